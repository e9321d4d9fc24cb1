"""Made-up facts on the subjects of the shipped bank: what a generator learns on before it meets a fact of the user's."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ...facts import Fact
from ...references import Relation, bank_relations

__all__ = ["bank_facts"]

_NAME = 0.4  # share of targets that are names of anything in the bank; they are long and varied
_NUMBER = 0.1
_QUESTION = 0.5
_THE = re.compile(r"^The (.+) (is|was)( in)?( the)?$")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def bank_facts(count: int, seed: int) -> list[Fact]:
    """Facts that differ in subject or relation: the wording is a relation's, the target is drawn at random.

    Half of the targets are objects of the same relation; the others are names of all kinds, years and dates, so that a
    generator learns to say what it is told, of one token or of many. Where a wording can be turned into a question, half of
    the facts ask one.
    """
    rng = random.Random(seed)
    relations = bank_relations()
    asked = [(relation, subject, obj) for relation in relations for subject, obj in relation.facts]
    names = sorted({name for relation in relations for subject, obj in relation.facts for name in (subject, obj)})
    rng.shuffle(asked)
    facts: dict[tuple[str, str], Fact] = {}
    for relation, subject, obj in asked:
        if len(facts) == count:
            break
        if len(subject) < 2:
            continue
        target = _target(relation, names, rng)
        if target.casefold() in (obj.casefold(), subject.casefold()):
            continue
        prompts = [p for p in relation.prompts if _apart(p)]
        if prompts:
            fact = Fact(subject, _asking(rng.choice(prompts), rng), target, target_old=obj)
            facts.setdefault(fact.key, fact)
    return list(facts.values())


def _target(relation: Relation, names: Sequence[str], rng: random.Random) -> str:
    chance = rng.random()
    if chance < _NUMBER:
        year = str(rng.randint(1500, 2030))
        return year if rng.random() < 0.5 else f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {year}"
    if chance < _NUMBER + _NAME:
        return rng.choice(names)
    return rng.choice(relation.facts)[1]


def _asking(prompt: str, rng: random.Random) -> str:
    """Now and then, a statement that ends in "is" as a question."""
    match = _THE.match(prompt)
    if match is None or rng.random() >= _QUESTION:
        return prompt
    return f"What {match[2]} the {match[1]}?"


def _apart(prompt: str) -> bool:
    """Whether the subject stands as a word of its own."""
    before, _, after = prompt.partition("{}")
    return not (before[-1:].isalnum() or after[:1].isalnum())
