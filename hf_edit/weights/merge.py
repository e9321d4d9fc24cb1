"""Making a low-rank change part of a weight in half precision, for good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attach import Factors

__all__ = ["can_be_merged", "merged", "rounded"]

_HALF = (torch.bfloat16, torch.float16)


def can_be_merged(weight: Any) -> bool:
    """Whether a weight is a plain one in half precision: not quantised, and not offloaded."""
    plain = isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor and not weight.is_meta
    return plain and weight.dtype in _HALF


def merged(
    weight: torch.Tensor, changes: Sequence[Factors], transposed: bool, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """A weight with changes added in float32, rounded once.

    Args:
        weight: [out, in], or [in, out] where `transposed`, in half precision.
        changes: of that weight.
        generator: of the rounding, on the CPU.

    Returns:
        The weight in its own dtype, and the share of the change that it took on: its projection onto the change, 1 where all of
        it arrived.
    """
    dense = torch.stack([change.dense() for change in changes]).sum(0)
    dense = (dense.T if transposed else dense).to(weight.device)
    new = rounded(weight.float() + dense, weight.dtype, generator)
    arrived = ((new.float() - weight.float()) * dense).sum() / (dense * dense).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return new, float(arrived)


def rounded(numbers: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Numbers in half precision, rounded stochastically: up or down with the probability that makes the mean right.

    To the nearest, most of a change that is smaller than half a step would be lost; so none of it is on average.

    Args:
        numbers: float32.
        dtype: bfloat16 or float16.
        generator: on the CPU.
    """
    nearest = numbers.to(dtype)
    rest = numbers - nearest.float()
    # the neighbour on the other side of the number: one more or one less in the bits of the magnitude
    grows = (rest > 0) == (nearest > 0)
    bits = nearest.view(torch.int16) + torch.where(grows, 1, -1).to(torch.int16)
    other = bits.view(dtype)
    chance = rest / (other.float() - nearest.float())
    draw = torch.rand(numbers.shape, generator=generator).to(numbers.device)
    moves = (rest != 0) & (nearest != 0) & other.isfinite() & (draw < chance)
    return torch.where(moves, other, nearest)
