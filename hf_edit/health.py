"""Whether an edited model still writes as it did: its perplexity on text that it wrote before the edits.

Edits in the weights add up, and after many of them a model can collapse all at once (arXiv 2403.07175). Its own earlier text
needs no download, and the unedited model's perplexity on it is what to compare with.

The text is drawn from the model's whole distribution, so the mean rise of its negative log-likelihood estimates the KL
divergence of the edited model from the clean one. Text drawn from the likeliest tokens alone is far easier to predict, and
hides part of what ordinary text would show.
"""

from __future__ import annotations

import math

import torch
from safetensors.torch import load_file, save_file

from .answers import score_targets
from .base import Base
from .cache import atomic_path, cache_folder
from .positions import EncodedText
from .suffix import frozen
from .texts import sample_freely

__all__ = ["COLLAPSE", "Health", "own_text"]

COLLAPSE = 1.25  # times the clean perplexity, above which a model's other answers suffer visibly
_TEXTS, _LENGTH, _SEED = 24, 64, 20240  # another seed than the key statistics', so that nothing was fitted to this text


def own_text(base: Base) -> list[list[int]]:
    """Texts of the clean model's own as token ids, sampled once a model: call it while no edit is in force."""
    name = f"free-{base.tokenizer_fingerprint[:16]}-{_SEED}-{_TEXTS}-{_LENGTH}.safetensors"
    path = cache_folder("own_text", base.fingerprint) / name
    if path.exists():
        return load_file(path)["ids"].tolist()
    with frozen(base.model):
        rows = sample_freely(base, _TEXTS, _LENGTH, _SEED)
    with atomic_path(path) as temporary:
        save_file({"ids": torch.tensor(rows)}, temporary)
    return rows


class Health:
    """Perplexity of one model on its own text, edited against clean.

    Args:
        base: the clean model.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._texts = [EncodedText(tuple(row), -1, (1, len(row))) for row in own_text(base)]
        self.fingerprint = base.fingerprint
        self.clean = self.now()

    def now(self) -> float:
        """Of the model as it stands; infinite where that is more than a float holds."""
        scores = score_targets(self._base, self._texts)
        try:
            return math.exp(-sum(s.log_prob for s in scores) / sum(len(s.log_probs) for s in scores))
        except OverflowError:
            return math.inf
