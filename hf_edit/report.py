"""`EditReport`: what an edit did to each fact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .facts import Fact

__all__ = ["EditReport", "FactResult"]


@dataclass(frozen=True)
class FactResult:
    """One fact before and after the edit.

    Attributes:
        fact: the fact.
        before: what the model went on to say, greedily; None where the edit was not verified.
        after: what it says now.
        success: whether the answer holds the target; None where the edit was not verified.
        probability_before: P(target | prompt) before.
        probability: P(target | prompt) now.
        note: a remark of the method.
    """

    fact: Fact
    before: str | None = None
    after: str | None = None
    success: bool | None = None
    probability_before: float | None = None
    probability: float | None = None
    note: str = ""

    def __str__(self) -> str:
        line = f"{self.fact.question} [{self.fact.target}]"
        if self.success is not None:
            line = (
                f"{'ok  ' if self.success else 'MISS'} {self.fact.question}: {_line(self.before)} -> {_line(self.after)}"
                f"  (P {self.probability_before:.3f} -> {self.probability:.3f})"
            )
        return f"{line}  {self.note}".rstrip()


@dataclass(frozen=True)
class EditReport:
    """What an edit did; `print(report)` shows a fact a line.

    Attributes:
        method: the method's name.
        pack_name: the pack that holds the edit.
        results: one for each fact, in the order given.
        seconds: wall time of the fit.
        seconds_verifying: wall time of asking before and after.
    """

    method: str
    pack_name: str
    results: tuple[FactResult, ...]
    seconds: float
    seconds_verifying: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[FactResult]:
        return iter(self.results)

    @property
    def success(self) -> float | None:
        """Share of facts whose greedy answer holds the target; None where the edit was not verified."""
        known = [r.success for r in self.results if r.success is not None]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        rows = []
        for r in self.results:
            row: dict[str, Any] = {
                "id": r.fact.id,
                "prompt": r.fact.question,
                "target": r.fact.target,
                "before": r.before,
                "after": r.after,
            }
            row |= {"success": r.success, "probability_before": r.probability_before, "probability": r.probability}
            rows.append(row | ({"note": r.note} if r.note else {}))
        return {
            "method": self.method,
            "pack_name": self.pack_name,
            "success": self.success,
            "seconds": round(self.seconds, 3),
            "seconds_verifying": round(self.seconds_verifying, 3),
            "results": rows,
        }

    def __str__(self) -> str:
        count = len(self.results)
        head = f"{self.method}: {count} {'fact' if count == 1 else 'facts'} in {self.seconds:.1f} s"
        if self.success is not None:
            head += f", {sum(bool(r.success) for r in self.results)} of {count} answered"
        return "\n".join([head, *(f"  {r}" for r in self.results), *(f"  note: {n}" for n in self.notes)])


def _line(answer: str | None) -> str:
    """The answer's first line, cut to fit."""
    text = " ".join((answer or "").strip().split("\n")[0].split())
    return repr(text if len(text) <= 48 else text[:47] + "…")
