"""MEMIT: a batch of facts by least squares against the keys that the model sees elsewhere."""

from __future__ import annotations

from ..solve import Update
from .insertion import Insertion, spread

__all__ = ["memit"]


def memit(problem: Insertion) -> dict[str, Update]:
    """dW = R K^T (lambda C + K K^T)^-1 in each layer (arXiv 2210.07229, eq. 14)."""
    return spread(problem, lambda block, K: problem.moment(block).solve(K) / problem.covariance_weight)
