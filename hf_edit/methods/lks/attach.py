"""What LKS does at a mention: the generator's state takes the place of the entity's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...mentions import Points
from ...suffix import hidden_of
from .generator import Generator

__all__ = ["Rewriting"]


@dataclass(frozen=True)
class Rewriting:
    """The effect behind a block whose output is rewritten.

    Attributes:
        generator: on the model's device.
        codes: [facts, ...], `Generator.encode` of each fact's feature.
        write: which of the generator's blocks it is, counted from the lowest.
    """

    generator: Generator
    codes: torch.Tensor
    write: int = 0

    def __call__(self, _: torch.Tensor, output: Any, points: Points) -> Any:
        """The block's output with the generator's states at the points."""
        states = hidden_of(output)
        at = points.of(states)
        new = self.generator(self.codes[points.facts], states[at].to(self.codes), self.write)
        states = states.clone()
        states[at] = new.to(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states
