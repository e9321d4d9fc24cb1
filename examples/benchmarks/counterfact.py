"""Facts in one batch, or batch after batch on top of each other: what holds, what is spared, and how the model writes then.

    python examples/benchmarks/counterfact.py FACTS --facts 100 [--method steam] [--set kept_prompts=9] [--json FILE]
    python examples/benchmarks/counterfact.py FACTS --facts 500 --batch 50

FACTS is a .jsonl, .json or .csv file of facts with paraphrases (`rephrases`) and questions about the same subject (`locality`),
such as CounterFact with the fields of the LKS paper. Of several facts on one subject the first is taken. The last rows of the
file, which are not edited, are the unrelated prompts. The metrics are those of `hf_edit.metrics`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown, percent, settings
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, Fact, Question, read_facts
from hf_edit.evaluation import perplexity


def read(path: Path, count: int, unrelated: int, skip: int) -> tuple[list[Fact], list[Fact]]:
    """Facts to edit, each on a subject of its own, and rows about other subjects whose prompts must go on as before."""
    first: dict[str, Fact] = {}
    for fact in read_facts(path):
        first.setdefault(fact.subject, fact)
    facts = list(first.values())[skip:]
    if len(facts) < count + unrelated:
        raise SystemExit(f"{path} has facts on {len(facts)} subjects, not {count} and {unrelated} unrelated ones")
    rest = [Fact(f.subject, f.prompt, f.target, locality=(Question(f.question),)) for f in facts[-unrelated:]]
    return facts[:count], rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="FACTS")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first facts of the file")
    parser.add_argument("--batch", type=int, help="facts in one edit; by default all")
    parser.add_argument("--unrelated", type=int, default=100)
    parser.add_argument("--method", default="steam")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    parser.add_argument("--model", help="id or folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="ordinary text, a text a line, for a second perplexity")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    given = settings(arguments.set)
    facts, unrelated = read(arguments.path, arguments.facts, arguments.unrelated, arguments.skip)
    model = EditableModelForCausalLM.from_pretrained(arguments.model or smollm2(), dtype=torch.float32)
    texts = arguments.text.read_text(encoding="utf-8").splitlines() if arguments.text else []

    size = arguments.batch or len(facts)
    steps: list[dict[str, Any]] = []
    seconds = 0.0
    for first in range(0, len(facts), size):
        started = time.perf_counter()
        model.edit(facts[first : first + size], arguments.method, verify=False, on_conflict="replace", **given)
        seconds += time.perf_counter() - started
        if size < len(facts):
            done = model.evaluate(facts[: first + size], metrics=["efficacy"], mode="teacher_forced", progress=False)
            held = [row.scores["efficacy.right"] for row in done]
            step = {
                "facts": len(held),
                "right": 100 * sum(held) / len(held),
                "of the first batch": 100 * sum(held[:size]) / size,
            }
            step["of the newest"] = 100 * sum(held[first:]) / len(held[first:])
            step["perplexity, own text"] = round(model.perplexity(), 2)
            if texts:
                step["perplexity, given text"] = round(perplexity(model, texts), 2)
            steps.append(step)
            print(json.dumps(step), file=sys.stderr, flush=True)
    report = model.evaluate(facts, mode="both", metrics=["efficacy", "paraphrase", "same_subject", "repetition"])
    others = model.evaluate(unrelated, mode="teacher_forced", metrics=["same_subject"]).summary()
    with model.disable_edits():
        clean = model.perplexity()
    found = {
        "facts": len(facts),
        **percent(report),
        "unrelated, tokens": round(100 * others["same_subject.tokens"].mean, 1),
        "perplexity": f"{clean:.2f} -> {model.perplexity():.2f}",
        "seconds a fact": round(seconds / len(facts), 2),
    }
    if steps:
        print(markdown(steps), end="\n\n")
    print(markdown([found]))
    if arguments.json:
        whole = {"method": arguments.method, "settings": given, "batch": size, "found": found, "steps": steps}
        arguments.json.write_text(json.dumps({**whole, "report": report.to_dict()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
