"""`EditReport`: what an edit did to each fact. `EvalReport`: how it did by the metrics of the literature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .facts import Fact

if TYPE_CHECKING:
    from .evaluation import CleanAnswers

__all__ = ["EditReport", "EvalReport", "FactResult", "FactScores", "Summary"]


@dataclass(frozen=True)
class Answer:
    """What a model says of a fact.

    Attributes:
        text: the greedy continuation of the fact's prompt.
        said: whether it holds the target.
        probability: P(target | prompt).
        question: the fact in another wording, as a user's turn in a chat; None without a chat template.
        chat: the answer to it.
        said_in_chat: whether that holds the target.
    """

    text: str
    said: bool
    probability: float
    question: str | None = None
    chat: str | None = None
    said_in_chat: bool | None = None


@dataclass(frozen=True)
class FactResult:
    """One fact before and after the edit.

    Attributes:
        fact: the fact.
        before: what the model went on to say, greedily; None where the edit was not verified.
        after: what it says now.
        success: whether the fact is answered: the answer holds the target and, where the model has a chat template, so does the
            one in the chat; None where the edit was not verified.
        probability_before: P(target | prompt) before.
        probability: P(target | prompt) now.
        note: a remark of the method.
        chat_question: another wording, asked through the chat template; None where the model has none.
        chat_before: the answer to it before.
        chat: the answer now.
        said, said_in_chat: whether the answer to the prompt as given, and that in the chat, hold the target.
    """

    fact: Fact
    before: str | None = None
    after: str | None = None
    success: bool | None = None
    probability_before: float | None = None
    probability: float | None = None
    note: str = ""
    chat_question: str | None = None
    chat_before: str | None = None
    chat: str | None = None
    said: bool | None = None
    said_in_chat: bool | None = None

    @classmethod
    def of(cls, fact: Fact, before: Answer, after: Answer, note: str = "") -> FactResult:
        """From what the model said before the edit and what it says now."""
        return cls(
            fact,
            before.text,
            after.text,
            after.said and after.said_in_chat is not False,
            before.probability,
            after.probability,
            note,
            after.question,
            before.chat,
            after.chat,
            after.said,
            after.said_in_chat,
        )

    def __str__(self) -> str:
        line = f"{self.fact.question} [{self.fact.target}]"
        if self.success is not None:
            said = _mark(self.success if self.said is None else self.said)
            line = (
                f"{said} {_asked(self.fact.question)}: {_line(self.before)} -> {_line(self.after)}"
                f"  (P {self.probability_before:.3f} -> {self.probability:.3f})"
            )
        line = f"{line}  {self.note}".rstrip()
        if self.chat is None:
            return line
        said = _mark(bool(self.said_in_chat))
        return f"{line}\n  {said} chat: {_asked(self.chat_question)}: {_line(self.chat_before)} -> {_line(self.chat)}"


@dataclass(frozen=True)
class EditReport:
    """What an edit did; `print(report)` shows one line for each fact.

    Attributes:
        method: the method's name.
        pack_name: the pack that holds the edit.
        results: one for each fact, in the order given.
        seconds: wall time of the fit.
        seconds_verifying: wall time of asking before and after.
        notes: remarks on the whole edit.
        perplexity_clean, perplexity: on text that the model wrote before all its edits (`hf_edit.health`), clean and now; None
            where the edit was not verified or changed no weights.
    """

    method: str
    pack_name: str
    results: tuple[FactResult, ...]
    seconds: float
    seconds_verifying: float = 0.0
    notes: tuple[str, ...] = field(default=())
    perplexity_clean: float | None = None
    perplexity: float | None = None

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[FactResult]:
        return iter(self.results)

    @property
    def success(self) -> float | None:
        """Share of facts that are answered, see `FactResult`; None where the edit was not verified."""
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
            if r.chat is not None:
                row |= {"said": r.said, "said_in_chat": r.said_in_chat, "chat_question": r.chat_question}
                row |= {"chat_before": r.chat_before, "chat": r.chat}
            rows.append(row | ({"note": r.note} if r.note else {}))
        return {
            "method": self.method,
            "pack_name": self.pack_name,
            "success": self.success,
            "seconds": round(self.seconds, 3),
            "seconds_verifying": round(self.seconds_verifying, 3),
            "perplexity_clean": self.perplexity_clean,
            "perplexity": self.perplexity,
            "notes": list(self.notes),
            "results": rows,
        }

    def __str__(self) -> str:
        count = len(self.results)
        head = f"{self.method}: {count} {'fact' if count == 1 else 'facts'} in {self.seconds:.1f} s"
        if self.success is not None:
            head += f", {sum(bool(r.success) for r in self.results)} of {count} answered"
            if any(r.chat is not None for r in self.results):
                said, in_chat = (sum(bool(getattr(r, name)) for r in self.results) for name in ("said", "said_in_chat"))
                head += f" ({said} as given, {in_chat} in the chat)"
        if self.perplexity is not None:
            head += f", perplexity {self.perplexity_clean:.2f} -> {self.perplexity:.2f}"
        return "\n".join([head, *(f"  {r}" for r in self.results), *(f"  note: {n}" for n in self.notes)])


@dataclass(frozen=True)
class FactScores:
    """One fact's numbers.

    Attributes:
        fact: the fact.
        scores: by metric, e.g. ``paraphrase.said``, the mean over the fact's questions; a metric that the fact has nothing
            for is not there.
        answer: the greedy continuation of the edit's prompt, where text was generated.
    """

    fact: Fact
    scores: Mapping[str, float]
    answer: str | None = None


@dataclass(frozen=True)
class Summary:
    """The mean of a metric over facts, its 95 % bootstrap interval, and how many facts have it."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class EvalReport:
    """An evaluation; `print(report)` shows a metric a line.

    Attributes:
        mode: "generate", "teacher_forced" or "both".
        rows: one for each fact, in the order given, so that reports on the same facts can be compared in pairs.
        seconds: wall time.
        clean: what the unedited model said; hand it to the next evaluation of the same base model.
    """

    mode: str
    rows: tuple[FactScores, ...]
    seconds: float
    clean: CleanAnswers | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[FactScores]:
        return iter(self.rows)

    @property
    def metrics(self) -> list[str]:
        """The names of all numbers that some fact has, in the order of the metrics."""
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def values(self, metric: str) -> dict[str, float]:
        """A metric by fact id, for the facts that have it.

        Raises:
            KeyError: no fact has it.
        """
        if metric not in self.metrics:
            raise KeyError(f"there is no {metric!r} in this report; there are: {', '.join(self.metrics)}")
        return {str(row.fact.id): row.scores[metric] for row in self.rows if metric in row.scores}

    def summary(self, *, resamples: int = 2000, seed: int = 0) -> dict[str, Summary]:
        """By metric, the mean over facts (each fact weighs the same, however many questions it has) and its interval."""
        from .bootstrap import bootstrap  # torch, which a report that is only read does not need

        found = {}
        for metric in self.metrics:
            values = [row.scores[metric] for row in self.rows if metric in row.scores]
            found[metric] = Summary(*bootstrap(values, resamples, seed), len(values))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        summary = {name: {"mean": s.mean, "low": s.low, "high": s.high, "count": s.count} for name, s in self.summary().items()}
        rows = []
        for r in self.rows:
            row = {"id": r.fact.id, "prompt": r.fact.question, "target": r.fact.target, "answer": r.answer}
            rows.append({**row, "scores": dict(r.scores)})
        return {"mode": self.mode, "seconds": round(self.seconds, 3), "summary": summary, "rows": rows}

    def __str__(self) -> str:
        count = len(self.rows)
        head = f"{self.mode}: {count} {'fact' if count == 1 else 'facts'} in {self.seconds:.1f} s"
        summary = self.summary()
        width = max(map(len, summary), default=0)
        lines = [f"  {name:{width}}  {s.mean:7.3f}  [{s.low:.3f}, {s.high:.3f}]  {s.count}" for name, s in summary.items()]
        return "\n".join([f"{head} (mean, 95 % interval, facts)", *lines])


def _asked(question: str | None) -> str:
    """A question in one line."""
    return " ".join((question or "").split())


def _mark(said: bool) -> str:
    return "ok  " if said else "MISS"


def _line(answer: str | None) -> str:
    """The answer's first line, cut to fit."""
    text = " ".join((answer or "").strip().split("\n")[0].split())
    return repr(text if len(text) <= 48 else text[:47] + "…")
