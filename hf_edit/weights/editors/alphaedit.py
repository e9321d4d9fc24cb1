"""AlphaEdit: a batch of facts written into the directions that the model's other keys do not use."""

from __future__ import annotations

import torch

from ..solve import Update
from .insertion import Insertion, spread

__all__ = ["alphaedit"]


def alphaedit(problem: Insertion) -> dict[str, Update]:
    """dW^T = [P (K K^T + Kp Kp^T) + L2 I]^-1 P K R^T in each layer (arXiv 2410.02355, eq. 14), P onto the null space of C.

    L2 is relative to the mean squared length of the projected keys, and the threshold to C's mean eigenvalue, so both carry
    over to other models.
    """

    spaces, ridge = {}, {}
    for block in problem.layers:
        moment = problem.moment(block)
        spaces[block] = moment.null_space(problem.null_space_threshold * float(moment.matrix.diagonal().mean()))
        keys = spaces[block].project(problem.keys(block).T)
        ridge[block] = problem.ridge * float((keys**2).sum(0).mean().clamp(min=1e-12))

    def precondition(block: int, keys: torch.Tensor) -> torch.Tensor:
        return spaces[block].project(keys) / ridge[block]

    return spread(problem, precondition)
