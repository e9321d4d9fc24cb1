"""Where an edit acts in a run, and what it does there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Effect", "Points", "Write"]

Write = tuple[int, int | None]  # the fact that is active at a token, and the token to come where its target is being said


@dataclass(frozen=True)
class Points:
    """Tokens of a run at which facts are active, each given by its row, its column among those that run, and its fact.

    Attributes:
        rows, columns, facts: all of one length.
        upcoming: of the same length: None where the token ends a mention; where it is one of the fact's target, which is
            being said, the target's next token.
        width: how many columns run.
    """

    rows: list[int]
    columns: list[int]
    facts: list[int]
    upcoming: list[int | None]
    width: int

    def of(self, states: torch.Tensor) -> tuple[list[int], ...]:
        """The index of these tokens in a module's tensor: [rows, columns, ...], or [rows * columns, ...] where it is flat."""
        if states.dim() == 3:
            return self.rows, self.columns
        return ([row * self.width + column for row, column in zip(self.rows, self.columns, strict=True)],)


class Effect(Protocol):
    """What an edit does after a module, at the tokens where facts are active."""

    def __call__(self, given: torch.Tensor, output: Any, points: Points, /) -> Any:
        """The module's output as it is to be.

        Args:
            given: the module's first argument.
            output: as the module has it; left as it is.
            points: at least one.
        """
        ...
