"""What edits that act at mentions cost at run time, beside the clean model in the same run. On SmolLM2-135M or another model.

    python examples/benchmarks/running.py PACK [--prompts 20] [--tokens 64] [--repeats 20] [--names 9600]

PACK is a folder with an LKS pack, or one of weight edits with a gate. Each row is the median of paired repeats, as a ratio to
the clean model's time:

- mention: facts' own prompts, which ask for them;
- other question: another question about the same subjects;
- no mention: ordinary text of about the same length.

They are scored by plain forwards, and continued by `--tokens` new tokens.

`--names` adds invented subjects until the pack knows so many, since finding names is part of the cost; nobody asks about them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown

from hf_edit import EditableModelForCausalLM
from hf_edit.methods.scope.runner import Runner
from hf_edit.scope import Scope

OTHER = "{} was seen last week in the company of two friends, who later said that nothing"
TEXT = "It was a long day, and nobody in the village had said a word about the weather, which"


def know(model: EditableModelForCausalLM, count: int) -> None:
    """Let the edits know invented names beside their own."""
    for edit in Runner.of(model._base).edits:
        invented = [[f"Zorvath Quillim{n}"] for n in range(count - len(edit.tracker.facts))]
        own = [[fact.subject, *fact.aliases] for fact in {f.subject.casefold(): f for f in model.list_edits()}.values()]
        edit.tracker.scope = Scope([*own, *invented])


def ratio(edited: Any, clean: Any, run: Callable[[Any], object], repeats: int) -> float:
    """The time of a run of the edited model, relative to that of the clean one: the median of pairs."""
    found = []
    for _ in range(repeats):
        seconds = []
        for model in (edited, clean):
            started = time.perf_counter()
            run(model)
            seconds.append(time.perf_counter() - started)
        found.append(seconds[0] / seconds[1])
    return round(statistics.median(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of a batch that is scored")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--names", type=int, default=0)
    options = parser.parse_args()
    model = EditableModelForCausalLM.from_pretrained(options.pack)
    model.base_model.generation_config.eos_token_id = None  # so that both models write as many tokens
    facts = model.list_edits()[: options.prompts]
    prompts = {
        "mention": [fact.question for fact in facts],
        "other question": [OTHER.format(fact.subject) for fact in facts],
        "no mention": [TEXT] * len(facts),
    }
    with model.disable_edits():
        clean = copy.deepcopy(model.base_model)
    if options.names:
        know(model, options.names)

    def ids(text: str) -> dict[str, torch.Tensor]:
        return dict(model.tokenizer(text, return_tensors="pt"))

    def score(of: Any, texts: Sequence[str]) -> None:
        for text in texts:
            with torch.no_grad():
                of(**ids(text), use_cache=False)

    def generate(of: Any, text: str) -> None:
        of.generate(**ids(text), max_new_tokens=options.tokens, do_sample=False)

    rows = []
    for name, texts in prompts.items():
        scored = ratio(model.base_model, clean, partial(score, texts=texts), options.repeats)
        made = ratio(model.base_model, clean, partial(generate, text=texts[0]), options.repeats)
        rows.append({"prompts": name, "scoring": scored, f"{options.tokens} new tokens": made})
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
