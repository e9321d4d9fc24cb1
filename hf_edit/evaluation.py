"""What an edit did, beyond the prompt that it was made with: asking for all that the metrics need, as seldom as possible.

A metric (`hf_edit.metrics`) says which answers it needs. All needs are gathered first, so that a prompt is asked once however
many metrics read the answer, teacher-forced texts share one pass, and what the unedited model says is read once and can be
handed on (`CleanAnswers`): no later edit changes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from .answers import answer_lengths, room, score_targets
from .base import Base
from .bootstrap import bootstrap, paired_bootstrap
from .facts import Fact, Question
from .message_prompts import as_text
from .metrics import ANSWER_TOKENS, TEXT_TOKENS, Asks, Metric, Readings, available_metrics
from .positions import EncodedText, Text, encode, join
from .progress import bar
from .prose import perplexity
from .report import EvalReport, FactScores
from .suffix import frozen
from .texts import generate_ids

__all__ = [
    "CleanAnswers",
    "EvalReport",
    "available_metrics",
    "bootstrap",
    "evaluate",
    "paired_bootstrap",
    "perplexity",
]

_KEPT_TOKENS = 5  # of the clean answer to a question without a reference answer


@dataclass(frozen=True)
class CleanAnswers:
    """Greedy continuations by the unedited model. Computed once a set of questions, whatever is edited later.

    Attributes:
        fingerprint: of the unedited model.
        answers: by prompt, how many tokens were asked for, and the ids that came.
    """

    fingerprint: str
    answers: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def lacks(self, prompt: str, tokens: int) -> bool:
        """Whether so many tokens have not been asked for yet."""
        return self.answers.get(prompt, (0, ()))[0] < tokens


def evaluate(
    base: Base,
    facts: Sequence[Fact],
    *,
    metrics: Sequence[str] | None = None,
    mode: str = "generate",
    batch_size: int = 32,
    max_new_tokens: int = ANSWER_TOKENS,
    text_tokens: int = TEXT_TOKENS,
    generation_prompts: Mapping[str, Sequence[str]] | None = None,
    reference_texts: Mapping[str, Sequence[str]] | None = None,
    clean: CleanAnswers | None = None,
    unedited: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: bool = True,
) -> EvalReport:
    """Evaluate a model as it stands; users call `EditableModelForCausalLM.evaluate`, which knows how to lift its edits.

    Args:
        base: the model, with the edits in force that are evaluated.
        facts: what to ask about; a metric is left out where a fact lacks what it is about.
        metrics: names, see `available_metrics`; by default all that the facts and the mode have something for.
        mode: "generate", "teacher_forced" or "both"; see `hf_edit.metrics`.
        batch_size: texts in a forward at most.
        max_new_tokens: of an answer in free generation; where its target does not fit in, as many more as it needs.
        text_tokens: of a text that fluency and consistency read.
        generation_prompts: by fact id, beginnings of texts about the subject, for fluency and consistency.
        reference_texts: by fact id, texts about the target, for consistency.
        clean: `EvalReport.clean` of an earlier evaluation of the same base model, so that it is not asked again.
        unedited: gives a context in which the model is free of edits; by default it is taken to be so already.
        progress: show progress bars for what takes longer than two seconds.

    Raises:
        ValueError: no facts, an unknown metric or mode, a metric that no fact has anything for, or `clean` of another model.
    """
    started = time.perf_counter()
    if not facts:
        raise ValueError("there are no facts to evaluate; pass some, or make an edit first")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("text_tokens", text_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    known = available_metrics(
        mode,
        max_new_tokens=max_new_tokens,
        text_tokens=text_tokens,
        generation_prompts=generation_prompts,
        reference_texts=reference_texts,
    )
    texts = as_text(base.tokenizer, facts)
    chosen = _chosen(known, metrics, texts, mode)
    asks = [[metric.asks(fact) for metric in chosen] for fact in texts]
    everything, lengths = _with_lengths(base, [ask for row in asks for ask in row], max_new_tokens)
    with frozen(base.model):
        clean, kept = _ask_clean(base, everything, clean, unedited, batch_size, progress)
        heard = _ask(base, everything, clean, kept, lengths, batch_size, progress)
    rows = tuple(
        FactScores(
            given,
            {k: v for m, ask in zip(chosen, row, strict=True) if ask != Asks() for k, v in m.scores(fact, heard).items()},
            heard.answer(fact.question, lengths.get((fact.question, fact.target), max_new_tokens))
            if fact.question in heard.continued
            else None,
        )
        for given, fact, row in zip(facts, texts, asks, strict=True)
    )
    return EvalReport(mode, rows, time.perf_counter() - started, clean)


def _chosen(known: Mapping[str, list[Metric]], wanted: Sequence[str] | None, facts: Sequence[Fact], mode: str) -> list[Metric]:
    names = list(known) if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no metric {name!r} in mode {mode!r}; there are: {', '.join(known)}")
        if wanted is not None and not any(metric.asks(fact) != Asks() for metric in known[name] for fact in facts):
            raise ValueError(
                f"no fact has what {name!r} is about: rephrases, locality and portability are fields of Fact (neighborhood "
                "needs target_old, too); fluency and consistency take generation_prompts=... and reference_texts=..."
            )
    return [metric for name in dict.fromkeys(names) for metric in known[name]]


def _with_lengths(base: Base, asks: Sequence[Asks], max_new_tokens: int) -> tuple[list[Asks], dict[tuple[str, str], int]]:
    """What is asked, with the number of tokens of each answer; and this number by (prompt, target)."""
    pairs = list(dict.fromkeys(pair for ask in asks for pair in (*ask.answers, *ask.clean_answers)))
    found = answer_lengths(base, [_with_target(prompt, target) for prompt, target in pairs], max_new_tokens)
    lengths = dict(zip(pairs, found, strict=True))

    def of(answers: Iterable[tuple[str, str]]) -> tuple[tuple[str, int], ...]:
        return tuple((prompt, lengths[prompt, target]) for prompt, target in answers)

    whole = [replace(a, continued=(*a.continued, *of(a.answers)), clean=(*a.clean, *of(a.clean_answers))) for a in asks]
    return whole, lengths


def _ask_clean(
    base: Base,
    asks: Sequence[Asks],
    clean: CleanAnswers | None,
    unedited: Callable[[], AbstractContextManager[None]],
    batch_size: int,
    progress: bool,
) -> tuple[CleanAnswers | None, dict[Question, int]]:
    """What the unedited model says, as far as `clean` lacks it, and how many tokens of it each kept question compares."""
    kept = list(dict.fromkeys(q for ask in asks for q in ask.kept))
    lengths = dict.fromkeys(kept, _KEPT_TOKENS)
    answered = [q for q in kept if q.target]
    wholes = [join(q.prompt, str(q.target)) for q in answered]
    texts = [Text(whole, None, (len(q.prompt), len(whole))) for q, whole in zip(answered, wholes, strict=True)]
    encoded = encode(base.tokenizer, texts)
    lengths |= {q: min(len(text.labels), room(base, text)) for q, text in zip(answered, encoded, strict=True)}
    wanted = _longest([*(pair for ask in asks for pair in ask.clean), *((q.prompt, n) for q, n in lengths.items())])
    if not wanted:
        return clean, lengths
    with unedited():
        fingerprint = base.fingerprint
        if clean is not None and clean.fingerprint != fingerprint:
            raise ValueError("the clean answers are another model's; leave clean=... out, and they are asked for again")
        clean = clean or CleanAnswers(fingerprint)
        missing = {prompt: tokens for prompt, tokens in wanted.items() if clean.lacks(prompt, tokens)}
        new = _continue(base, missing, batch_size, progress)
    if new:
        clean = CleanAnswers(fingerprint, {**clean.answers, **{p: (wanted[p], ids) for p, ids in new.items()}})
    return clean, lengths


def _ask(
    base: Base,
    asks: Sequence[Asks],
    clean: CleanAnswers | None,
    kept_lengths: Mapping[Question, int],
    lengths: Mapping[tuple[str, str], int],
    batch_size: int,
    progress: bool,
) -> Readings:
    """What the edited model says: one teacher-forced pass over all texts, one continuation of each prompt."""
    said = {} if clean is None else {prompt: ids for prompt, (_, ids) in clean.answers.items()}
    pairs = list(dict.fromkeys(pair for ask in asks for pair in ask.scored))
    texts = encode(base.tokenizer, [_with_target(prompt, target) for prompt, target in pairs])
    kept = [q for q, n in kept_lengths.items() if said[q.prompt][:n]]
    prompts = encode(base.tokenizer, [Text(q.prompt) for q in kept])
    for q, prompt in zip(kept, prompts, strict=True):
        ids = (*prompt.ids, *said[q.prompt][: kept_lengths[q]])
        texts.append(EncodedText(ids, -1, (len(prompt.ids), len(ids))))
    scores = score_targets(base, texts, batch_size, progress=progress)
    continued = _continue(base, _longest(pair for ask in asks for pair in ask.continued), batch_size, progress)
    return Readings(
        base.tokenizer,
        dict(zip(pairs, scores[: len(pairs)], strict=True)),
        {**dict.fromkeys(kept_lengths), **dict(zip(kept, scores[len(pairs) :], strict=True))},
        continued,
        said,
        lengths,
    )


def _continue(base: Base, wanted: Mapping[str, int], batch_size: int, progress: bool) -> dict[str, tuple[int, ...]]:
    """Greedy continuations, by prompt: those of equal length run together, prompts of similar length first."""
    prompts = list(wanted)
    rows = dict(zip(prompts, (text.ids for text in encode(base.tokenizer, [Text(p) for p in prompts])), strict=True))
    by_tokens: dict[int, list[str]] = {}
    for prompt in sorted(prompts, key=lambda p: len(rows[p])):
        by_tokens.setdefault(wanted[prompt], []).append(prompt)
    found: dict[str, tuple[int, ...]] = {}
    with bar(len(prompts), "asking", "prompt", progress) as shown:
        for tokens, group in by_tokens.items():
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                new = generate_ids(base, [rows[p] for p in batch], tokens)
                found.update((p, tuple(ids)) for p, ids in zip(batch, new, strict=True))
                shown.update(len(batch))
    return found


def _longest(asked: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The most tokens that anything asks of each prompt."""
    wanted: dict[str, int] = {}
    for prompt, tokens in asked:
        wanted[prompt] = max(tokens, wanted.get(prompt, 0))
    return wanted


def _with_target(prompt: str, target: str) -> Text:
    whole = join(prompt, target)
    return Text(whole, None, (len(prompt), len(whole)))
