"""Residual flow: what an edit does to the residual stream, block by block.

STEAM (arXiv 2510.10398) starts from the observation that an edited fact may run in a stream of its own, past the way in which
the model represents the new object by itself. Here a user can look: with the edits and without them, at the position that
predicts the object,

- how near each block's output is to the semantic anchor of the new object (`Cosine`),
- what the model would say if it stopped there (`Lens`, nostalgebraist 2020),
- how far the edit has moved the stream, and where that leads in two dimensions (`project`, `plot_flow`).

    >>> flow = residual_flow(model, model.list_edits(), references=held_out)
    >>> print(flow)
    >>> flow.plot("flow.png")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from random import Random
from statistics import fmean, median
from typing import Any

import torch

from .base import Base
from .facts import Fact
from .layout import Layout
from .message_prompts import as_text
from .methods.steam import SteamConfig
from .methods.steam.anchors import build_anchors, centre
from .model import EditableModelForCausalLM
from .positions import EncodedText, encode, fact_text
from .reading import read_facts
from .references import bank, references_for
from .suffix import SuffixCache, frozen, read_keys_and_states

__all__ = [
    "Cosine",
    "FactFlow",
    "Lens",
    "Point",
    "Projection",
    "ResidualFlow",
    "Stream",
    "Streams",
    "logit_lens",
    "plot_flow",
    "project",
    "residual_flow",
]

_RECALLED = 10  # a reference is shown where its object's first token is among the clean model's first ten choices
_SHOWN = 16  # references of an object that are kept for the projection
_OTHER_REFERENCES = 5  # references behind the anchor of another object, at most
_SHOWN_DEPTH = 0.8
_LENS_NUMBERS = 2**24  # logits that are computed at once


# --- what is measured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosine:
    """Cosines of one stream, a number for each block.

    Attributes:
        anchor: to the anchor of the fact's target.
        others: to the anchors of other objects, their mean. All states share one large direction, so `anchor` by itself is
            high for any object.
    """

    anchor: tuple[float, ...]
    others: tuple[float, ...]

    @property
    def above(self) -> tuple[float, ...]:
        """How much nearer the stream is to the target's anchor than to those of other objects."""
        return tuple(own - other for own, other in zip(self.anchor, self.others, strict=True))


@dataclass(frozen=True)
class Lens:
    """What the logit lens says of one token, a number for each block.

    Attributes:
        log_prob: the token's log-probability, in nats.
        rank: its place among all tokens; 1 is the first choice.
    """

    log_prob: tuple[float, ...]
    rank: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """One model's residual stream at the position that predicts one fact's object.

    Attributes:
        raw: cosines of the states as they are; None where the target or all of the other objects have no anchor.
        centred: the same, less the mean state before objects of all kinds.
        new: the lens on the target's first token.
        old: the lens on the old object's first token.
    """

    raw: Cosine | None
    centred: Cosine | None
    new: Lens
    old: Lens


@dataclass(frozen=True)
class FactFlow:
    """One fact's stream, block by block, with the edits and without.

    Attributes:
        fact: the fact.
        old: its `target_old`, or else the clean model's first choice after the prompt.
        tokens: the first tokens of target and old object, which the lens looks for. Where they are the same one, so is what
            the lens says of both.
        references: the references behind the target's anchor; 0 for no anchor.
        clean: the stream without the edits.
        edited: the stream with the edits in force.
        residual: for each block, |edited - clean| / |clean|.
    """

    fact: Fact
    old: str
    tokens: tuple[str, str]
    references: int
    clean: Stream
    edited: Stream
    residual: tuple[float, ...]


@dataclass(frozen=True)
class Streams:
    """The states behind a flow, float32 on the CPU.

    Attributes:
        clean, edited: [facts, blocks, hidden].
        anchors: by object, [blocks, hidden].
        references: by object, [references, blocks, hidden]: the clean model before that object, in facts that it recalls.
    """

    clean: torch.Tensor
    edited: torch.Tensor
    anchors: dict[str, torch.Tensor]
    references: dict[str, torch.Tensor]


@dataclass(frozen=True)
class ResidualFlow:
    """Facts' residual streams with the edits and without; `print(flow)` shows one line for each block.

    Attributes:
        blocks: the blocks whose outputs were read, ascending.
        facts: a `FactFlow` for each fact, in the order given.
        others: the objects whose anchors the cosines are compared with.
        streams: the states themselves, for `project`.
    """

    blocks: tuple[int, ...]
    facts: tuple[FactFlow, ...]
    others: tuple[str, ...]
    streams: Streams = field(repr=False, compare=False)

    def by_block(self) -> list[dict[str, float | None]]:
        """For each block, means over the facts (of ranks the median); cosines are None where no fact has an anchor.

        Keys: ``block``, ``residual`` and, ending in ``_clean`` and ``_edited``: ``above``, ``centred_above``,
        ``log_prob_new``, ``rank_new``, ``log_prob_old``, ``rank_old``.
        """
        rows = []
        for at, block in enumerate(self.blocks):
            row: dict[str, float | None] = {"block": block, "residual": fmean(f.residual[at] for f in self.facts)}
            for name, streams in (("clean", [f.clean for f in self.facts]), ("edited", [f.edited for f in self.facts])):
                row[f"above_{name}"] = _mean(s.raw.above[at] for s in streams if s.raw)
                row[f"centred_above_{name}"] = _mean(s.centred.above[at] for s in streams if s.centred)
                for token, lenses in (("new", [s.new for s in streams]), ("old", [s.old for s in streams])):
                    row[f"log_prob_{token}_{name}"] = fmean(lens.log_prob[at] for lens in lenses)
                    row[f"rank_{token}_{name}"] = median(lens.rank[at] for lens in lenses)
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON types, without the states."""
        facts = [{**vars(flow), "fact": flow.fact.to_dict()} for flow in self.facts]
        return _plain({"blocks": self.blocks, "others": self.others, "facts": facts})

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Draw this flow; see `plot_flow`."""
        return plot_flow({"edited": self}, path, **options)

    def __str__(self) -> str:
        return "\n".join([*_heading(self), *_table(self.by_block())])


# --- measuring ------------------------------------------------------------------------------------------------------------


def residual_flow(
    model: EditableModelForCausalLM,
    facts: Any,
    *,
    references: Any = "bank",
    blocks: Sequence[int] | None = None,
    others: int | Sequence[str] = 16,
    seed: int = 0,
) -> ResidualFlow:
    """Follow the stream that predicts facts' objects through the blocks, with the edits in force and without them.

    Anchors, centre and references are read on the clean model, and both streams go through the clean model's final norm and
    unembedding, so whatever differs, differs in the stream. The model is as before afterwards.

    Args:
        model: the model with the edits to look at in force.
        facts: what `EditableModelForCausalLM.edit` takes; `model.list_edits()` for those in force, or others that were held
            out. A fact's `target_old` names what the lens calls old.
        references: the facts behind the anchors, as for `SteamConfig.references`. An edit that was pulled towards anchors is
            near to those by construction: to learn whether it stands where the model keeps the object, give references that
            the fit did not have.
        blocks: the blocks to read, by default all. A flow keeps hidden size x blocks numbers for each of twice the facts and
            for up to 16 references of each object.
        others: how many random objects of the bank the cosines are compared with, or the objects by name: objects of the
            target's own relation are the stricter comparison, because anchors tell relations apart before they tell objects.
        seed: of the choice of other objects.

    Raises:
        TypeError: the model is no `EditableModelForCausalLM`.
        ValueError: there is no such block, no fact, or no such object in the bank.
    """
    if not isinstance(model, EditableModelForCausalLM):
        raise TypeError(
            f"residual_flow compares a model with and without its edits, and a {type(model).__name__} has none to switch; "
            "wrap it: EditableModelForCausalLM(model, tokenizer)"
        )
    wanted = as_text(model.tokenizer, read_facts(facts))
    base = Base(model.base_model, model.tokenizer)
    chosen = _blocks(base.layout(), blocks)
    prompts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in wanted])
    with frozen(base.model):
        edited = _read(base, prompts, chosen)
        with model.disable_edits():
            clean = _read(base, prompts, chosen)
            old = _old_objects(base, wanted, prompts)
            kept = _known(base, wanted, old, references, chosen)
            rivals = _others(base, wanted, old, others, seed, chosen)
            labels = torch.tensor([[text.labels[0], o.token] for text, o in zip(prompts, old, strict=True)])
            lenses = [_lenses(base, states, labels) for states in (clean, edited)]
    flows = []
    for i, (fact, was) in enumerate(zip(wanted, old, strict=True)):
        anchor = kept.anchors.get(fact.target.casefold())
        before, after = (
            Stream(*_cosines(states[i], anchor, rivals.states, kept.centre), *lens[i])
            for states, lens in zip((clean, edited), lenses, strict=True)
        )
        tokens = (base.tokenizer.decode([prompts[i].labels[0]]), base.tokenizer.decode([was.token]))
        moved = (edited[i] - clean[i]).norm(dim=-1) / clean[i].norm(dim=-1)
        flows.append(FactFlow(fact, was.name, tokens, kept.counts[i], before, after, tuple(moved.tolist())))
    return ResidualFlow(chosen, tuple(flows), rivals.names, Streams(clean, edited, kept.anchors, kept.references))


@torch.no_grad()
def logit_lens(base: Base, states: torch.Tensor) -> torch.Tensor:
    """What the model would say if the stream ended as it stands: the logit lens (nostalgebraist 2020).

    The model's own forward does the work with its blocks left out, so final norm, projections, scales and soft caps are the
    model's own, whatever it calls them.

    Args:
        base: the model as it stands.
        states: [rows, hidden], block outputs.

    Returns:
        float32 [rows, vocabulary].
    """
    with frozen(base.model):
        tail = _tail(base)
        return torch.cat([tail(part) for part in states.split(_lens_rows(base))])


def _tail(base: Base) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands between the last block and the logits, as a function: [rows, hidden] -> float32 [rows, vocabulary]."""
    layout = base.layout()
    cache = SuffixCache(base.model, layout, len(layout))  # runs start above the last block
    cache.add([[0]], [0])  # one token, whichever: its state is replaced

    def run(states: torch.Tensor) -> torch.Tensor:
        batch = cache.batch([0] * len(states))
        assert batch.inputs is not None
        logits = batch.run([(row, 0) for row in range(len(states))], inputs=states[:, None].to(batch.inputs)).logits
        assert logits is not None
        return logits

    return run


def _lens_rows(base: Base) -> int:
    return max(1, _LENS_NUMBERS // base.model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def _lenses(base: Base, states: torch.Tensor, labels: torch.Tensor) -> list[list[Lens]]:
    """The lens on some tokens of each fact: states [facts, blocks, hidden], labels [facts, tokens] -> [facts][tokens]."""
    facts, blocks, _ = states.shape
    tail, log_probs, ranks = _tail(base), [], []
    rows = _lens_rows(base)
    repeated = labels.repeat_interleave(blocks, dim=0)
    for part, wanted in zip(states.flatten(0, 1).split(rows), repeated.split(rows), strict=True):
        scores = tail(part).log_softmax(-1)
        own = scores.gather(1, wanted.to(scores.device))
        log_probs.append(own.cpu())
        ranks.append(torch.stack([(scores > own[:, k, None]).sum(1) + 1 for k in range(own.shape[1])], dim=1).cpu())
    log_prob, rank = (torch.cat(found).reshape(facts, blocks, -1) for found in (log_probs, ranks))
    return [
        [Lens(tuple(log_prob[i, :, k].tolist()), tuple(rank[i, :, k].tolist())) for k in range(labels.shape[1])]
        for i in range(facts)
    ]


def _read(base: Base, texts: Sequence[EncodedText], blocks: Sequence[int]) -> torch.Tensor:
    """Block outputs at each text's last token before the target: float32 [texts, blocks, hidden], on the CPU."""
    rows = [text.ids[: text.target[0]] for text in texts]
    points = [(i, len(row) - 1) for i, row in enumerate(rows)]
    _, states = read_keys_and_states(base.model, base.layout(), rows, points, blocks=blocks, last=max(blocks))
    return torch.stack([states[b].float().cpu() for b in blocks], dim=1)


def _blocks(layout: Layout, blocks: Sequence[int] | None) -> tuple[int, ...]:
    if blocks is None:
        return tuple(range(len(layout)))
    chosen = tuple(sorted({layout.block(b) for b in blocks}))
    if not chosen:
        raise ValueError("blocks is empty; leave it out to read all blocks")
    return chosen


@dataclass(frozen=True)
class _Old:
    """What a fact's prompt was continued with: a name, and its first token."""

    name: str
    token: int


@torch.no_grad()
def _old_objects(base: Base, facts: Sequence[Fact], prompts: Sequence[EncodedText]) -> list[_Old]:
    """Each fact's `target_old`, or else the clean model's first choice."""
    found: dict[int, _Old] = {}
    named = [i for i, f in enumerate(facts) if f.target_old is not None]
    texts = encode(base.tokenizer, [fact_text(facts[i], target=facts[i].target_old) for i in named])
    for i, text in zip(named, texts, strict=True):
        found[i] = _Old(str(facts[i].target_old), text.labels[0])
    open_ = [i for i in range(len(facts)) if i not in found]
    if open_:
        last = _read(base, [prompts[i] for i in open_], (len(base.layout()) - 1,))[:, 0]
        for i, token in zip(open_, logit_lens(base, last).argmax(-1).tolist(), strict=True):
            found[i] = _Old(base.tokenizer.decode([token]).strip(), token)
    return [found[i] for i in range(len(facts))]


# --- anchors --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What the clean model knows of the facts' objects; `anchors` and `references` by object, as in `Streams`."""

    anchors: dict[str, torch.Tensor]
    references: dict[str, torch.Tensor]
    counts: tuple[int, ...]  # references behind the anchor of each fact's target
    centre: torch.Tensor  # [blocks, hidden]


@dataclass(frozen=True)
class _Others:
    names: tuple[str, ...]
    states: torch.Tensor  # [objects, blocks, hidden]


def _anchors(
    base: Base, facts: Sequence[Fact], blocks: tuple[int, ...], **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """STEAM's anchors of the facts' targets: [facts, blocks, hidden]; the centre: [blocks, hidden]; references behind each."""
    found = build_anchors(base, facts, blocks, SteamConfig(anchor_frame="raw", **settings).anchor_settings)
    return torch.stack([found.states[b] for b in blocks], dim=1), centre(base)[list(blocks)], found.counts


def _known(base: Base, facts: Sequence[Fact], old: Sequence[_Old], references: Any, blocks: tuple[int, ...]) -> _Known:
    """Anchors and references of the targets and of the old objects."""
    asked = [*facts, *(f.replace(target=o.name, references=()) for f, o in zip(facts, old, strict=True) if o.name)]
    states, centre, counts = _anchors(base, asked, blocks, references=references)
    anchors = {f.target.casefold(): s for f, s, n in zip(asked, states, counts, strict=True) if n}
    subjects = sorted({f.subject for f in facts})
    shown = {f.target.casefold(): _recalled(base, f.target, references, subjects, blocks) for f in asked}
    return _Known(anchors, {key: found for key, found in shown.items() if len(found)}, counts[: len(facts)], centre)


def _recalled(base: Base, obj: str, references: Any, subjects: Sequence[str], blocks: Sequence[int]) -> torch.Tensor:
    """States before an object in facts that the clean model recalls: [references, blocks, hidden]."""
    found = references_for(obj, references, subjects)
    found = found[:: -(-len(found) // _SHOWN)] if found else []  # evenly taken, because relations stand together
    if not found:
        return torch.zeros(0, len(blocks), base.layout().hidden_size)
    texts = [fact_text(Fact(r.subject, r.prompts[0], r.object), target=r.object) for r in found]
    rows = encode(base.tokenizer, texts)
    states = _read(base, rows, (*blocks, len(base.layout()) - 1))
    lenses = _lenses(base, states[:, -1:], torch.tensor([row.labels[:1] for row in rows]))
    return states[[i for i, (lens,) in enumerate(lenses) if lens.rank[0] <= _RECALLED], :-1]


def _others(
    base: Base, facts: Sequence[Fact], old: Sequence[_Old], others: int | Sequence[str], seed: int, blocks: tuple[int, ...]
) -> _Others:
    """Anchors of other objects than the facts'; random ones are drawn from those that the model recalls."""
    targets = {f.target.casefold() for f in facts}
    if isinstance(others, int):
        names = _random_objects(targets | {o.name.casefold() for o in old}, others, seed)
    else:
        names = _named_objects(targets, others)
    # References must not mention any of the facts' subjects, so every fact takes part.
    bare = [fact.replace(references=()) for fact in facts]
    asked = [bare[i % len(bare)].replace(target=names[i % len(names)]) for i in range(max(len(names), len(bare)))]
    states, _, counts = _anchors(base, asked, blocks, references="bank", max_references=_OTHER_REFERENCES)
    rows = [i for i in range(len(names)) if counts[i]][: others if isinstance(others, int) else None]
    return _Others(tuple(names[i] for i in rows), states[rows])


def _random_objects(taken: set[str], count: int, seed: int) -> list[str]:
    """Objects of the bank, half as many again as are wanted, because not all are recalled."""
    if count < 1:
        raise ValueError(f"others must be at least 1, not {count}: a cosine means something only above those of others")
    least = SteamConfig().min_references
    known = sorted(key for key, found in bank().items() if len(found) >= least and key not in taken)
    drawn = Random(seed).sample(known, min(count + -(-count // 2), len(known)))
    return [bank()[key][0].object for key in drawn]


def _named_objects(targets: set[str], others: Sequence[str]) -> list[str]:
    names = [others] if isinstance(others, str) else list(dict.fromkeys(others))
    if not names:
        raise ValueError("others is empty; name objects of the bank, or leave it out for random ones")
    for name in names:
        if name.casefold() in targets:
            raise ValueError(f"{name!r} is the target of one of the facts; others must be other objects")
        if name.casefold() not in bank():
            raise ValueError(f"the bank has no references for {name!r}; leave it out, or name other objects of the bank")
    return names


def _cosines(
    states: torch.Tensor, anchor: torch.Tensor | None, others: torch.Tensor, centre: torch.Tensor
) -> tuple[Cosine | None, Cosine | None]:
    """Raw and centred cosines of one stream: states, anchor and centre [blocks, hidden], others [objects, blocks, hidden]."""
    if anchor is None or not len(others):
        return None, None
    found = []
    for origin in (torch.zeros_like(centre), centre):
        own = torch.cosine_similarity(states - origin, anchor - origin, dim=-1)
        rest = torch.cosine_similarity((states - origin)[None], others - origin, dim=-1).mean(0)
        found.append(Cosine(tuple(own.tolist()), tuple(rest.tolist())))
    return found[0], found[1]


# --- two dimensions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A state in the plane.

    Attributes:
        kind: "reference", "anchor", "clean" or "edited".
        label: the object, or the edit's name.
        x, y: coordinates along the first and the second principal axis.
    """

    kind: str
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Projection:
    """States of one block in two dimensions.

    Attributes:
        block: the block.
        question: the fact's prompt.
        points: the states.
        explained: the shares of the variance that lie along the two axes.
    """

    block: int
    question: str
    points: tuple[Point, ...]
    explained: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The projection as JSON types."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        head = f"block {self.block}, {self.question}: {self.explained[0]:.0%} and {self.explained[1]:.0%} of the variance"
        return "\n".join([head, *(f"  {p.kind:<9} {p.label:<20} {p.x:9.2f} {p.y:9.2f}" for p in self.points)])


def project(
    flow: ResidualFlow | Mapping[str, ResidualFlow], block: int | None = None, fact: int | Fact | str = 0
) -> Projection:
    """One fact's streams, anchors and references in the plane of their first two principal components.

    The components are those of the references of target and old object together with the streams, less their mean; the
    anchors are shown in that plane.

    Args:
        flow: a flow, or several edits of the same facts by name: they share the plane.
        block: one of the flow's blocks; by default the one at four fifths of them. Further down, states of one relation stand
            together, whatever the object.
        fact: which of the flow's facts: its index, itself or its id.

    Raises:
        ValueError: the flow has no such block or fact, or the flows do not go together.
    """
    flows = {"edited": flow} if isinstance(flow, ResidualFlow) else _checked(flow)
    first = next(iter(flows.values()))
    at, index = _block_index(first, block), _fact_index(first, fact)
    shown = first.facts[index]
    objects = {name.casefold(): name for name in (shown.fact.target, shown.old)}
    kept = first.streams
    fitted = [("clean", "clean", kept.clean[index, at])]
    fitted += [("edited", label, f.streams.edited[index, at]) for label, f in flows.items()]
    fitted += [("reference", objects[key], state[at]) for key in objects for state in kept.references.get(key, ())]
    placed = [("anchor", objects[key], kept.anchors[key][at]) for key in objects if key in kept.anchors]
    states = torch.stack([state for _, _, state in fitted])
    axes, explained = _principal(states - states.mean(0))
    points = tuple(
        Point(kind, label, *((state - states.mean(0)) @ axes.T).tolist()) for kind, label, state in (*fitted, *placed)
    )
    return Projection(first.blocks[at], shown.fact.question, points, explained)


def _principal(states: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """The first two principal axes [2, hidden] of centred states, and their shares of the variance."""
    _, sizes, axes = torch.linalg.svd(states.double(), full_matrices=False)
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()  # an axis has no sign of its own
    shares = sizes[:2] ** 2 / (sizes**2).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return axes.to(states.dtype), (float(shares[0]), float(shares[1]))


def _checked(flows: Mapping[str, ResidualFlow]) -> dict[str, ResidualFlow]:
    if not flows:
        raise ValueError("there is no flow to show; give at least one: {'steam': residual_flow(...)}")
    first = next(iter(flows.values()))
    for label, flow in flows.items():
        if flow.blocks != first.blocks or [f.fact for f in flow.facts] != [f.fact for f in first.facts]:
            raise ValueError(f"the flow {label!r} is of other facts or blocks than the first one; they can't be compared")
    return dict(flows)


def _block_index(flow: ResidualFlow, block: int | None) -> int:
    if block is None:
        return round((len(flow.blocks) - 1) * _SHOWN_DEPTH)
    if block not in flow.blocks:
        raise ValueError(f"the flow was not read at block {block}; it has: {', '.join(map(str, flow.blocks))}")
    return flow.blocks.index(block)


def _fact_index(flow: ResidualFlow, fact: int | Fact | str) -> int:
    for index, known in enumerate(flow.facts):
        if fact in (index, known.fact, known.fact.id):
            return index
    raise ValueError(f"the flow has no fact {fact!r:.80}; it has {len(flow.facts)}, counted from 0")


# --- text and figures -----------------------------------------------------------------------------------------------------


def plot_flow(
    flows: Mapping[str, ResidualFlow],
    path: str | os.PathLike[str] | None = None,
    *,
    axes: Sequence[Any] | None = None,
    block: int | None = None,
    fact: int | Fact | str = 0,
) -> Any:
    """Draw edits of the same facts beside each other: centred cosine above other objects, logit lens, projection.

    Needs matplotlib, the extra ``plots``. The first two panels show means over the facts (see `ResidualFlow.by_block`).

    Args:
        flows: flows by the name that the legend gives them.
        path: where to save the figure; its ending says in which format.
        axes: three axes to draw on; by default those of a new figure.
        block: the projection's block.
        fact: the projection's fact.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the flows do not go together, or there are not three axes.
    """
    known = _checked(flows)
    if axes is None:
        figure = _matplotlib("figure").Figure(figsize=(15, 4.5), layout="constrained")
        axes = figure.subplots(1, 3)
    panels = list(axes)
    if len(panels) != 3:
        raise ValueError(f"a flow is drawn on three axes, not on {len(panels)}")
    _plot_cosines(panels[0], known)
    _plot_lens(panels[1], known)
    _plot_projection(panels[2], project(known, block, fact))
    if path is not None:
        panels[0].figure.savefig(path)
    return panels[0].figure


def _matplotlib(module: str) -> Any:
    # Figures are made without pyplot, which would keep them all alive and look for a screen.
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("figures are drawn by matplotlib, which is not installed: pip install hf-edit[plots]") from error


def _plot_cosines(axes: Any, flows: dict[str, ResidualFlow]) -> None:
    first = next(iter(flows.values()))
    lines = {"clean": (first, "clean", "0.6"), **{n: (f, "edited", f"C{i}") for i, (n, f) in enumerate(flows.items())}}
    for label, (flow, name, colour) in lines.items():
        heights = [float("nan") if (v := row[f"centred_above_{name}"]) is None else v for row in flow.by_block()]
        axes.plot(flow.blocks, heights, color=colour, label=label)
    axes.axhline(0, color="0.85", linewidth=1, zorder=0)
    axes.set(xlabel="block", ylabel="cosine above other objects (centred)", title="Nearness to the new object's anchor")
    axes.legend()


def _plot_lens(axes: Any, flows: dict[str, ResidualFlow]) -> None:
    first = next(iter(flows.values()))
    lines = {"clean": (first, "clean", "0.6"), **{n: (f, "edited", f"C{i}") for i, (n, f) in enumerate(flows.items())}}
    for label, (flow, name, colour) in lines.items():
        for token, style in (("new", "-"), ("old", ":")):
            heights = [row[f"log_prob_{token}_{name}"] for row in flow.by_block()]
            axes.plot(flow.blocks, heights, color=colour, linestyle=style, label=f"{label}, {token} object")
    axes.set(xlabel="block", ylabel="log P of the first token", title="Logit lens")
    axes.legend()


def _plot_projection(axes: Any, shown: Projection) -> None:
    edits = [p for p in shown.points if p.kind == "edited"]
    (clean,) = (p for p in shown.points if p.kind == "clean")
    objects = list(dict.fromkeys(p.label for p in shown.points if p.kind in ("reference", "anchor")))
    for obj, colour in zip(objects, ("tab:purple", "tab:brown"), strict=False):
        references = [p for p in shown.points if p.kind == "reference" and p.label == obj]
        anchors = [p for p in shown.points if p.kind == "anchor" and p.label == obj]
        axes.scatter([p.x for p in references], [p.y for p in references], s=14, color=colour, alpha=0.5, label=obj)
        axes.scatter([p.x for p in anchors], [p.y for p in anchors], s=140, color=colour, marker="*", edgecolors="black")
    axes.scatter([clean.x], [clean.y], color="0.6", edgecolors="black", marker="s", label="clean", zorder=3)
    for i, p in enumerate(edits):
        axes.annotate("", (p.x, p.y), (clean.x, clean.y), arrowprops={"arrowstyle": "->", "color": f"C{i}"})
        axes.scatter([p.x], [p.y], color=f"C{i}", edgecolors="black", label=p.label, zorder=3)
    axes.set(
        xlabel=f"first component ({shown.explained[0]:.0%})",
        ylabel=f"second component ({shown.explained[1]:.0%})",
        title=f"Block {shown.block}; stars are anchors",
    )
    axes.legend()


_COLUMNS = (  # title, key in `by_block`, format
    ("cosine above", "above", "{:+.3f}"),
    ("centred above", "centred_above", "{:+.3f}"),
    ("log P new", "log_prob_new", "{:.2f}"),
    ("rank new", "rank_new", "{:.0f}"),
    ("log P old", "log_prob_old", "{:.2f}"),
    ("rank old", "rank_old", "{:.0f}"),
)


def _heading(flow: ResidualFlow, most: int = 6) -> list[str]:
    lines = [f"residual flow, clean > edited; cosines above those of {len(flow.others)} other objects"]
    for f in flow.facts[:most]:
        known = f"anchor of {f.references} references" if f.references else "no anchor: too few references are recalled"
        lines.append(f"  {f.fact.question}: old {f.tokens[1]!r}, new {f.tokens[0]!r}, {known}")
    return lines if len(flow.facts) <= most else [*lines, f"  and {len(flow.facts) - most} more facts; means over all follow"]


def _table(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    cells = [["block", "change", *(title for title, _, _ in _COLUMNS)]]
    for row in rows:
        pairs = []
        for _, key, style in _COLUMNS:
            ends = [row[f"{key}_clean"], row[f"{key}_edited"]]
            pairs.append(" > ".join("-" if end is None else style.format(end) for end in ends))
        cells.append([f"{row['block']:.0f}", f"{row['residual']:.3f}", *pairs])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, all the way down."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
