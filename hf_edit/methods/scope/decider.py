"""The gate's word on single tokens: which facts the text up to there asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...gate import asks_about_another
from ...routing import Routing
from ...wording import asked_words
from .tracker import State, Tracker, Verdict

__all__ = ["Decider", "Queries"]

_WINDOW = 96  # tokens of a question that are looked at: two sentences
_TAIL = 16  # tokens that hold the last characters of a text


class Decider:
    """Says which facts a text asks for. It sees the tokens up to its end and the state of a middle block there.

    Args:
        tokenizer: of the model.
        tracker: of the edit.
        routing: the pack's gate with its facts' prompts.
    """

    def __init__(self, tokenizer: Any, tracker: Tracker, routing: Routing) -> None:
        self.routing = routing
        self._tokenizer, self._tracker = tokenizer, tracker

    @property
    def block(self) -> int:
        """Whose output the gate reads."""
        return self.routing.block

    def verdict(self, state: State, ids: Sequence[int], index: int, queries: Queries) -> Verdict:
        """What the text that ends with a token asks for: (entity, fact) for all facts whose own prompt it ends in, else for the
        likeliest one that the gate lets through.

        Args:
            state: after the token, as far as mentions go.
            ids: the text's tokens; those after `index` are not looked at.
            queries: of the run that this token's state comes from.
        """
        entities = state.entities
        facts = [fact for e in entities for fact in self._tracker.facts[e]]
        owner = [e for e in entities for _ in self._tracker.facts[e]]
        if self.routing.may_be_own(self._text(ids, index, _TAIL), facts):
            own = self.routing.own(self._text(ids, index, self.routing.window), facts, True)
            if own:
                return tuple((owner[facts.index(fact)], fact) for fact in own)
        if not queries.hopeful(index, facts):
            return ()
        asked: dict[int, str] = {}

        def words(entity: int) -> str:
            if entity not in asked:
                text = self._text(ids, index, _WINDOW)
                named = [(m.start, m.end) for m in self._tracker.scope.find(text) if m.entity == entity]
                asked[entity] = asked_words(text, named)
            return asked[entity]

        query, least = queries.of(index), self.routing.gate.threshold
        scores = [self.routing.scores(query, self._tracker.facts[e], partial(words, e), least) for e in entities]
        near = torch.cat(scores)
        for best in near.argsort(descending=True).tolist():
            if bool(near[best].isneginf()):
                break
            if not self._about_another(state, ids, index, owner[best], self.routing.prompt(facts[best])):
                return ((owner[best], facts[best]),)
        return ()

    def _text(self, ids: Sequence[int], index: int, window: int) -> str:
        """The last tokens of the text up to an index."""
        part = ids[max(0, index + 1 - window) : index + 1]
        return self._tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _about_another(self, state: State, ids: Sequence[int], index: int, entity: int, prompt: str) -> bool:
        """Whether the question is put about somebody who is named after the entity's last mention, and not in a fact's own
        prompt."""
        last = max(i for i, e in state.mentions if e == entity)
        before, after = (
            self._tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
            for begin, end in ((max(0, last + 1 - _WINDOW), last + 1), (last + 1, index + 1))
        )
        return asks_about_another(before, after, prompt)


class Queries:
    """What the gate reads in one row of a run.

    Args:
        routing: the pack's gate.
        states: [tokens, hidden], the output of the gate's block.
        first: index of the first of these tokens.
    """

    def __init__(self, routing: Routing, states: torch.Tensor, first: int) -> None:
        self._routing, self._first = routing, first
        self._projected = routing.gate.project(states)
        self._hope: dict[tuple[int, ...], list[bool]] = {}

    def of(self, index: int) -> torch.Tensor:
        """The query at a token, [size]."""
        return self._projected[index - self._first]

    def hopeful(self, index: int, facts: Sequence[int]) -> bool:
        """Whether the gate may let one of the facts through at a token, by the states alone."""
        key = tuple(facts)
        if key not in self._hope:
            self._hope[key] = self._routing.hopeful(self._projected, key)
        return self._hope[key][index - self._first]
