"""Packs put together, compared, and kept in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import BaseMismatchError, ConflictingEditsError, MergeError, PackFormatError
from .facts import Fact, fold, resolve_conflicts
from .methods import get_method

if TYPE_CHECKING:
    from .pack import EditPack

__all__ = ["PackDiff", "difference", "in_order", "joined", "relinked"]

_SAME_BASE = ("base_model_type", "sizes", "tokenizer_fingerprint")


@dataclass(frozen=True)
class PackDiff:
    """What it takes to get from one pack to another.

    Attributes:
        added: facts of the other alone.
        removed: facts of the one alone.
        changed: (before, after) where both answer the same question otherwise.
        settings: (before, after) by the setting's name; "method" is one.
        tensors: whether the facts that both hold are stored with other numbers, or other modules are edited.
    """

    added: tuple[Fact, ...]
    removed: tuple[Fact, ...]
    changed: tuple[tuple[Fact, Fact], ...]
    settings: dict[str, tuple[Any, Any]]
    tensors: bool

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.settings or self.tensors)

    def __str__(self) -> str:
        lines = [f"- {f.question} {f.target}" for f in self.removed]
        lines += [f"+ {f.question} {f.target}" for f in self.added]
        lines += [f"~ {a.question} {a.target} -> {b.target}" for a, b in self.changed]
        lines += [f"~ {name}: {a!r} -> {b!r}" for name, (a, b) in self.settings.items()]
        return "\n".join([*lines, *(["~ other tensors"] if self.tensors else [])]) or "no difference"


def difference(one: EditPack, other: EditPack) -> PackDiff:
    """See `EditPack.diff`."""
    before, after = {f.key: f for f in one.facts}, {f.key: f for f in other.facts}
    shared = [key for key in before if key in after]
    old, new = ({"method": pack.method, **pack.config.to_dict()} for pack in (one, other))
    settings = {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}
    same = one.tensors.keys() == other.tensors.keys() and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
    changed = [(before[k], after[k]) for k in shared if fold(before[k].target) != fold(after[k].target)]
    return PackDiff(
        added=tuple(f for key, f in after.items() if key not in before),
        removed=tuple(f for key, f in before.items() if key not in after),
        changed=tuple(changed),
        settings=settings,
        tensors=not same and len(shared) == len(before) == len(after) and not changed,
    )


def joined(one: EditPack, other: EditPack) -> EditPack:
    """See `EditPack.__add__`."""
    for key in _SAME_BASE:
        if one.base[key] != other.base[key]:
            raise BaseMismatchError(
                f"the packs were made for different bases ({key}: {one.base[key]} and {other.base[key]}); no model fits both"
            )
    join = getattr(get_method(one.method), "join", None)
    if one.method != other.method or join is None:
        raise MergeError(
            f"edits by {one.method!r} and {other.method!r} can't become one pack; put both on the model: "
            "model.load_pack(pack, pack_name=...)"
        )
    if len(resolve_conflicts(other.facts, one.facts)) < len(other.facts):
        raise ConflictingEditsError("the packs share facts; take them out of one first: pack.remove(ids)")
    if {f.id for f in one.facts} & {f.id for f in other.facts}:
        raise ConflictingEditsError("facts of the two packs have the same id; give them different ids, or none")
    one.config.joining(other.config, {name: getattr(one.config, name) for name in one.config.structural})  # or it refuses
    fit = join(one.fit, other.fit)
    base = {**one.base, "base_fingerprint": _fingerprint(one, other, fit.modules)}
    return replace(one, fit=fit, base=base)


def _fingerprint(one: EditPack, other: EditPack, modules: Sequence[str]) -> str:
    """The fingerprint of the modules of both, which holds one of each."""
    known: dict[str, str] = {}
    for pack in (one, other):
        for module, found in zip(pack.fit.modules, pack.base["base_fingerprint"].split("-"), strict=True):
            if known.setdefault(module, found) != found:
                raise BaseMismatchError(f"the packs were made for bases with different weights in {module}; no model fits both")
    return "-".join(known[module] for module in modules)


def in_order(packs: Mapping[str, EditPack]) -> dict[str, EditPack]:
    """Packs of one folder, each behind the one that it was made on top of.

    Raises:
        PackFormatError: they name each other as what they were made on top of.
    """
    if all(pack.parent is None for pack in packs.values()):
        return dict(packs)
    digests = {name: pack.digest for name, pack in packs.items()}
    waiting: dict[str, EditPack] = dict(packs)
    ordered: dict[str, EditPack] = {}
    while waiting:
        missing = {digests[name] for name in waiting}
        free = [name for name, pack in waiting.items() if pack.parent not in missing]
        if not free:
            raise PackFormatError(f"the packs {', '.join(waiting)} name each other as what they were made on top of")
        for name in free:
            ordered[name] = waiting.pop(name)
    return ordered


def relinked(packs: Mapping[str, EditPack], active: Sequence[str]) -> dict[str, EditPack]:
    """The packs, those that were made on top of others naming what lies beneath them now."""
    linked, beneath = dict(packs), None
    for name in active:
        pack = linked[name]
        if pack.parent is not None:
            now = None if beneath is None else linked[beneath].digest
            if now != pack.parent:
                linked[name] = replace(pack, parent=now)
        if pack.in_weights:
            beneath = name
    return linked
