"""`Moment`: the second moment of a module's keys, what is solved with it, and its factors on disk.

Factorising takes d^3 operations and gives the same for every edit of a model, so factors are kept in the cache folder, by
a digest of the matrix they belong to. Triangles are stored folded: half the bytes of a square. One CPU thread, float64,
the file in the page cache:

| width | Cholesky, CPU s | read, unfolded and checked, CPU s | MB |
|---|---|---|---|
| 1,536 | 0.06 | 0.02 | 9 |
| 4,096 | 0.9 | 0.18 | 67 |
| 8,192 | 5.9 | 0.97 | 268 |
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache import atomic_path, cache_folder
from .errors import PackFormatError

__all__ = ["Moment", "NullSpace"]

logger = logging.getLogger(__name__)

# Added to C's diagonal, relative to the diagonal's median (the mean is the first token's, whose keys are enormous):
# directions that the sampled text hardly used by chance are not taken for free ones, and stay solvable.
_RIDGE = 1e-1
_WORTH_KEEPING = 512  # below this width a factor takes no longer to make than to read


@dataclass(frozen=True)
class NullSpace:
    """The projector P onto the directions that keys hardly use (AlphaEdit, arXiv 2410.02355, sec. 3.2).

    Attributes:
        basis: float64 [in, k], orthonormal: of the null space, or of its complement where that has fewer directions.
        complement: whether `basis` spans the complement: P = I - B B^T then, B B^T otherwise.
    """

    basis: torch.Tensor
    complement: bool

    @property
    def dimension(self) -> int:
        """Dimension of the null space."""
        width, k = self.basis.shape
        return width - k if self.complement else k

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        """P X in float64, for X [in, n]."""
        vectors = vectors.to("cpu", torch.float64)
        inside = self.basis @ (self.basis.T @ vectors)
        return vectors - inside if self.complement else inside


class Moment:
    """The second moment C = E[k k^T] of one module's keys, in float64 on the CPU.

    Args:
        matrix: [in, in], the mean of k k^T.
        tokens: how many keys it was taken from.
    """

    def __init__(self, matrix: torch.Tensor, tokens: int) -> None:
        self.tokens = tokens
        self.width = len(matrix)
        self._total: torch.Tensor | None = matrix.to("cpu", torch.float64) * tokens
        self._stored: tuple[Path, str] | None = None
        self._factor: torch.Tensor | None = None

    @classmethod
    def of_total(cls, total: torch.Tensor, tokens: int) -> Moment:
        """A moment from the sum of k k^T over `tokens` keys, [in, in], which is kept bit for bit."""
        moment = cls(total[:0], tokens)
        moment.width, moment._total = len(total), total.to("cpu", torch.float64)
        return moment

    @classmethod
    def stored(cls, path: Path, name: str, tokens: int, digest: str) -> Moment:
        """A moment whose folded sum is a tensor of a safetensors file; the file is read when the sum is needed.

        Args:
            digest: `Moment.digest` of what was written, checked against what is read.

        Raises:
            PackFormatError: the file holds no folded float64 triangle of this name.
        """
        moment = cls(torch.empty(0, 0), tokens)
        moment._total, moment._stored = None, (path, name)
        try:
            with safe_open(path, "pt") as file:
                found = file.get_slice(name)
                dtype, shape = found.get_dtype(), found.get_shape()
        except (SafetensorError, OSError) as error:
            raise PackFormatError(f"{path} holds no readable tensor {name!r}: {error}") from error
        moment.width = shape[0] - 1
        if dtype != "F64" or len(shape) != 2 or moment.width < 1 or shape[1] != (moment.width + 1) // 2 or tokens < 1:
            raise PackFormatError(f"{path}: {name!r} is no second moment ({dtype} {shape}, {tokens} tokens)")
        moment.__dict__["digest"] = digest
        return moment

    @property
    def total(self) -> torch.Tensor:
        """The sum of k k^T: float64 [in, in]. A stored one is read at each call and not held in memory.

        Raises:
            PackFormatError: the file was changed since it was written.
        """
        if self._total is not None:
            return self._total
        assert self._stored is not None
        path, name = self._stored
        with safe_open(path, "pt") as file:
            lower = unfolded(file.get_tensor(name))
        total = lower + lower.tril(-1).T
        if _digest(total, self.tokens) != self.digest or not bool(torch.isfinite(total).all()):
            raise PackFormatError(f"{path}: {name!r} is damaged (its digest differs); compute it again or get it again")
        return total

    @property
    def matrix(self) -> torch.Tensor:
        """C = E[k k^T]: float64 [in, in]."""
        return self.total / self.tokens

    @cached_property
    def digest(self) -> str:
        """Hash of the tokens, the diagonal and a sample of rows: what factors on disk are known by."""
        return _digest(self.total, self.tokens)

    def __add__(self, other: Moment) -> Moment:
        """The moment over both sets of keys."""
        if self.width != other.width:
            raise ValueError(f"keys of {self.width} and of {other.width} numbers have no common second moment")
        return Moment.of_total(self.total + other.total, self.tokens + other.tokens)

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """C^-1 K in float64, C with its ridge.

        Args:
            keys: [in, n].

        Returns:
            [in, n]. C is factorised once: the Cholesky factor is kept in memory and in the cache folder.
        """
        if self._factor is None:
            self._factor = self._cholesky()
        return torch.cholesky_solve(keys.to("cpu", torch.float64), self._factor)

    def null_space(self, threshold: float) -> NullSpace:
        """The projector onto the eigenvectors of C (without ridge) whose eigenvalue is below `threshold`.

        The eigenvectors are kept in the cache folder and serve every threshold.

        Raises:
            ValueError: no eigenvalue is below the threshold, or it is not positive.
        """
        if not threshold > 0:
            raise ValueError(f"the threshold must be positive, not {threshold}")
        path = self._kept("eigenvectors")
        found = _read_eigenvectors(path, self.width, threshold) if path else None
        if found is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            if path:
                _write(path, {"values": values, "vectors": vectors.T.contiguous()})
            found = _beside(values, threshold, lambda rows: vectors.T[rows])
        if found.dimension == 0:
            raise ValueError(f"no eigenvalue of C is below {threshold}; give a larger threshold")
        return found

    def _cholesky(self) -> torch.Tensor:
        path = self._kept(f"cholesky-{_RIDGE:g}")
        if path is not None and (found := _read_triangle(path, self.width)) is not None:
            return found
        damped = self.matrix
        diagonal = damped.diagonal()
        diagonal += _RIDGE * diagonal.median().clamp(min=1e-12)
        factor = torch.linalg.cholesky(damped)
        if path is not None:
            _write(path, {"lower": folded(factor)})
        return factor

    def _kept(self, what: str) -> Path | None:
        """Where a factor is kept, or None where that does not pay."""
        if self.width < _WORTH_KEEPING:
            return None
        return cache_folder("key_factors") / f"{self.digest}-{what}.safetensors"


def folded(lower: torch.Tensor) -> torch.Tensor:
    """A lower triangle [n, n] without its empty half: [n + 1, ceil(n / 2)].

    The last columns' triangle, transposed, lies above the first columns'; what is above the diagonal is not read.
    """
    n = len(lower)
    half = (n + 1) // 2
    rest = n - half
    out = lower.new_zeros(n + 1, half)
    out[1 : half + 1] = lower[:half, :half].tril()
    out[:rest, :rest] += lower[half:, half:].T.triu()
    out[half + 1 :] = lower[half:, :half]
    return out


def unfolded(packed: torch.Tensor) -> torch.Tensor:
    """The lower triangle [n, n] that `folded` packed, zeros above it."""
    n = len(packed) - 1
    half = (n + 1) // 2
    rest = n - half
    lower = packed.new_zeros(n, n)
    lower[:half, :half] = packed[1 : half + 1].tril()
    lower[half:, half:] = packed[:rest, :rest].triu().T
    lower[half:, :half] = packed[half + 1 :]
    return lower


def _digest(total: torch.Tensor, tokens: int) -> str:
    # Of the lower triangle only, which is what files hold.
    rows = sorted(set(torch.linspace(0, len(total) - 1, 64).long().tolist()))
    digest = hashlib.sha256(f"{tuple(total.shape)} {tokens}".encode())
    digest.update(total.diagonal().contiguous().numpy().tobytes())
    for row in rows:
        digest.update(total[row, : row + 1].contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _beside(values: torch.Tensor, threshold: float, vectors: Callable[[slice], torch.Tensor]) -> NullSpace:
    """The smaller of the two bases; `values` ascend and `vectors` gives rows of eigenvectors."""
    k = int((values < threshold).sum())
    if complement := 2 * k > len(values):
        return NullSpace(vectors(slice(k, None)).T.clone(), complement)
    return NullSpace(vectors(slice(k)).T.clone(), complement)


def _crc(tensor: torch.Tensor) -> str:
    return str(zlib.crc32(memoryview(tensor.numpy())))  # type: ignore[arg-type]


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Keep a factor; a full disk costs the next edit some time and this one nothing."""
    checks = {name: _crc(tensor) for name, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"format": "pt", **checks})
    except (OSError, SafetensorError) as error:
        logger.warning("a factor could not be kept in %s: %s", path, error)


def _read_triangle(path: Path, width: int) -> torch.Tensor | None:
    """A factor from disk; None where there is none or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            packed, check = file.get_tensor("lower"), (file.metadata() or {}).get("lower")
    except (SafetensorError, OSError):
        return None
    right = packed.dtype == torch.float64 and packed.shape == (width + 1, (width + 1) // 2)
    return unfolded(packed) if right and _crc(packed) == check else None


def _read_eigenvectors(path: Path, width: int, threshold: float) -> NullSpace | None:
    """The null space from disk, reading only the eigenvectors it needs; None where there are none or they are damaged."""
    try:
        with safe_open(path, "pt") as file:
            values, check = file.get_tensor("values"), (file.metadata() or {}).get("values")
            vectors = file.get_slice("vectors")
            if values.dtype != torch.float64 or _crc(values) != check:
                return None
            if vectors.get_dtype() != "F64" or [len(values), *vectors.get_shape()] != [width] * 3:
                return None
            found = _beside(values, threshold, lambda rows: vectors[rows])
    except (SafetensorError, OSError):
        return None
    probe = torch.randn(found.basis.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthonormal = torch.allclose(found.basis.T @ (found.basis @ probe), probe, rtol=0, atol=1e-8)
    return found if orthonormal else None
