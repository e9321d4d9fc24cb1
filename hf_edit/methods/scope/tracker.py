"""Which facts are active after each token of a text. Pure bookkeeping: it reads tokens and verdicts, and runs no model.

The state after a token depends on the tokens up to there alone, and on the verdicts of the decider at those tokens. So it is
the same however a text is cut into runs.

- A fact becomes active where the decider says that the text asks for it, and is active for that token only: at the next
  one the decider speaks again. The end of a user's turn asks what its content asked.
- While its target is being said, an active fact stays so.
- At the end of a turn, and after a question mark, a fact stays active while the answer is written, whatever the decider says
  of the answer's words, until its target has been said, the turn ends, or the answer is longer than any target.
- Once its target has been said, the fact is inactive until the text mentions the entity again. In an answer in the chat, an
  edit that can finish its sentences keeps it active up to the end of that sentence.
- In a chat, an answer's own words may ask about names of its turn and the one before.
- An active fact acts at all mentions of its entity, and, for edits that carry targets on, at the tokens of a target that is
  being said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ...facts import Fact
from ...gate import PromptEnd
from ...positions import Text, encode, fact_text
from ...scope import Entities, Scope, beginning, mentions_in_tokens, readable_from, text_of, token_spans
from .points import Write

__all__ = ["EMPTY", "Active", "Spellings", "State", "Tracker", "begun"]

_ANSWER = 64  # tokens of an answer in which a fact stays active, more than any target has
_NEAR = 96  # tokens back to a mention that running text, outside a user's turn, may still ask about: two sentences
_NEXT_SENTENCE = re.compile(r"(?:[.!?。！？]['\"”’)]*\s+|[。！？\n]\s*)\S")
_QUESTION = re.compile(r"[?？؟]['\"”’)]*\Z")
_SETTLES = 4  # tokens after which a word's end is certain: "Ann" in "Annapolis", "Don" in "Don't"

Verdict = tuple[tuple[int, int], ...]  # (entity, fact): what the text asks for
Mentions = tuple[tuple[int, int], ...]  # (index of the last token, entity)


class Spellings:
    """The token ids of facts' targets, as they stand after the facts' prompts and at the beginning of a line.

    Args:
        tokenizer: of the model.
        facts: in order.
    """

    def __init__(self, tokenizer: Any, facts: Sequence[Fact]) -> None:
        self._tokenizer, self._facts = tokenizer, facts
        self._known: dict[int, tuple[tuple[int, ...], ...]] = {}  # of facts that were active: few are

    def __call__(self, fact: int) -> tuple[tuple[int, ...], ...]:
        if fact not in self._known:
            told, target = self._facts[fact], self._facts[fact].target
            spelled: dict[tuple[int, ...], None] = {}
            for text in (fact_text(told, target=target), Text("\n" + target, target=(1, 1 + len(target)))):
                with suppress(ValueError):  # no token is the target's alone
                    spelled[encode(self._tokenizer, [text])[0].labels[:_ANSWER]] = None
            self._known[fact] = tuple(spelled)
        return self._known[fact]


@dataclass(frozen=True)
class Active:
    """An active fact.

    Attributes:
        entity, fact: which it is.
        since: index of the token after which its target may be said.
        answering: index of the token that ended the question; the fact stays active while the answer is written. None where
            the decider is asked at each token.
        turn: whether that token ended a turn of a chat.
        told: index of the token that completed the target, in an answer whose sentence is not over.
    """

    entity: int
    fact: int
    since: int
    answering: int | None = None
    turn: bool = False
    told: int | None = None


@dataclass(frozen=True)
class State:
    """What is known after a token.

    Attributes:
        mentions: so far.
        active: the active facts.
        verdict: of the last token of content.
        said: (entity, index of the token that completed the target of a fact about it).
        turns: where the last two turns of a chat ended.
    """

    mentions: Mentions = ()
    active: tuple[Active, ...] = ()
    verdict: Verdict = ()
    said: tuple[tuple[int, int], ...] = ()
    turns: tuple[int, ...] = ()

    @property
    def entities(self) -> tuple[int, ...]:
        """All that are mentioned, in order."""
        return tuple(dict.fromkeys(entity for _, entity in self.mentions))


EMPTY = State()


class Tracker:
    """The rules of one edit.

    Args:
        tokenizer: of the model.
        entities: that are looked for, and their facts.
        gated: whether a decider is asked; without it each entity's newest fact is always active.
        spellings: with it the edit also acts on the tokens of a target that is being said, all but the last.
        finishes: whether the edit can finish the sentence of a chat that says the target.
    """

    def __init__(
        self, tokenizer: Any, entities: Entities, gated: bool, spellings: Spellings | None = None, finishes: bool = False
    ) -> None:
        self.facts, self._gated = entities.facts, gated
        self.scope: Scope = entities.scope
        self.spellings, self._finishes = spellings, finishes
        self._tokenizer = tokenizer
        self._targets = tuple(target.strip().casefold() for target in entities.targets)
        self._end = PromptEnd(tokenizer)

    @property
    def window(self) -> int:
        """How many tokens at the end of a text may hold a name that the next tokens change."""
        return self.scope.longest + 8

    # --- mentions ---

    def touched(self, ids: Sequence[int], begin: int) -> set[int]:
        """Indices, from `begin` on, of tokens after which the mentions may be others than before them."""
        start = beginning(self._tokenizer, ids, max(0, begin - self.window - _SETTLES))
        start += readable_from(self._tokenizer, ids[start:])
        part = ids[start:]
        text = text_of(self._tokenizer, part)
        if self.scope.fuzzy or not text.isascii():
            # several tokens make one character there, and one that comes later changes one before it
            return set(range(begin, len(ids))) if self.scope.may_mention(text) else set()
        ends = sorted(self.scope.ends(text))
        if not ends:
            return set()
        spans = token_spans(self._tokenizer, text, part)
        found: set[int] = set()
        at = 0
        for end in ends:
            while at < len(spans) - 1 and spans[at][1] < end:
                at += 1
            found.update(range(start + at - 1, start + at + 1 + _SETTLES))
        return {i for i in found if begin <= i < len(ids)}

    def mentions(self, ids: Sequence[int], index: int, before: Mentions) -> Mentions:
        """The mentions of a text that ends with a token.

        Args:
            ids: tokens; those after `index` are not looked at.
            before: the mentions of the text without its last token.
        """
        settled = max(0, index + 1 - self.window)
        begin = beginning(self._tokenizer, ids, max(0, settled - self.window))
        found = mentions_in_tokens(self._tokenizer, self.scope, ids[begin : index + 1])
        kept = tuple(m for m in before if m[0] < settled)
        now = kept + tuple((begin + i, e) for i, e in found if begin + i >= settled)
        return before if now == before else now

    # --- states ---

    def is_content(self, ids: Sequence[int], index: int) -> bool:
        """Whether a token is content: no blank, no special token, and none that the chat template sets around a turn."""
        return not self._end.is_blank(ids[index]) and not self._end.in_tail(ids, index)

    def next(self, before: State, ids: Sequence[int], index: int, touched: bool, verdict: Verdict | None = None) -> State:
        """The state after a token.

        Args:
            before: the state in front of it.
            ids: the text's tokens; those after `index` are not looked at.
            touched: whether the token is among the `touched` ones.
            verdict: of the decider; None gives the state that the tokens alone make likely, in which the facts stay active.
        """
        mentions = self.mentions(ids, index, before.mentions) if touched else before.mentions
        if not mentions:
            return EMPTY
        state = before if mentions is before.mentions else replace(before, mentions=mentions)
        if not self._gated:
            return replace(state, active=tuple(Active(e, self.facts[e][-1], last) for e, last in _last(mentions).items()))
        if not self.is_content(ids, index):
            return self._between(state, ids, index)
        if verdict is None:
            verdict = tuple((a.entity, a.fact) for a in state.active)
        state = self._after_targets(replace(state, verdict=verdict), ids, index)
        there = _last(mentions)
        said = dict(state.said)
        asked = {fact for _, fact in verdict}
        active = [
            a
            for a in state.active
            if a.answering is not None or (a.fact not in asked and self._begins(ids[a.since + 1 : index + 1], a.fact))
        ]
        kept = {a.entity for a in active}
        known = {(a.entity, a.fact): a for a in before.active if a.answering is None}
        asks = self._asks(ids, index) if verdict else False
        nearest = max(index - _NEAR, state.turns[0] if len(state.turns) > 1 else -1)  # in this turn or the one before
        for entity, fact in verdict:
            last = there.get(entity, -1)
            if entity not in kept and last > nearest and said.get(entity, -1) < last:
                one = known.get((entity, fact)) or Active(entity, fact, index)
                active.append(replace(one, answering=index) if asks else one)
        return replace(state, active=tuple(active))

    def _between(self, state: State, ids: Sequence[int], index: int) -> State:
        """After a token that is no content."""
        if self._end.ends_turn(ids, index):
            again = (
                bool(state.turns) and index - state.turns[-1] <= self._end.spread
            )  # the same end, with what opens the answer
            turns = (*state.turns[: -1 if again else None], index)[-2:]
            active = tuple(Active(e, f, index, index, True) for e, f in state.verdict)
            return replace(state, active=active, said=(), turns=turns)
        if self._end.is_special(ids[index]):
            return replace(state, active=())
        return state

    def _after_targets(self, state: State, ids: Sequence[int], index: int) -> State:
        """Without the facts whose target the text has just said, and those whose answer has gone on for long."""
        active, said = [], dict(state.said)
        for one in state.active:
            if one.answering is not None and index - one.answering > _ANSWER:
                continue
            over = one.told is not None and self._sentence_over(ids[one.told + 1 : index + 1])
            if one.told is None and self._says(ids[max(one.since + 1, index + 1 - _ANSWER) : index + 1], one.fact):
                if one.turn and self._finishes:
                    one = replace(one, told=index)
                else:
                    over = True
            if over:
                said[one.entity] = index
            else:
                active.append(one)
        if len(active) == len(state.active) and tuple(active) == state.active:
            return state
        return replace(state, active=tuple(active), said=tuple(said.items()))

    def _says(self, answer: Sequence[int], fact: int) -> bool:
        """Whether an answer ends in a fact's target."""
        if not answer or not self._targets:
            return False
        return self._tokenizer.decode(answer).rstrip().casefold().endswith(self._targets[fact])

    def _begins(self, answer: Sequence[int], fact: int) -> bool:
        """Whether an answer ends in the beginning of a fact's target."""
        target = self._targets[fact] if self._targets else ""
        for count in range(1, min(len(answer), _ANSWER) + 1):
            said = self._tokenizer.decode(answer[-count:]).strip().casefold()
            if len(said) > len(target):
                return False
            if said and target.startswith(said):
                return True
        return False

    def _sentence_over(self, ids: Sequence[int]) -> bool:
        """Whether another sentence has begun."""
        return bool(_NEXT_SENTENCE.search(self._tokenizer.decode(ids)))

    def _asks(self, ids: Sequence[int], index: int) -> bool:
        """Whether the text ends in a question mark."""
        return bool(_QUESTION.search(self._tokenizer.decode(ids[max(0, index - 2) : index + 1])))

    # --- where the edit acts ---

    def writes(self, state: State, mentions: Mentions, ids: Sequence[int]) -> dict[int, Write]:
        """By index, the fact that acts at a token.

        Args:
            state: after some token.
            mentions: those of the state, or of a longer text: then where the facts would act if they stayed active.
            ids: the text's tokens, up to the same length.
        """
        if not state.active:
            return {}
        facts = {one.entity: (one.fact, len(ids) if one.told is None else one.told) for one in state.active}
        found: dict[int, Write] = {i: (facts[e][0], None) for i, e in mentions if e in facts and i <= facts[e][1]}
        return found | self._carried(state, ids)

    def _carried(self, state: State, ids: Sequence[int]) -> dict[int, Write]:
        """By index, the fact whose target the text is saying there, and how it goes on."""
        if self.spellings is None:
            return {}
        said = [
            (length, index, (one.fact, target[length]))
            for one in state.active
            for target in self.spellings(one.fact)
            if target[0] in (answer := ids[one.since + 1 : one.since + 1 + 2 * _ANSWER])
            for index, length in enumerate(begun(answer, target), one.since + 1)
            if 0 < length < len(target)
        ]
        return {index: on for _, index, on in sorted(said)}  # of several, the one of which most has been said


def begun(answer: Sequence[int], target: Sequence[int]) -> list[int]:
    """For each token of an answer, how many of the target's first tokens it ends with there (Knuth, Morris and Pratt)."""
    fall = [0]  # for each beginning of the target, the longest shorter one that it ends with
    for token in target[1:]:
        fall.append(_longer(fall[-1], token, target, fall))
    lengths = [0]
    for token in answer:
        before = lengths[-1] if lengths[-1] < len(target) else fall[-1]
        lengths.append(_longer(before, token, target, fall))
    return lengths[1:]


def _last(mentions: Mentions) -> dict[int, int]:
    """By entity, the index of its last mention."""
    return {entity: index for index, entity in mentions}


def _longer(length: int, token: int, target: Sequence[int], fall: Sequence[int]) -> int:
    while length and target[length] != token:
        length = fall[length - 1]
    return length + (target[length] == token)
