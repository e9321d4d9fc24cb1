"""How well the gate tells which of a subject's facts a prompt asks for, on SmolLM2-135M or another model.

    python examples/benchmarks/gate.py FACTS [FACTS ...] [--rows 400] [--blocks 13] [--output DIR]

FACTS are files of facts with `rephrases` (another wording of the same question) and `locality` (another question about the
same subject), of which `--rows` are measured:

- fires: prompts for which the fact has to be switched on, in %. Its own paraphrase; the paraphrase in the chat template;
  behind another fact's sentence; with another subject named in front of it;
- quiet: prompts for which it has to stay off. The other question about the subject, bare, in the chat template and behind
  another fact's sentence; and the fact's own prompt asked about another subject that is named beside this one;
- area: under the curve of paraphrases against other questions, both bare; *quiet at 97*: the share of other questions that are
  quiet at the threshold that 97 % of paraphrases reach;
- routed: the subject gets two more facts, whose prompts are other rows'; the share of paraphrases that switch on the right one.

The gate is trained on the package's own wordings, at each of `--blocks`. With `--told`, a second one also learns from the
files' other rows: those measured are then chosen by lot of their wordings, and no row that shares one or a subject is learned
from. `new` counts only the rows whose paraphrase is no wording of the package, word for word.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown, split
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import Fact, LKSConfig, read_facts
from hf_edit.base import Base
from hf_edit.facts import fold, resolve_conflicts
from hf_edit.gate import Gate, PromptEnd, asks_about_another, gate_block, read_queries
from hf_edit.gate_training import train_gate
from hf_edit.questions import asked_relations
from hf_edit.suffix import frozen
from hf_edit.wording import agreement, asked_words, word_ids

FIRES = ("paraphrase", "in chat", "behind text", "other named")
QUIET = ("other question", "in chat", "behind text", "other asked")
LINK = "{} met {} last week. "


def filled(prompt: str, subject: str) -> str:
    """A wording with its subject."""
    return prompt.replace("{}", subject)


class Questions:
    """The prompts of some rows, read once: states by kind, [rows, hidden] each."""

    def __init__(self, base: Base, block: int, facts: Sequence[Fact], seed: int) -> None:
        rng = random.Random(seed)
        self.facts = facts
        others = [rng.choice([f for f in facts if f.subject != fact.subject]) for fact in facts]
        asked = [(filled(f.rephrases[0], f.subject), f.locality[0].prompt) for f in facts]
        texts = {"own": [f.question for f in facts]}
        for kind, which in (("fires", 0), ("quiet", 1)):
            bare = [pair[which] for pair in asked]
            texts[kind] = bare
            texts[kind + " chat"] = [chat(base, text) for text in bare]
            texts[kind + " behind"] = [f"{o.question} {o.target_old}. {t}" for o, t in zip(others, bare, strict=True)]
        pairs = list(zip(facts, others, strict=True))
        texts["fires named"] = [LINK.format(o.subject, f.subject) + filled(f.rephrases[0], f.subject) for f, o in pairs]
        texts["quiet named"] = [LINK.format(f.subject, o.subject) + filled(f.prompt, o.subject) for f, o in pairs]
        # patterns of rows that share no object with this one's ask for something else
        objects: dict[str, set[str]] = {}
        for f in facts:
            objects.setdefault(f.prompt, set()).update((f.target, f.target_old or ""))
        for number in range(2):
            chosen = [rng.choice([p for p, o in objects.items() if not o & objects[f.prompt]]) for f in facts]
            texts[f"beside {number}"] = [filled(p, f.subject) for p, f in zip(chosen, facts, strict=True)]
        end = PromptEnd(base.tokenizer)
        self.states: dict[str, torch.Tensor] = {}
        self.words: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind, those in texts.items():
            rows = [base.tokenizer(t, add_special_tokens=not kind.endswith("chat"))["input_ids"] for t in those]
            ends = [end(row) for row in rows]
            self.states[kind] = read_queries(base, block, rows, ends).cpu()
            read = [base.tokenizer.decode(row[: e + 1], skip_special_tokens=True) for row, e in zip(rows, ends, strict=True)]
            asked_for = [asked_words(t, spans(t, f.subject)) for t, f in zip(read, facts, strict=True)]
            ids, there = word_ids(base.tokenizer, asked_for)
            self.words[kind] = (base.model.get_input_embeddings()(ids.to(base.device)).detach().cpu(), there)
        known = {p.casefold() for relation in asked_relations() for p in relation.prompts}
        self.another = {
            kind: torch.tensor([later(t, f.subject) for t, f in zip(those, facts, strict=True)])
            for kind, those in texts.items()
        }
        self.new = torch.tensor([f.rephrases[0].casefold() not in known for f in facts])

    def scores(self, gate: Gate) -> dict[str, float]:
        """Shares in %."""
        vectors = {kind: gate.project(states) for kind, states in self.states.items()}
        words = {kind: gate.words(*found) for kind, found in self.words.items()}

        def near_to(kind: str, other: str) -> torch.Tensor:
            return gate.scores((vectors[kind] * vectors[other]).sum(-1), agreement(words[other], words[kind]))

        near = {kind: near_to(kind, "own") for kind in vectors}
        fires = {kind: (near[kind] >= gate.threshold) & ~self.another[kind] for kind in near}
        row = {}
        for name, kind in zip(FIRES, ("fires", "fires chat", "fires behind", "fires named"), strict=True):
            row[f"fires: {name}"] = fires[kind].float().mean()
        row["fires: new"] = fires["fires"][self.new].float().mean()
        for name, kind in zip(QUIET, ("quiet", "quiet chat", "quiet behind", "quiet named"), strict=True):
            row[f"quiet: {name}"] = (~fires[kind]).float().mean()
        beside = torch.stack([near_to("fires", f"beside {n}") for n in range(2)]).amax(0)
        asked, other = near["fires"], near["quiet"]
        row["area"] = (asked[:, None] > other).float().mean() + (asked[:, None] == other).float().mean() / 2
        row["quiet at 97"] = (other < asked.quantile(0.03)).float().mean()
        row["routed"] = (fires["fires"] & (near["fires"] > beside)).float().mean()
        return {name: 100 * float(value) for name, value in row.items()}


def spans(text: str, subject: str) -> list[tuple[int, int]]:
    """Where a text mentions the subject."""
    return [m.span() for m in re.finditer(re.escape(subject.casefold()), text.casefold())]


def later(text: str, subject: str) -> bool:
    """Whether a text names somebody else after its last mention of the subject, to ask about him or her."""
    end = text.rfind(subject) + len(subject)
    return text.rfind(subject) >= 0 and asks_about_another(text[:end], text[end:])


def chat(base: Base, text: str) -> str:
    """A prompt as a user's message."""
    return base.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def usable(path: str) -> list[Fact]:
    """The rows of a file that have all that is asked here."""
    return [
        f
        for f in read_facts(path)
        if f.rephrases and "{}" in f.rephrases[0] and f.locality and f.subject in f.locality[0].prompt and f.target_old
    ]


def measure(
    base: Base, paths: Sequence[str], blocks: Sequence[int], rows: int, seed: int, told: bool, quiet: Sequence[float]
) -> list[dict[str, object]]:
    """A row for each gate, threshold and file."""
    sets: dict[str, list[Fact]] = {}
    rest: list[Fact] = []
    for path in paths:
        found = usable(path)
        if told:
            others, sets[Path(path).stem] = split(resolve_conflicts(found, on_conflict="replace"), rows, seed)
            rest += others
        else:
            sets[Path(path).stem] = random.Random(seed).sample(found, min(rows, len(found)))
    asked_about = {fold(f.subject) for facts in sets.values() for f in facts}
    rest = [f for f in rest if fold(f.subject) not in asked_about]
    table: list[dict[str, object]] = []
    for block in blocks:
        with frozen(base.model):
            questions = {name: Questions(base, block, facts, seed) for name, facts in sets.items()}
        for learned in [(), rest] if told else [()]:
            started = time.perf_counter()
            gate = train_gate(base, block, learned, seed=seed)
            row = {"block": block, "rows learned from": len(learned), "seconds": round(time.perf_counter() - started)}
            for share in quiet:
                row["gate_quiet"] = share
                table += [{**row, "measured on": name, **asked.scores(gate.at(share))} for name, asked in questions.items()]
            print(markdown(table), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FACTS", help="files of facts with rephrases and locality")
    parser.add_argument("--blocks", type=int, nargs="+", help="that gates read (default: the one that edits take)")
    parser.add_argument("--rows", type=int, default=400, help="rows of each file to measure (default: 400)")
    quiet = LKSConfig().gate_quiet
    parser.add_argument("--quiet", type=float, nargs="+", default=[quiet], help=f"values of gate_quiet (default: {quiet})")
    parser.add_argument("--told", action="store_true", help="measure a gate that learned from the other rows as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=None, help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="folder for gate.json and gate.md")
    arguments = parser.parse_args()

    source = arguments.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    base = Base(model, AutoTokenizer.from_pretrained(source))
    blocks = arguments.blocks or [gate_block(base.layout())]
    found = measure(base, arguments.paths, blocks, arguments.rows, arguments.seed, arguments.told, arguments.quiet)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "gate.json").write_text(json.dumps({"model": str(source), "rows": found}, indent=2) + "\n")
        (arguments.output / "gate.md").write_text(markdown(found) + "\n")


if __name__ == "__main__":
    main()
