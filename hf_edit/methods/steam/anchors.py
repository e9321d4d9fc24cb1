"""Semantic anchors: where the clean model itself stands when it is about to say an object (Latent Positioning).

Anchors are read before the object of known facts that share it (references). Where too few of these are recalled, as of dates
and rare names, the model is given the fact itself: the mean of its states before the object is an *in-context anchor*. On
SmolLM2-135M and CounterFact, its centred cosine to held-out references of the object is 0.53 in the last third of the blocks,
0.42 to those of another object of the same relation, and no higher than to these in the middle third. So it is used in the
last third.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from ...alignment import general_references, score_references
from ...answers import score_targets
from ...base import Base
from ...cache import atomic_path, cache_folder
from ...facts import Fact, fold
from ...lm.chat import chat_frame
from ...positions import Text, encode, fact_text, join
from ...progress import bar
from ...questions import other_wordings
from ...references import Reference, balanced, bank, bank_relations, open_source

__all__ = ["AnchorSettings", "Anchors", "ObjectAnchor", "anchor_of", "build_anchors", "centre", "informative_blocks"]

T = TypeVar("T")

_NEAR = 10
_ENOUGH_EXACT = 5  # with fewer references that are recalled word for word, the first token among the top 10 will do
_TOLD_WORDINGS = 2
_RELATION_FACTS = 8
_BAND_OBJECTS, _BAND_REFERENCES = 48, 6


@dataclass(frozen=True)
class AnchorSettings:
    """How anchors are made; see `SteamConfig`.

    Attributes:
        source: of the reference facts.
        frame: "raw", "centred" or "object".
        minimum, maximum, per_relation: numbers of references.
    """

    source: object
    frame: str
    minimum: int
    maximum: int
    per_relation: int


@dataclass(frozen=True)
class ObjectAnchor:
    """What the references of one object leave behind.

    Attributes:
        mean: float32 [blocks, hidden], the mean state of the recalled references, at every block.
        share: float32 [blocks, hidden], the same each reference less its relation's mean; zero where unknown.
        count: references behind it; 0 for none.
    """

    mean: torch.Tensor
    share: torch.Tensor
    count: int


@dataclass(frozen=True)
class Anchors:
    """Anchors of facts' objects, as directions from an origin.

    Attributes:
        blocks: where they were read.
        origin: by block, [facts, hidden]: what is taken off a stream before it is compared. Zero in the raw frame, the mean
            state before objects of all kinds in the centred one, the state of the fact's relation in the object frame.
        states: by block, [facts, hidden]: direction of the new object; zero where a fact has no anchor.
        old: by block, [facts, hidden]: direction of the old object; zero where it is unknown.
        others: by block, [objects, hidden]: directions of other objects.
        counts: for each fact, the references behind its anchor, or the prompts behind an in-context anchor; 0 for none.
        in_context: the facts whose anchor is an in-context one, by index.
    """

    blocks: tuple[int, ...]
    origin: dict[int, torch.Tensor]
    states: dict[int, torch.Tensor]
    old: dict[int, torch.Tensor]
    others: dict[int, torch.Tensor]
    counts: tuple[int, ...]
    in_context: frozenset[int] = frozenset()


def build_anchors(
    base: Base,
    facts: Sequence[Fact],
    blocks: tuple[int, ...],
    settings: AnchorSettings,
    *,
    given_blocks: Sequence[int] = (),
    contrast: int = 0,
    progress: bool = False,
) -> Anchors:
    """Anchors of the facts' targets, read on the clean model.

    References are recalled when every token of the object is the model's first choice; where fewer than five are, when the
    object's first token is among its first ten.

    Args:
        blocks: where the streams will be compared.
        given_blocks: where they will be compared for facts whose object has too few references; none of these facts has an
            anchor where this is empty.
        contrast: how many other objects of the bank to read anchors of, and the facts' old objects with them.
        progress: show a progress bar.
    """
    references = open_source(settings.source, facts=facts)

    def anchor(obj: str) -> ObjectAnchor:
        return anchor_of(base, obj, references(obj), settings)

    found = {fold(f.target): f.target for f in facts}
    anchors = {}
    with bar(len(found), "reading anchors", "object", progress) as shown:
        for key, obj in found.items():
            anchors[key] = anchor(obj)
            shown.update()
    old, others = {}, {}
    if contrast:
        old = {fold(f.target_old): anchor(f.target_old) for f in facts if f.target_old}
        known = open_source("bank", facts=facts)  # whatever the source: it may hold nothing but the facts' own objects
        others = {o: anchor_of(base, o, known(o), settings) for o in _other_objects(contrast, {*anchors, *old})}
        others = {obj: a for obj, a in others.items() if a.count}
    general = centre(base)
    frame = settings.frame

    def direction(a: ObjectAnchor, block: int) -> torch.Tensor:
        if frame == "raw" or not a.count:
            return a.mean[block]
        return a.share[block] if frame == "object" else a.mean[block] - general[block]

    nothing = ObjectAnchor(torch.zeros_like(general), torch.zeros_like(general), 0)
    picked = [anchors[fold(f.target)] for f in facts]
    before = [old.get(fold(f.target_old), nothing) if f.target_old else nothing for f in facts]
    # in the object frame only references whose relation the bank knows say anything
    counts = [a.count if frame != "object" or bool(a.share.any()) else 0 for a in picked]
    left = [i for i, count in enumerate(counts) if not count] if given_blocks else []
    everywhere = tuple(sorted({*blocks, *given_blocks})) if left else blocks
    origin = dict(zip(everywhere, _origins(base, facts, everywhere, frame, general), strict=True))
    states = {b: torch.stack([direction(a, b) for a in picked]) for b in everywhere}
    for b in set(everywhere) - set(blocks):
        states[b] = torch.zeros_like(states[b])
    if left:
        given, prompts = _given(base, [facts[i] for i in left], given_blocks, progress)
        for column, b in enumerate(given_blocks):
            origin[b], states[b] = origin[b].clone(), states[b].clone()
            origin[b][left] = 0.0 if frame == "raw" else general[b]
            recalled = torch.tensor([float(count > 0) for count in prompts])[:, None]
            states[b][left] = recalled * (given[:, column] - origin[b][left])
        for i, count in zip(left, prompts, strict=True):
            counts[i] = count
    return Anchors(
        everywhere,
        origin,
        states,
        {b: torch.stack([direction(a, b) for a in before]) for b in everywhere},
        {b: torch.stack([direction(a, b) for a in others.values()]) if others else general[:0] for b in everywhere},
        tuple(counts),
        frozenset(i for i in left if counts[i]),
    )


def _given(base: Base, facts: Sequence[Fact], blocks: Sequence[int], progress: bool) -> tuple[torch.Tensor, list[int]]:
    """States before the object when the clean model is given the fact.

    Of the prompts that give a fact, those count after which the object's first token is among the model's first ten.

    Returns:
        The mean over these prompts, float32 [facts, blocks, hidden] on the CPU, and for each fact their number. Without such a
        prompt the mean is zero.
    """
    giving = [_prompts_that_give(base, f) for f in facts]
    texts = encode(base.tokenizer, [text for own in giving for text in own])
    scores = iter(score_targets(base, texts, blocks=blocks, progress=progress))
    given, counts = [], []
    for own in giving:
        read = [torch.stack([s.states[b] for b in blocks]) for s in itertools.islice(scores, len(own)) if s.rank < _NEAR]
        given.append(torch.stack(read).mean(0) if read else torch.zeros(len(blocks), base.layout().hidden_size))
        counts.append(len(read))
    return torch.stack(given), counts


def _prompts_that_give(base: Base, fact: Fact) -> list[Text]:
    """Prompts with the fact in front of what is asked, in several wordings and in the chat."""
    question = fact_text(fact).text
    wordings = [wording.replace("{}", fact.subject) for wording in other_wordings(fact)[:_TOLD_WORDINGS]]
    told = [f"{join(said, fact.target)}." for said in (question, *wordings)]
    prompts = [*(f"{said} {question}" for said in told), f"{join(question, fact.target)}\n\n{question}"]
    texts = [Text(whole := join(prompt, fact.target), None, (len(prompt), len(whole))) for prompt in prompts]
    frame = chat_frame(base.tokenizer, told[0])
    if frame is not None and chat_frame(base.tokenizer) is not None:
        asked = frame.around(Text(question)).text
        texts.append(Text(asked + fact.target, None, (len(asked), len(asked) + len(fact.target)), special=False))
    return texts


def anchor_of(base: Base, obj: str, pool: Iterable[Reference], settings: AnchorSettings) -> ObjectAnchor:
    """The anchor of one object from its references, cached on disk by model, object, references and numbers."""
    chosen = balanced(list(pool), 2 * settings.maximum, settings.per_relation)
    by_relation = _relation_means(base) if settings.frame == "object" else {}
    texts = [[r.prompts[0], r.subject, r.object, r.relation] for r in chosen]
    key = [fold(obj), texts, settings.minimum, settings.maximum, _bank_digest() if by_relation else None]
    hidden, blocks = base.layout().hidden_size, len(base.layout())

    def read() -> dict[str, torch.Tensor]:
        states, exact, near = _read(base, chosen)
        recalled = [i for i, hit in enumerate(exact) if hit]
        if len(recalled) < _ENOUGH_EXACT:
            recalled = [i for i, hit in enumerate(near) if hit]
        recalled = recalled[: settings.maximum] if len(recalled) >= settings.minimum else []
        known = [i for i in recalled if chosen[i].relation in by_relation]
        free = [states[i] - by_relation[chosen[i].relation] for i in known]
        return {
            "mean": states[recalled].mean(0) if recalled else torch.zeros(blocks, hidden),
            "share": torch.stack(free).mean(0) if free else torch.zeros(blocks, hidden),
            "count": torch.tensor(len(recalled)),
        }

    if len(texts) < settings.minimum:
        return ObjectAnchor(torch.zeros(blocks, hidden), torch.zeros(blocks, hidden), 0)
    kept = _kept(base, key, read)
    return ObjectAnchor(kept["mean"], kept["share"], int(kept["count"]))


def informative_blocks(base: Base, above: int, width: int) -> tuple[int, ...]:
    """The band of blocks where a state tells its object best: where the mean cosine of a reference to its own object's
    anchor (made without it) exceeds that to other objects' anchors most. Found from the bank, once a model.

    Args:
        above: the last edited block; the band lies above it.
        width: how many blocks.
    """
    gain = _kept(base, ["band", _bank_digest()], lambda: {"gain": _object_gain(base)})["gain"]
    starts = range(above + 1, max(above + 2, len(gain) - width + 1))
    best = max(starts, key=lambda start: float(gain[start : start + width].mean()))
    return tuple(range(best, min(best + width, len(gain))))


def _object_gain(base: Base) -> torch.Tensor:
    """By block, the mean cosine to the own anchor less that to the others': float32 [blocks]."""
    pools = [balanced(list(group), _BAND_REFERENCES, 3) for group in bank().values()]
    pools = [pool for pool in pools if len(pool) == _BAND_REFERENCES]
    pools = list(_evenly(pools, _BAND_OBJECTS))
    states, _, _ = _read(base, [r for pool in pools for r in pool])
    states = states.view(len(pools), _BAND_REFERENCES, *states.shape[1:]) - centre(base)
    sums = states.sum(1, keepdim=True)
    own = torch.cosine_similarity(states, sums - states, dim=-1).mean((0, 1))
    unit = (torch.nn.functional.normalize(t, dim=-1) for t in (states, sums[:, 0]))
    cross = torch.einsum("orbh,abh->oab", *unit) / _BAND_REFERENCES  # state's object x anchor's x block
    others = cross.masked_fill(torch.eye(len(pools), dtype=torch.bool)[..., None], 0)
    return own - others.sum((0, 1)) / (len(pools) * (len(pools) - 1))


def _origins(
    base: Base, facts: Sequence[Fact], blocks: tuple[int, ...], frame: str, general: torch.Tensor
) -> list[torch.Tensor]:
    """By block, what is taken off each fact's stream: [facts, hidden]."""
    if frame == "raw":
        return [torch.zeros(len(facts), general.shape[1]) for _ in blocks]
    if frame == "centred":
        return [general[b].expand(len(facts), -1) for b in blocks]
    means = torch.stack(list(_relation_means(base).values()))
    asked = [Reference(f.prompt, f.subject, (f.prompt,), f.target) for f in facts]
    states, _, _ = _read(base, asked, blocks)
    middle = general[list(blocks)]
    unit = (torch.nn.functional.normalize(t - middle, dim=-1) for t in (states, means[:, blocks]))
    nearest = torch.einsum("fbh,rbh->fr", *unit)
    return [means[nearest.argmax(1), b] for b in blocks]


def _relation_means(base: Base) -> dict[str, torch.Tensor]:
    """By relation of the bank, the mean state before its objects: float32 [blocks, hidden]."""
    relations = bank_relations()

    def read() -> dict[str, torch.Tensor]:
        chosen = [[Reference(r.name, s, r.prompts, o) for s, o in _evenly(r.facts, _RELATION_FACTS)] for r in relations]
        states, _, _ = _read(base, [reference for group in chosen for reference in group])
        means = [part.mean(0) for part in states.split([len(group) for group in chosen])]
        return {"means": torch.stack(means)}

    means = _kept(base, ["relations", _bank_digest()], read)["means"]
    return {r.name: mean for r, mean in zip(relations, means, strict=True)}


def centre(base: Base) -> torch.Tensor:
    """The mean state before objects of all kinds, evenly taken from the bank: float32 [blocks, hidden]."""

    def read() -> dict[str, torch.Tensor]:
        states, _, _ = _read(base, general_references())
        return {"centre": states.mean(0)}

    return _kept(base, ["centre", _bank_digest()], read)["centre"]


@cache
def _bank_digest() -> str:
    """Of the shipped bank and of what is taken of it: what was read of another bank is not used."""
    rows = [[r.name, r.prompts, r.facts] for r in bank_relations()]
    numbers = [len(general_references()), _RELATION_FACTS, _BAND_OBJECTS, _BAND_REFERENCES]
    return hashlib.sha256(json.dumps([rows, numbers]).encode()).hexdigest()[:16]


def _other_objects(count: int, exclude: set[str]) -> Sequence[str]:
    """Objects of the bank with many references, evenly taken."""
    rich = [obj for obj, group in bank().items() if len(group) >= _BAND_REFERENCES and obj not in exclude]
    return _evenly(rich, count)


def _evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, evenly taken."""
    return items[:: max(1, len(items) // count)][:count]


def _kept(base: Base, key: Sequence[object], make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors from the cache, made at the first call for a model and key."""
    name = hashlib.sha256(json.dumps([base.tokenizer_fingerprint, *key], ensure_ascii=False).encode()).hexdigest()[:32]
    path = cache_folder("anchors", base.fingerprint) / f"{name}.safetensors"
    if path.exists():
        return load_file(path)
    found = {k: t.contiguous() for k, t in make().items()}
    with atomic_path(path) as temporary:
        save_file(found, temporary)
    return found


def _read(
    base: Base, references: Sequence[Reference], blocks: Sequence[int] | None = None
) -> tuple[torch.Tensor, list[bool], list[bool]]:
    """Before each reference's object: states, float32 [references, blocks, hidden] on the CPU, of all blocks by default;
    whether the object is recalled; whether it nearly is."""
    blocks = range(len(base.layout())) if blocks is None else blocks
    scores = score_references(base, references, blocks)
    states = torch.stack([torch.stack([score.states[b] for b in blocks]) for score in scores])
    return states, [score.right for score in scores], [score.rank < _NEAR for score in scores]
