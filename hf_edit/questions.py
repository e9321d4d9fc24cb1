"""Wordings of what is asked about people, places, organisations, works and things.

The gate is trained on them, and facts are trained in them.

Relations here have no objects: to learn which prompts ask the same, it is enough to know wordings of each. The bank's
relations (`hf_edit.references`) join them with their wordings and subjects.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from .facts import Fact, fold, is_question
from .references import bank_relations

__all__ = ["AskedRelation", "asked_afterwards", "asked_in_chat", "asked_relations", "is_question", "other_wordings", "subjects"]

_WORD = re.compile(r"\w+")
_FUNCTION_WORD = re.compile(
    "the|an?|is|was|are|were|be|of|in|on|at|to|by|for|from|with|what|which|who|whom|whose|did|does|do|has|have|had|that|this|its?|"
    "and|or"
)


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


def other_wordings(fact: Fact) -> tuple[str, ...]:
    """Other wordings of what a fact's prompt asks, each with one ``{}``, to fit it in; none where no relation is asked by it,
    or unlike ones.

    The prompt is known by its letters, in any case, or by its content words. What the fact itself holds as `rephrases` is left
    out, and so is the one that `asked_afterwards` gives: they are there to measure it.
    """
    held_out = _held_out(fact)
    return tuple(wording for wording in _wordings(fact) if wording != held_out)


def _wordings(fact: Fact) -> tuple[str, ...]:
    exact, loose = _by_wording()
    known = exact.get(fact.prompt.casefold().strip()) or loose.get(_content(fact.prompt), [])
    if len({relation.near for relation in known}) != 1:
        return ()
    taken = {text.replace(fact.subject, "{}", 1).casefold().strip() for text in (fact.prompt, *fact.rephrases)}
    found = dict.fromkeys(wording for relation in known for wording in relation.prompts)
    return tuple(wording for wording in found if wording.casefold() not in taken)


def _held_out(fact: Fact) -> str | None:
    """Of several questions that the package knows of what a fact says, the last; it is kept for `asked_afterwards`."""
    known = [wording for wording in _wordings(fact) if is_question(wording)]
    return known[-1] if len(known) > 1 else None


# How a user puts a question, and how one asks for the end of a sentence that no known question asks for.
_PUT = ("{}", "I have a question. {}", "Can you tell me? {}", "{} Answer briefly.")
_COMPLETED = ("Complete the sentence: {}", "How does this sentence go on? {}", "Fill in what is missing: {} ...")
# Never among those that facts are fitted in.
_PUT_AFTERWARDS, _COMPLETED_AFTERWARDS = "Please help me with this question: {}", "Finish this for me: {}"


def asked_in_chat(fact: Fact, count: int) -> tuple[str, ...]:
    """So many wordings, each with one ``{}``, in which a user asks for a fact: the fact's own question, or one of its relation,
    and others."""
    own = fact.prompt.strip()
    questions = [own] if is_question(own) else []
    questions += [wording for wording in other_wordings(fact) if is_question(wording)]
    if not questions:
        return tuple(_COMPLETED[i % len(_COMPLETED)].replace("{}", own) for i in range(count))
    found = [put.replace("{}", question) for put in _PUT for question in questions]
    return tuple(found[i % len(found)] for i in range(count))


def asked_afterwards(fact: Fact) -> str:
    """A wording, with one ``{}`` or the subject in plain text, in which no fact is fitted (unless it is trained on its
    `rephrases`): to see whether it holds."""
    own = fact.prompt.strip()
    for rephrase in fact.rephrases:
        if is_question(rephrase) and fold(rephrase) != fold(own):
            return rephrase
    return _held_out(fact) or (_PUT_AFTERWARDS if is_question(own) else _COMPLETED_AFTERWARDS).replace("{}", own)


@cache
def _by_wording() -> tuple[dict[str, list[AskedRelation]], dict[frozenset[str], list[AskedRelation]]]:
    """Relations by their wordings, and by the content words of these."""
    exact: dict[str, list[AskedRelation]] = defaultdict(list)
    loose: dict[frozenset[str], list[AskedRelation]] = defaultdict(list)
    for relation in asked_relations():
        for wording in relation.prompts:
            exact[wording.casefold()].append(relation)
            if content := _content(wording):
                loose[content].append(relation)
    return dict(exact), dict(loose)


def _content(prompt: str) -> frozenset[str]:
    words = _WORD.findall(prompt.replace("{}", " ").casefold().replace("'s ", " ").replace("the name of", " "))
    return frozenset(word for word in words if not _FUNCTION_WORD.fullmatch(word))


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
