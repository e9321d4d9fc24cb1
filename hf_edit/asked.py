"""Where a prompt ends and its answer begins, for edits that look at what is asked (`hf_edit.gate`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["asked_at", "asking", "first_reads"]

_ASKED: ContextVar[tuple[int, ...] | None] = ContextVar("asked", default=None)


@contextmanager
def asked_at(positions: Sequence[int] | None) -> Iterator[None]:
    """Say where the prompts of the next forward end, which the model can't see where an answer is given behind them.

    Args:
        positions: for each row, the index of the prompt's last token, not counting padding in front; None says nothing.
    """
    token = _ASKED.set(None if positions is None else tuple(positions))
    try:
        yield
    finally:
        _ASKED.reset(token)


def asking() -> tuple[int, ...] | None:
    """What `asked_at` says now."""
    return _ASKED.get()


def first_reads(points: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[int]:
    """For each row, the first position that is read, or its last one: an answer is read from the prompt's last token on.

    Args:
        points: (row, position) pairs.
        lengths: of the rows.
    """
    first = [length - 1 for length in lengths]
    for row, position in points:
        first[row] = min(first[row], position)
    return first
