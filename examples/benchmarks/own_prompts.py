"""Which prompts activate a gated fact: its own in every form, paraphrases, other questions. On SmolLM2-135M or another model.

    python examples/benchmarks/own_prompts.py FACTS [FACTS ...] [--rows N] [--quiet 0.95] [--output DIR]

No value is optimised: all facts of a file get one gate, as `model.edit(facts, gate=True)` gives them, and the gate decides for
each prompt which facts are active. Rows of the table, each as plain text and in the model's chat template:

- own: the fact's own prompt; also with blanks at its end, after a system prompt, and as a user puts it in the chat;
- paraphrase: the fact's first rephrase, where it names the subject;
- same subject: the fact's locality questions that name the subject, and prompts of other rows, asked about this subject.

`active` is the share of prompts, in %, for which the fact itself is active, `others` the share for which another one is. Own
prompts and paraphrases should be active, other questions should not. With `--strict`, the exit code is 1 if a fact's own prompt
does not activate it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import Fact, LKSConfig, read_facts
from hf_edit.base import Base
from hf_edit.facts import fold, resolve_conflicts
from hf_edit.lm.chat import chat_text
from hf_edit.methods.scope.attachment import MentionAttachment
from hf_edit.positions import Text, encode, pad
from hf_edit.routing import fit_routing, load_routing
from hf_edit.scope import Entities
from hf_edit.suffix import frozen

SYSTEM = "Answer in one word."
PUT = ("Please help me with this question: {}", "I have a question. {}", "{} Answer briefly.", "Hi! {} Thanks in advance.")
BATCH = 8


class Gated:
    """A model with the gate of some facts, whose edit changes nothing.

    Args:
        base: the model.
        facts: all are in one pack.
        quiet: see `SteamConfig.gate_quiet`.
        seed: of the gate's training.
    """

    def __init__(self, base: Base, facts: Sequence[Fact], quiet: float, seed: int) -> None:
        self._base = base
        tensors = fit_routing(base, facts, {}, nullcontext, seed, True, quiet)
        routing = load_routing(base, tensors, facts)
        assert routing is not None
        self._edit = MentionAttachment(base, Entities.of(facts), {}, routing)

    def detach(self) -> None:
        """Leave the model as it was."""
        self._edit.detach()

    def active(self, prompts: Sequence[Text]) -> list[set[int]]:
        """The numbers of the facts that each prompt activates."""
        rows = [text.ids for text in encode(self._base.tokenizer, prompts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[set[int]] = [set() for _ in rows]
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            ids, mask = pad([rows[i] for i in part], device=self._base.device)
            with torch.no_grad():
                self._base.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
            for i, facts in zip(part, self._edit.active, strict=True):
                found[i] = facts
        return found


def prompts_of(base: Base, facts: Sequence[Fact], seed: int) -> dict[str, list[tuple[int, Text]]]:
    """(number of the fact, prompt) by the row of the table."""
    rng = random.Random(seed)
    numbered = list(enumerate(facts))
    own = [(i, f.question) for i, f in numbered]
    paraphrases = [
        (i, _filled(f.rephrases[0], f)) for i, f in numbered if f.rephrases and _names(f, _filled(f.rephrases[0], f))
    ]
    asked = [(i, q.prompt) for i, f in numbered for q in f.locality if _names(f, q.prompt)]
    others = []
    for i, fact in numbered:
        elsewhere = [f for f in facts if fold(f.subject) != fold(fact.subject) and fold(f.prompt) != fold(fact.prompt)]
        if elsewhere:
            others.append((i, _filled(rng.choice(elsewhere).prompt, fact)))
    put = [(i, rng.choice(PUT).replace("{}", question)) for i, question in own]
    plain = {"own": own, "own, blanks after it": [(i, q + " \n") for i, q in own], "paraphrase": paraphrases}
    plain |= {"same subject, locality": asked, "same subject, other rows' prompts": others}
    found = {name: [(i, Text(text)) for i, text in those] for name, those in plain.items()}
    if getattr(base.tokenizer, "chat_template", None):
        chats = {"own": own, "own, as a user puts it": put} | {
            n: plain[n] for n in plain if n not in ("own", "own, blanks after it")
        }
        found |= {f"{name}, in the chat": [(i, _chat(base, text)) for i, text in those] for name, those in chats.items()}
        found["own, in the chat, system prompt"] = [(i, _chat(base, text, SYSTEM)) for i, text in own]
    return {name: those for name, those in found.items() if those}


def _filled(prompt: str, fact: Fact) -> str:
    return prompt.replace("{}", fact.subject)


def _names(fact: Fact, text: str) -> bool:
    return fold(fact.subject) in fold(text)


def _chat(base: Base, text: str, system: str | None = None) -> Text:
    first = [] if system is None else [{"role": "system", "content": system}]
    return chat_text(base.tokenizer, [*first, {"role": "user", "content": text}])


def measure(base: Base, facts: Sequence[Fact], quiet: float, seed: int) -> list[dict[str, Any]]:
    """The rows of the table for one file and threshold."""
    with frozen(base.model):
        gated = Gated(base, facts, quiet, seed)
        rows = []
        for name, those in prompts_of(base, facts, seed).items():
            active = gated.active([text for _, text in those])
            own = [i in found for (i, _), found in zip(those, active, strict=True)]
            others = [bool(found - {i}) for (i, _), found in zip(those, active, strict=True)]
            row = {"prompts": name, "n": len(own), "active": 100 * sum(own) / len(own), "others": 100 * sum(others) / len(own)}
            rows.append(row)
            missed = [facts[i].question for (i, _), hit in zip(those, own, strict=True) if not hit]
            if name.startswith("own") and "puts" not in name:
                row["missed"] = missed
            print(row, file=sys.stderr, flush=True)
        gated.detach()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FACTS", help="files of facts")
    parser.add_argument("--rows", type=int, help="facts of each file, drawn at random (default: all)")
    quiet = LKSConfig().gate_quiet
    parser.add_argument("--quiet", type=float, nargs="+", default=[quiet], help=f"values of gate_quiet (default: {quiet})")
    parser.add_argument("--strict", action="store_true", help="fail if a fact's own prompt does not activate it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="folder for own_prompts.json and own_prompts.md")
    options = parser.parse_args(arguments)

    source = options.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    base = Base(model, AutoTokenizer.from_pretrained(source))
    table: list[dict[str, Any]] = []
    for path in options.paths:
        facts = resolve_conflicts(read_facts(path), on_conflict="keep")
        if options.rows is not None and options.rows < len(facts):
            facts = random.Random(options.seed).sample(facts, options.rows)
        for share in options.quiet:
            found = measure(base, facts, share, options.seed)
            table += [{"facts": Path(path).stem, "gate_quiet": share, **row} for row in found]
    shown = markdown([{k: v for k, v in row.items() if k != "missed"} for row in table])
    print(shown)
    missed = [question for row in table for question in row.get("missed", ())]
    for question in missed:
        print(f"not activated by its own prompt: {question!r}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "own_prompts.json").write_text(json.dumps({"model": str(source), "rows": table}, indent=2) + "\n")
        (options.output / "own_prompts.md").write_text(shown + "\n")
    return 1 if options.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
