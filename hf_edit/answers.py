"""What a model answers: greedy continuations, and how it takes a given one."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from .base import Base
from .facts import Fact
from .positions import EncodedText, Text, encode, fact_text, joined_without_space
from .progress import bar
from .suffix import SuffixCache, frozen
from .texts import generate_ids

__all__ = [
    "Score",
    "answer_lengths",
    "check_positions",
    "fits",
    "greedy",
    "mentions",
    "place",
    "room",
    "says",
    "score_targets",
    "target_probabilities",
]

_LEAD = 4  # tokens that an answer may begin with before its target, such as "the city of"
_STEP = 16  # answers longer than the shortest are read in steps of so many tokens, so that they form few batches
_ROOM = 32  # positions for what a prompt is fitted behind
_READS = 1024  # positions that one forward reads logits at: 200 MB at a vocabulary of 50,000


def answer_lengths(base: Base, texts: Sequence[Text], least: int) -> list[int]:
    """How many tokens of an answer to read, so that each text's target fits in: `least`, and more for long targets only.

    A prompt and its answer never take more positions than the model has.

    Args:
        texts: each with a target.
        least: tokens of an answer to a short target.
    """
    lead, step = min(_LEAD, least - 1), min(_STEP, least)

    def length(text: EncodedText) -> int:
        beyond = max(0, len(text.labels) + lead - least)
        return min(least + step * math.ceil(beyond / step), room(base, text))

    return [length(text) for text in encode(base.tokenizer, texts)]


def room(base: Base, text: EncodedText) -> int:
    """How many tokens a model can write after a text's prompt: as many as it has positions left, and at least one."""
    return max(1, _positions(base) - text.target[0])


def fits(base: Base, text: EncodedText, more: int = 0) -> bool:
    """Whether a model has positions for a text and so many tokens behind it."""
    return len(text.ids) + more <= _positions(base)


def _positions(base: Base) -> int:
    config = base.model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or sys.maxsize


def check_positions(base: Base, facts: Sequence[Fact]) -> None:
    """Refuse facts that don't fit into the model's context, with a few words before them, which they are fitted with.

    Raises:
        ValueError: a prompt with its target takes more tokens than that.
    """
    for fact, text in zip(facts, encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts]), strict=True):
        if not fits(base, text, _ROOM):
            raise ValueError(
                f"the prompt and target of {fact.subject!r:.60} take {len(text.ids)} tokens, and {_ROOM} more are needed for "
                f"the contexts they are fitted in, but the model has {_positions(base)} positions: shorten the prompt"
            )


def greedy(
    base: Base, prompts: Sequence[str | Text], length: int | Sequence[int] = 16, batch: int = 32, progress: bool = False
) -> list[str]:
    """Greedy continuations of prompts, as the model stands now.

    Args:
        prompts: plain texts, or `Text` where the tokenizer is to add no special tokens.
        length: new tokens at most, of all or of each. Prompts of equal length run together, so none waits for a longer one.

    Returns:
        The continuations, without the prompts.
    """
    rows = [text.ids for text in encode(base.tokenizer, [p if isinstance(p, Text) else Text(p) for p in prompts])]
    lengths = [length] * len(rows) if isinstance(length, int) else length
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], len(rows[i])))
    found: dict[int, str] = {}
    with frozen(base.model), bar(len(rows), "asking", "prompt", progress) as shown:
        for tokens, same in groupby(order, key=lambda i: lengths[i]):
            alike = list(same)
            for group in (alike[first : first + batch] for first in range(0, len(alike), batch)):
                new = generate_ids(base, [rows[i] for i in group], tokens)
                texts = base.tokenizer.batch_decode(new, skip_special_tokens=True)
                found.update(zip(group, texts, strict=True))
                shown.update(len(group))
    return [found[i] for i in range(len(rows))]


@dataclass(frozen=True)
class Score:
    """How a model takes a given continuation, teacher-forced: each token predicted from those before it.

    Attributes:
        log_probs: of each token, natural logarithms.
        firsts: for each token, whether it is the model's first choice (the argmax).
        rank: how many tokens the model finds likelier than the first one; 0 where that is its first choice.
        states: by block, [hidden] in float32 on the CPU: the block's output where the first token is predicted.
    """

    log_probs: tuple[float, ...]
    firsts: tuple[bool, ...]
    rank: int
    states: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether every token is the model's first choice, which greedy decoding would then say."""
        return all(self.firsts)

    @property
    def log_prob(self) -> float:
        """Logarithm of the continuation's probability: the sum over its tokens."""
        return sum(self.log_probs)

    @property
    def probability(self) -> float:
        """The continuation's probability."""
        return math.exp(self.log_prob)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood a token, in nats."""
        return -self.log_prob / len(self.log_probs)


def score_targets(
    base: Base, texts: Sequence[EncodedText], batch: int = 32, blocks: Sequence[int] = (), progress: bool = False
) -> list[Score]:
    """Score each text's target, as the model stands now; a text that asks the same as another is run once.

    Logits are computed only where a target is predicted, and a target's last token is not run. So the two objects of a fact
    that are one token each share one row.

    Args:
        texts: each with a target behind at least one token.
        batch: rows in a forward at most.
        blocks: whose outputs are read where a target begins.
    """
    inputs = list(dict.fromkeys(_needed(text) for text in texts))
    row_of = {ids: row for row, ids in enumerate(inputs)}
    asking: list[list[int]] = [[] for _ in inputs]
    for i, text in enumerate(texts):
        asking[row_of[_needed(text)]].append(i)
    found: dict[int, Score] = {}
    with frozen(base.model), bar(len(inputs), "scoring", "text", progress) as shown:
        for rows in _score_batches(inputs, batch):
            asked = [(row, i) for row, number in enumerate(rows) for i in asking[number]]
            found.update(_score(base, [inputs[number] for number in rows], [(row, i, texts[i]) for row, i in asked], blocks))
            shown.update(len(rows))
    return [found[i] for i in range(len(texts))]


def _needed(text: EncodedText) -> tuple[int, ...]:
    """The ids that predict the target: its last token predicts nothing that is asked for."""
    return text.ids[: text.target[1] - 1]


def _score_batches(inputs: Sequence[tuple[int, ...]], batch: int) -> Iterator[list[int]]:
    """Rows by length, so many at a time, fewer where they are long: logits may be read at all of their tokens."""
    group: list[int] = []
    for number in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if group and (len(group) >= batch or (len(group) + 1) * len(inputs[number]) > _READS):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


@torch.no_grad()
def _score(
    base: Base,
    inputs: Sequence[tuple[int, ...]],
    asked: Sequence[tuple[int, int, EncodedText]],
    blocks: Sequence[int],
) -> dict[int, Score]:
    """One batch: scores by the text's number, for (row, number, text) triples."""
    points = [(row, position - 1) for row, _, text in asked for position in range(*text.target)]
    where = {point: n for n, point in enumerate(dict.fromkeys(points))}
    out = SuffixCache(base.model, base.layout(), 0).add(inputs, [0] * len(inputs), list(where), blocks)
    assert out.logits is not None
    logits = out.logits
    at = torch.tensor([where[point] for point in points], device=logits.device)
    labels = torch.tensor([token for _, _, text in asked for token in text.labels], device=logits.device)
    values = logits[at, labels]
    log_probs = (values - logits.logsumexp(-1)[at]).tolist()
    firsts = (logits.argmax(-1)[at] == labels).tolist()
    found, start = {}, 0
    for row, number, text in asked:
        end = start + len(text.labels)
        read = where[row, text.target[0] - 1]
        rank = 0 if firsts[start] else max(1, int((logits[read] > values[start]).sum()))  # an equal one came first
        states = {block: out.states[block][read].float().cpu() for block in blocks}
        found[number] = Score(tuple(log_probs[start:end]), tuple(firsts[start:end]), rank, states)
        start = end
    return found


def target_probabilities(base: Base, facts: Sequence[Fact], batch: int = 32) -> list[float]:
    """P(target | prompt) of each fact: the product over the target's tokens, teacher-forced."""
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    return [score.probability for score in score_targets(base, texts, batch)]


def mentions(text: str, name: str) -> int:
    """How many times a text holds a name, as whole words, whatever their case."""
    return len(_named(name).findall(text))


def place(text: str, name: str) -> tuple[int, int] | None:
    """Where a text holds a name first, as whole words, whatever their case; None where it does not."""
    found = _named(name).search(text)
    return None if found is None else found.span()


def _named(name: str) -> re.Pattern[str]:
    before = "" if joined_without_space(name[0]) else r"(?<!\w)"
    after = "" if joined_without_space(name[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(name) + after, re.IGNORECASE)


def says(answer: str, target: str) -> bool:
    """Whether an answer holds the target, as whole words, whatever their case."""
    return mentions(answer, target) > 0
