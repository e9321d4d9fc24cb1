"""The base editors: how optimised values get into weights. Each is a function from an `Insertion` to updates by module."""

from __future__ import annotations

from collections.abc import Callable

from ..solve import Update
from .alphaedit import alphaedit
from .insertion import Insertion
from .memit import memit
from .rome import r_rome, rome

__all__ = ["EDITORS", "ONE_BY_ONE", "Insertion"]

EDITORS: dict[str, Callable[[Insertion], dict[str, Update]]] = {
    "rome": rome,
    "r_rome": r_rome,
    "memit": memit,
    "alphaedit": alphaedit,
}
ONE_BY_ONE = frozenset({"rome", "r_rome"})  # edit one fact at a time, in one layer
