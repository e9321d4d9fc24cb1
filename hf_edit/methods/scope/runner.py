"""Running a model whose edits act at mentions, so that it is one function of the prefix.

The logits after a token come from a run in which exactly the facts that are active there act, and in which nothing after the
token plays a part. Which facts those are is known token by token (`tracker`, `decider`). So the decoder runs once as the
tokens before make it likely; where a token turns out to need other writes, it runs once more from the first of them on, and the
output is put together column by column. A run serves all columns at which its writes are the right ones: a prompt that asks for
a fact takes two runs, a text without mentions one.

What the hooks have to keep, and why:

- The record on a cache (`_RECORD`): what the cached tokens were, which states and writes they have. It lies on the cache, so
  that it is copied and dropped with it.
- `prepare_inputs_for_generation` shows the whole text, since beams change places in the cache behind the decoder's back.
- A thread-local tells the hooks on modules which run they are in.
- Hooks on the outermost model read the tokens: a multimodal class shows its decoder nothing but embeddings.

What is not known: an edit with a gate that is attached between two calls over one cache has not been asked about the tokens
before, and acts by what follows.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...base import Base
from ...kv_cache import CACHE_NAMES, cache_of, cache_passed, with_cache
from ...restore import EditsOff
from ...suffix import hidden_of
from .decider import Decider, Queries
from .points import Effect, Points, Write
from .tracker import EMPTY, Mentions, State, Tracker

__all__ = ["Edit", "Runner"]

_RECORD = "_hf_edit_rows"
_OF_TOKENS = {"inputs_embeds", "attention_mask", "position_ids", "cache_position", *CACHE_NAMES}

F = TypeVar("F", bound=Callable[..., Any])
States = dict[str, State]
Writes = dict[str, dict[int, Write]]  # by edit, the fact that acts at a token, by its index


@dataclass(eq=False)
class Edit:
    """An edit that acts at mentions.

    Attributes:
        tracker: its rules.
        decider: the gate, or None.
        effects: what it does, by module.
        key: tells its records on a cache from other edits', also once the cache was copied.
        last: the facts that were active at the end of each row of the last call.
    """

    tracker: Tracker
    decider: Decider | None
    effects: Mapping[nn.Module, Effect]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    last: list[set[int]] = field(default_factory=list)


@dataclass
class _Row:
    """A row of a batch. Tokens are counted without padding.

    Attributes:
        tokens: all columns, from the first that is known.
        real: the columns that hold tokens.
        states: by edit, the state after each token that was run.
        applied: by edit, what acts in the cache.
        places: the position that each column was run at; empty where the caller left that to the model.
        begin: how many tokens were run before this call.
        touched: by edit, the new tokens after which the mentions may be others.
        mentions: by edit, those of the whole text.
        runs: what acts in each run of this call.
        taken: for each new token, the run that its output comes from.
        queries: what gates read, by edit and run.
    """

    tokens: list[int]
    real: list[int]
    states: dict[str, list[State]]
    applied: Writes
    places: list[int] = field(default_factory=list)
    begin: int = 0
    touched: dict[str, set[int]] = field(default_factory=dict)
    mentions: dict[str, Mentions] = field(default_factory=dict)
    runs: list[Writes] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    queries: dict[tuple[str, int], Queries] = field(default_factory=dict)

    @functools.cached_property
    def ids(self) -> list[int]:
        """The tokens without padding."""
        return [self.tokens[column] for column in self.real]

    def kept(self, columns: int) -> _Row:
        """What was known when the text had so many columns."""
        real = [c for c in self.real if c < columns]
        states = {key: states[: len(real)] for key, states in self.states.items()}
        applied = {key: _upto(w, len(real) - 1) for key, w in self.applied.items()}
        return _Row(self.tokens[:columns], real, states, applied, self.places[:columns])

    @property
    def live(self) -> bool:
        """Whether an edit may act."""
        return any(self.touched.values()) or any(s and s[-1] is not EMPTY for s in self.states.values())


@dataclass
class _Piece:
    """A call whose embeddings are not those of its tokens alone: it had a picture. It is run again as it was.

    Attributes:
        begin, end: its columns.
        arguments: of the decoder, without the cache; None where a part of the call was taken back.
    """

    begin: int
    end: int
    arguments: dict[str, Any] | None


@dataclass
class _Run:
    """A run of the decoder.

    Attributes:
        begin: its first column.
        writes: for each row, what acts.
        points: by edit, the same for its modules, once it is known how many columns run.
        read: by block, what the gates read.
    """

    begin: int
    writes: list[Writes]
    real: list[list[int]]
    points: dict[str, Points] | None = None
    read: dict[int, torch.Tensor] = field(default_factory=dict)
    output: Any = None
    cached: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # keys and values, while a later run replaces them

    def at(self, key: str, states: torch.Tensor) -> Points:
        """Where an edit acts."""
        if self.points is None:
            width = states.shape[1] if states.dim() == 3 else len(states) // len(self.writes)
            self.points = {k: self._points(k, width) for k in {key for row in self.writes for key in row}}
        return self.points.get(key) or Points([], [], [], [], 0)

    def _points(self, key: str, width: int) -> Points:
        points = Points([], [], [], [], width)
        for number, (writes, real) in enumerate(zip(self.writes, self.real, strict=True)):
            for index, (fact, upcoming) in sorted(writes.get(key, {}).items()):
                if index < len(real) and real[index] >= self.begin:
                    points.rows.append(number)
                    points.columns.append(real[index] - self.begin)
                    points.facts.append(fact)
                    points.upcoming.append(upcoming)
        return points


@dataclass
class _Call:
    """A call of the decoder by whoever uses the model.

    Attributes:
        arguments: by name.
        text: [rows, columns], from the first column that is known.
        mask: of the same shape, or None.
        hidden: columns in front of them that a cache holds and nobody showed.
        first: the first column that is new.
        rows: one for each.
        cache: that the decoder fills, once it is there.
        pieces: the earlier calls that can only be run again as they were.
        whole: whether this call is such a one, too.
        stuck: whether the cache can't be taken back.
    """

    arguments: dict[str, Any]
    text: torch.Tensor
    mask: torch.Tensor | None
    hidden: int
    first: int
    rows: list[_Row]
    cache: Any
    pieces: list[_Piece] = field(default_factory=list)
    whole: bool = False
    runs: list[_Run] = field(default_factory=list)
    stuck: bool = False
    as_tuple: bool = False

    @property
    def columns(self) -> int:
        return self.text.shape[1]


class _Now(threading.local):
    """What hooks tell each other; a copy of a model begins with none of it."""

    call: _Call | None = None
    run: _Run | None = None
    inside: bool = False
    shown: tuple[torch.Tensor, Any, Any] | None = None  # the text, and the cache and mask that go with it
    outer: tuple[Any, Any] = (None, None)  # the tokens and the mask that the outermost model was called with

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        return _Now, ()


def _eager(hook: F) -> F:
    """A hook that a compiler does not trace into. The public decorator imports the compiler at once, which takes seconds."""
    return torch._disable_dynamo(hook)  # type: ignore[return-value]


def _compile_anew() -> None:
    """Compiled code does not look whether a module has other hooks than before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Runner:
    """Runs a model with the edits that act at mentions, from the first of them until the last is taken off.

    Args:
        base: model and tokenizer.
    """

    def __init__(self, base: Base) -> None:
        self._model, self._layout = base.model, base.layout()
        self.edits: list[Edit] = []
        self._key = uuid.uuid4().hex
        self._now = _Now()
        self._clean_copy = False  # of a model whose edits were off
        self._effects: dict[str, list[Any]] = {}
        self._readers: list[Any] = []
        decoder = self._layout.decoder
        self._handles = [
            base.model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            base.model.register_forward_hook(self._leave, always_call=True),
            decoder.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        self._prepare = base.model.__dict__.get("prepare_inputs_for_generation")
        base.model.prepare_inputs_for_generation = _Prepare(self, base.model, self._prepare)

    @classmethod
    def of(cls, base: Base) -> Runner:
        """The model's runner, a new one where it has none."""
        hooks = base.layout().decoder._forward_pre_hooks.values()
        found = (getattr(hook, "__self__", None) for hook in hooks)
        return next((one for one in found if isinstance(one, cls)), None) or cls(base)

    @property
    def _off(self) -> bool:
        return self._clean_copy or EditsOff.of(self._model)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_clean_copy": self._off}

    def add(self, edit: Edit) -> None:
        """Let an edit act."""
        self.edits.append(edit)
        self._effects[edit.key] = [
            module.register_forward_hook(functools.partial(self._act, edit.key, effect), prepend=True)
            for module, effect in edit.effects.items()
        ]
        self._read_first()
        _compile_anew()

    def remove(self, edit: Edit) -> None:
        """Take an edit off; with the last one the model is left as it was."""
        for handle in self._effects.pop(edit.key, ()):
            handle.remove()
        self.edits = [one for one in self.edits if one is not edit]
        self._read_first()
        _compile_anew()
        if self.edits or self._model is None:
            return
        for handle in self._handles:
            handle.remove()
        if self._prepare is None:
            del self._model.prepare_inputs_for_generation
        else:
            self._model.prepare_inputs_for_generation = self._prepare
        self._model = None

    def _read_first(self) -> None:
        """Let gates read a block's output before anything acts there."""
        for handle in self._readers:
            handle.remove()
        blocks = {edit.decider.block for edit in self.edits if edit.decider is not None}
        self._readers = [
            self._layout.blocks[b].register_forward_hook(functools.partial(self._read, b), prepend=True) for b in blocks
        ]

    def show(self, text: torch.Tensor, cache: Any, mask: Any) -> None:
        """The whole text of each row, of which the decoder only gets what its cache does not hold, and a mask of two
        dimensions, of which it may get one of four."""
        self._now.shown = text, cache, mask

    # --- before the decoder runs ---

    @_eager
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now.outer = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")

    @_eager
    def _leave(self, *_: Any) -> None:
        self._now.outer = None, None

    @_eager
    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Read the text; the arguments of a wider run, where the new tokens alone say that earlier ones hold something else."""
        now = self._now
        if now.inside:
            return None
        shown, now.shown, now.call, now.run = now.shown, None, None, None
        kind: Any = type(decoder)
        arguments = dict(list(_signature(kind).bind_partial(decoder, *args, **kwargs).arguments.items())[1:])
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        off = self._off
        ids = None if off else self._tokens(arguments)
        if ids is None:
            if not off:
                _warn_of_embeddings()
            getattr(cache_passed(arguments), _RECORD, {}).pop(self._key, None)  # which would no longer be true
            return None
        _check_one_text_a_row(ids, arguments)
        as_tuple = arguments.get("return_dict") is False
        if as_tuple:
            arguments["return_dict"] = True
        call = now.call = self._call(ids, arguments, shown)
        for row in call.rows:
            row.runs.append(self._likely(row))
        call.as_tuple = as_tuple
        begin, widened = call.first, ((), arguments) if as_tuple else None
        differing = ((row, _first_difference(row.runs[0], row.applied, row.begin)) for row in call.rows)
        if changed := [row.real[index] for row, index in differing if index is not None]:
            self._check_gradients()
            rewound = self._rewound(call, min(changed))
            if rewound is None:
                for row in call.rows:
                    row.runs[0] = _merged(row.applied, row.runs[0], row.begin)
            else:
                begin = self._replayed(decoder, call, rewound, 0)
                widened = (), self._arguments(decoder, call, begin)
        now.run = self._new_run(call, begin)
        return widened

    def _tokens(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """The tokens that the decoder is called with, [rows, columns]; None where only embeddings are known."""
        ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is None and embeddings is not None:
            ids = self._now.outer[0]
            ids = ids if isinstance(ids, torch.Tensor) and ids.shape == embeddings.shape[:2] else None
        return ids

    def _call(self, ids: torch.Tensor, arguments: dict[str, Any], shown: tuple[torch.Tensor, Any, Any] | None) -> _Call:
        cache = cache_passed(arguments)
        done = self._length(cache)
        before = self._known(ids, cache, done, shown) if done else None
        hidden = 0 if not done else done if before is None else done - len(before[0].tokens)
        text, past = ids, before if before is not None else [_Row([], [], {}, {}) for _ in ids]
        if past[0].tokens:
            known = torch.tensor([row.tokens for row in past], dtype=ids.dtype, device=ids.device)
            text = torch.cat([known, ids], dim=1)
        first = text.shape[1] - ids.shape[1]
        mask: Any = arguments.get("attention_mask")
        if not _is_flat(mask) and _is_flat(self._now.outer[1]):
            mask = self._now.outer[1]
        elif not _is_flat(mask) and shown is not None and shown[1] is cache:
            mask = shown[2]
        mask = _of_columns(mask, len(text))
        fits = _is_flat(mask) and len(mask) == len(text)
        mask = mask[:, hidden : hidden + text.shape[1]] if fits and mask.shape[1] >= hidden + text.shape[1] else None
        there = None if mask is None else mask.bool().tolist()
        given: Any = arguments.get("position_ids")
        places: list[list[Any]] = [[]] * len(ids)
        if isinstance(given, torch.Tensor) and given.dim() in (2, 3) and given.shape[-1] == ids.shape[1]:
            given = given if given.dim() == 2 else given.movedim(0, -1)  # several numbers for each token
            places = given.expand(len(ids), *given.shape[1:]).tolist()
        rows = []
        for number, (row, tokens) in enumerate(zip(past, text.tolist(), strict=True)):
            new = [c for c in range(first, len(tokens)) if there is None or there[number][c]]
            own = row.places + places[number] if len(row.places) == first else []
            rows.append(_Row(tokens, row.real + new, row.states, row.applied, own, begin=len(row.real)))
            for edit in self.edits:
                self._find(edit, rows[-1])
        pieces = [] if before is None else [_upto_column(p, first, len(rows)) for p in self._pieces(cache) if p.begin < first]
        return _Call(arguments, text, mask, hidden, first, rows, cache, pieces, self._has_more(ids, arguments))

    def _length(self, cache: Any) -> int:
        """How many tokens a cache holds. One of recurrent states alone doesn't know; then those that are on record count, or
        one, where it was filled without the edits."""
        with suppress(AttributeError, ValueError):
            return int(cache.get_seq_length())
        if not any(any(getattr(layer, "has_previous_state", {}).values()) for layer in getattr(cache, "layers", ())):
            return 0
        hidden, record, _, _ = getattr(cache, _RECORD, {}).get(self._key, (1, [], None, []))
        return hidden + (len(record[0].tokens) if record else 0)

    def _pieces(self, cache: Any) -> list[_Piece]:
        return getattr(cache, _RECORD, {}).get(self._key, (0, [], None, []))[3]

    def _has_more(self, ids: torch.Tensor, arguments: dict[str, Any]) -> bool:
        """Whether a call holds more than its tokens: embeddings of a picture, and what goes with them."""
        if arguments.get("input_ids") is not None:
            return False
        more = any(isinstance(v, (torch.Tensor, list)) for k, v in arguments.items() if k not in _OF_TOKENS)
        return more or not torch.equal(self._embedded(ids), arguments["inputs_embeds"])

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        embedding = self._model.get_input_embeddings()
        return embedding(ids.clamp(0, len(embedding.weight) - 1))  # a picture's token may have no embedding of its own

    def _find(self, edit: Edit, row: _Row) -> None:
        """Where an edit's entities are mentioned in a row."""
        if len(row.states.setdefault(edit.key, [])) < row.begin:  # an edit that was made since
            row.states[edit.key] = self._read_over(edit.tracker, row, row.begin)
        states = row.states[edit.key]
        row.touched[edit.key] = edit.tracker.touched(row.ids, row.begin)
        mentions = states[-1].mentions if states else ()
        for index in sorted(row.touched[edit.key]):
            mentions = edit.tracker.mentions(row.ids, index, mentions)
        row.mentions[edit.key] = mentions

    def _read_over(self, tracker: Tracker, row: _Row, length: int) -> list[State]:
        """States of tokens that were run before an edit came, which nobody asked about."""
        touched, state, states = tracker.touched(row.ids[:length], 0), EMPTY, []
        for index in range(length):
            if state is not EMPTY or index in touched:
                state = tracker.next(state, row.ids, index, index in touched, ())
            states.append(state)
        return states

    def _known(
        self, ids: torch.Tensor, cache: Any, done: int, shown: tuple[torch.Tensor, Any, Any] | None
    ) -> list[_Row] | None:
        """For each row what is known of the tokens that a cache holds; None where it was filled without the edits."""
        hidden, record, keys, _ = getattr(cache, _RECORD, {}).get(self._key, (0, [], None, []))
        done -= hidden
        if not record or done <= 0 or any(len(row.tokens) < done for row in record):
            return None
        if shown is not None and shown[1] is cache and len(shown[0]) == len(ids) and not hidden:
            text = shown[0][:, : done + ids.shape[1]]
            if text.shape[1] == done + ids.shape[1] and torch.equal(text[:, done:].to(ids), ids):
                found = [_matching(record, number, row, done) for number, row in enumerate(text[:, :done].tolist())]
                return None if None in found else [row.kept(done) for row in found if row is not None]
        rows = _rows_kept(keys, _first_keys(cache), hidden + done)
        if rows is None and len(ids) == len(record):
            rows = list(range(len(ids)))
        return None if rows is None or len(rows) != len(ids) else [record[row].kept(done) for row in rows]

    def _likely(self, row: _Row) -> Writes:
        """What will act, as far as the tokens tell: facts that are active stay so."""
        if not row.live or row.begin == len(row.real):
            return {}
        states = {}
        for edit in self.edits:
            before = row.states[edit.key][-1] if row.states[edit.key] else EMPTY
            state = edit.tracker.next(before, row.ids, row.begin, row.begin in row.touched[edit.key])
            if edit.decider is None:  # the end is known beforehand
                for index in range(row.begin + 1, len(row.ids)):
                    state = edit.tracker.next(state, row.ids, index, index in row.touched[edit.key])
            states[edit.key] = state
        return self._planned(row, states, row.begin)

    def _planned(self, row: _Row, states: States, index: int) -> Writes:
        """What acts at all tokens, if the facts that are active after one of them stay so."""
        planned: Writes = {}
        for edit in self.edits:
            state = states[edit.key]
            if not state.active:
                continue
            exact = edit.tracker.writes(state, state.mentions, row.ids[: index + 1])
            later = edit.tracker.writes(state, row.mentions[edit.key], row.ids)
            planned[edit.key] = exact | {i: write for i, write in later.items() if i > index}
        return planned

    def _check_gradients(self) -> None:
        checkpointing = any(getattr(block, "gradient_checkpointing", False) for block in self._layout.blocks)
        if torch.is_grad_enabled() and self._model.training and checkpointing:
            raise RuntimeError(
                "checkpointing of activations runs blocks again without the edit that acts at mentions: switch it off "
                "(gradient_checkpointing=False), or train inside model.disable_edits()"
            )

    # --- while it runs ---

    @_eager
    def _read(self, block: int, _: nn.Module, __: Any, output: Any) -> None:
        """After a block that gates read."""
        if self._now.run is not None and not self._off:
            self._now.run.read[block] = hidden_of(output).detach()

    @_eager
    def _act(self, key: str, effect: Effect, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a module: what the edit does there."""
        run = self._now.run
        if run is None or self._off:  # a block that is run by itself, after a run that was cut off
            return None
        points = run.at(key, hidden_of(output))
        return effect(args[0], output, points) if points.rows else None

    # --- after it has run ---

    @_eager
    def _after(self, decoder: nn.Module, _: Any, output: Any) -> Any:
        """Run tokens again where other facts are active than the run had; remember what the cache holds."""
        now = self._now
        if now.inside or now.call is None:
            return None
        call, run = now.call, now.run
        assert run is not None
        now.call = now.run = None
        call.cache = cache_of(output) if cache_of(output) is not None else call.cache
        run.output = output
        call.runs.append(run)
        for row in call.rows:
            row.applied = row.runs[0]
        live = [row for row in call.rows if row.live]
        if live:
            self._check_gradients()
        waiting = [(row, self._follow(call, row)) for row in live]
        while waiting := [(row, steps) for row, steps in waiting if not self._ended(row, steps)]:
            if not self._repeat(decoder, call):
                call.stuck = True
        self._settle_cache(decoder, call)
        for row in call.rows:
            if row not in live:
                for edit in self.edits:
                    row.states[edit.key] += [EMPTY] * (len(row.real) - row.begin)
        for edit in self.edits:
            edit.last = [{a.fact for a in row.states[edit.key][-1].active} if row.real else set() for row in call.rows]
        if hasattr(call.cache, "__dict__"):
            record = [_Row(row.tokens, row.real, row.states, row.applied, row.places) for row in call.rows]
            pieces = call.pieces
            if call.whole:
                kept = {k: v for k, v in call.arguments.items() if k not in CACHE_NAMES}
                pieces = [*pieces, _Piece(call.first, call.columns, kept)]
            call.cache.__dict__.setdefault(_RECORD, {})[self._key] = call.hidden, record, _first_keys(call.cache), pieces
        changed = _assembled(call)
        return call.runs[0].output.to_tuple() if call.as_tuple else changed

    @staticmethod
    def _ended(row: _Row, steps: Iterator[Writes]) -> bool:
        """Let a row go on to its next need of a run, which becomes its last one's successor; whether it needs none."""
        wanted = next(steps, None)
        if wanted is None:
            return True
        row.runs.append(wanted)
        return False

    def _follow(self, call: _Call, row: _Row) -> Iterator[Writes]:
        """Go through the new tokens of a row; yields what must act in a further run."""
        states = {edit.key: row.states[edit.key][-1] if row.states[edit.key] else EMPTY for edit in self.edits}
        for index in range(row.begin, len(row.real)):
            likely, asked = {}, []
            for edit in self.edits:
                before, touched = states[edit.key], index in row.touched[edit.key]
                if before is EMPTY and not touched:
                    likely[edit.key] = EMPTY
                    continue
                state = likely[edit.key] = edit.tracker.next(before, row.ids, index, touched)
                if edit.decider is not None and state.mentions and edit.tracker.is_content(row.ids, index):
                    asked.append(edit)
            run = None
            for edit in asked:
                assert edit.decider is not None
                if run is None:
                    run = self._serving(call, row, likely, index)
                    if run is None:
                        yield self._planned(row, likely, index)
                        run = len(row.runs) - 1
                queries = self._queries(call, row, edit, run)
                verdict = edit.decider.verdict(likely[edit.key], row.ids, index, queries)
                touched = index in row.touched[edit.key]
                likely[edit.key] = edit.tracker.next(states[edit.key], row.ids, index, touched, verdict)
            states = likely
            run = self._serving(call, row, states, index)
            if run is None:
                yield self._planned(row, states, index)
                run = len(row.runs) - 1
            row.taken.append(run)
            for key, state in states.items():
                row.states[key].append(state)

    def _queries(self, call: _Call, row: _Row, edit: Edit, run: int) -> Queries:
        """What an edit's gate reads of a row in a run."""
        key = edit.key, run
        if key not in row.queries:
            assert edit.decider is not None
            ran = call.runs[run]
            first = next(i for i, column in enumerate(row.real) if column >= ran.begin)
            columns = [column - ran.begin for column in row.real[first:]]
            if edit.decider.block not in ran.read:
                raise NotImplementedError(
                    "the block that the gate reads was left out (assistant_early_exit); generate without, or inside "
                    "model.disable_edits()"
                )
            states = ran.read[edit.decider.block][call.rows.index(row)][columns]
            row.queries[key] = Queries(edit.decider.routing, states, first)
        return row.queries[key]

    def _serving(self, call: _Call, row: _Row, states: States, index: int) -> int | None:
        """The latest run in which, up to a token, exactly the active facts act; None where there is none."""
        if call.stuck:
            return len(row.runs) - 1
        needed = {
            edit.key: edit.tracker.writes(states[edit.key], states[edit.key].mentions, row.ids[: index + 1])
            for edit in self.edits
            if states[edit.key].active
        }
        for number in reversed(range(len(row.runs))):
            if call.runs[number].begin <= row.real[index] and _same(row.runs[number], needed, index):
                return number
        return None

    def _repeat(self, decoder: nn.Module, call: _Call) -> bool:
        """One run more, with what each row's last request says; whether it could be done."""
        number = len(call.runs)
        changed = []
        for row in call.rows:
            if len(row.runs) > number:
                index = _first_difference(row.runs[-1], row.applied, len(row.real))
                changed.append(row.real[0 if index is None else index])
            else:
                row.runs.append(row.applied)
        begin = self._rewound(call, min(changed))
        if begin is None:
            for row in call.rows:
                row.runs[-1] = row.applied
            call.runs.append(call.runs[-1])
            return False
        begin = self._replayed(decoder, call, begin, number)
        call.runs.append(self._ran(decoder, call, begin, number, self._arguments(decoder, call, begin)))
        for row in call.rows:
            row.applied = row.runs[-1]
        return True

    def _replayed(self, decoder: nn.Module, call: _Call, begin: int, number: int) -> int:
        """Run what lies between a column and the last part of the text that can be run in one go; where that part begins."""
        for piece in (p for p in call.pieces if p.begin >= begin):
            if piece.begin > begin:
                self._ran(decoder, call, begin, number, self._arguments(decoder, call, begin, piece.begin))
            assert piece.arguments is not None
            self._ran(decoder, call, piece.begin, number, with_cache(decoder.forward, piece.arguments, call.cache))
            begin = piece.end
        if call.whole and begin < call.first:
            self._ran(decoder, call, begin, number, self._arguments(decoder, call, begin, call.first))
            begin = call.first
        return begin

    def _ran(self, decoder: nn.Module, call: _Call, begin: int, number: int, arguments: dict[str, Any]) -> _Run:
        now = self._now
        now.inside, now.run = True, self._new_run(call, begin, number)
        try:
            now.run.output = decoder(**arguments)
            return now.run
        finally:
            now.inside, now.run = False, None

    def _new_run(self, call: _Call, begin: int, number: int = 0) -> _Run:
        return _Run(begin, [row.runs[number] for row in call.rows], [row.real for row in call.rows])

    def _rewound(self, call: _Call, column: int) -> int | None:
        """Let the cache forget the columns from one on; the column that a run has to begin with, None where it can't forget."""
        cache = call.cache
        if call.whole:
            column = min(column, call.first)
        column = min((p.begin for p in call.pieces if p.end > column), default=column)
        if any(p.arguments is None for p in call.pieces if p.begin >= column):
            _warn_once(type(cache).__name__)
            return None
        held = call.hidden + (call.columns if call.runs else call.first)
        if cache is None or held == call.hidden + column:
            return 0 if cache is None else column
        if call.runs and _plain(cache):
            call.runs[-1].cached = [(layer.keys, layer.values) for layer in cache.layers]
        with suppress(RuntimeError, ValueError, NotImplementedError):
            if _can_be_cut(cache):
                cache.crop(call.hidden + column - held)
                return column
        if not call.hidden and all(p.arguments is not None for p in call.pieces):
            with suppress(AttributeError, NotImplementedError, RuntimeError, TypeError):
                _empty(cache)
                if not self._length(cache):
                    return 0
        _warn_once(type(cache).__name__)
        return None

    def _arguments(self, decoder: nn.Module, call: _Call, begin: int, end: int | None = None) -> dict[str, Any]:
        """The decoder's arguments for a run of all columns from one on, or of those up to another one."""
        end = call.columns if end is None else end
        arguments = {k: v for k, v in call.arguments.items() if k != "cache_position"}
        if (begin, end) == (call.first, call.columns):
            return with_cache(decoder.forward, arguments, call.cache)
        if arguments.pop("inputs_embeds", None) is None:
            arguments["input_ids"] = call.text[:, begin:end]
        else:
            arguments = {k: v for k, v in arguments.items() if k in _OF_TOKENS or not isinstance(v, (torch.Tensor, list))}
            arguments["inputs_embeds"] = self._embedded(call.text[:, begin:end])
        given = call.arguments.get("attention_mask")
        if _is_flat(given):
            arguments["attention_mask"] = given[:, : call.hidden + end]
        elif given is not None:
            arguments["attention_mask"] = (
                None if call.mask is None else nn.functional.pad(call.mask, (call.hidden, 0), value=1)[:, : call.hidden + end]
            )
        places = call.arguments.get("position_ids")
        if places is not None and begin >= call.first:
            arguments["position_ids"] = places[..., begin - call.first :]
        elif places is not None and all(len(row.places) == call.columns for row in call.rows):
            known = torch.tensor([row.places[begin:end] for row in call.rows], dtype=places.dtype, device=places.device)
            arguments["position_ids"] = known if places.dim() == 2 else known.movedim(-1, 0)
        elif places is not None:
            there = torch.ones_like(call.text) if call.mask is None else call.mask.long()
            arguments["position_ids"] = (there.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        return with_cache(decoder.forward, arguments, call.cache)

    def _settle_cache(self, decoder: nn.Module, call: _Call) -> None:
        """Leave in the cache what is right after the last token."""
        if len(call.runs) < 2 or call.cache is None or call.stuck:
            return
        wrong = []
        for number, row in enumerate(call.rows):
            last = row.taken[-1] if row.taken else 0
            if not _same(row.applied, row.runs[last], len(row.real) - 1):
                wrong.append((number, row, last))
        if not wrong:
            return
        if _plain(call.cache) and all(call.runs[last].cached is not None for _, _, last in wrong):
            for at, layer in enumerate(call.cache.layers):
                for number, _, last in wrong:
                    chosen = torch.zeros(len(call.rows), dtype=torch.bool, device=layer.keys.device)
                    chosen[number] = True
                    keys, values = call.runs[last].cached[at]  # type: ignore[index]
                    layer.keys = torch.where(chosen[:, None, None, None], keys, layer.keys)
                    layer.values = torch.where(chosen[:, None, None, None], values, layer.values)
            for _, row, last in wrong:
                row.applied = row.runs[last]
            return
        for _, row, last in wrong:
            row.runs.append(row.runs[last])
        self._repeat(decoder, call)


class _Prepare:
    """`prepare_inputs_for_generation` that shows the text; a plain object, so that models can be copied and pickled."""

    def __init__(self, runner: Runner, model: Any, before: Any) -> None:
        self._runner, self._of, self._before = runner, model, before

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def _original(self) -> Any:
        return self._before or functools.partial(type(self._of).prepare_inputs_for_generation, self._of)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = self._original(input_ids, *args, **kwargs)
        self._runner.show(input_ids, cache_passed(prepared), kwargs.get("attention_mask"))
        return prepared


@functools.lru_cache(maxsize=64)
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _first_keys(cache: Any) -> torch.Tensor | None:
    """The keys of a cache's first layer, [rows, heads, tokens, ...], by which its rows are told apart; None where it keeps none
    of every token."""
    layer = next(iter(getattr(cache, "layers", ())), None)
    keys = getattr(layer, "keys", None)
    return keys.detach() if type(layer) is DynamicLayer and isinstance(keys, torch.Tensor) and keys.dim() == 4 else None


def _rows_kept(before: torch.Tensor | None, now: torch.Tensor | None, length: int) -> list[int] | None:
    """For each row of a cache the one that it was when its record was made, by its last keys: rows are reordered, repeated and
    taken out. Empty where one is of another cache, None where that can't be told."""
    if before is None or now is None or before is now or before.shape[2] < length or before.device != now.device:
        return None
    one, other = before[:, :, length - 1], now[:, :, length - 1]
    if one.shape == other.shape and torch.equal(one, other):
        return list(range(len(now)))
    same = (other.flatten(1)[:, None] == one.flatten(1)[None]).all(-1)  # [rows now, rows before]
    return same.int().argmax(1).tolist() if bool(same.any(1).all()) else []


def _is_flat(mask: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _upto_column(piece: _Piece, end: int, rows: int) -> _Piece:
    """A piece as far as the cache still holds it, for a batch of so many rows."""
    if piece.arguments is None or (piece.end <= end and len(piece.arguments["inputs_embeds"]) == rows):
        return _Piece(piece.begin, min(piece.end, end), piece.arguments)
    return _Piece(piece.begin, min(piece.end, end), None)


def _of_columns(mask: Any, rows: int) -> Any:
    """A mask of two dimensions for one of four: the columns that the last token attends to."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return mask
    last = mask[:, 0, -1]
    last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return last.expand(rows, -1).long()


def _check_one_text_a_row(ids: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """Refuse several texts that are packed into one row: which of them a mention is in can't be told."""
    places, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    packed = type(cache_passed(arguments)).__name__.startswith("Paged")
    if not packed and isinstance(places, torch.Tensor) and places.dim() == 2 and places.shape == ids.shape and ids.shape[1] > 1:
        falls = places.diff(dim=1) < 0
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
            falls = falls & mask[:, -ids.shape[1] :][:, 1:].bool() & mask[:, -ids.shape[1] :][:, :-1].bool()
        packed = bool(falls.any())
    if packed:
        raise NotImplementedError(
            "several texts in one row (continuous batching, padding-free batches) can't be edited at mentions: use generate, "
            "or model.disable_edits()"
        )


def _matching(record: Sequence[_Row], number: int, tokens: Sequence[int], length: int) -> _Row | None:
    """The record of a row by its tokens: beams change places."""
    return next((row for row in (*record[number : number + 1], *record) if row.tokens[:length] == tokens), None)


def _upto(writes: Mapping[int, Write], index: int) -> dict[int, Write]:
    """What acts up to a token."""
    return {i: write for i, write in writes.items() if i <= index}


def _same(one: Writes, other: Writes, index: int) -> bool:
    """Whether two writes are the same up to a token."""
    return all(_upto(one.get(key, {}), index) == _upto(other.get(key, {}), index) for key in {*one, *other})


def _merged(one: Writes, other: Writes, index: int) -> Writes:
    """What acts by the one in front of a token, and by the other from it on."""
    return {
        key: _upto(one.get(key, {}), index - 1) | {i: w for i, w in other.get(key, {}).items() if i >= index}
        for key in {*one, *other}
    }


def _first_difference(one: Writes, other: Writes, end: int) -> int | None:
    """The first token, in front of an end, at which two writes differ."""
    found = [
        i
        for key in {*one, *other}
        for i in {*one.get(key, {}), *other.get(key, {})}
        if i < end and one.get(key, {}).get(i) != other.get(key, {}).get(i)
    ]
    return min(found, default=None)


def _empty(cache: Any) -> None:
    """Let a cache forget all tokens."""
    kind = type(cache)
    if kind.__module__ == DynamicCache.__module__ or "reset" in vars(kind):
        cache.reset()
        return
    new = kind()  # a model's own class may hold more than the method that it inherits knows of
    cache.__dict__.clear()
    cache.__dict__.update(new.__dict__)


def _can_be_cut(cache: Any) -> bool:
    """Whether a cache can forget its last tokens: static ones can't, nor windows that have moved on."""
    layers = getattr(cache, "layers", None)
    if not layers or not getattr(cache, "is_croppable", True) or not hasattr(cache, "crop"):
        return False
    return all(
        isinstance(layer, DynamicLayer)
        and (not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window)
        for layer in layers
    )


def _plain(cache: Any) -> bool:
    """Whether a cache holds nothing but keys and values of all tokens."""
    layers = getattr(cache, "layers", [])
    return (
        type(cache) is DynamicCache
        and bool(layers)
        and all(type(layer) is DynamicLayer and isinstance(layer.keys, torch.Tensor) for layer in layers)
    )


def _assembled(call: _Call) -> Any:
    """The output of the first run, with each token's columns from the run that serves it."""
    width, output = call.columns - call.first, call.runs[0].output
    chosen = torch.zeros(len(call.rows), width, dtype=torch.long)
    for number, row in enumerate(call.rows):
        for index, run in enumerate(row.taken, row.begin):
            chosen[number, row.real[index] - call.first] = run
    used = chosen.unique().tolist()
    if call.runs[0].begin == call.first and used in ([], [0]):
        return None
    columns = [None if run not in used else run for run in range(len(call.runs))]

    def joined(of: Any, place: int) -> torch.Tensor:
        found = None
        keys = max(of(call.runs[run].output).shape[-1] for run in columns if run is not None)
        for run in columns:
            if run is None:
                continue
            ran = call.runs[run]
            states = of(ran.output)
            part = min(width, states.shape[place])
            states = states.narrow(place, states.shape[place] - part, part)
            if place == 2 and states.shape[-1] < keys:  # a run that saw a window of the cache
                states = nn.functional.pad(states, (keys - states.shape[-1], 0))
            if states.shape[place] < width:  # it began behind the first new column
                shape = list(states.shape)
                shape[place] = width - states.shape[place]
                states = torch.cat([states.new_zeros(shape), states], dim=place)
            if found is None:
                found = states
                continue
            here = (chosen == run).to(states.device)
            here = here[:, :, None] if place == 1 else here[:, None, :, None]
            found = torch.where(here, states, found)
        assert found is not None
        return found

    output.last_hidden_state = joined(lambda o: o.last_hidden_state, 1)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(joined(lambda o, n=n: o.hidden_states[n], 1) for n in range(len(output.hidden_states)))
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(
            None if a is None else joined(lambda o, n=n: o.attentions[n], 2) for n, a in enumerate(output.attentions)
        )
    return output


@functools.lru_cache(maxsize=64)
def _warn_once(cache: str) -> None:
    warnings.warn(
        f"a {cache} can't be rewound: a mention that it holds stays as it was decided before the prompt was known whole, so "
        "the answer may differ from that to the same prompt without a cache. Run prompts in one piece, or use a DynamicCache.",
        stacklevel=2,
    )


def _warn_of_embeddings() -> None:
    warnings.warn(
        "the model was given embeddings in place of tokens, so edits that act at mentions (LKS, a gate) don't act on them; "
        "pass input_ids, or take an edit of weights (method='steam' without a gate)",
        stacklevel=2,
    )
