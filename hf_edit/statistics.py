"""Second moments of MLP keys: what a weight edit must not disturb.

C = E[k k^T], uncentred, k the input of a block's MLP output projection (ROME, arXiv 2202.05262, sec. 3.1). The originals
take it from 100,000 documents of Wikipedia; here the model samples its own text, so nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .base import Base
from .cache import atomic_path, cache_folder
from .errors import BaseMismatchError
from .layout import weight_shape
from .progress import bar
from .suffix import frozen, read_keys_and_states
from .texts import sample_ids

__all__ = ["KeyStatistics", "Moment"]

_SAMPLE_LENGTH = 64
# Added to C's diagonal, relative to the diagonal's median (the mean is the first token's, whose keys are enormous):
# directions that the sampled text never used stay solvable.
_RIDGE = 1e-2


@dataclass
class Moment:
    """The second moment of one module's keys.

    Attributes:
        matrix: float64 [in, in], the mean of k k^T.
        tokens: how many keys it was taken from.
    """

    matrix: torch.Tensor
    tokens: int
    _factor: torch.Tensor | None = field(default=None, repr=False)

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """C^-1 K in float64, C with its ridge.

        Args:
            keys: [in, n].

        Returns:
            [in, n]. C is factorised at the first call only.
        """
        if self._factor is None:
            ridge = _RIDGE * self.matrix.diagonal().median().clamp(min=1e-12)
            damped = self.matrix + ridge * torch.eye(len(self.matrix), dtype=torch.float64)
            self._factor = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(keys.to("cpu", torch.float64), self._factor)


class KeyStatistics:
    """Second moments of MLP keys, by module name, for one model.

    Attributes:
        fingerprint: of the model they belong to (`Base.fingerprint`).
        moments: by module name.
    """

    def __init__(self, fingerprint: str, moments: dict[str, Moment] | None = None) -> None:
        self.fingerprint = fingerprint
        self.moments = moments or {}

    @classmethod
    def compute(
        cls,
        base: Base,
        modules: Sequence[str],
        *,
        texts: Sequence[str] | None = None,
        num_tokens: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> KeyStatistics:
        """Second moments of some modules' keys.

        Args:
            base: the clean model.
            modules: names of MLP output projections.
            texts: the text to read; None: the model samples its own.
            num_tokens: how many tokens; by default four for each key dimension, at least 8,192.
            seed: of the sampling.
        """
        if num_tokens is None:
            num_tokens = default_tokens(base, modules)
        with frozen(base.model):
            rows = _tokenised(base, texts, num_tokens) if texts is not None else _sampled(base, num_tokens, seed, progress)
            moments = _second_moments(base, modules, rows, progress)
        return cls(base.fingerprint, moments)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `key_statistics.safetensors` into a folder (float32, the file replaced whole or not at all)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: m.matrix.float() for name, m in self.moments.items()}
        metadata = {"format": "pt", "fingerprint": self.fingerprint}
        metadata |= {f"tokens.{name}": str(m.tokens) for name, m in self.moments.items()}
        with atomic_path(folder / "key_statistics.safetensors") as path:
            save_file(tensors, path, metadata)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, fingerprint: str | None = None) -> KeyStatistics:
        """Read a folder that `save_pretrained` wrote.

        Args:
            fingerprint: of the model they are meant for; checked where given.

        Raises:
            BaseMismatchError: they belong to another model.
        """
        from safetensors import safe_open

        path = Path(directory) / "key_statistics.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
            raise BaseMismatchError(
                f"{path} holds the statistics of another model (fingerprint {metadata.get('fingerprint')}, not "
                f"{fingerprint}). Compute them for this one: KeyStatistics.compute(...)."
            )
        tensors = load_file(path)
        moments = {name: Moment(t.double(), int(metadata[f"tokens.{name}"])) for name, t in tensors.items()}
        return cls(metadata["fingerprint"], moments)


def cached_statistics(
    base: Base, modules: Sequence[str], *, num_tokens: int | None = None, progress: bool = True
) -> KeyStatistics:
    """Statistics of a clean model from the cache folder; what is missing there is computed and added."""
    if num_tokens is None:
        num_tokens = default_tokens(base, modules)
    folder = cache_folder("key_statistics", f"{base.fingerprint}-{num_tokens}")
    path = folder / "key_statistics.safetensors"
    known = KeyStatistics(base.fingerprint)
    if path.exists():
        known = KeyStatistics.from_pretrained(folder, fingerprint=base.fingerprint)
    missing = [name for name in modules if name not in known.moments]
    if missing:
        known.moments |= KeyStatistics.compute(base, missing, num_tokens=num_tokens, progress=progress).moments
        known.save_pretrained(folder)
    return known


def default_tokens(base: Base, modules: Sequence[str]) -> int:
    """Four tokens for each key dimension, at least 8,192: efficacy needs less, sparing other facts gains from more."""
    return max(8192, 4 * max(weight_shape(base.model.get_submodule(name))[1] for name in modules))


def _sampled(base: Base, num_tokens: int, seed: int, progress: bool) -> list[list[int]]:
    """Texts that the model samples, kept in the cache: statistics of further modules read the same ones."""
    folder = cache_folder("samples", base.fingerprint)
    path = folder / f"{num_tokens}-{seed}.safetensors"
    if path.exists():
        return load_file(path)["ids"].tolist()
    count = -(-num_tokens // _SAMPLE_LENGTH)
    with bar(count * _SAMPLE_LENGTH, "sampling text for key statistics", "token", progress) as shown:
        rows = sample_ids(base, count, _SAMPLE_LENGTH, seed, listener=shown.update)
    rows = [row[:_SAMPLE_LENGTH] for row in rows]
    with atomic_path(path) as temporary:
        save_file({"ids": torch.tensor(rows)}, temporary)
    return rows


def _tokenised(base: Base, texts: Sequence[str], num_tokens: int) -> list[list[int]]:
    """Texts as token rows of at most 512 tokens, up to the budget."""
    rows: list[list[int]] = []
    left = num_tokens
    for text in texts:
        if left <= 0:
            break
        ids = base.tokenizer(text)["input_ids"][:left]
        rows += [ids[i : i + 512] for i in range(0, len(ids), 512)]
        left -= len(ids)
    if not rows:
        raise ValueError("texts holds no token; give text, or texts=None to let the model sample its own")
    return rows


def _second_moments(base: Base, modules: Sequence[str], rows: list[list[int]], progress: bool) -> dict[str, Moment]:
    layout = base.layout()
    last = max(_block_of(layout.blocks_path, name) for name in modules)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    with bar(len(rows), "key statistics", "text", progress) as shown:
        for first in range(0, len(rows), 32):
            group = rows[first : first + 32]
            points = [(i, j) for i, row in enumerate(group) for j in range(len(row))]
            keys, _ = read_keys_and_states(base.model, layout, group, points, modules=modules, last=last)
            for name, found in keys.items():
                product = found.float().T @ found.float()
                sums[name] = sums[name] + product.double().cpu() if name in sums else product.double().cpu()
            tokens += len(points)
            shown.update(len(group))
    return {name: Moment(total / tokens, tokens) for name, total in sums.items()}


def _block_of(blocks_path: str, module: str) -> int:
    return int(module.removeprefix(f"{blocks_path}.").split(".")[0])
