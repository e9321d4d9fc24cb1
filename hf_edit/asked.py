"""Accepted for callers of earlier versions, which had to say where a prompt ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["asked_at"]


@contextmanager
def asked_at(positions: Sequence[int] | None) -> Iterator[None]:
    """Has no effect: the logits after a token depend on the tokens up to there alone.

    Args:
        positions: for each row, the index of the prompt's last token.
    """
    yield
