"""The edit scope: which entities a text mentions, and at which tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ahocorasick

from .facts import Fact
from .positions import joined_without_space

__all__ = [
    "Entities",
    "Mention",
    "Phrase",
    "Scope",
    "alike",
    "beginning",
    "begins_word",
    "mentions_in_tokens",
    "readable_from",
    "text_of",
    "token_spans",
]

_REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
_BYTES = 4  # of a character at most

_EXACT_CASE = 3  # names up to this length match in their own case only: "US" is not "us"
_FUZZY_LENGTH = 8  # names from this length on are also found with one typing mistake, where that is asked for
# one character for another, so that positions stay: apostrophes, hyphens, blanks
_ALIKE = str.maketrans({**dict.fromkeys("’‘ʼʹ`´", "'"), **dict.fromkeys("‐‑‒–", "-"), **dict.fromkeys("\t\n\r\u00a0", " ")})
_PLAIN = re.compile(r"[\t\n\r`]")
# Korean particles, which stand behind a name without a space
_PARTICLES = re.compile(
    "(?:은|는|이|가|을|를|의|에|에서|에게|께|한테|로|으로|와|과|도|만|까지|부터|처럼|보다|이나|나|랑|이랑|라도|마다|조차|밖에|이다|입니다)(?!\\w)"
)


@dataclass(frozen=True)
class Mention:
    """A mention of an entity in a text: characters `start` to `end`."""

    start: int
    end: int
    entity: int


@dataclass(frozen=True)
class Phrase:
    """A text in which characters `start` to `end` mention an entity, whatever else they may be a part of."""

    text: str
    start: int
    end: int
    entity: int


class Scope:
    """A dictionary of entities that finds every mention of each in a text in one pass, however many there are.

    Mentions are whole words, the longest where several overlap. Case counts for names of up to three letters only; composed
    and decomposed letters, the kinds of apostrophes, hyphens and blanks are the same. A word ends where letters, digits and
    the marks on them end; in scripts without spaces, where a syllable or a run of Katakana does; a Korean name may have a
    particle behind it. Clitics that are written together with a word, as in Arabic, are part of the word.

    Args:
        names: for each entity, its names.
        fuzzy: also find names of eight letters or more with one letter too many, missing, wrong, or two letters swapped,
            where the first letter is right and no entity has that very name.
        phrases: texts whose mention is found wherever they occur, in any case, even within a word or a longer name. That
            mention may overlap another one.

    Attributes:
        longest: bytes of the longest name: no tokenizer needs more tokens for it.
    """

    def __init__(self, names: Sequence[Iterable[str]], fuzzy: bool = False, phrases: Sequence[Phrase] = ()) -> None:
        self._automaton = ahocorasick.Automaton()
        self._owners: dict[str, list[tuple[str, int]]] = {}
        self.longest = 0
        for entity, own in enumerate(names):
            for name in own:
                composed = alike(unicodedata.normalize("NFC", name))
                self._owners.setdefault(_lower(composed), []).append((composed, entity))
                # a text may spell the name in decomposed letters
                self.longest = max(self.longest, len(name.encode()), len(unicodedata.normalize("NFD", name).encode()))
        for key in self._owners:
            self._automaton.add_word(key, key)
        self._automaton.make_automaton()
        self._typos = _Typos(self._owners) if fuzzy else None
        self._phrases: dict[str, list[Phrase]] = {}
        for phrase in phrases:
            self._phrases.setdefault(_lower(alike(phrase.text)), []).append(phrase)
            self.longest = max(self.longest, len(phrase.text.encode()), len(unicodedata.normalize("NFD", phrase.text).encode()))
        self._whole = ahocorasick.Automaton()
        for key in self._phrases:
            self._whole.add_word(key, key)
        self._whole.make_automaton()

    def find(self, text: str) -> list[Mention]:
        """All mentions, in order; none overlaps another but those of phrases."""
        if not self._owners:
            return []
        places = None
        if not unicodedata.is_normalized("NFC", text):
            text, places = _composed(text)
        text = alike(text)
        lowered = _lower(text)
        found = []
        for last, key in self._automaton.iter(lowered):
            start, end = last + 1 - len(key), last + 1
            if begins_word(text, start) and _ends(text, end):
                entity = self._entity(key, text[start:end])
                if entity is not None:
                    found.append(Mention(start, end, entity))
        kept = _longest(found)
        if self._typos is not None:
            kept = sorted([*kept, *self._typos.find(lowered, kept)], key=lambda m: m.start)
        if self._phrases:
            kept = sorted({*kept, *self._in_phrases(text, lowered)}, key=lambda m: (m.start, m.end, m.entity))
        return kept if places is None else [Mention(places[m.start], places[m.end], m.entity) for m in kept]

    def ends(self, text: str) -> set[int]:
        """Where in a text something ends that may be a mention, whatever stands around it: characters before that end."""
        places = None
        if not unicodedata.is_normalized("NFC", text):
            text, places = _composed(text)
        lowered = _lower(alike(text))
        found = {
            last + 1 for automaton in (self._automaton, self._whole) if len(automaton) for last, _ in automaton.iter(lowered)
        }
        return found if places is None else {places[end] for end in found}

    @property
    def fuzzy(self) -> bool:
        """Whether names with a typing mistake are found."""
        return self._typos is not None

    def may_mention(self, text: str) -> bool:
        """Whether a text, or a beginning of it, may mention an entity; quick, and sure where it says no."""
        return self.fuzzy or next(self._skeletons.iter(_skeleton(text)), None) is not None

    @cached_property
    def _skeletons(self) -> Any:
        """All names without the marks on their letters."""
        found = ahocorasick.Automaton()
        for key in (*self._owners, *self._phrases):
            found.add_word(_skeleton(key) or key, key)
        found.make_automaton()
        return found

    def _in_phrases(self, text: str, lowered: str) -> Iterator[Mention]:
        for last, key in self._whole.iter(lowered):
            start = last + 1 - len(key)
            if begins_word(text, start):
                yield from (Mention(start + p.start, start + p.end, p.entity) for p in self._phrases[key])

    def _entity(self, key: str, written: str) -> int | None:
        """Whose name it is: in this very case if possible, otherwise in any case unless the name is short."""
        owners = self._owners[key]
        exact = next((entity for name, entity in owners if name == written), None)
        if exact is not None:
            return exact
        return next((entity for name, entity in owners if len(name) > _EXACT_CASE), None)


class _Typos:
    """Names with one typing mistake, by what is left of both when a letter is deleted (the idea of SymSpell).

    Args:
        owners: by name in lower case, its spellings and entities.
    """

    def __init__(self, owners: dict[str, list[tuple[str, int]]]) -> None:
        self._owners = owners
        self._by_deletion: dict[str, list[str]] = {}
        self._words = 1
        for name in owners:
            if len(name) >= _FUZZY_LENGTH and name.isprintable() and not any(map(joined_without_space, name)):
                self._words = max(self._words, name.count(" ") + 1)
                for shorter in (name, *_deletions(name)):
                    self._by_deletion.setdefault(shorter, []).append(name)

    def find(self, lowered: str, taken: Sequence[Mention]) -> list[Mention]:
        """Mentions outside those that were found exactly."""
        words = [(m.start(), m.end()) for m in re.finditer(r"\w(?:[\w'.-]*\w)?", lowered)]
        found = []
        for first, (start, _) in enumerate(words):
            for _, end in words[first : first + self._words]:
                if any(m.start < end and start < m.end for m in taken):
                    break
                for stop in (end, end - 2) if lowered[end - 2 : end] == "'s" else (end,):
                    name = self._meant(lowered[start:stop])
                    if name is not None:
                        found.append(Mention(start, stop, self._owners[name][0][1]))
        return _longest(found)

    def _meant(self, written: str) -> str | None:
        """The one name that `written` is a mistake away from."""
        if len(written) < _FUZZY_LENGTH - 1 or written in self._owners:
            return None
        near = {n for s in (written, *_deletions(written)) for n in self._by_deletion.get(s, ()) if _one_mistake(written, n)}
        return near.pop() if len(near) == 1 else None


def _deletions(text: str) -> Iterator[str]:
    return (text[:i] + text[i + 1 :] for i in range(1, len(text)))


def _one_mistake(one: str, other: str) -> bool:
    """Whether two texts with the same first letter are one insertion, deletion, substitution or swap of letters apart; digits
    are never mistaken."""
    if one[0] != other[0] or [c for c in one if c.isdigit()] != [c for c in other if c.isdigit()]:
        return False
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return len(one) + len(other) == 1 or (len(one) == len(other) and (len(one) == 1 or (len(one) == 2 and one == other[::-1])))


def _longest(found: list[Mention]) -> list[Mention]:
    """From the left, the longest at each place, none overlapping another."""
    if len(found) < 2:
        return found
    found.sort(key=lambda m: (m.start, -m.end))
    kept: list[Mention] = []
    for mention in found:
        if not kept or mention.start >= kept[-1].end:
            kept.append(mention)
    return kept


def mentions_in_tokens(tokenizer: Any, scope: Scope, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(index of the mention's last token, entity) for all mentions in a row of token ids."""
    begin = readable_from(tokenizer, ids)
    ids = ids[begin:]
    text = text_of(tokenizer, ids)
    for missing in range(1, min(_BYTES, len(ids))):  # tokens of a character that is not complete yet
        if not text.endswith(_REPLACEMENT):
            break
        whole = text_of(tokenizer, ids[:-missing])
        if not whole.endswith(_REPLACEMENT):
            text, ids = whole, ids[:-missing]
    mentions = scope.find(text)
    if not mentions:
        return []
    spans = token_spans(tokenizer, text, ids)
    found = []
    for mention in mentions:
        last = max((i for i, (a, b) in enumerate(spans) if a < mention.end and b > a and b > mention.start), default=None)
        if last is not None:
            found.append((begin + last, mention.entity))
    return found


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids as it stands, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_spans(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Each token's characters in the decoded text."""
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) == list(ids):
        return again["offset_mapping"]
    # Sampled tokens need not be those that the tokenizer would choose: decode ever longer pieces instead. One that ends inside
    # a character shows replacements in its place; all tokens of a character have the span of what they complete.
    spans: list[tuple[int, int]] = []
    begin = 0
    for i in range(len(ids)):
        piece = text_of(tokenizer, ids[: i + 1])
        if not piece.endswith(_REPLACEMENT) or i == len(ids) - 1:
            spans += [(begin, len(piece))] * (i + 1 - len(spans))
            begin = len(piece)
    return spans


def readable_from(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many tokens end a character whose beginning is missing: some tokenizers decode none of those that follow them."""
    if not text_of(tokenizer, ids[:_BYTES]).startswith(_REPLACEMENT):
        return 0
    return next((at for at in range(min(_BYTES, len(ids))) if _begins_character(tokenizer, ids, at)), 0)


def beginning(tokenizer: Any, ids: Sequence[int], index: int) -> int:
    """The token at an index, or the last one before it that begins a character: a part of the text is read from there."""
    before = (at for at in range(index, max(-1, index - _BYTES), -1) if _begins_character(tokenizer, ids, at))
    return next(before, index)


def _begins_character(tokenizer: Any, ids: Sequence[int], index: int) -> bool:
    pieces = (text_of(tokenizer, ids[index : index + count]) for count in range(1, _BYTES + 1))
    return any(not piece.startswith(_REPLACEMENT) for piece in pieces)


def alike(text: str) -> str:
    return text if text.isascii() and not _PLAIN.search(text) else text.translate(_ALIKE)


def _skeleton(text: str) -> str:
    """A text's letters in lower case, without the marks on them."""
    decomposed = unicodedata.normalize("NFD", alike(text))
    return _lower("".join(c for c in decomposed if unicodedata.category(c)[0] != "M"))


def _lower(text: str) -> str:
    """Lower case, character by character, so that positions stay."""
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lowered if lowered.isascii() else lowered.replace("ς", "σ")


def _composed(text: str) -> tuple[str, list[int]]:
    """The text in composed letters (NFC), and where each of its characters began; one entry more for the end."""
    pieces, places = [], []
    start = 0
    for at in range(1, len(text) + 1):
        if at < len(text) and (unicodedata.combining(text[at]) or "\u1160" <= text[at] <= "\u11ff"):
            continue  # a mark, or the vowel or end of a Korean syllable
        piece = unicodedata.normalize("NFC", text[start:at])
        pieces.append(piece)
        places += [start] * len(piece)
        start = at
    return "".join(pieces), [*places, len(text)]


def begins_word(text: str, at: int) -> bool:
    """Whether a name may begin here."""
    return at == 0 or _boundary(text[at - 1], text[at])


def _ends(text: str, at: int) -> bool:
    """Whether a name may end here."""
    if at == len(text):
        return True
    after = text[at]
    if after == "'":  # "Ann's" names Ann, "Don't" does not name Don
        return not (text[at + 1 : at + 2] in ("t", "T") and (at + 2 == len(text) or not _word(text[at + 2])))
    return _boundary(text[at - 1], after) or ("가" <= after <= "힣" and _PARTICLES.match(text, at) is not None)


def _boundary(before: str, after: str) -> bool:
    """Whether a word may begin or end between two characters."""
    if before.isascii() and after.isascii():
        return not (_word(before) and _word(after))
    if unicodedata.category(after)[0] == "M" or after in _FOLLOWING or before in _LEADING:
        return False  # inside a syllable
    if _katakana(before) and _katakana(after):
        return False
    if joined_without_space(before) or joined_without_space(after):
        return True
    return not (_word(before) and _word(after))


_FOLLOWING = frozenset("ะาำๅະາຳ")  # Thai and Lao vowels that are written behind their consonant
_LEADING = frozenset("เแโใไເແໂໃໄ")  # and in front of it


def _katakana(character: str) -> bool:
    return ("ァ" <= character <= "ヺ") or character in "ーヽヾ" or "ｦ" <= character <= "ﾟ"


def _word(character: str) -> bool:
    return character.isalnum() or character == "_" or (character > "\x7f" and unicodedata.category(character)[0] == "M")


@dataclass(frozen=True)
class Entities:
    """The entities that facts are about: one for each subject, whatever its case.

    Attributes:
        scope: finds them.
        facts: for each entity, the numbers of its facts, the newest last.
        targets: of the facts; empty where it does not matter what they say.
    """

    scope: Scope
    facts: tuple[tuple[int, ...], ...]
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, facts: Sequence[Fact], fuzzy: bool = False) -> Entities:
        """Those of some facts, under their aliases too.

        In its own prompt a fact's subject is always found, also where it is a part of a word or of another subject's name.
        """
        names: dict[str, dict[str, None]] = {}
        own: dict[str, list[int]] = {}
        for number, fact in enumerate(facts):
            key = fact.subject.casefold()
            names.setdefault(key, {}).update(dict.fromkeys((fact.subject, *fact.aliases)))
            own.setdefault(key, []).append(number)
        known = [list(each) for each in names.values()]
        scope = Scope(known, fuzzy)
        numbers = {key: number for number, key in enumerate(names)}
        phrases = [_own_phrase(fact, numbers[fact.subject.casefold()]) for fact in facts]
        if missed := [p for p in phrases if Mention(p.start, p.end, p.entity) not in scope.find(p.text)]:
            scope = Scope(known, fuzzy, missed)
        return cls(scope, tuple(tuple(each) for each in own.values()), tuple(fact.target for fact in facts))


def _own_phrase(fact: Fact, entity: int) -> Phrase:
    """A fact's own prompt up to its last visible character, and where the subject stands in it."""
    start = fact.prompt.find("{}")
    return Phrase(fact.question.rstrip(), start, start + len(fact.subject), entity)
