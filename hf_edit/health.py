"""Whether an edited model still writes as it did: its perplexity on text that it wrote before the edits.

Edits in the weights add up, and after many of them a model can collapse all at once (arXiv 2403.07175). Its own earlier text
is ordinary text that needs no download, and the unedited model's perplexity on it is what to compare with.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from .base import Base
from .cache import atomic_path, cache_folder
from .prose import perplexity
from .suffix import frozen
from .texts import sample_ids

__all__ = ["COLLAPSE", "Health", "own_text"]

COLLAPSE = 1.25  # times the clean perplexity, above which a model's other answers suffer visibly
_TEXTS, _LENGTH, _SEED = 16, 48, 20240  # another seed than the key statistics', so that nothing was fitted to this text


def own_text(base: Base) -> list[str]:
    """Text of the clean model's own, sampled once a model: call it while no edit is in force."""
    name = f"{base.tokenizer_fingerprint[:16]}-{_SEED}-{_TEXTS}-{_LENGTH}.safetensors"
    path = cache_folder("own_text", base.fingerprint) / name
    if path.exists():
        rows = load_file(path)["ids"].tolist()
    else:
        with frozen(base.model):
            rows = [row[:_LENGTH] for row in sample_ids(base, _TEXTS, _LENGTH, _SEED)]
        with atomic_path(path) as temporary:
            save_file({"ids": torch.tensor(rows)}, temporary)
    return base.tokenizer.batch_decode(rows, skip_special_tokens=True)


class Health:
    """Perplexity of one model on its own text, edited against clean.

    Args:
        base: the clean model.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._texts = own_text(base)
        self.fingerprint = base.fingerprint
        self.clean = perplexity(base, self._texts)

    def now(self) -> float:
        """Of the model as it stands."""
        return perplexity(self._base, self._texts)
