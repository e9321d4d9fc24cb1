"""The metrics of the literature, each defined once: what it asks about a fact, and the numbers that it makes of the answers.

Two ways to answer, which differ for good reasons and are never mixed in one number:

- ``teacher_forced``: the probability of a given continuation, each token predicted from the right ones before it. What most
  papers report. It needs no generation, compares two objects, and hides that a model may not stop saying the target.
- ``generate``: the model's own greedy continuation of the bare prompt, read as text. The answer is never in what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .answers import Score, mentions, says
from .facts import Fact, Question
from .positions import Text, encode, join
from .prose import TfIdf, n_gram_entropy

__all__ = ["ANSWER_TOKENS", "MODES", "PORTABILITY_FORMS", "TEXT_TOKENS", "Asks", "Metric", "Readings", "available_metrics"]

MODES = ("generate", "teacher_forced", "both")
PORTABILITY_FORMS = {"A": "Question: {}\nAnswer:", "B": "{} The answer is"}
ANSWER_TOKENS = 20  # new tokens of an answer in free generation, at least
TEXT_TOKENS = 100  # new tokens of a text whose fluency is measured
_REPEATED = 3  # a target said so often in one answer is a stutter


@dataclass(frozen=True)
class Asks:
    """What a metric needs to hear about one fact.

    Attributes:
        scored: (prompt, continuation) pairs, teacher-forced on the edited model.
        continued: (prompt, tokens): greedy continuations by the edited model.
        clean: (prompt, tokens): greedy continuations by the unedited model.
        answers: (prompt, target): greedy continuations by the edited model, long enough to say the target.
        clean_answers: the same by the unedited model.
        kept: questions whose clean greedy answer is scored on the edited model.
    """

    scored: tuple[tuple[str, str], ...] = ()
    continued: tuple[tuple[str, int], ...] = ()
    clean: tuple[tuple[str, int], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()
    clean_answers: tuple[tuple[str, str], ...] = ()
    kept: tuple[Question, ...] = ()


class Metric(Protocol):
    """A metric: what it asks about a fact, and the numbers that it makes of the answers."""

    def asks(self, fact: Fact) -> Asks:
        """What it needs to hear; nothing where the fact lacks what the metric is about."""
        ...

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        """Numbers by name, each a mean over the fact's questions; only called where something was asked."""
        ...


@dataclass(frozen=True)
class Readings:
    """All that was heard, for metrics to look up.

    Attributes:
        tokenizer: of the model.
        scored: by (prompt, continuation), its score on the edited model.
        kept: by question, the score of the clean answer on the edited model; None where the clean model says nothing.
        continued: greedy continuations by the edited model, by prompt.
        clean: the same by the unedited model.
        lengths: by (prompt, target), how many tokens of a continuation are read for the target; by default all.
    """

    tokenizer: Any
    scored: Mapping[tuple[str, str], Score]
    kept: Mapping[Question, Score | None]
    continued: Mapping[str, tuple[int, ...]]
    clean: Mapping[str, tuple[int, ...]]
    lengths: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def answer(self, prompt: str, tokens: int | None) -> str:
        """The edited model's continuation."""
        return self.tokenizer.decode(self.continued[prompt][:tokens], skip_special_tokens=True)

    def clean_answer(self, prompt: str, tokens: int | None) -> str:
        """The unedited model's continuation."""
        return self.tokenizer.decode(self.clean[prompt][:tokens], skip_special_tokens=True)

    def says(self, prompt: str, target: str) -> bool:
        """Whether the edited model's answer holds the target."""
        return says(self.answer(prompt, self.lengths.get((prompt, target))), target)

    def clean_says(self, prompt: str, target: str) -> bool:
        """Whether the unedited model's answer holds the target."""
        return says(self.clean_answer(prompt, self.lengths.get((prompt, target))), target)


# --- the edit itself and its paraphrases ------------------------------------------------------------------------------


def _edit_prompts(fact: Fact) -> list[str]:
    return [fact.question]


def _paraphrases(fact: Fact) -> list[str]:
    return [text.replace("{}", fact.subject) for text in fact.rephrases]


@dataclass(frozen=True)
class Preference:
    """Efficacy and paraphrase score (generality), teacher-forced.

    ``preferred``: P(target) > P(old), and ``magnitude``: P(target) - P(old), for facts that name the old object: the ES, PS,
    EM and PM of ROME (arXiv 2202.05262, sec. 3.4). ``right``: every token of the target is the model's first choice, the
    accuracy of zsRE evaluations, which a preference between two unlikely objects is not. ``nll``: mean negative
    log-likelihood a token of the target, in nats.
    """

    name: str
    prompts: Callable[[Fact], list[str]]

    def asks(self, fact: Fact) -> Asks:
        objects = [fact.target, *([fact.target_old] if fact.target_old else [])]
        return Asks(scored=tuple((prompt, obj) for prompt in self.prompts(fact) for obj in objects))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        prompts = self.prompts(fact)
        new = [heard.scored[prompt, fact.target] for prompt in prompts]
        found = {"right": _mean(s.right for s in new), "nll": _mean(s.nll for s in new)}
        if fact.target_old:
            old = [heard.scored[prompt, fact.target_old] for prompt in prompts]
            found["preferred"] = _mean(n.log_prob > o.log_prob for n, o in zip(new, old, strict=True))
            found["magnitude"] = _mean(n.probability - o.probability for n, o in zip(new, old, strict=True))
        return _named(self.name, found)


@dataclass(frozen=True)
class Saying:
    """Efficacy and paraphrase score in free generation.

    ``said``: the greedy continuation of the bare prompt holds the target as whole words. Nothing of the target is in the
    prompt, and the model itself decides where a word ends. At least ``max_new_tokens`` are read, and as many as a long target
    needs.
    """

    name: str
    prompts: Callable[[Fact], list[str]]

    def asks(self, fact: Fact) -> Asks:
        return Asks(answers=tuple((prompt, fact.target) for prompt in self.prompts(fact)))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        return _named(self.name, {"said": _mean(heard.says(prompt, fact.target) for prompt in self.prompts(fact))})


# --- what must stay as it was -----------------------------------------------------------------------------------------


def _neighbours(fact: Fact) -> list[Question]:
    old = (fact.target_old or "").casefold()
    return [q for q in fact.locality if q.target and q.target.casefold() == old]


def _locality(fact: Fact) -> list[Question]:
    return list(fact.locality)


def _same_subject(fact: Fact) -> list[Question]:
    names = (fact.subject, *fact.aliases)
    return [q for q in fact.locality if any(mentions(q.prompt, name) for name in names)]


@dataclass(frozen=True)
class Neighborhood:
    """Neighborhood score, teacher-forced: prompts about other subjects whose right answer is the edit's old object.

    Those of a fact's locality questions whose answer is `target_old`, as in CounterFact. ``preferred``: P(old) > P(target),
    the NS of ROME (arXiv 2202.05262, sec. 3.4). ``right``: every token of the old object is the model's first choice.
    """

    name: str = "neighborhood"

    def asks(self, fact: Fact) -> Asks:
        return Asks(scored=tuple((q.prompt, obj) for q in _neighbours(fact) for obj in (str(q.target), fact.target)))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        pairs = [(heard.scored[q.prompt, str(q.target)], heard.scored[q.prompt, fact.target]) for q in _neighbours(fact)]
        found = {"preferred": _mean(o.log_prob > n.log_prob for o, n in pairs), "right": _mean(o.right for o, _ in pairs)}
        return _named(self.name, found)


@dataclass(frozen=True)
class Unchanged:
    """Locality against the unedited model, teacher-forced: does the model still answer as it did, right or wrong?

    The unedited model's greedy answer, as long as the question's reference answer (five tokens where there is none), is
    scored on the edited model. ``tokens``: share of its tokens that are still the first choice, the locality of EasyEdit
    (arXiv 2308.07269); ``whole``: share of answers of which every token is. A question to which the unedited model says
    nothing does not count. ``same_subject`` is the same for the questions that name the edited subject, where edits do most
    damage.
    """

    name: str
    questions: Callable[[Fact], list[Question]]

    def asks(self, fact: Fact) -> Asks:
        return Asks(kept=tuple(self.questions(fact)))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        found = [score for q in self.questions(fact) if (score := heard.kept[q]) is not None]
        if not found:
            return {}
        return _named(self.name, {"tokens": _mean(_mean(s.firsts) for s in found), "whole": _mean(s.right for s in found)})


@dataclass(frozen=True)
class UnchangedText:
    """Locality against the unedited model in free generation.

    ``continuation``: share of locality questions whose greedy continuation is token for token that of the unedited model.
    ``leak``: share where it holds the edit's target and the unedited model's does not; read as far as `Saying` reads.
    """

    name: str
    questions: Callable[[Fact], list[Question]]
    tokens: int

    def asks(self, fact: Fact) -> Asks:
        asked = tuple((q.prompt, self.tokens) for q in self.questions(fact))
        answers = tuple((q.prompt, fact.target) for q in self.questions(fact))
        return Asks(continued=asked, clean=asked, answers=answers, clean_answers=answers)

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        prompts = [q.prompt for q in self.questions(fact)]
        same = (heard.continued[p][: self.tokens] == heard.clean[p][: self.tokens] for p in prompts)
        leak = (heard.says(p, fact.target) and not heard.clean_says(p, fact.target) for p in prompts)
        return _named(self.name, {"continuation": _mean(same), "leak": _mean(leak)})


# --- what follows from the edit ---------------------------------------------------------------------------------------


def _portability_prompts(fact: Fact) -> list[tuple[str, str, str, str]]:
    """(form, prompt, answer, "named" or "unnamed") of each portability question that has an answer."""
    return [
        (form, template.replace("{}", q.prompt) if q.prompt.rstrip().endswith("?") else q.prompt, q.target, kind)
        for q in fact.portability
        if q.target
        for kind in ("named" if mentions(q.prompt, fact.target) else "unnamed",)
        for form, template in PORTABILITY_FORMS.items()
    ]


def _by_form(fact: Fact, values: Callable[[str, str], dict[str, float]]) -> dict[str, float]:
    """Means over the questions: of all, and of those that do and do not name the target, each where there are any."""
    collected: dict[str, list[float]] = {}
    for form, prompt, answer, kind in _portability_prompts(fact):
        for name, value in values(prompt, answer).items():
            for key in (f"{form}.{name}", f"{form}.{name}.{kind}"):
                collected.setdefault(key, []).append(value)
    return _named("portability", {key: _mean(found) for key, found in collected.items()})


class Portability:
    """Portability, teacher-forced: the answer to a question that follows from the edit and does not repeat it.

    One hop past the fact, as in RippleEdits (arXiv 2307.12976) and CounterFactPlus (arXiv 2305.14956). Each question is put
    in two forms, because small models hinge on the wording: `PORTABILITY_FORMS`; a prompt that ends in no question mark is
    continued as it stands in both. ``nll``: mean negative log-likelihood a token of the answer, in nats; ``exact``: every
    token of it is the model's first choice. Both also apart for questions that name the edit's target themselves (``named``:
    a model can answer them without having taken in the edit) and those that don't (``unnamed``).
    """

    name = "portability"

    def asks(self, fact: Fact) -> Asks:
        return Asks(scored=tuple((prompt, answer) for _, prompt, answer, _ in _portability_prompts(fact)))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        return _by_form(fact, lambda p, a: {"nll": heard.scored[p, a].nll, "exact": float(heard.scored[p, a].right)})


class PortabilitySaying:
    """Portability in free generation. ``said``: the greedy continuation, read as far as `Saying` reads, holds the answer; forms
    and parts as `Portability`."""

    name = "portability"

    def asks(self, fact: Fact) -> Asks:
        return Asks(answers=tuple((prompt, answer) for _, prompt, answer, _ in _portability_prompts(fact)))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        return _by_form(fact, lambda p, a: {"said": float(heard.says(p, a))})


# --- how the model writes afterwards ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repetition:
    """Stutter in free generation.

    ``repeated``: the greedy continuation of the edit's prompt says the target three times or more. ``floor``: the same for
    the unedited model once the target has been put into its mouth, over the same number of tokens (the target counts), which
    is how often a text would repeat it anyway.
    """

    tokens: int
    name: str = "repetition"

    def asks(self, fact: Fact) -> Asks:
        told = join(fact.question, fact.target)
        return Asks(continued=((fact.question, self.tokens),), clean=((told, self.tokens),))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        told = join(fact.question, fact.target)
        length = len(encode(heard.tokenizer, [Text(told, None, (len(fact.question), len(told)))])[0].labels)
        rest = heard.clean_answer(told, max(0, self.tokens - length))
        repeated = mentions(heard.answer(fact.question, self.tokens), fact.target) >= _REPEATED
        return _named(self.name, {"repeated": repeated, "floor": 1 + mentions(rest, fact.target) >= _REPEATED})


@dataclass(frozen=True)
class Fluency:
    """Fluency of text about the subject. ``entropy``: `n_gram_entropy` of prompt and continuation, mean over the prompts.

    The generation entropy of ROME (arXiv 2202.05262, sec. 3.4) on CounterFact's generation prompts. ROME samples from the
    five likeliest tokens; text here is greedy, so that arms are compared on the same footing: read it against the unedited
    model's, not against published levels.
    """

    prompts: Mapping[str, Sequence[str]]
    tokens: int
    name: str = "fluency"

    def asks(self, fact: Fact) -> Asks:
        return Asks(continued=tuple((p, self.tokens) for p in dict.fromkeys(self.prompts.get(str(fact.id), ()))))

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        texts = (f"{p} {heard.answer(p, self.tokens)}" for p, _ in self.asks(fact).continued)
        return _named(self.name, {"entropy": _mean(n_gram_entropy(text) for text in texts)})


class Consistency:
    """Consistency of text about the subject with its new object. ``similarity``: TF-IDF cosine of the texts that `Fluency`
    reads, in a row, to reference texts about the target, in a row: the RS of ROME (arXiv 2202.05262, sec. 3.4).

    ROME's reference texts are Wikipedia articles about things that share the target. The caller gives his own here, e.g.
    CounterFact's attribute prompts, each followed by the target; levels depend on them and are not comparable across sets.
    How rare a word is, is taken from all reference texts given, whichever facts are evaluated.
    """

    name = "consistency"

    def __init__(self, prompts: Mapping[str, Sequence[str]], texts: Mapping[str, Sequence[str]], tokens: int) -> None:
        self._fluency = Fluency(prompts, tokens)
        self._texts = {key: " ".join(found) for key, found in texts.items() if found}
        self._weights = TfIdf(list(self._texts.values())) if self._texts else None

    def asks(self, fact: Fact) -> Asks:
        return self._fluency.asks(fact) if str(fact.id) in self._texts else Asks()

    def scores(self, fact: Fact, heard: Readings) -> dict[str, float]:
        assert self._weights is not None
        prompts = [p for p, _ in self.asks(fact).continued]
        written = " ".join(f"{p} {heard.answer(p, self._fluency.tokens)}" for p in prompts)
        return _named(self.name, {"similarity": self._weights.similarity(written, self._texts[str(fact.id)])})


# --- choosing ---------------------------------------------------------------------------------------------------------


def available_metrics(
    mode: str = "both",
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    text_tokens: int = TEXT_TOKENS,
    generation_prompts: Mapping[str, Sequence[str]] | None = None,
    reference_texts: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[Metric]]:
    """The metrics of a mode, by the name that `evaluate(metrics=...)` takes; arguments as there.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(map(repr, MODES))}, not {mode!r}")
    forced: dict[str, Metric] = {
        "efficacy": Preference("efficacy", _edit_prompts),
        "paraphrase": Preference("paraphrase", _paraphrases),
        "neighborhood": Neighborhood(),
        "locality": Unchanged("locality", _locality),
        "same_subject": Unchanged("same_subject", _same_subject),
        "portability": Portability(),
    }
    free: dict[str, Metric] = {
        "efficacy": Saying("efficacy", _edit_prompts),
        "paraphrase": Saying("paraphrase", _paraphrases),
        "locality": UnchangedText("locality", _locality, max_new_tokens),
        "same_subject": UnchangedText("same_subject", _same_subject, max_new_tokens),
        "portability": PortabilitySaying(),
        "repetition": Repetition(max_new_tokens),
        "fluency": Fluency(generation_prompts or {}, text_tokens),
        "consistency": Consistency(generation_prompts or {}, reference_texts or {}, text_tokens),
    }
    found: dict[str, list[Metric]] = {}
    for part, group in (("teacher_forced", forced), ("generate", free)):
        if mode in (part, "both"):
            for name, metric in group.items():
                found.setdefault(name, []).append(metric)
    return found


def _mean(values: Iterable[float]) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found)


def _named(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}.{key}": float(value) for key, value in values.items()}
