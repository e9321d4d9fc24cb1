"""The words in which something is asked, without the name of whom it is asked about.

The state at a prompt's end says what kind of answer is due; that of "When did {} die?" and "When was {} born?" is nearly the
same. Their words are not. So the gate also compares words, by the model's own embeddings: each word of the one question with
the nearest of the other (late interaction, as in ColBERT, https://arxiv.org/abs/2004.12832); words that say more weigh more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SENTENCE_END", "Words", "agreement", "asked_words", "word_ids", "word_weights"]

SENTENCE_END = re.compile(r"[.!?。！？]['\"”’)]*\s+|\n+")
_MOST = 16  # words of a question that are compared, its last ones
_BLANK = "{}"


@dataclass(frozen=True)
class Words:
    """The words of some questions.

    Attributes:
        vectors: [questions, words, size], of length 1.
        weights: [questions, words], at least 0; 0 where there is no word.
    """

    vectors: torch.Tensor
    weights: torch.Tensor

    def __getitem__(self, which: Any) -> Words:
        """Some of the questions."""
        return Words(self.vectors[which], self.weights[which])


def word_weights(x: torch.Tensor) -> torch.Tensor:
    """How much words count, above 0, by any number; squared, so that a few of a question's words decide."""
    return torch.nn.functional.softplus(x).square()


def agreement(one: Words, other: Words) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of what the one question says stands in the other, and the other way around: pair by pair, at most 1.

    Args:
        one, other: of equally many questions, or one of them of a single question.
    """
    near = one.vectors @ other.vectors.transpose(-1, -2)
    near = near.masked_fill((one.weights == 0)[:, :, None] | (other.weights == 0)[:, None, :], -1.0)
    return _weighted(near.amax(2), one.weights), _weighted(near.amax(1), other.weights)


def _weighted(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)


def asked_words(text: str, names: Sequence[tuple[int, int]] = ()) -> str:
    """What a text asks at its end: its last sentence, and the one before where only that holds the name; without the name.

    Args:
        text: up to the end of the question; a prompt of a fact may hold ``{}`` in the name's place.
        names: where the name stands, (first character, behind the last) in order.
    """
    pieces, at = [], 0
    for start, end in names:
        pieces.append(text[at:start])
        at = end
    text = _BLANK.join([*pieces, text[at:]])
    begins = [0, *(m.end() for m in SENTENCE_END.finditer(text) if text[m.end() :].strip())]
    begin = begins[-1]
    if _BLANK not in text[begin:] and _BLANK in text[(begins[-2:])[0] :]:
        begin = begins[-2]
    return " ".join(text[begin:].replace(_BLANK, " ").split())


def word_ids(tokenizer: Any, questions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of questions in lower case, int64 [questions, words], and where there is one, bool of the same shape."""
    rows = [tokenizer(" " + q.casefold(), add_special_tokens=False)["input_ids"][-_MOST:] for q in questions]
    width = max(map(len, rows), default=0) or 1
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long).reshape(len(rows), width)
    there = torch.tensor([[i < len(row) for i in range(width)] for row in rows]).reshape(len(rows), width)
    return ids, there
