"""Edits without training: an editor is trained on some facts and then told others, whose subjects and wordings it never saw.

    python examples/benchmarks/lks_editor.py FACTS [FACTS ...] [--limit 2000] [--save DIR] [--set epochs=4]

Each FACTS is a file of facts with paraphrases (`rephrases`) and questions about the same subject (`locality`). Of each file,
wordings are drawn by lot for the test until --test facts ask in them; no fact that asks in one of them, or is about one of
their subjects, is trained on. Measured are the facts of the test, file by file, edited with `train=False`: reliability and
generality (teacher-forced and said in free generation), the same subject's other answers, and milliseconds a fact.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown, percent, settings, split
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, Fact, LKSEditor, read_facts
from hf_edit.facts import fold, resolve_conflicts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FACTS")
    parser.add_argument("--model", help="id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--test", type=int, default=200, help="facts of each file that are tested (default: 200)")
    parser.add_argument("--limit", type=int, help="facts of each file that are trained on at most")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder for the editor")
    parser.add_argument("--editor", metavar="EDITOR", help="folder or repo of an editor: measure it and train none")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    train: list[Fact] = []
    tests: dict[str, list[Fact]] = {}
    for path in options.paths:
        rest, tests[path.stem] = split(resolve_conflicts(read_facts(path), on_conflict="replace"), options.test, options.seed)
        train += rest[: options.limit]
    taken = {fold(f.subject) for test in tests.values() for f in test}
    train = resolve_conflicts([f for f in train if fold(f.subject) not in taken], on_conflict="replace")

    model = EditableModelForCausalLM.from_pretrained(options.model or smollm2(), dtype=torch.float32)
    started = time.perf_counter()
    if options.editor:
        editor = LKSEditor.from_pretrained(options.editor)
    else:
        editor = LKSEditor.train(model, train, seed=options.seed, **settings(options.set))
    seconds = time.perf_counter() - started
    if options.save:
        editor.save_pretrained(options.save)
    rows = []
    for name, test in tests.items():
        started = time.perf_counter()
        model.edit(test, "lks", train=False, editor=editor, verify=False, **editor.settings)
        spent = time.perf_counter() - started
        report = model.evaluate(test, mode="both", metrics=["efficacy", "paraphrase", "same_subject", "repetition"])
        rows.append({"facts": name, "tested": len(test), **percent(report), "ms a fact": round(1000 * spent / len(test), 1)})
        model.rollback()
    print(f"trained on {editor.num_facts} facts in {seconds:.0f} s\n")
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps({"trained": editor.num_facts, "seconds": seconds, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
