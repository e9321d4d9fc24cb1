"""The edit scope: which entities a text mentions, and at which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ahocorasick

from ...positions import joined_without_space

__all__ = ["Mention", "Scope", "mentions_in_tokens"]

_EXACT_CASE = 3  # names up to this length match in their own case only: "US" is not "us"


@dataclass(frozen=True)
class Mention:
    """A mention of an entity in a text: characters `start` to `end`."""

    start: int
    end: int
    entity: int


class Scope:
    """A dictionary of entities that finds every mention of each in a text in one pass, however many there are.

    Mentions are whole words (in scripts that have spaces between words), the longest where several overlap, in any case
    except for names of up to three letters.

    Args:
        names: for each entity, its names.

    Attributes:
        longest: bytes of the longest name: no tokenizer needs more tokens for it.
    """

    def __init__(self, names: Sequence[Iterable[str]]) -> None:
        self._automaton = ahocorasick.Automaton()
        self._owners: dict[str, list[tuple[str, int]]] = {}
        self.longest = 0
        for entity, own in enumerate(names):
            for name in own:
                self._owners.setdefault(_lower(name), []).append((name, entity))
                self.longest = max(self.longest, len(name.encode()))
        for key in self._owners:
            self._automaton.add_word(key, key)
        self._automaton.make_automaton()

    def find(self, text: str) -> list[Mention]:
        """All mentions, in order, none overlapping another."""
        if not self._owners:
            return []
        found = []
        for last, key in self._automaton.iter(_lower(text)):
            start, end = last + 1 - len(key), last + 1
            if not (_boundary(text, start) and _boundary(text, end)):
                continue
            entity = self._entity(key, text[start:end])
            if entity is not None:
                found.append(Mention(start, end, entity))
        found.sort(key=lambda m: (m.start, -m.end))
        kept: list[Mention] = []
        for mention in found:
            if not kept or mention.start >= kept[-1].end:
                kept.append(mention)
        return kept

    def _entity(self, key: str, written: str) -> int | None:
        """Whose name it is: in this very case if possible, otherwise in any case unless the name is short."""
        owners = self._owners[key]
        exact = next((entity for name, entity in owners if name == written), None)
        if exact is not None:
            return exact
        return next((entity for name, entity in owners if len(name) > _EXACT_CASE), None)


def mentions_in_tokens(tokenizer: Any, scope: Scope, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(index of the mention's last token, entity) for all mentions in a row of token ids."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    mentions = scope.find(text)
    if not mentions:
        return []
    spans = _token_spans(tokenizer, text, ids)
    found = []
    for mention in mentions:
        last = max((i for i, (a, b) in enumerate(spans) if a < mention.end and b > a and b > mention.start), default=None)
        if last is not None:
            found.append((last, mention.entity))
    return found


def _token_spans(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Each token's characters in the decoded text."""
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) == list(ids):
        return again["offset_mapping"]
    # Sampled tokens need not be those that the tokenizer would choose: decode ever longer pieces instead.
    ends = [
        len(tokenizer.decode(ids[: i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for i in range(len(ids))
    ]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _lower(text: str) -> str:
    """Lower case, character by character, so that positions stay."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _boundary(text: str, at: int) -> bool:
    """Whether a word may begin or end between two characters."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if joined_without_space(before) or joined_without_space(after):
        return True
    return not (_word(before) and _word(after))


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"
