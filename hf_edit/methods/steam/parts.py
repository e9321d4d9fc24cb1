"""The tensors of a pack of weight edits, by module: factors, and what it takes to solve them for fewer facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ...weights.attach import Factors
from ...weights.solve import Update
from ..base import Fit

__all__ = ["PARTS", "alone", "appended", "chosen", "update_of"]

PARTS = ("left", "right", "gram")  # behind a gate the first, which holds the values
_JOINED: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "left": partial(torch.cat, dim=1),
    "right": torch.cat,
    "gram": lambda grams: torch.block_diag(*grams),
}


def chosen(fit: Fit, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors of some of the facts, with their changes as they are."""
    found: dict[str, torch.Tensor] = {}
    keep = list(keep)
    for module in fit.modules:
        left, right, gram = (fit.tensors.get(f"{module}.{part}") for part in PARTS)
        assert left is not None
        found[f"{module}.left"] = left[:, keep]
        if right is not None:
            found[f"{module}.right"] = right[keep]
        if gram is not None:
            found[f"{module}.gram"] = gram[keep][:, keep]
    return found


def update_of(fit: Fit, module: str) -> Update:
    """A module's change in a pack."""
    left, right, gram = (fit.tensors.get(f"{module}.{part}") for part in PARTS)
    assert left is not None
    return alone(left) if right is None or gram is None else Update(Factors(left, right), gram)


def alone(values: torch.Tensor) -> Update:
    """Values that act one by one, [out, facts], which no key belongs to."""
    count = values.shape[1]
    return Update(Factors(values, torch.zeros(count, 0)), torch.zeros(1, 1).expand(count, count))


def appended(
    tensors: Mapping[str, torch.Tensor], updates: Mapping[str, Update], parts: Sequence[str] = PARTS
) -> dict[str, torch.Tensor]:
    """Earlier factors with new ones beside them; a module that only one of the two edits gets zeros for the other."""
    new = {m: dict(zip(PARTS, (u.factors.left, u.factors.right, u.gram), strict=True)) for m, u in updates.items()}
    old: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        old.setdefault(module, {})[part] = tensor
    counts = [next((side[m]["left"].shape[1] for m in side), 0) for side in (old, new)]
    joined = {}
    for module in sorted({*old, *new}):
        like = old.get(module) or new[module]
        sides = [
            side.get(module)
            or {
                "left": torch.zeros(len(like["left"]), count),
                "right": torch.zeros(count, like["right"].shape[1] if "right" in like else 0),
                "gram": torch.zeros(1, 1).expand(count, count),
            }
            for side, count in zip((old, new), counts, strict=True)
        ]
        for part in parts:
            joined[f"{module}.{part}"] = _JOINED[part]([side[part] for side in sides])
    return joined
