"""The least-squares insertion that MEMIT and AlphaEdit share, solved through the small system of the facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .attach import Factors

__all__ = ["Protected", "Update", "insert"]


@dataclass(frozen=True)
class Update:
    """A change of one weight and what it takes to solve it again for fewer facts.

    Attributes:
        factors: column i of `left` and row i of `right` belong to fact i.
        gram: float32 [facts, facts], K^T M K with the M of `insert`; zero where the editor has none.
    """

    factors: Factors
    gram: torch.Tensor


@dataclass(frozen=True)
class Protected:
    """M = (A + Kp Kp^T)^-1, for an editor's own A^-1 and keys Kp of facts edited before, so that new facts leave them in place
    (Kp is AlphaEdit's, arXiv 2410.02355, eq. 14; MEMIT takes it just as well).

    Attributes:
        keys: Kp, [in, earlier].
        whitened: A^-1 Kp, [in, earlier].
        own: X [in, n] -> A^-1 X.
    """

    keys: torch.Tensor
    whitened: torch.Tensor
    own: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, keys: torch.Tensor, own: Callable[[torch.Tensor], torch.Tensor]) -> Protected:
        """Protect keys, [in, earlier]; there may be none. More than the key is wide are replaced by as many with their sum of
        squares."""
        keys = keys.double()
        if keys.shape[1] > keys.shape[0]:
            values, vectors = torch.linalg.eigh(keys @ keys.T)
            keys = vectors * values.clamp(min=0).sqrt()
        return cls(keys, own(keys) if keys.shape[1] else keys, own)

    def precondition(self, K: torch.Tensor) -> torch.Tensor:
        """M K = A^-1 K - A^-1 Kp (I + Kp^T A^-1 Kp)^-1 Kp^T A^-1 K, by the Woodbury identity: [in, n], float64."""
        found = self.own(K.double())
        if not self.keys.shape[1]:
            return found
        inner = torch.eye(self.keys.shape[1], dtype=torch.float64) + self.keys.T @ self.whitened
        return found - self.whitened @ torch.linalg.solve(inner, self.keys.T @ found)


def insert(keys: torch.Tensor, whitened: torch.Tensor, residuals: torch.Tensor) -> Update:
    """dW = R K^T M (I + K K^T M)^-1 = R (I + K^T M K)^-1 K^T M, in float64.

    With M = (lambda C)^-1 this is MEMIT's update R K^T (lambda C + K K^T)^-1 (arXiv 2210.07229, eq. 14); the system to
    solve is as large as there are facts, not as the key.

    Args:
        keys: K, [in, facts].
        whitened: M K, [in, facts].
        residuals: R, [out, facts].
    """
    K, A = keys.double().cpu(), whitened.double().cpu()
    gram = K.T @ A
    right = torch.linalg.solve(torch.eye(len(gram), dtype=torch.float64) + gram, A.T)
    return Update(Factors(residuals.float().cpu(), right.float()), gram.float())
