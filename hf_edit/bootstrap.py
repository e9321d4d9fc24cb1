"""How far a mean can be trusted: percentile bootstrap over facts (Efron, 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["Estimate", "bootstrap", "paired_bootstrap"]

_CHUNK = 4_000_000  # resampled indices held at once


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of some values and the 2.5th and 97.5th percentile of the means of resamples, drawn with replacement.

    Args:
        values: one a fact; facts are what is drawn, so several questions of one fact belong into one value.
        resamples: how many.
        seed: of the draws; equal input gives equal output.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not len(values):
        raise ValueError("there are no values to take a mean of")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    data = torch.tensor(list(values), dtype=torch.float64)
    if not bool(data.isfinite().all()):
        raise ValueError("a mean is asked for of values that are not all finite; leave those facts out")
    draws = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK // len(data))
    means = torch.cat(
        [
            data[torch.randint(len(data), (min(step, resamples - first), len(data)), generator=draws)].mean(1)
            for first in range(0, resamples, step)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(math.fsum(data.tolist()) / len(data), low, high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of a - b over facts and its 95 % interval, `(difference, low, high)`.

    Two arms are compared fact by fact: what makes one fact harder than another is in both and cancels.

    Args:
        a, b: one value a fact, the same facts in the same order.

    Raises:
        ValueError: unequal lengths, no values, or one that is not finite.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs are of the same facts: there are {len(a)} values of one and {len(b)} of the other")
    return bootstrap([x - y for x, y in zip(a, b, strict=True)], resamples, seed)
