"""Progress bars: shown on a terminal's standard error, for what takes longer than two seconds."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

__all__ = ["bar"]


def bar(total: int, what: str, unit: str = "it", show: bool = True) -> Any:
    """A progress bar that appears after two seconds."""
    return tqdm(total=total, desc=what, unit=unit, disable=not show, delay=2, leave=False, dynamic_ncols=True)
