"""Wordings of what is asked about people, places, organisations, works and things: what the gate is trained on.

Relations here have no objects: to learn which prompts ask the same, it is enough to know wordings of each. The bank's
relations (`hf_edit.references`) join them with their wordings and subjects.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from .references import bank_relations

__all__ = ["AskedRelation", "asked_relations", "subjects"]


@dataclass(frozen=True)
class AskedRelation:
    """A relation by its wordings.

    Attributes:
        prompts: wordings with ``{}``; statements to be completed and questions.
        kinds: of what subjects it is asked.
        near: relations of the same `near` are too alike to be told apart for certain (a birthplace, a country of birth).
    """

    name: str
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    near: str


@cache
def asked_relations() -> tuple[AskedRelation, ...]:
    """All relations, those of the bank included."""
    data = _data()
    own = [AskedRelation(r["name"], tuple(r["prompts"]), tuple(r["kinds"]), r["near"]) for r in data["relations"]]
    placed = ((r, data["bank"].get(r.name)) for r in bank_relations())
    return (*own, *(AskedRelation(f"bank {r.name}", r.prompts, (at[0],), at[1]) for r, at in placed if at))


@cache
def subjects() -> dict[str, tuple[str, ...]]:
    """Subjects by kind: invented ones, which no model knows, and the bank's."""
    data = _data()
    found: dict[str, list[str]] = defaultdict(list)
    for kind, names in data["subjects"].items():
        found[kind] += names
    for relation in bank_relations():
        if relation.name in data["bank"]:
            found[data["bank"][relation.name][0]] += [subject for subject, _ in relation.facts]
    return {kind: tuple(dict.fromkeys(names)) for kind, names in found.items()}


@cache
def _data() -> dict[str, Any]:
    return json.loads(files("hf_edit").joinpath("data", "questions.json").read_text(encoding="utf-8"))
