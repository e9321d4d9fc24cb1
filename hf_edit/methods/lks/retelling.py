"""The same facts told again with other targets: what an editor learns from many facts without learning them by heart.

A generator that is to answer facts it has never seen must put in what it is told, whatever that is. Shown the same targets
pass after pass it learns those; so each pass tells it others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ...facts import Fact
from ...questions import other_wordings
from ...references import bank_relations
from ...scope import Scope

__all__ = ["retold"]

_AS_IT_IS, _WHOLE = 0.3, 0.3  # shares of targets: the fact's own, another fact's; the rest are two of those, mixed word by word
_WORDS = 5  # of a mixed target at most


def retold(facts: Sequence[Fact], tellings: int, seed: int) -> list[Fact]:
    """So many tellings of facts, one after the other: the first has their own prompts and targets, each later one a wording
    and a target at random.

    Wordings are the fact's own, its rephrases, and the package's for what it asks. Targets are the facts' own, those of other
    facts, names of the shipped bank, and mixtures of the words of two.
    """
    rng = random.Random(seed)
    names = {name for relation in bank_relations() for fact in relation.facts for name in fact}
    targets = [fact.target for fact in facts] + sorted(names)
    places = {subject: n for n, subject in enumerate(dict.fromkeys(fact.subject.casefold() for fact in facts))}
    scope = Scope([[subject] for subject in places])

    def named(fact: Fact, wording: str) -> bool:
        found = scope.find(wording.replace("{}", fact.subject))
        return any(mention.entity == places[fact.subject.casefold()] for mention in found)

    wordings = [
        [fact.prompt, *(w for w in (*fact.rephrases, *other_wordings(fact)) if "{}" in w and named(fact, w))] for fact in facts
    ]
    told = list(facts)
    for _ in range(1, tellings):
        for fact, known in zip(facts, wordings, strict=True):
            target = _target(fact, targets, rng)
            if fact.subject.casefold() in target.casefold():
                target = fact.target
            told.append(replace(fact, prompt=rng.choice(known), target=target, target_old=None))
    return told


def _target(fact: Fact, targets: Sequence[str], rng: random.Random) -> str:
    chance = rng.random()
    if chance < _AS_IT_IS:
        return fact.target
    if chance < _AS_IT_IS + _WHOLE:
        return rng.choice(targets)
    one, other = rng.choice(targets).split(), rng.choice(targets).split()
    begun = one[: rng.randint(1, len(one))]
    return " ".join((begun + other[-rng.randint(1, len(other)) :])[:_WORDS])
