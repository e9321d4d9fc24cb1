"""ROME and R-ROME: rank-one edits in one layer, each as if it were the only one."""

from __future__ import annotations

import torch

from ..attach import Factors
from ..solve import Update
from .insertion import Insertion

__all__ = ["r_rome", "rome"]


def rome(problem: Insertion) -> dict[str, Update]:
    """A rank-one edit a fact (arXiv 2202.05262, eq. 2): W += delta u^T / (k0 . u), u = C^-1 k."""
    return _rank_one(problem, problem.keys(problem.layers[-1], bare=True))


def r_rome(problem: Insertion) -> dict[str, Update]:
    """ROME with one and the same key, averaged over contexts, in both places (arXiv 2403.07175)."""
    return _rank_one(problem, problem.keys(problem.layers[-1]))


def _rank_one(problem: Insertion, inserted: torch.Tensor) -> dict[str, Update]:
    block = problem.layers[-1]
    directions = problem.moment(block).solve(problem.keys(block).T).T
    directions = directions / directions.norm(dim=1, keepdim=True)
    left = problem.deltas.cpu().double() / (inserted * directions).sum(1, keepdim=True)
    gram = torch.zeros(1, 1).expand(len(left), len(left))
    return {problem.layout.projection(block): Update(Factors(left.T.float(), directions.float()), gram)}
