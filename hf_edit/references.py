"""Reference facts: known facts that share an object, from the bank that ships with the package or from the user."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from .facts import Fact, read_facts

__all__ = ["Reference", "Relation", "bank", "bank_prompts", "bank_relations", "references_for"]


@dataclass(frozen=True)
class Reference:
    """A known fact: `prompts` (wordings with ``{}``) filled with `subject` go on with `object`."""

    relation: str
    subject: str
    prompts: tuple[str, ...]
    object: str


@cache
def bank() -> dict[str, tuple[Reference, ...]]:
    """The shipped reference facts, by object in lower case."""
    by_object: dict[str, list[Reference]] = defaultdict(list)
    for relation in _relations():
        prompts = tuple(relation["prompts"])
        for subject, obj in relation["facts"]:
            by_object[obj.casefold()].append(Reference(relation["relation"], subject, prompts, obj))
    return {key: tuple(found) for key, found in by_object.items()}


@dataclass(frozen=True)
class Relation:
    """A relation of the bank: its wordings, its (subject, object) facts, and its objects in lower case."""

    name: str
    prompts: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    objects: frozenset[str]


@cache
def bank_relations() -> tuple[Relation, ...]:
    """The shipped bank's relations."""
    return tuple(
        Relation(
            r["relation"],
            tuple(r["prompts"]),
            tuple((subject, obj) for subject, obj in r["facts"]),
            frozenset(obj.casefold() for _, obj in r["facts"]),
        )
        for r in _relations()
    )


@cache
def bank_prompts() -> dict[str, tuple[str, ...]]:
    """All wordings of a bank relation, by each of its wordings in lower case."""
    return {p.casefold(): tuple(r["prompts"]) for r in _relations() for p in r["prompts"]}


def references_for(obj: str, source: Any, exclude: Iterable[str] = ()) -> list[Reference]:
    """Reference facts whose object is `obj`.

    Args:
        obj: the object, in any case.
        source: "bank", or the user's own: a path, a list of facts or of dicts (their targets are the objects).
        exclude: names that no reference may mention: the subjects that are being edited.
    """
    if source == "bank":
        found: Sequence[Reference] = bank().get(obj.casefold(), ())
    else:
        found = [r for r in _from_user(source) if r.object.casefold() == obj.casefold()]
    names = [name.casefold() for name in exclude]
    return [r for r in found if not any(name in r.subject.casefold() or name in r.prompts[0].casefold() for name in names)]


def _from_user(source: Any) -> list[Reference]:
    facts: list[Fact] = read_facts(os.fspath(source) if isinstance(source, os.PathLike) else source)
    return [Reference(f.prompt, f.subject, (f.prompt,), f.target) for f in facts]


@cache
def _relations() -> list[dict[str, Any]]:
    text = files("hf_edit").joinpath("data", "reference_facts.json").read_text(encoding="utf-8")
    return json.loads(text)["relations"]
