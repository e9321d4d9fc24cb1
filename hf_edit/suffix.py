"""Running only what an edit can change.

An edit enters at one position of a text and at one block. Blocks below it, and tokens in front of it, never change:
their states, keys and values are computed once, for all steps of an optimisation, and each step runs the remaining
tokens through the remaining blocks. Logits are computed only where a loss reads them.

The model's own forward does the work, so masks, position codes, soft caps and scales are the model's own: blocks below
the edit hand on what they get, and a cache holds the clean keys and values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .kv_cache import with_cache
from .layout import Layout
from .positions import pad

__all__ = [
    "Frontier",
    "Outputs",
    "Span",
    "SuffixBatch",
    "SuffixCache",
    "caches_exactly",
    "frozen",
    "hidden_of",
    "length_groups",
    "read_keys_and_states",
]

Hook = Callable[[torch.Tensor], torch.Tensor]
Keep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """What one run gives back.

    Attributes:
        logits: float32 [reads, vocabulary], in the order asked for.
        states: by block, its output at the positions asked for: [reads, hidden].
    """

    logits: torch.Tensor | None
    states: dict[int, torch.Tensor]


@dataclass
class Span:
    """One text's share of a cache. Its tensors lie in one piece, which a cache of many texts needs: a tensor for each text
    and block would cost more than what it holds.

    Attributes:
        ids: all token ids.
        cut: index of the first token that runs.
        kept: the pieces in a row, [numbers].
        shapes: of the pieces: the clean input of the first block that runs, [tokens - cut, hidden], unless that is block 0;
            then, for each block that runs, keys and values, [heads, cut, head size].
    """

    ids: tuple[int, ...]
    cut: int
    kept: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, ids: tuple[int, ...], cut: int, pieces: Sequence[torch.Tensor], keep: Keep) -> Span:
        """A text's share from its pieces."""
        flat = torch.cat([piece.reshape(-1).to(pieces[0].device) for piece in pieces]) if pieces else torch.empty(0)
        return cls(ids, cut, keep(flat), tuple(tuple(piece.shape) for piece in pieces))

    def pieces(self) -> list[torch.Tensor]:
        """The pieces, each in its shape."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(self.kept.split(sizes), self.shapes, strict=True)] if sizes else []


class SuffixCache:
    """Clean states, keys and values of texts, from which runs start at block `start` and at each text's cut.

    Args:
        model: the causal language model.
        layout: its blocks.
        start: the first block that runs.
        keep: puts a tensor away and gives back the one to read later: in another precision, or mapped from a file. By default
            tensors stay as they are.
    """

    def __init__(self, model: Any, layout: Layout, start: int, keep: Keep = lambda tensor: tensor) -> None:
        self.model = model
        self.layout = layout
        self.start = start
        self.spans: list[Span] = []
        self._keep = keep
        self._tuples = False  # whether the block in front of the start returns a tuple

    @torch.no_grad()
    def add(
        self,
        texts: Sequence[Sequence[int]],
        cuts: Sequence[int],
        reads: Sequence[tuple[int, int]] = (),
        states: Sequence[int] = (),
        shared: Sequence[int] | None = None,
    ) -> Outputs:
        """Run texts through the clean model once and keep what later runs start from.

        Args:
            texts: token ids; one that is there twice, with the same cut, runs once.
            cuts: for each text, the first token that later runs compute; 0 runs all of it.
            shared: for each text, how many leading tokens, at most up to its cut, it has in common with other texts; they run
                once. Only for models that cache exactly.
            reads: (text, position) pairs to read logits and `states` at in this clean pass.
            states: blocks whose outputs are read at `reads`.

        Returns:
            The clean outputs at `reads`, in their order.
        """
        found: dict[int, tuple[torch.Tensor | None, dict[int, torch.Tensor]]] = {}
        spans: dict[int, Span] = {}
        seen: dict[tuple[tuple[int, ...], int], int] = {}
        same = [seen.setdefault((tuple(text), cut), i) for i, (text, cut) in enumerate(zip(texts, cuts, strict=True))]
        for prefix, members in _by_prefix(texts, shared or [0] * len(texts)).items():
            past = self._run_prefix(prefix) if prefix else None
            order = sorted((i for i in members if same[i] == i), key=lambda i: len(texts[i]))
            for rows in _batches(order, [len(t) - len(prefix) for t in texts], self.model):
                at = {row: i for i, row in enumerate(rows)}
                wanted = [n for n, (text, _) in enumerate(reads) if same[text] in at]
                points = [(at[same[reads[n][0]]], reads[n][1] - len(prefix)) for n in wanted]
                outputs = self._clean(rows, texts, cuts, points, states, spans, past)
                for k, n in enumerate(wanted):
                    logits = outputs.logits[k] if outputs.logits is not None else None
                    found[n] = (logits, {block: s[k] for block, s in outputs.states.items()})
        self.spans += [spans[i] for i in same]
        if not reads:
            return Outputs(None, {})
        logits = torch.stack([found[n][0] for n in range(len(reads))])  # type: ignore[misc]
        return Outputs(logits, {b: torch.stack([found[n][1][b] for n in range(len(reads))]) for b in states})

    def _clean(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
        cuts: Sequence[int],
        points: Sequence[tuple[int, int]],
        states: Sequence[int],
        spans: dict[int, Span],
        past: DynamicCache | None,
    ) -> Outputs:
        device = self.model.get_input_embeddings().weight.device
        before = past.get_seq_length() if past is not None else 0
        ids, mask = pad([texts[r][before:] for r in rows], device=device)
        mask = torch.cat([mask.new_ones(len(rows), before), mask], dim=1)
        cache = DynamicCache() if any(cuts[r] for r in rows) else None
        if past is not None and cache is not None:
            for block, layer in enumerate(past.layers):
                cache.update(*(t.expand(len(rows), -1, -1, -1) for t in (layer.keys, layer.values)), block)
        raw: list[Any] = []
        with ExitStack() as stack:
            if self.start:
                stack.enter_context(_reading(self.layout.blocks[self.start - 1], raw))
            places = _positions(mask)[:, before:]
            outputs = _forward(self.model, self.layout, stack, points, states, ids, mask, cache, places)
        self._tuples = any(isinstance(output, tuple) for output in raw)
        inputs = [hidden_of(output) for output in raw]
        blocks = range(self.start, len(self.layout)) if cache is not None else range(0)
        for i, row in enumerate(rows):
            cut, length = cuts[row], len(texts[row])
            pieces = [inputs[0][i, cut - before : length - before]] if inputs else []
            if cache is not None:
                pieces += [t[i, :, :cut] for b in blocks for t in (cache.layers[b].keys, cache.layers[b].values)]
            spans[row] = Span.of(tuple(texts[row]), cut, pieces, self._keep)
        return outputs

    def _run_prefix(self, ids: Sequence[int]) -> DynamicCache:
        """Keys and values of a text's beginning, all blocks."""
        cache = DynamicCache()
        row, mask = pad([ids], device=self.model.get_input_embeddings().weight.device)
        with ExitStack() as stack:
            _forward(self.model, self.layout, stack, (), (), row, mask, cache, _positions(mask), logits=False)
        return cache

    def batch(self, indices: Sequence[int]) -> SuffixBatch:
        """Texts of the cache as one padded batch, in the order given."""
        return SuffixBatch(self, [self.spans[i] for i in indices])


class SuffixBatch:
    """A padded batch of a `SuffixCache`: built once, run as often as an optimisation has steps.

    Attributes:
        ids: [rows, longest suffix].
        inputs: [rows, longest suffix, hidden], the clean input of the first block that runs, or None at block 0.
    """

    def __init__(self, cache: SuffixCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._cuts = [s.cut for s in spans]
        device = cache.model.get_input_embeddings().weight.device
        self.ids, mask = pad([s.ids[s.cut :] for s in spans], device=device)
        prefix = max(self._cuts)
        before = torch.tensor([[int(j < s.cut) for j in range(prefix)] for s in spans], device=device, dtype=mask.dtype)
        self._mask = torch.cat([before.reshape(len(spans), prefix), mask], dim=1)
        self._positions = _positions(self._mask)[:, prefix:]
        pieces = [s.pieces() for s in spans]
        self.inputs = None
        if cache.start:
            states = nn.utils.rnn.pad_sequence([own.pop(0).to(device) for own in pieces], batch_first=True)
            self.inputs = states.to(cache.model.get_input_embeddings().weight.dtype)
        # a text that is cut at its first token has none, and others in the batch may have some
        shapes = next((own for own in pieces if own), [])
        placed = [device_of(cache.layout.blocks[cache.start + n // 2]) for n in range(len(shapes))]
        padded = [
            _pad_heads([(own[n] if own else like[:, :0]).to(where) for own in pieces], prefix)
            for n, (like, where) in enumerate(zip(shapes, placed, strict=True))
        ]
        self._keys, self._values = (padded[0::2], padded[1::2]) if prefix else ([], [])

    def column(self, row: int, position: int) -> int:
        """The column, in this batch's suffixes, of a token position of the row's whole text."""
        return position - self._cuts[row]

    def run(
        self,
        reads: Sequence[tuple[int, int]],
        *,
        states: Sequence[int] = (),
        inputs: torch.Tensor | None = None,
        hooks: Mapping[nn.Module, Hook] | None = None,
        logits: bool = True,
    ) -> Outputs:
        """Run the suffixes.

        Args:
            reads: (row, position in the whole text) pairs to read at.
            states: blocks, at or above the start, whose outputs are read at `reads`.
            inputs: takes the place of the clean inputs of the first block that runs.
            hooks: by module, a function of the module's output [rows, suffix, ...] that gives the one to go on with.
            logits: False where only states are wanted.
        """
        cache, model, layout = self._cache, self._cache.model, self._cache.layout
        points = [(row, self.column(row, position)) for row, position in reads]
        past = self._past() if self._keys else None
        with ExitStack() as stack:
            if cache.start:
                stack.enter_context(_skipping(layout, cache.start, self.inputs if inputs is None else inputs, cache._tuples))
            for module, change in (hooks or {}).items():
                stack.enter_context(_changing(module, change, self.ids.shape))
            return _forward(model, layout, stack, points, states, self.ids, self._mask, past, self._positions, logits)

    def _past(self) -> DynamicCache:
        past = DynamicCache()
        filler = self._keys[0][:1, :1, :, :1].expand_as(self._keys[0])  # never read: blocks below the start are skipped
        for block in range(len(self._cache.layout)):
            kept = block - self._cache.start
            past.update(*(((self._keys[kept], self._values[kept])) if kept >= 0 else (filler, filler)), block)
        return past


def read_keys_and_states(
    model: Any,
    layout: Layout,
    texts: Sequence[Sequence[int]],
    points: Sequence[tuple[int, int]],
    *,
    modules: Sequence[str] = (),
    blocks: Sequence[int] = (),
    last: int,
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Inputs of modules and outputs of blocks at points of texts; nothing above block `last` runs. See `Frontier.read`."""
    return Frontier(model, layout, texts).read(points, modules=modules, blocks=blocks, last=last)


class Frontier:
    """Texts that a model has run up to a block: what lies below it is not run again, however often the blocks above change.

    Args:
        model: the causal language model.
        layout: its blocks.
        texts: token ids.

    Attributes:
        start: the first block that runs.
    """

    def __init__(self, model: Any, layout: Layout, texts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.layout = layout
        self.start = 0
        self._texts = texts
        self._inputs: list[torch.Tensor] = []  # by text, [tokens, hidden], of the block `start`
        self._tuples = False  # whether the block in front of it returns a tuple

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Run the texts up to a block, as the model stands now, and keep its inputs; `block` is not below `start`."""
        if block <= self.start:
            return
        found: dict[int, torch.Tensor] = {}
        kinds = False
        for group in _batches(sorted(range(len(self._texts)), key=lambda i: len(self._texts[i])), self._lengths, self.model):
            _, outputs = self._run(group, (), (block - 1,), block - 1)
            kinds = isinstance(outputs[block - 1], tuple)
            for row, text in enumerate(group):
                found[text] = hidden_of(outputs[block - 1])[row, : len(self._texts[text])].clone()
        self._inputs = [found[i] for i in range(len(self._texts))]
        self.start, self._tuples = block, kinds

    @torch.no_grad()
    def read(
        self, points: Sequence[tuple[int, int]], *, modules: Sequence[str] = (), blocks: Sequence[int] = (), last: int
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Inputs of modules and outputs of blocks at points of the texts, as the model stands now.

        Args:
            points: (text, position) pairs.
            modules: names of modules whose inputs are read, at or above `start`: the keys of an MLP output projection.
            blocks: blocks whose outputs are read, at or above `start`.
            last: the highest block that runs.

        Returns:
            By module [points, in] and by block [points, hidden], in the model's dtype.
        """
        keys: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
        states: dict[int, list[torch.Tensor]] = {block: [] for block in blocks}
        order: list[int] = []
        by_text: dict[int, list[int]] = {}
        for n, (text, _) in enumerate(points):
            by_text.setdefault(text, []).append(n)
        for group in _batches(sorted(by_text, key=lambda i: len(self._texts[i])), self._lengths, self.model):
            wanted = [n for text in group for n in by_text[text]]
            order += wanted
            device = self.model.get_input_embeddings().weight.device
            row = {text: i for i, text in enumerate(group)}
            rows = torch.tensor([row[points[n][0]] for n in wanted], device=device)
            columns = torch.tensor([points[n][1] for n in wanted], device=device)
            read, outputs = self._run(group, modules, blocks, last)
            for name in modules:
                keys[name].append(_at(read[name], rows, columns))
            for block in blocks:
                states[block].append(_at(hidden_of(outputs[block]), rows, columns))
        back = torch.tensor(order).argsort()
        return (
            {name: torch.cat(found)[back.to(found[0].device)] for name, found in keys.items()},
            {block: torch.cat(found)[back.to(found[0].device)] for block, found in states.items()},
        )

    @property
    def _lengths(self) -> list[int]:
        return [len(text) for text in self._texts]

    def _run(
        self, group: Sequence[int], modules: Sequence[str], blocks: Sequence[int], last: int
    ) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
        """One padded batch: inputs of modules [rows, tokens, in] and outputs of blocks as they are."""
        ids, mask = pad([self._texts[i] for i in group], device=self.model.get_input_embeddings().weight.device)
        read: dict[str, list[Any]] = {name: [] for name in modules}
        outputs: dict[int, list[Any]] = {block: [] for block in blocks}
        with ExitStack() as stack:
            for name in modules:
                stack.enter_context(_reading_inputs(self.model.get_submodule(name), read[name]))
            for block in blocks:
                stack.enter_context(_reading(self.layout.blocks[block], outputs[block]))
            stack.enter_context(_stopping(self.layout, last))
            if self.start:
                inputs = nn.utils.rnn.pad_sequence([self._inputs[i] for i in group], batch_first=True)
                stack.enter_context(_skipping(self.layout, self.start, inputs, self._tuples))
            _forward(self.model, self.layout, stack, (), (), ids, mask, None, _positions(mask), logits=False)
        keys = {name: found[0].reshape(*ids.shape, -1) for name, found in read.items()}
        return keys, {block: found[0] for block, found in outputs.items()}


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """The model in eval mode, none of its parameters asking for a gradient; both as before afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@torch.no_grad()
def caches_exactly(model: Any, layout: Layout) -> bool:
    """Whether texts of unequal length may share a padded cache: not where distances are counted in cache slots (MPT's
    ALiBi) or where the cache holds no keys and values. Found by trying it on a few tokens."""
    texts = [list(range(1, 8)), list(range(8, 12))]
    reads = [(0, 6), (1, 3)]
    cache = SuffixCache(model, layout, 0)
    try:
        with frozen(model):
            clean = cache.add(texts, [5, 1], reads).logits
            again = cache.batch([0, 1]).run(reads).logits
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return False  # a cache of another kind
    assert clean is not None
    assert again is not None
    spread = clean.std(dim=-1).mean()
    rounding = 1e-2 if model.dtype in (torch.float32, torch.float64) else 16 * torch.finfo(model.dtype).eps
    return float((clean - again).abs().max()) < rounding * float(spread)


def length_groups(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Indices of rows grouped by length: the partition that computes the fewest tokens, padding and the cost of one more
    forward included (reading all weights once takes a CPU as long as about 50 tokens, an accelerator some thousand)."""
    overhead = 50 if device.type == "cpu" else 4096
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n rows, and where their last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[first][0] + (end - first) * longest + overhead, first) for first in range(end)))
    groups = []
    end = len(order)
    while end:
        groups.append(order[best[end][1] : end])
        end = best[end][1]
    return groups[::-1]


def device_of(block: nn.Module) -> torch.device:
    """Where a block runs; accelerate may keep its weights elsewhere."""
    place = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
    return next(block.parameters()).device if place is None else torch.empty(0, device=place).device


def hidden_of(output: Any) -> torch.Tensor:
    """A block's hidden states [batch, tokens, hidden]: some architectures return them in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _forward(
    model: Any,
    layout: Layout,
    stack: ExitStack,
    points: Sequence[tuple[int, int]],
    states: Sequence[int],
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache | None,
    positions: torch.Tensor,
    logits: bool = True,
) -> Outputs:
    seen: dict[int, list[Any]] = {block: [] for block in states}
    for block in states:
        stack.enter_context(_reading(layout.blocks[block], seen[block]))
    rows = torch.tensor([r for r, _ in points], dtype=torch.long, device=ids.device)
    columns = torch.tensor([c for _, c in points], dtype=torch.long, device=ids.device)
    head = model.get_output_embeddings()
    wanted = logits and len(points) > 0
    stack.enter_context(_gathering(head, rows if wanted else rows[:0], columns if wanted else columns[:0]))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        arguments = with_cache(model.forward, arguments, cache)
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = positions
    output = model(**arguments, return_dict=True)
    return Outputs(
        output.logits[0].float() if wanted else None,
        {block: _at(hidden_of(outputs[0]), rows, columns) for block, outputs in seen.items()},
    )


def _at(states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[rows, columns, hidden] at the given points: [points, hidden]."""
    return states[rows.to(states.device), columns.to(states.device)]


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _pad_heads(tensors: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """[heads, cut, size] tensors as [rows, heads, length, size], zeros behind each cut."""
    out = tensors[0].new_zeros(len(tensors), tensors[0].shape[0], length, tensors[0].shape[2])
    for i, tensor in enumerate(tensors):
        out[i, :, : tensor.shape[1]] = tensor
    return out


def _by_prefix(texts: Sequence[Sequence[int]], shared: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """Indices of texts by the tokens that they begin with."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (text, count) in enumerate(zip(texts, shared, strict=True)):
        groups.setdefault(tuple(text[:count]), []).append(i)
    return groups


def _batches(order: Sequence[int], lengths: Sequence[int], model: Any) -> Iterator[list[int]]:
    """Indices in the order given, in groups of a bounded padded size (one row at least): what a CPU's caches hold, or what
    keeps an accelerator busy."""
    budget = 1024 if model.get_input_embeddings().weight.device.type == "cpu" else 8192
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * max(lengths[index], lengths[group[0]]) > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@contextmanager
def _reading(module: nn.Module, into: list[Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: into.append(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _reading_inputs(module: nn.Module, into: list[Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: into.append(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stopping(layout: Layout, last: int) -> Iterator[None]:
    """Blocks above `last` do nothing."""
    kinds: list[Any] = []
    blocks = layout.blocks[last + 1 :]
    with _reading(layout.blocks[last], kinds), _replaced(blocks, [_pass_on(kinds)] * len(blocks)):
        yield


def _pass_on(kinds: list[Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _hand_on(None, isinstance(kinds[-1], tuple))(*args, **kwargs)

    return forward


@contextmanager
def _changing(module: nn.Module, change: Hook, shape: Sequence[int]) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        states = hidden_of(output)
        # some blocks (OPT) run their MLP on all tokens of the batch in a row: [rows * tokens, ...]
        changed = change(states.reshape(*shape, -1)).reshape(states.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _gathering(head: nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """The output embedding sees only the states at (rows, columns), as one row of a batch: [1, reads, hidden]."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at(args[0], rows, columns)[None], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _skipping(layout: Layout, start: int, inputs: torch.Tensor | None, as_tuple: bool) -> Iterator[None]:
    """Blocks below `start` do nothing, and the last of them hands on `inputs`."""
    blocks = layout.blocks[:start]
    handed_on = [inputs if index == start - 1 else None for index in range(start)]
    with _replaced(blocks, [_hand_on(states, as_tuple) for states in handed_on]):
        yield


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The blocks with other `forward` methods; as before afterwards, also where something had replaced them already."""
    missing = object()
    before = [block.__dict__.get("forward", missing) for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is missing:
                del block.forward
            else:
                block.forward = forward


def _hand_on(inputs: torch.Tensor | None, as_tuple: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = inputs if inputs is not None else args[0] if args else kwargs["hidden_states"]
        return (states, None) if as_tuple else states

    return forward
