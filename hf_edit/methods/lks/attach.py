"""What LKS does at a mention: the generator's state takes the place of the entity's own; and where its target is being said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...suffix import hidden_of
from ..scope.points import Points
from .features import token_vectors
from .generator import Generator

__all__ = ["Rewriting"]


@dataclass(frozen=True)
class Rewriting:
    """The effect behind a block whose output is rewritten.

    Attributes:
        generator: on the model's device.
        codes: [facts, ...], `Generator.encode` of each fact's feature.
        write: which of the generator's blocks it is, counted from the lowest.
        embeddings: the model's, of tokens; only for what acts where a target is being said.
    """

    generator: Generator
    codes: torch.Tensor
    write: int = 0
    embeddings: nn.Module | None = None

    def __call__(self, _: torch.Tensor, output: Any, points: Points) -> Any:
        """The block's output with the generator's states at the points."""
        states = hidden_of(output)
        at = points.of(states)
        codes = self.codes[points.facts]
        carried = [n for n, token in enumerate(points.upcoming) if token is not None]
        if carried:
            assert self.embeddings is not None
            upcoming = [t for t in points.upcoming if t is not None]
            tokens = token_vectors(self.embeddings, upcoming, self.generator.hidden)
            codes[carried] = self.generator.carry(tokens.to(codes))
        new = self.generator(codes, states[at].to(codes), self.write)
        states = states.clone()
        states[at] = new.to(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states
