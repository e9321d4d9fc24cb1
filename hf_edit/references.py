"""Reference facts: known facts that share an object, from the bank that ships with the package, the user or Wikidata.

A source is a function that answers one question: which known facts have this object?
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import ahocorasick

from .facts import Fact, fold
from .reading import read_facts

__all__ = [
    "Reference",
    "Relation",
    "Source",
    "balanced",
    "bank",
    "bank_relations",
    "open_source",
    "references_for",
]

_WORDS = (
    "'bank', 'wikidata', 'facts', 'datasets:NAME', a path (.jsonl, .json, .csv), facts, a function of the object, or a list of "
    "several of these"
)


@dataclass(frozen=True)
class Reference:
    """A known fact: `prompts` (wordings with ``{}``) filled with `subject` go on with `object`."""

    relation: str
    subject: str
    prompts: tuple[str, ...]
    object: str


Source = Callable[[str], Sequence[Reference]]


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


def references_for(obj: str, source: Any, exclude: Iterable[str] = ()) -> list[Reference]:
    """Reference facts whose object is `obj`; for many objects, `open_source` once and ask it for each.

    Args:
        obj: the object, in any case.
        source: see `open_source`.
        exclude: names that no reference may mention: the subjects that are being edited.
    """
    return list(open_source(source, exclude=exclude)(obj))


def open_source(source: Any, *, facts: Sequence[Fact] = (), exclude: Iterable[str] = ()) -> Source:
    """A source of reference facts: a function from an object, in any case, to the references that have it.

    Args:
        source: "bank", the shipped facts; "wikidata", online (see `hf_edit.wikidata`); "datasets:NAME" or
            "datasets:NAME:SPLIT", a data set with the columns subject, prompt and target (needs the package `datasets`);
            "facts", nothing beyond the facts' own references; a path (.jsonl, .json, .csv); facts, mappings or `Reference`s,
            in a list or any other iterable; a function from the object to such; or a list of several sources, which are asked
            in turn and joined.
        facts: the facts being edited. Their own references come first, whatever the source, and none mentions their subjects.
        exclude: further names that no reference may mention, as whole words in any case.

    Returns:
        The source. A user's facts are read and indexed once, here; repetitions are dropped.

    Raises:
        ValueError: it is no source, or holds what is no fact.
        FileNotFoundError: the path does not exist.
        ImportError: `datasets` is not installed.
        SourceUnavailableError: from the function, where an online source does not answer.
    """
    sources = [_index(_own(facts)), *_opened(source)]
    mentions = _mentions([*(fact.subject for fact in facts), *exclude])

    def find(obj: str) -> list[Reference]:
        found: dict[str, Reference] = {}
        for each in sources:
            for reference in each(obj):
                text = fold(reference.prompts[0].replace("{}", reference.subject))
                if not mentions(text):
                    found.setdefault(text, reference)
        return list(found.values())

    return find


def balanced(found: Iterable[Reference], max_references: int, max_per_relation: int) -> list[Reference]:
    """References balanced over their relations: the relations take turns, in the order in which they first appear.

    Args:
        max_references: how many at most.
        max_per_relation: how many of one relation at most.
    """
    by_relation: dict[str, list[Reference]] = defaultdict(list)
    for reference in found:
        by_relation[reference.relation].append(reference)
    queues = [group[:max_per_relation] for group in by_relation.values()]
    turns = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:max_references]


def _opened(source: Any) -> list[Source]:
    """The sources that a user's word for them names."""
    if isinstance(source, (list, tuple)) and not all(isinstance(s, (Fact, Mapping, Reference)) for s in source):
        return [opened for part in source for opened in _opened(part)]
    if isinstance(source, (str, os.PathLike)):
        return [_named(os.fspath(source))]
    if isinstance(source, (Fact, Mapping, Reference)):
        return [_index([_reference(source)])]
    if callable(source):
        return [_asked(source)]
    if isinstance(source, Iterable):
        return [_index(_read(source))]
    raise ValueError(f"references come from {_WORDS}, not from {type(source).__name__}")


def _named(name: str) -> Source:
    if name == "bank":
        return _index(reference for group in bank().values() for reference in group)
    if name == "facts":
        return lambda obj: ()
    if name == "wikidata":
        from .wikidata import Wikidata

        return Wikidata()
    if name.startswith("datasets:"):
        return _index(_read(_dataset(name)))
    if name == "given":
        raise ValueError("these settings were saved without their references, which were objects; give them again")
    if not name.lower().endswith((".jsonl", ".json", ".csv")):
        raise ValueError(f"there is no source of references {name!r}; references come from {_WORDS}")
    return _index(_reference(fact) for fact in read_facts(name))


def _dataset(name: str) -> Iterable[Any]:
    """The rows of "datasets:NAME" or "datasets:NAME:SPLIT"."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"references={name!r} needs the package datasets: pip install datasets. Or give the facts as a .jsonl file."
        ) from error
    repository, _, split = name.removeprefix("datasets:").partition(":")
    rows = load_dataset(repository, split=split or "train")
    # a data set that was made for other purposes has columns that no reference needs
    return ({name: row[name] for name in ("subject", "prompt", "target") if name in row} for row in rows)


def _asked(function: Callable[[str], Iterable[Any]]) -> Source:
    """A user's function as a source; mappings it gives need no target."""

    def find(obj: str) -> list[Reference]:
        return _read(function(obj), obj)

    return find


def _index(references: Iterable[Reference]) -> Source:
    by_object: dict[str, list[Reference]] = defaultdict(list)
    for reference in references:
        by_object[fold(reference.object)].append(reference)
    return lambda obj: by_object.get(fold(obj), ())


def _read(rows: Iterable[Any], obj: str | None = None) -> list[Reference]:
    """References from rows of any kind; the error names the row."""
    read = []
    for number, row in enumerate(rows, start=1):
        try:
            read.append(_reference(row, obj))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"references, record {number}: {error}") from error
    return read


def _reference(row: Any, obj: str | None = None) -> Reference:
    if isinstance(row, Reference):
        return row
    if isinstance(row, Mapping) and obj is not None:
        row = {"target": obj, **row}
    fact = row if isinstance(row, Fact) else Fact.from_dict(row)
    if fact.form == "messages":
        raise ValueError(f"the prompt of a reference fact is text, not messages: {fact.question!r:.120}")
    return Reference(fact.prompt, fact.subject, (fact.prompt,), fact.target)


def _own(facts: Iterable[Fact]) -> Iterator[Reference]:
    """The references that facts bring along; a text that names no subject is a relation of its own."""
    for fact in facts:
        for own in fact.references:
            yield _reference(own) if isinstance(own, Fact) else Reference(own, "", (own,), fact.target)


def _mentions(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a folded text holds one of the names as whole words; one pass however many names there are."""
    automaton = ahocorasick.Automaton()
    for name in filter(None, map(fold, names)):
        automaton.add_word(name, len(name))
    if not len(automaton):
        return lambda text: False
    automaton.make_automaton()

    def found(text: str) -> bool:
        spans = ((end + 1 - length, end + 1) for end, length in automaton.iter(text))
        return any(not _in_word(text, first - 1, first) and not _in_word(text, end - 1, end) for first, end in spans)

    return found


def _in_word(text: str, left: int, right: int) -> bool:
    """Whether two neighbouring characters belong to one word."""
    return left >= 0 and right < len(text) and all(c.isalnum() or c == "_" for c in (text[left], text[right]))


@cache
def _relations() -> list[dict[str, Any]]:
    text = files("hf_edit").joinpath("data", "reference_facts.json").read_text(encoding="utf-8")
    return json.loads(text)["relations"]
