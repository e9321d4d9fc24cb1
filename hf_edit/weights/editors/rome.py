"""ROME and R-ROME: a rank-one edit of one fact in one layer."""

from __future__ import annotations

import torch

from ..attach import Factors
from ..solve import Update
from .insertion import Insertion

__all__ = ["r_rome", "rome"]


def rome(problem: Insertion) -> dict[str, Update]:
    """Rank-one edit of a single fact (arXiv 2202.05262, eq. 2): W += delta u^T / (k0 . u), u = C^-1 k."""
    return _rank_one(problem, problem.keys(problem.layers[-1], bare=True))


def r_rome(problem: Insertion) -> dict[str, Update]:
    """ROME with one and the same key, averaged over contexts, in both places (arXiv 2403.07175)."""
    return _rank_one(problem, problem.keys(problem.layers[-1]))


def _rank_one(problem: Insertion, inserted: torch.Tensor) -> dict[str, Update]:
    block = problem.layers[-1]
    keys = problem.keys(block)
    direction = problem.moment(block).solve(keys.T)[:, 0]
    direction = direction / direction.norm()
    left = problem.values.deltas[0].double().cpu() / (inserted[0].cpu() @ direction)
    return {
        problem.layout.projection(block): Update(Factors(left[:, None].float(), direction[None].float()), torch.zeros(1, 1))
    }
