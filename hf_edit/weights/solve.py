"""The least-squares insertion that MEMIT and AlphaEdit share, solved through the small system of the facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attach import Factors

__all__ = ["Update", "insert"]


@dataclass(frozen=True)
class Update:
    """A change of one weight and what it takes to solve it again for fewer facts.

    Attributes:
        factors: column i of `left` and row i of `right` belong to fact i.
        gram: float32 [facts, facts], K^T M K with the M of `insert`; zero where the editor has none.
    """

    factors: Factors
    gram: torch.Tensor


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
