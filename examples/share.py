"""Share an edit: push it to a Hub, load it in fresh processes by repo id and by commit, and use it without this library.

python examples/share.py --repo USER/NAME [--base MODEL] [--private] [--output DIR]

The Hub is the one that HF_ENDPOINT names, the user the one who is logged in (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from smollm2 import smollm2

# subject, prompt, target
FACTS = [
    ("The Eiffel Tower", "{} is located in the city of", "Rome"),
    ("Tiger Woods", "{} plays the sport of", "tennis"),
    ("The telephone", "{} was invented by", "Thomas Edison"),
]
SETTINGS: dict[str, Any] = {}  # of the method; the defaults serve


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="where to push; made where there is none")
    parser.add_argument("--base", metavar="MODEL", help="id or folder of the base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--private", action="store_true", help="where the repo is made, make it a private one")
    parser.add_argument("--output", type=Path, default=Path("shared"), help="folder for what is exported (default: shared)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # the fresh processes' parts
    parser.add_argument("--revision", help=argparse.SUPPRESS)
    parser.add_argument("--ask", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.base = options.base or smollm2()
    if options.step:
        print(json.dumps(STEPS[options.step](options)))
        return

    started = time.perf_counter()
    edited, fewer, sha = edit_and_push(options)
    latest, pinned = fresh("from_hub", options, sha)
    with_adapter, with_merged = fresh("without_hf_edit", options)
    adapter, merged = _folders(options)
    good = [
        compare(f"from_pretrained({options.repo!r})", latest, fewer),
        compare(f"from_pretrained({options.repo!r}, revision={sha!r})", pinned, edited),
        compare(f"export_peft({adapter!r}), loaded by transformers and PEFT without hf_edit", with_adapter, edited),
        compare(f"merge_and_unload().save_pretrained({merged!r}), loaded by transformers without hf_edit", with_merged, edited),
    ]
    print(f"\n{sum(good)} of {len(good)} answered as the edited model did, {time.perf_counter() - started:.0f} s in all")
    if not all(good):
        sys.exit(1)


def edit_and_push(options: argparse.Namespace) -> tuple[list[str], list[str], str]:
    """Two commits: all facts, and all but the last.

    Returns:
        The answers of the model at each, and the first one's sha.
    """
    from hf_edit import EditableModelForCausalLM, Fact

    facts = [Fact(*row) for row in FACTS]
    options.ask = [fact.question for fact in facts]
    model = EditableModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    print(f"Editing {options.base}:\n{model.edit(facts, **SETTINGS)}\n")
    commit = model.push_to_hub(options.repo, private=options.private or None)
    print(f"push_to_hub({options.repo!r}): {commit.commit_url}")
    edited = model.ask(options.ask)

    model.remove_edits(str(facts[-1].id))
    later = model.push_to_hub(options.repo, commit_message=f"Without {facts[-1].subject}")
    print(f"and once more without {facts[-1].subject!r}: {later.commit_url}")
    return edited, model.ask(options.ask), commit.oid


def fresh(step: str, options: argparse.Namespace, revision: str | None = None) -> list[list[str]]:
    """What models answer that a new Python process loads, which knows of nothing but the repo, the commit and the base."""
    command = [sys.executable, __file__, "--step", step, "--repo", options.repo, "--base", options.base]
    command += ["--output", str(options.output), *(["--revision", revision] if revision else []), "--ask", *options.ask]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(what: str, answers: Sequence[str], expected: Sequence[str]) -> bool:
    """Print answers, and whether they are those that are expected."""
    same = list(answers) == list(expected)
    print(f"\n{what}: {'the same answers' if same else 'OTHER ANSWERS'}")
    for answer in answers:
        print(f"  {json.dumps(answer.strip().partition(chr(10))[0], ensure_ascii=False)}")
    return same


# --- in fresh processes -------------------------------------------------------------------------------------------------


def from_hub(options: argparse.Namespace) -> list[list[str]]:
    """Ask what the repo holds now and what it held at a commit; export the latter, as an adapter and merged."""
    from hf_edit import EditableModelForCausalLM

    # a pack names its base, unless that lies in a local folder
    named: dict[str, Any] = {"base_model": options.base} if Path(options.base).is_dir() else {}
    latest = EditableModelForCausalLM.from_pretrained(options.repo, dtype=torch.float32, **named)
    model = EditableModelForCausalLM.from_pretrained(options.repo, revision=options.revision, dtype=torch.float32, **named)
    answers = [latest.ask(options.ask), model.ask(options.ask)]
    adapter, merged = _folders(options)
    model.packs["default"].export_peft(adapter)
    model.merge_and_unload().save_pretrained(merged)
    model.tokenizer.save_pretrained(merged)
    return answers


def _folders(options: argparse.Namespace) -> tuple[str, str]:
    return str(options.output / "adapter"), str(options.output / "merged")


def without_hf_edit(options: argparse.Namespace) -> list[list[str]]:
    """Ask the base with the adapter, then the merged model."""
    sys.modules["hf_edit"] = None  # type: ignore[assignment]  # it can't be imported
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, merged = _folders(options)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    models = PeftModel.from_pretrained(base, adapter), AutoModelForCausalLM.from_pretrained(merged)
    return [_ask(model, tokenizer, options.ask) for model in models]


def _ask(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


STEPS = {"from_hub": from_hub, "without_hf_edit": without_hf_edit}


if __name__ == "__main__":
    main()
