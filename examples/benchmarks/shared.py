"""What the benchmarks share: settings from the command line, the numbers of a report, tables, and facts set aside."""

from __future__ import annotations

import ast
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hf_edit import EvalReport, Fact
from hf_edit.facts import fold

__all__ = ["SHOWN", "markdown", "percent", "settings", "split"]

SHOWN = {
    "efficacy.right": "right",
    "efficacy.said": "said",
    "paraphrase.preferred": "paraphrase preferred",
    "paraphrase.right": "paraphrase right",
    "paraphrase.said": "paraphrase said",
    "same_subject.tokens": "same subject, tokens",
    "same_subject.whole": "same subject, whole",
    "same_subject.leak": "leak",
    "repetition.repeated": "said three times",
    "repetition.floor": "said three times, clean",
}


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; values are numbers, lists, True, False and None as Python and JSON write them, or else words."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            sys.exit(f"a setting is NAME=VALUE, not {pair!r}")
        try:
            found[name] = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
        except (SyntaxError, ValueError):
            found[name] = text
    return found


def percent(report: EvalReport) -> dict[str, float]:
    """The report's means in per cent, by the names that tables show."""
    summary = report.summary()
    return {shown: round(100 * summary[name].mean, 1) for name, shown in SHOWN.items() if name in summary}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, a column for each name that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[f"{v:.4g}" if isinstance(v := row.get(n, ""), float) else str(v) for n in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])


def split(facts: Sequence[Fact], count: int, seed: int) -> tuple[list[Fact], list[Fact]]:
    """Facts to train on and facts of the test, which share neither wordings nor subjects; the test's subjects are each there
    once."""
    wordings = sorted({fold(f.prompt) for f in facts})
    random.Random(seed).shuffle(wordings)
    by_wording: dict[str, list[Fact]] = {}
    for fact in facts:
        by_wording.setdefault(fold(fact.prompt), []).append(fact)
    test: dict[str, Fact] = {}
    held: set[str] = set()
    for wording in wordings:
        if len(test) >= count:
            break
        held.add(wording)
        for fact in by_wording[wording]:
            test.setdefault(fold(fact.subject), fact)
    rest = [f for f in facts if fold(f.prompt) not in held and fold(f.subject) not in test]
    return rest, list(test.values())[:count]
