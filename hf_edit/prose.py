"""Measures of running text: how varied it is, what it is about, and how a model takes it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .answers import score_targets
from .base import Base
from .positions import EncodedText, Text, encode

__all__ = ["TfIdf", "n_gram_entropy", "perplexity"]

_WORD = re.compile(r"\w+|[^\w\s]")
_TERM = re.compile(r"\b\w\w+\b")


def n_gram_entropy(text: str) -> float:
    """Weighted entropy of a text's 2- and 3-grams of words, in bits: (2/3 H_2 + 4/3 H_3) / 2.

    The fluency ("generation entropy") of ROME (arXiv 2202.05262, sec. 3.4), with the weights and the mean of its released
    code: a text that repeats itself scores low. Words and punctuation marks are counted; an n-gram that a text is too short
    for adds nothing.
    """
    words = _WORD.findall(text)
    return sum(weight * _entropy(words, n) for n, weight in ((2, 2 / 3), (3, 4 / 3))) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


class TfIdf:
    """Cosine similarity of texts as bags of words, rare words weighing more.

    Terms are words of two or more characters in lower case; a term weighs its count times ln((1 + N) / (1 + n)) + 1, where
    n of the N documents hold it. That is what scikit-learn's `TfidfVectorizer` does by default, except that words which no
    document holds count too here: a text that talks about something else must be less similar.

    Args:
        documents: the texts that say how rare a word is.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        if not documents:
            raise ValueError("TF-IDF needs at least one document to know how rare words are")
        self._count = len(documents)
        self._holding = Counter(term for text in documents for term in set(_terms(text)))

    def similarity(self, one: str, other: str) -> float:
        """The cosine between two texts, from 0 (no word in common) to 1; 0 where one of them has no words."""
        a, b = self._weights(one), self._weights(other)
        norms = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
        return sum(weight * b[term] for term, weight in a.items() if term in b) / norms if norms else 0.0

    def _weights(self, text: str) -> dict[str, float]:
        return {
            term: count * (math.log((1 + self._count) / (1 + self._holding[term])) + 1)
            for term, count in Counter(_terms(text)).items()
        }


def _terms(text: str) -> list[str]:
    return _TERM.findall(text.lower())


def perplexity(model: Any, texts: Sequence[str], *, window: int = 512, stride: int | None = None, batch_size: int = 8) -> float:
    """Perplexity of a model, with the edits in force, on ordinary texts: exp of the mean NLL a token over all texts.

    Long texts are read in windows that overlap, so that each token counts once and sees at least `window - stride` tokens
    before it, except at a text's beginning. A text's first token, which nothing predicts, does not count.

    Args:
        model: an `EditableModelForCausalLM` or a `Base`.
        texts: ordinary text, not about the edited facts.
        window: tokens that the model sees at once.
        stride: tokens between the beginnings of two windows; by default half a window.

    Raises:
        ValueError: no text has two tokens, or stride and window make no sense.
    """
    step = window // 2 if stride is None else stride
    if not 1 <= step < window:
        raise ValueError(f"stride must lie between 1 and window - 1, not {step} at a window of {window}")
    base = model if isinstance(model, Base) else Base(model.get_base_model(), model.tokenizer)
    rows: list[EncodedText] = []
    for ids in (text.ids for text in encode(base.tokenizer, [Text(t) for t in texts])):
        scored = 1
        while scored < len(ids):
            begin = max(0, scored - (window - step)) if scored > 1 else 0
            end = min(begin + window, len(ids))
            rows.append(EncodedText(ids[begin:end], -1, (scored - begin, end - begin)))
            scored = end
    if not rows:
        raise ValueError("perplexity needs a text of at least two tokens")
    scores = score_targets(base, rows, batch_size)
    try:
        return math.exp(-sum(s.log_prob for s in scores) / sum(len(s.log_probs) for s in scores))
    except OverflowError:
        return math.inf
