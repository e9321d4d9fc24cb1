"""Records of public datasets as fields of `Fact`. Plain data in, plain data out.

The formats are those of `Fact.to_dict`, CounterFact, CounterFactPlus, zsRE, EasyEdit, QAEdit, MQuAKE and KnowGIC. They mostly
differ in what they call a field. An unknown field is an error, because a misspelt one would otherwise be lost.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = ["FIELDS", "STRUCTURED", "check_columns", "fact_fields", "question_pairs"]

# The fields of `Fact`, each with its names in the datasets. Fields that are lists take all of their names at once.
_NAMES = {
    "subject": ("subject",),
    "prompt": ("prompt", "src"),
    "target": ("target", "target_new", "alt"),
    "target_old": ("target_old", "ground_truth", "target_true"),
    "aliases": ("aliases", "subject_aliases"),
    "rephrases": ("rephrases", "rephrase_prompt", "rephrase", "generality", "paraphrase_prompts", "question"),
    "locality": ("locality", "neighborhood_prompts"),
    "portability": ("portability",),
    "references": ("references",),
    "source": ("source",),
    "id": ("id",),
}
# Questions whose prompts and answers are two fields.
_PAIRED = {
    "locality": (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")),
    "portability": (("portability_prompt", "portability_ground_truth"), ("questions", "new_answer")),
}
_PROMPT = ("prompt", "question", "New Question", "loc")
_ANSWER = ("target", "answer", "ground_truth", "New Answer", "loc_ans")
_QAEDIT = ("NQ", "SQA", "TQA")  # its sources, each of which numbers its records
_REWRITES = "requested_rewrite"
_OF_CHAINS = {"questions", "new_answer"}  # MQuAKE's multi-hop questions, beside the rewrites

_USED = {name for names in _NAMES.values() for name in names} | {n for pairs in _PAIRED.values() for p in pairs for n in p}
FIELDS = _USED - _OF_CHAINS - {"question"} | {_REWRITES}  # of a record, but for MQuAKE's questions
_PLAIN = {name for field in ("subject", "prompt", "source", "id") for name in _NAMES[field]}
STRUCTURED = FIELDS - _PLAIN  # may hold a list or a mapping
# What stands beside several rewrites and follows from all of them; any other field belongs to one of them.
_OF_ALL = {"source", "portability"} | {name for pair in _PAIRED["portability"] for name in pair}
# Further fields of the datasets, which are accepted and not read.
_UNUSED = {"case_id", "pararel_idx", "relation_id", "attribute_prompts", "generation_prompts", "cond"}
_UNUSED_OF_ZSRE = {"pred", "answers"}  # another model's answer, and the true ones
_UNUSED_OF_CHAINS = {
    *("answer", "answer_alias", "new_answer_alias", "single_hops", "new_single_hops", "hops", "orig"),  # MQuAKE
    *("chain", "broader_context"),  # KnowGIC: true facts that lead to the old object, not to the new one
}


def fact_fields(record: Any) -> list[dict[str, Any]]:
    """The arguments of `Fact` for each fact that a record holds: one, or as many as its `requested_rewrite` lists.

    Multi-hop questions beside several rewrites follow from all of them together, so they go to the last fact.

    Raises:
        ValueError: a field is unknown, missing, given twice, or neither text nor a list; the message names it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"a fact is read from a mapping, not from {type(record).__name__}: {record!r:.80}. Give a mapping with subject, "
            "prompt and target, or a Fact."
        )
    if record.get(_REWRITES) in (None, ""):
        check_columns(record)
        return [_fields(_given(record))]
    _check_names(record, FIELDS | _OF_CHAINS, _UNUSED | _UNUSED_OF_CHAINS)
    return _fields_of_rewrites(_given(record))


def check_columns(names: Collection[str]) -> None:
    """Check the names of a record's fields, or of a table's columns before its rows are read.

    Raises:
        ValueError: one is unknown; the message names it, and the nearest that is known.
    """
    _check_names(names, FIELDS, _UNUSED | _UNUSED_OF_ZSRE if "src" in names else _UNUSED)


def question_pairs(value: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(prompt, answer) of a mapping that is a question, or several whose prompts and answers are lists.

    Raises:
        ValueError: a key is unknown, or the lists differ in length.
    """
    _check_names(value, (*_PROMPT, *_ANSWER), ("Recalled Relation",))
    found = _given(value)
    if not found:
        return []
    prompt = _single({name: found[name] for name in _PROMPT if name in found}, "the question gives its prompt")
    answers = {name: found[name] for name in _ANSWER if name in found}
    if isinstance(prompt, str):
        answers = _words(answers)
    return _paired(prompt, _single(answers, "the question gives its answer"), "a question")


def _fields_of_rewrites(record: dict[str, Any]) -> list[dict[str, Any]]:
    rewrites, case = record.pop(_REWRITES), record.get("case_id")
    if isinstance(rewrites, Mapping):
        dataset, rewrites = "counterfact", [rewrites]
    else:
        dataset = "knowgic" if "chain" in record else "mquake"
    if not isinstance(rewrites, (list, tuple)) or not rewrites or not all(isinstance(r, Mapping) for r in rewrites):
        raise ValueError(f"{_REWRITES} is a mapping or a list of mappings, not {rewrites!r:.80}")
    base = record.pop("id", f"{dataset}-{case}" if case is not None else None)
    if len(rewrites) > 1:
        for name in (name for name in record if name in _USED - _OF_ALL):
            raise ValueError(f"{name!r} of a record with {len(rewrites)} rewrites belongs to one of them: move it there.")
    shared = {"source": record["source"]} if "source" in record else {}
    found = []
    for number, rewrite in enumerate(rewrites, start=1):
        fact = _joined(record if number == len(rewrites) else shared, rewrite)
        if base is not None:
            fact.setdefault("id", base if len(rewrites) == 1 else f"{base}-{number - 1}")
        found.append(_fields(fact))
    return found


def _joined(record: Mapping[str, Any], rewrite: Mapping[str, Any]) -> dict[str, Any]:
    """A rewrite and what stands beside it, as one record."""
    _check_names(rewrite, FIELDS - {_REWRITES} | {"question"}, _UNUSED)
    found = _given(rewrite)
    for name in found.keys() & record.keys() - _UNUSED:
        if found[name] != record[name]:
            raise ValueError(f"{name!r} is given twice, in {_REWRITES} and beside it")
    return {**record, **found}


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Fact` from a record without nested rewrites."""
    fields = {name: _one(record, name) for name in ("subject", "prompt", "target", "target_old", "source", "id")}
    for name in ("subject", "prompt", "target"):
        if fields[name] is None:
            held = ", ".join(map(str, record)) or "nothing"
            raise ValueError(f"the record has no {name!r} (it has: {held:.200}). A fact needs subject, prompt and target.")
    if fields["id"] is not None:
        by_source = isinstance(fields["id"], int) and fields["source"] in _QAEDIT
        fields["id"] = f"qaedit-{fields['source']}-{fields['id']}" if by_source else str(fields["id"])
    for name in ("aliases", "rephrases"):
        fields[name] = [text for key in _NAMES[name] for text in _texts(record, key)]
    for name in ("locality", "portability"):
        fields[name] = _questions(record.get(name), name)
        for prompts, answers in _PAIRED[name]:
            if prompts in record or answers in record:
                if name == "portability" and answers not in record:
                    raise ValueError(f"{prompts!r} has no {answers!r}: a portability question is scored by its answer")
                fields[name] += _paired(record.get(prompts), record.get(answers), f"{prompts!r} with {answers!r}")
    near = _questions(record.get("neighborhood_prompts"), "neighborhood_prompts")
    fields["locality"] += [(q, fields["target_old"]) if isinstance(q, str) else q for q in near]  # they ask for the old object
    references = record.get("references")
    fields["references"] = [] if references is None else _listed(references)
    return fields


def _check_names(names: Iterable[Any], used: Collection[str], unused: Collection[str]) -> None:
    for name in names:
        if name not in used and name not in unused:
            fields = [field for field in _NAMES if field in used] or used
            meant = _meant(name, used)
            raise ValueError(f"unknown field {name!r:.80}{meant} Rename or drop it. The fields are: {', '.join(fields)}.")


def _meant(name: Any, used: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the known one that is spelt alike, or has its words in another order."""
    given = str(name)[:80].strip().casefold()
    near = difflib.get_close_matches(given, used, n=1, cutoff=0.8)
    near = near or [other for other in used if _split(other) == _split(given)]
    return f"; did you mean {near[0]!r}?" if near else "."


def _split(name: str) -> list[str]:
    return sorted(re.findall(r"[^\W_]+", name.casefold()))


def _given(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold something: rows of `datasets` and CSV files have all columns."""
    return {name: value for name, value in record.items() if value is not None and not (isinstance(value, str) and not value)}


def _one(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field that holds one text."""
    found = {name: record[name] for name in _NAMES[field] if name in record}
    if field in ("target", "target_old"):
        found = _words(found)
    return _single(found, f"the record gives {field}")


def _single(found: Mapping[str, Any], what: str) -> Any:
    """The one value under several names."""
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"{what} twice: {' and '.join(f'{n!r}: {v!r:.80}' for n, v in found.items())}")
    return values[0] if values else None


def _words(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: word for name, value in found.items() if (word := _word(value, name)) is not None}


def _word(value: Any, name: str) -> Any:
    """One text from CounterFact's {"str": ...}, or the first of a list."""
    if isinstance(value, Mapping):
        if "str" not in value:
            raise ValueError(f"{name} is text, or a mapping with 'str', not {value!r:.80}")
        value = value["str"]
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value == "" else value


def _texts(record: Mapping[str, Any], name: str) -> list[Any]:
    """A field of several texts as a list; each is checked by `Fact`."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} is a list, not {type(value).__name__}: {value!r:.80}")
    return list(value)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable) else list(value)


def _questions(value: Any, name: str) -> list[Any]:
    """Questions from one, a list of them, or EasyEdit's groups: {"neighborhood": {"prompt": ...}, ...}."""
    if value is None:
        return []
    items = _listed(value)
    if isinstance(value, Mapping) and not {*_PROMPT, *_ANSWER} & {key for key, held in value.items() if held is not None}:
        groups = _given(value)
        for kind, group in groups.items():
            if not all(isinstance(question, Mapping) for question in _listed(group)):
                meant = _meant(kind, (*_PROMPT, *_ANSWER))
                raise ValueError(
                    f"{name}: {kind!r:.80} is neither a question's prompt nor its target{meant} A group of questions holds "
                    f"mappings with prompt and target, not {group!r:.80}."
                )
        items = [question for group in groups.values() for question in _listed(group)]
    return [question for item in items for question in (question_pairs(item) if isinstance(item, Mapping) else [item])]


def _paired(prompts: Any, answers: Any, what: str) -> list[tuple[Any, Any]]:
    """Prompts and answers as pairs; an answer may be the first of several accepted ones."""
    if prompts is None:
        raise ValueError(f"{what} has no prompt")
    if isinstance(prompts, str):
        prompts, answers = [prompts], [answers]
    elif not isinstance(prompts, (list, tuple)):
        raise ValueError(f"{what}: a prompt is text, not {type(prompts).__name__}: {prompts!r:.80}")
    elif not isinstance(answers, (list, tuple)):
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise ValueError(f"{what}: {len(prompts)} prompts and {len(answers)} answers")
    return [(prompt, _word(answer, what)) for prompt, answer in zip(prompts, answers, strict=True)]
