"""Edits that stay beside the weights and act on the tokens where a text mentions an entity, if the prompt asks for the fact.

What an edit does there is an `Effect`: put another state in the place of the entity's (LKS), or let a change of weights act on
that token alone (weight edits with a gate).
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .asked import asking
from .base import Base
from .facts import Fact
from .gate import PromptEnd, asks_about_another
from .kv_cache import cache_of, cache_passed, with_cache
from .positions import Text, encode, fact_text
from .routing import Routing
from .scope import Entities, mentions_in_tokens, text_of
from .suffix import hidden_of
from .wording import asked_words

__all__ = ["Effect", "MentionAttachment", "Points", "Spellings"]

_KEPT = "_hf_edit_rows"  # where a cache says, for each edit, what was done to the tokens that it holds
_NONE = -1
_WINDOW = 96  # tokens of a question that are looked at: two sentences
_NEXT_SENTENCE = re.compile(r"(?:[.!?。！？]['\"”’)]*\s+|[。！？\n]\s*)\S")
_ANSWER = 64  # tokens of an answer that are looked at, more than any target has


_On = tuple[int, int | None]  # a fact that is on at a token, and the token to come where its target is being said


@dataclass(frozen=True)
class Points:
    """Tokens of a run at which facts are on, each given by its row, its column among those that run, and its fact.

    Attributes:
        rows, columns, facts: all of one length.
        upcoming: of the same length: None where the token ends a mention; where it is one of the fact's target, which is
            being said, the target's next token.
        width: how many columns run.
    """

    rows: list[int]
    columns: list[int]
    facts: list[int]
    upcoming: list[int | None]
    width: int

    def of(self, states: torch.Tensor) -> tuple[list[int], ...]:
        """The index of these tokens in a module's tensor: [rows, columns, ...], or [rows * columns, ...] where it is flat."""
        if states.dim() == 3:
            return self.rows, self.columns
        return ([row * self.width + column for row, column in zip(self.rows, self.columns, strict=True)],)


class Spellings:
    """The token ids of facts' targets, as they stand behind the facts' prompts and at the beginning of a line.

    Args:
        tokenizer: of the model.
        facts: in order.
    """

    def __init__(self, tokenizer: Any, facts: Sequence[Fact]) -> None:
        self._tokenizer, self._facts = tokenizer, facts
        self._known: dict[int, tuple[tuple[int, ...], ...]] = {}  # of facts that were asked for: few are

    def __call__(self, fact: int) -> tuple[tuple[int, ...], ...]:
        if fact not in self._known:
            told, target = self._facts[fact], self._facts[fact].target
            spelled: dict[tuple[int, ...], None] = {}
            for text in (fact_text(told, target=target), Text("\n" + target, target=(1, 1 + len(target)))):
                with suppress(ValueError):  # no token is the target's alone
                    spelled[encode(self._tokenizer, [text])[0].labels[:_ANSWER]] = None
            self._known[fact] = tuple(spelled)
        return self._known[fact]


class Effect(Protocol):
    """What an edit does behind a module, at the tokens where facts are on."""

    def __call__(self, given: torch.Tensor, output: Any, points: Points, /) -> Any:
        """The module's output as it is to be.

        Args:
            given: the module's first argument.
            output: as the module has it; left as it is.
            points: at least one.
        """
        ...


@dataclass(frozen=True)
class _Question:
    """A place in a text where the gate looks: columns count from the text's beginning, padding included.

    Attributes:
        final: at the end of a prompt the answer holds for all entities; in generated text a fact that is asked for is switched
            on, and none is switched off for not being asked for, because the second token of an answer asks for nothing.
    """

    row: int
    column: int
    final: bool


@dataclass
class _Row:
    """What is known of one row of a batch.

    Attributes:
        ids: all tokens.
        mentions: (column of the last token, entity).
        asked: the questions that there were, by column.
        events: (column of the question, entity, fact or -1).
        said: (column, entity) where the target of an entity's fact has been said, and the fact is switched off.
        told: (column, entity) where it has been said, and the fact stays on until its sentence is over.
        applied: by column, the fact that its state was rewritten for, and the token to come where that is of its target.
    """

    ids: list[int]
    mentions: list[tuple[int, int]] = field(default_factory=list)
    asked: list[_Question] = field(default_factory=list)
    events: list[tuple[int, int, int]] = field(default_factory=list)
    said: list[tuple[int, int]] = field(default_factory=list)
    told: list[tuple[int, int]] = field(default_factory=list)
    applied: dict[int, _On] = field(default_factory=dict)

    def until(self, length: int) -> _Row:
        """The same as it stood when the text had this length."""
        return _Row(
            self.ids[:length],
            [m for m in self.mentions if m[0] < length],
            [q for q in self.asked if q.column < length],
            [e for e in self.events if e[0] < length],
            [s for s in self.said if s[0] < length],
            [t for t in self.told if t[0] < length],
            {c: f for c, f in self.applied.items() if c < length},
        )


@dataclass
class _Plan:
    """What is to be done in one run of the decoder.

    Attributes:
        text: [rows, columns], from the beginning as far as it is known.
        mask: 2-D, of the same shape, or None.
        first: the first column that runs now.
        rows: as they will stand after it.
        questions: those in columns that run now, in order.
        arguments: of the decoder, by name.
        points: where facts are on in this run, once its lowest effect has come.
        clouded: questions that the gate could not judge, because it would have read what the edit did.
        asked_for: how many columns the caller lets run, where the edit has more of them run.
    """

    text: torch.Tensor
    mask: torch.Tensor | None
    first: int
    rows: list[_Row]
    questions: list[_Question]
    arguments: dict[str, Any]
    points: Points | None = None
    clouded: list[_Question] = field(default_factory=list)
    asked_for: int | None = None

    def reach(self, states: torch.Tensor) -> None:
        """Take from a module's tensor how many columns run: another edit may have widened the run behind this one's back."""
        width = states.shape[1] if states.dim() == 3 else len(states) // len(self.rows)
        self.first = self.text.shape[1] - width


class _Run(threading.local):
    """What hooks tell each other during a run; a copy of a model begins with none of it."""

    plan: _Plan | None = None
    again: bool = False
    shown: tuple[torch.Tensor, torch.Tensor | None, bool] | None = None  # text, mask, whether it is a prompt
    prompt: int = 0  # columns of the prompt that is being continued
    asked: tuple[int, ...] | None = None

    def __reduce__(self) -> tuple[type[_Run], tuple[()]]:
        return _Run, ()


_AGAIN: ContextVar[list[_Question] | None] = ContextVar("again", default=None)  # the questions of a run that is repeated


class MentionAttachment:
    """An edit in force on a model at the mentions of its entities, until `detach`.

    The edit acts on the last token of every mention: in prompts, behind left padding, in continued conversations,
    and in text that the model itself generates. With a gate, the end of the prompt decides for which of the entity's facts,
    if any: the same forward reads it. In generated text a fact is switched on where the text comes to ask for it, and off once
    its target has been said, until the text mentions the entity again: what is written behind it, the clean model writes.

    What is right depends on the whole text, and tokens may have been run before it was known: the question comes in a later
    chunk or turn than the mention, a name turns out to be the beginning of another, or the gate reads a block above the one
    where the edit acts. Then the tokens from the first changed mention on are run again, in place of what the cache held. So
    every way of running the model gives what the whole prompt gives at once. That a target has been said is known before its
    last token runs; then those tokens run with it, in one forward. On a CPU, where the width of a run counts, rows that are
    right as they are don't take part.

    Args:
        base: model and tokenizer.
        entities: that are looked for, and their facts.
        effects: what is done, by module.
        routing: how a fact is chosen; without it the entity's newest fact is always on.
        spellings: with it the edit also acts on the tokens of a target that an answer is saying, all but the last.
        finishes: in an answer in the chat, a fact whose target has been said stays on until that sentence is over, for edits
            that know how to end it. Names that the rest of the sentence mentions are left alone.
    """

    def __init__(
        self,
        base: Base,
        entities: Entities,
        effects: Mapping[nn.Module, Effect],
        routing: Routing | None = None,
        spellings: Spellings | None = None,
        finishes: bool = False,
    ) -> None:
        self._model, self._tokenizer = base.model, base.tokenizer
        self._scope, self._facts, self._routing = entities.scope, entities.facts, routing
        self._spellings, self._finishes = spellings, finishes
        self._special = frozenset(base.tokenizer.all_special_ids)
        self._targets = tuple(target.strip().casefold() for target in entities.targets)
        self._end = PromptEnd(base.tokenizer)
        self._window = entities.scope.longest + 8
        self._key = uuid.uuid4().hex  # tells the records of several edits on one cache apart, also once it was copied
        self._now = _Run()
        decoder = base.model.get_decoder()
        self._handles = [
            base.model.register_forward_pre_hook(self._read_labels, with_kwargs=True),
            decoder.register_forward_pre_hook(self._find, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._settle),
            *(m.register_forward_hook(functools.partial(self._act, effect), prepend=True) for m, effect in effects.items()),
        ]
        if routing is not None:  # in front of the hook that acts, where it is the same module
            judged = base.layout().blocks[routing.block]
            self._handles.append(judged.register_forward_hook(self._judge, prepend=True))
        self._before = base.model.__dict__.get("prepare_inputs_for_generation")
        base.model.prepare_inputs_for_generation = _Prepare(self, base.model, self._before)

    def detach(self) -> None:
        """Leave the model as it was; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._model is not None:
            if self._before is None:
                del self._model.prepare_inputs_for_generation
            else:
                self._model.prepare_inputs_for_generation = self._before
        self._model = None

    def show(self, text: torch.Tensor, mask: torch.Tensor | None, is_prompt: bool) -> None:
        """The whole text of each row, which the model itself only gets token by token inside `generate`."""
        self._now.shown = text, mask, is_prompt

    # --- before the decoder runs --------------------------------------------------------------------------------------

    def _read_labels(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Labels tell where an answer begins: the prompt ends in front of the first one, where some tokens have none."""
        labels = kwargs.get("labels")
        self._now.asked = None
        if isinstance(labels, torch.Tensor) and labels.dim() == 2:
            mask = kwargs.get("attention_mask")
            skipped = (labels != -100).long().argmax(1)
            if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
                skipped = skipped - (mask.long().argmax(1))
            if bool((skipped > 0).all()):
                self._now.asked = tuple((skipped - 1).tolist())

    def _find(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Which of the tokens end a mention, and where the gate has to look; the arguments of a run of more tokens, where what
        they say changes what earlier ones hold."""
        now = self._now
        kind: Any = type(decoder)
        arguments = dict(list(_signature(kind).bind_partial(decoder, *args, **kwargs).arguments.items())[1:])
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        ids = arguments.get("input_ids")
        if now.again:
            if now.plan is not None and ids is not None:  # several edits may each have more tokens run again
                now.plan.first, now.plan.points = now.plan.text.shape[1] - ids.shape[1], None
            return None
        shown, now.shown, now.plan = now.shown, None, None
        if ids is None:
            now.prompt = 0
            return None
        cache = cache_passed(arguments)
        done = _length(cache)
        known = getattr(cache, _KEPT, {}).get(self._key, []) if done else []
        text, first = self._whole(ids, done, known, shown)
        if shown is not None and shown[2]:
            now.prompt = text.shape[1]
        mask: Any = shown[1] if shown is not None and shown[1] is not None else arguments.get("attention_mask")
        mask = mask[:, -text.shape[1] :] if _fits(mask, text) else None
        kept = None if mask is None else mask.tolist()
        rows: list[_Row] = []
        questions: list[_Question] = []
        for number, tokens in enumerate(text.tolist()):
            real = [i for i in range(len(tokens)) if kept is None or kept[number][i]]
            row = _Row(tokens)
            if first:
                past = _matching(known, number, tokens, first)
                row = replace(past.until(first), ids=tokens) if past is not None else row
            row.mentions = self._mentions(row, real, first)
            rows.append(row)
            if real:
                questions += self._questions(number, tokens, real, first, shown)
        if (repeated := _AGAIN.get()) is not None:  # another edit has the tokens run again
            questions = [q for q in repeated if q.column >= first]
        questions.sort(key=lambda q: q.column)
        for question in questions:  # also where this edit has nothing to say: another one that runs tokens again may
            rows[question.row].asked.append(question)
        now.asked = None
        now.plan = _Plan(text, mask, first, rows, questions, arguments)
        widened = self._widened(decoder, now.plan, cache) if repeated is None else None
        return None if widened is None else ((), widened)

    def _widened(self, decoder: nn.Module, plan: _Plan, cache: Any) -> dict[str, Any] | None:
        """Where the one token to run completes a target, the arguments of a run from the mention on, without the fact.

        Edits look at the arguments in turn; one that others look behind leaves it to `_settle`, as does a longer run, in which
        a fact may come and go."""
        hooks = [h for h in decoder._forward_pre_hooks.values() if getattr(h, "__func__", None) is type(self)._find]
        if self._routing is None or hooks[-1] != self._find or plan.text.shape[1] != plan.first + 1:
            return None
        plan.questions = [q for q in plan.questions if q.final or not self._said(plan.rows[q.row], q)]
        outdated = self._outdated(plan, plan.first)
        if not outdated or self._apart(decoder, plan, outdated, cache):
            return None
        begin = _rewound(cache, min(outdated.values()), plan.first)
        if begin is None:
            return None
        plan.first, plan.asked_for = begin, 1
        return with_cache(decoder.forward, _from_column(plan, begin), cache)

    def _whole(
        self,
        ids: torch.Tensor,
        done: int,
        known: Sequence[_Row],
        shown: tuple[torch.Tensor, torch.Tensor | None, bool] | None,
    ) -> tuple[torch.Tensor, int]:
        """The rows' ids from the beginning, as far as they are known, and the first column that runs now."""
        if not done:
            return ids, 0
        whole = done + ids.shape[1]
        if shown is not None and shown[0].shape[0] == ids.shape[0] and shown[0].shape[1] >= whole:
            return shown[0][:, :whole], done
        if len(known) == ids.shape[0] and all(len(row.ids) >= done for row in known):
            return torch.cat([ids.new_tensor([row.ids[:done] for row in known]), ids], dim=1), done
        return ids, 0

    def _mentions(self, row: _Row, real: Sequence[int], first: int) -> list[tuple[int, int]]:
        """All mentions of a row: those that are known to stay, and what a look at the text's end finds."""
        settled = max(0, first - self._window)  # a name that ends further back can't be continued by what is new
        begin = max(0, settled - self._window)
        part = [i for i in real if i >= begin]
        ids = [row.ids[c] for c in part]
        before = [row.ids[c] for c in part if c < first]
        if before and [e for c, e in row.mentions if c >= begin] == self._same_entities(before, ids):
            return row.mentions
        found = [(part[i], e) for i, e in mentions_in_tokens(self._tokenizer, self._scope, ids)]
        return [m for m in row.mentions if m[0] < settled] + [m for m in found if m[0] >= settled]

    def _same_entities(self, before: Sequence[int], ids: Sequence[int]) -> list[int] | None:
        """The entities that a text mentions, if it mentions them at the very places where its beginning does; None if not.

        Most tokens that a model generates neither end a name nor go on with one: then nobody has to ask at which tokens the
        mentions stand, for which the text would be tokenised again."""
        found = [self._scope.find(text_of(self._tokenizer, part)) for part in (before, ids)]
        return [mention.entity for mention in found[0]] if found[0] == found[1] else None

    def _questions(
        self,
        number: int,
        tokens: Sequence[int],
        real: Sequence[int],
        first: int,
        shown: tuple[torch.Tensor, torch.Tensor | None, bool] | None,
    ) -> Iterator[_Question]:
        """Where the gate looks in a row: at the end of the prompt, and at each token that was generated behind it."""
        asked = self._now.asked or asking()
        generated = (shown is not None and not shown[2]) or (shown is None and first > 0 and len(tokens) == first + 1)
        prompt = len(tokens) if not generated else self._now.prompt if shown is not None else first
        own = [i for i in real if i < prompt]
        if own and prompt > first:
            position = asked[number] if asked is not None and number < len(asked) and not first else None
            end = own[min(position, len(own) - 1)] if position is not None else own[self._end([tokens[i] for i in own])]
            if end >= first:
                yield _Question(number, end, True)
        for column in real:
            if column >= max(prompt, first):
                yield _Question(number, column, False)

    # --- while it runs ------------------------------------------------------------------------------------------------

    def _judge(self, _: nn.Module, __: Any, output: Any) -> None:
        """Behind the gate's block: what the prompts ask."""
        plan = self._now.plan
        if plan is None or self._routing is None or (self._now.again and not plan.clouded):
            return
        gate = self._routing.gate
        questions = plan.clouded or [q for q in plan.questions if any(c <= q.column for c, _ in plan.rows[q.row].mentions)]
        if plan.points is not None:  # the edit acts below the gate, and may have acted before this question came
            plan.clouded = [q for q in questions if q.final and any(c <= q.column for c in plan.rows[q.row].applied)]
            questions = [q for q in questions if q not in plan.clouded]
        if not questions:
            return
        states = hidden_of(output)
        plan.reach(states)
        at = ([q.row for q in questions], [q.column - plan.first for q in questions])
        for question, query in zip(questions, gate.project(states[at].detach()), strict=True):
            row = plan.rows[question.row]
            if not question.final and self._said(row, question):
                continue
            # what has been said is not said again before the text comes back to its subject
            since = {e: c for c, e in row.said} if not question.final else {}
            entities = list(dict.fromkeys(e for c, e in row.mentions if since.get(e, -1) < c <= question.column))
            if not entities:
                continue
            facts = [f for e in entities for f in self._facts[e]]
            owner = [e for e in entities for _ in self._facts[e]]
            if question.final:
                row.events += [(question.column, e, _NONE) for e in entities]
            text = self._text(plan, question, self._routing.window, special=True)
            if own := self._routing.own(text, facts, question.final):
                row.events += [(question.column, owner[facts.index(fact)], fact) for fact in own]
                continue
            least = gate.threshold if question.final else gate.sure
            scores = [
                self._routing.scores(query, self._facts[e], functools.partial(self._asked, plan, question, e), least)
                for e in entities
            ]
            near = torch.cat(scores)
            for best in near.argsort(descending=True).tolist():
                if bool(near[best].isneginf()):
                    break
                if not self._about_another(plan, question, owner[best], self._routing.prompt(facts[best])):
                    row.events.append((question.column, owner[best], facts[best]))
                    break

    def _said(self, row: _Row, question: _Question) -> bool:
        """Whether generated text ends in the target of a fact that is on; then it is switched off."""
        on = {entity: fact for _, entity, fact in row.events if self._targets}
        on = {entity: fact for entity, fact in on.items() if fact != _NONE}
        begin = 1 + max((q.column for q in row.asked if q.final and q.column < question.column), default=-1)
        answer = row.ids[max(begin, question.column + 1 - _ANSWER) : question.column + 1]
        text = self._tokenizer.decode(answer).rstrip().casefold() if on else ""
        said = [entity for entity, fact in on.items() if text.endswith(self._targets[fact])]
        if self._finishes and begin and row.ids[begin] in self._special:  # behind what ends a turn: an answer in the chat
            row.told += [(question.column, e) for e in said if (question.column, e) not in row.told]
            ends = {e: c for c, e in row.told if begin <= c}
            said = [e for e in on if e in ends and self._sentence_over(row.ids[ends[e] + 1 : question.column + 1])]
        row.events += [(question.column, entity, _NONE) for entity in said]
        row.said += [(question.column, entity) for entity in said]
        return bool(said)

    def _sentence_over(self, ids: Sequence[int]) -> bool:
        """Whether another sentence has begun."""
        return bool(_NEXT_SENTENCE.search(self._tokenizer.decode(ids)))

    def _asked(self, plan: _Plan, question: _Question, entity: int) -> str:
        """The words of a question, without the entity's name."""
        text = self._text(plan, question, _WINDOW)
        return asked_words(text, [(m.start, m.end) for m in self._scope.find(text) if m.entity == entity])

    def _text(self, plan: _Plan, question: _Question, window: int, special: bool = False) -> str:
        """The last tokens of the text up to a question, with or without special tokens."""
        seen = slice(max(0, question.column + 1 - window), question.column + 1)
        ids = plan.rows[question.row].ids[seen]
        if plan.mask is not None:
            ids = [token for token, kept in zip(ids, plan.mask[question.row, seen].tolist(), strict=True) if kept]
        return self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _about_another(self, plan: _Plan, question: _Question, entity: int, prompt: str) -> bool:
        """Whether the question is put about somebody who is named after the entity's last mention, and not in a fact's own
        prompt."""
        row = plan.rows[question.row]
        last = max(c for c, e in row.mentions if e == entity and c <= question.column)
        kept = [True] * len(row.ids) if plan.mask is None else plan.mask[question.row].tolist()
        before, after = (
            self._tokenizer.decode([row.ids[c] for c in columns if kept[c]], clean_up_tokenization_spaces=False)
            for columns in (range(last + 1), range(last + 1, question.column + 1))
        )
        return asks_about_another(before, after, prompt)

    def _wanted(self, row: _Row) -> dict[int, _On]:
        """By column, the fact that is to be on."""
        if self._routing is None:
            chosen = {entity: self._facts[entity][-1] for _, entity in row.mentions}
        else:
            chosen = {entity: fact for _, entity, fact in row.events}
        asked = max((q.column for q in row.asked if q.final), default=-1)
        told = {e: c for c, e in row.told if c > asked}
        wanted: dict[int, _On] = {
            c: (chosen[e], None) for c, e in row.mentions if chosen.get(e, _NONE) != _NONE and c <= told.get(e, c)
        }
        return wanted | self._carried(row, {fact for fact, _ in wanted.values()})

    def _carried(self, row: _Row, facts: Iterable[int]) -> dict[int, _On]:
        """By column, the fact whose target the answer is saying there, and how it goes on."""
        if self._spellings is None:
            return {}
        begin = 1 + max((q.column for q in row.asked if q.final), default=-1)
        answer = row.ids[begin:]
        said = [
            (n, column, (fact, target[n]))
            for fact in facts
            for target in self._spellings(fact)
            if target[0] in answer
            for column, n in enumerate(_begun(answer, target), begin)
            if 0 < n < len(target)
        ]
        return {column: on for _, column, on in sorted(said)}  # of several, the one of which most has been said

    def _act(self, effect: Effect, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind a module: what the edit does there."""
        plan = self._now.plan
        if plan is None:
            return None
        if plan.points is None:
            plan.reach(hidden_of(output))
            plan.points = self._applied(plan)
        return effect(args[0], output, plan.points) if plan.points.rows else None

    def _applied(self, plan: _Plan) -> Points:
        """Where facts are on in this run, as far as the gate has spoken; the rows remember it."""
        points = Points([], [], [], [], plan.text.shape[1] - plan.first)
        for number, row in enumerate(plan.rows):
            now = {c: f for c, f in self._wanted(row).items() if c >= plan.first}
            row.applied = {c: f for c, f in row.applied.items() if c < plan.first} | now
            points.rows.extend([number] * len(now))
            points.columns.extend(c - plan.first for c in now)
            points.facts.extend(fact for fact, _ in now.values())
            points.upcoming.extend(token for _, token in now.values())
        return points

    # --- behind the decoder -------------------------------------------------------------------------------------------

    def _settle(self, decoder: nn.Module, _: Any, output: Any) -> Any:
        """Run tokens again where the text now says otherwise than it did; remember what the cache holds."""
        plan = self._now.plan
        if plan is None or self._now.again:
            return None
        cache = cache_of(output)
        cache = cache_passed(plan.arguments) if cache is None else cache
        changed = None
        if plan.asked_for is not None:
            changed = _replaced(output, output, plan.asked_for)
        if plan.clouded:  # the gate reads the clean model
            for q in plan.clouded:
                plan.rows[q.row].events += [(q.column, e, _NONE) for e in {e for _, e in plan.rows[q.row].mentions}]
            changed = self._settled(decoder, plan, cache, output)
            plan.clouded = []
        changed = self._settled(decoder, plan, cache, output) or changed
        self._now.plan = None
        if hasattr(cache, "__dict__"):
            cache.__dict__.setdefault(_KEPT, {})[self._key] = plan.rows
        return changed

    def _outdated(self, plan: _Plan, end: int) -> dict[int, int]:
        """The rows that hold something else than they are to, and the first column in front of `end` where they do."""
        found = {}
        for number, row in enumerate(plan.rows):
            columns = [c for c in _differences(row.applied, self._wanted(row)) if c < end]
            if columns:
                found[number] = min(columns)
        return found

    def _apart(self, decoder: nn.Module, plan: _Plan, rows: Collection[int], cache: Any) -> bool:
        """Whether some of the rows can be run again by themselves, and whether that takes less: a wider run of all rows costs
        an accelerator hardly more than a narrow one."""
        edits = sum(getattr(h, "__func__", None) is type(self)._find for h in decoder._forward_pre_hooks.values())
        known = {"input_ids", "attention_mask", "position_ids", "cache_position"}
        others = [v for k, v in plan.arguments.items() if k not in known and isinstance(v, torch.Tensor)]
        apart = len(rows) < len(plan.rows) and plan.text.device.type == "cpu" and edits == 1 and not others
        return apart and not plan.clouded and _plain(cache)

    def _settled(self, decoder: nn.Module, plan: _Plan, cache: Any, output: Any) -> Any:
        """The decoder's output where tokens had to be run again, None where all is as it is to be."""
        outdated = self._outdated(plan, plan.text.shape[1])
        if not outdated:
            return None
        column = min([*outdated.values(), plan.first])
        if getattr(output, "attentions", None) is None and self._apart(decoder, plan, outdated, cache):
            return self._repeated_apart(decoder, plan, list(outdated), column, cache, output)
        return self._repeated(decoder, plan, column, cache, output)

    def _repeated_apart(self, decoder: nn.Module, plan: _Plan, rows: list[int], column: int, cache: Any, output: Any) -> Any:
        """The decoder's output after the tokens of some rows, from `column` on, were run again."""
        part = replace(
            plan,
            text=plan.text[rows],
            mask=None if plan.mask is None else plan.mask[rows],
            first=column,
            rows=[plan.rows[row] for row in rows],
            points=None,
        )
        own = DynamicCache()
        for number, layer in enumerate(cache.layers if column else ()):
            own.update(layer.keys[rows, :, :column], layer.values[rows, :, :column], number)
        self._now.again, self._now.plan = True, part
        try:
            again = decoder(**with_cache(decoder.forward, _from_column(part, column), own))
        finally:
            self._now.again, self._now.plan = False, plan
        for layer, made in zip(cache.layers, own.layers, strict=True):
            layer.keys[rows, :, column:] = made.keys[:, :, column:]
            layer.values[rows, :, column:] = made.values[:, :, column:]
        return _replaced(output, again, output.last_hidden_state.shape[1], rows)

    def _repeated(self, decoder: nn.Module, plan: _Plan, column: int, cache: Any, output: Any) -> Any:
        """The decoder's output for the same tokens, after all from `column` on, or from further back, were run again."""
        begin = 0 if cache is None else _rewound(cache, column, plan.text.shape[1])
        if begin is None:
            _warn_once(type(cache).__name__)
            return None
        same = begin == plan.text.shape[1] - plan.arguments["input_ids"].shape[1]
        arguments = plan.arguments if same else _from_column(plan, begin)
        arguments = with_cache(decoder.forward, arguments, cache)
        token = _AGAIN.set(sorted((q for r in plan.rows for q in r.asked), key=lambda q: q.column))
        self._now.again = True
        try:
            again = decoder(**arguments)
        finally:
            self._now.again = False
            _AGAIN.reset(token)
        return _replaced(output, again, output.last_hidden_state.shape[1])


class _Prepare:
    """`prepare_inputs_for_generation` that shows an edit the text; a plain object, so that models can be copied and pickled."""

    def __init__(self, attachment: MentionAttachment, model: Any, before: Any) -> None:
        self._attachment, self._of, self._before = attachment, model, before

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def _original(self) -> Any:
        return self._before or functools.partial(type(self._of).prepare_inputs_for_generation, self._of)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._attachment.show(input_ids, kwargs.get("attention_mask"), bool(kwargs.get("is_first_iteration")))
        return self._original(input_ids, *args, **kwargs)


@functools.lru_cache(maxsize=64)
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _length(cache: Any) -> int:
    """How many tokens a cache holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _fits(mask: Any, text: torch.Tensor) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[0] == len(text) and mask.shape[1] >= text.shape[1]


def _matching(known: Sequence[_Row], number: int, tokens: Sequence[int], length: int) -> _Row | None:
    """The record of a row by its tokens: beams change places."""
    beginning = list(tokens[:length])
    candidates = [*known[number : number + 1], *known]
    return next((row for row in candidates if row.ids[:length] == beginning), None)


def _begun(answer: Sequence[int], target: Sequence[int]) -> list[int]:
    """For each token of an answer, how many of the target's first tokens it ends with there (Knuth, Morris and Pratt)."""
    fall = [0]  # for each beginning of the target, the longest shorter one that it ends with
    for token in target[1:]:
        fall.append(_longer(fall[-1], token, target, fall))
    lengths = [0]
    for token in answer:
        before = lengths[-1] if lengths[-1] < len(target) else fall[-1]
        lengths.append(_longer(before, token, target, fall))
    return lengths[1:]


def _longer(length: int, token: int, target: Sequence[int], fall: Sequence[int]) -> int:
    while length and target[length] != token:
        length = fall[length - 1]
    return length + (target[length] == token)


def _differences(one: dict[int, _On], other: dict[int, _On]) -> set[int]:
    return {c for c in {*one, *other} if one.get(c) != other.get(c)}


def _from_column(plan: _Plan, begin: int) -> dict[str, Any]:
    """The decoder's arguments, but for the cache, for a run of all tokens from column `begin` on."""
    arguments = {k: v for k, v in plan.arguments.items() if k not in ("cache_position", "inputs_embeds")}
    arguments |= {"input_ids": plan.text[:, begin:], "attention_mask": plan.mask}
    if plan.arguments.get("position_ids") is not None:
        everything = torch.ones_like(plan.text) if plan.mask is None else plan.mask.long()
        arguments["position_ids"] = (everything.cumsum(1) - 1).clamp(min=0)[:, begin:]
    return arguments


def _replaced(output: Any, other: Any, columns: int, rows: list[int] | None = None) -> Any:
    """A decoder's output with the last columns of another one, in all rows or in those that the other one is of."""

    def taken(own: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if rows is None:
            return states[:, -columns:]
        return own.index_put((torch.tensor(rows, device=own.device),), states[:, -columns:])

    output.last_hidden_state = taken(output.last_hidden_state, other.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        pairs = zip(output.hidden_states, other.hidden_states, strict=True)
        output.hidden_states = tuple(taken(own, states) for own, states in pairs)
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(None if a is None else a[..., -columns:, :] for a in other.attentions)
    return output


def _plain(cache: Any) -> bool:
    """Whether a cache holds nothing but keys and values of all tokens, which rows can be taken from and put back into."""
    layers = getattr(cache, "layers", [])
    return (
        type(cache) is DynamicCache
        and bool(layers)
        and all(type(layer) is DynamicLayer and isinstance(layer.keys, torch.Tensor) for layer in layers)
        and not any(layer.keys.requires_grad for layer in layers)
        and (torch.is_inference_mode_enabled() or not any(layer.keys.is_inference() for layer in layers))
    )


def _rewound(cache: Any, column: int, total: int) -> int | None:
    """Let a cache that holds `total` tokens forget those from `column` on, or all; how many it holds then, None if neither."""
    try:
        cache.crop(column - total)
        if _length(cache) == column:
            return column
    except (AttributeError, RuntimeError, ValueError, NotImplementedError, TypeError):
        pass  # static caches and windows that have moved on can't be cut
    try:
        cache.reset()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return 0 if _length(cache) == 0 else None


@functools.lru_cache(maxsize=64)
def _warn_once(cache: str) -> None:
    warnings.warn(
        f"a {cache} can't be rewound: a mention that it holds stays as it was decided before the prompt was known whole, so "
        "the answer may differ from that to the same prompt without a cache. Run prompts in one piece, or use a DynamicCache.",
        stacklevel=2,
    )
