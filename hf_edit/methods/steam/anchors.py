"""Semantic anchors: where the clean model itself stands when it is about to say an object (Latent Positioning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...base import Base
from ...facts import Fact
from ...positions import EncodedText, Text, encode, join
from ...references import Reference, balanced, bank, open_source
from ...suffix import SuffixCache
from .config import SteamConfig

__all__ = ["Alignment", "Anchors", "build_anchors"]

_ENOUGH_EXACT = 5  # with fewer references that are recalled word for word, the first token among the top 10 will do
_CENTRE_FACTS = 96


@dataclass(frozen=True)
class Anchors:
    """Anchors of facts' objects.

    Attributes:
        blocks: where they were read.
        states: by block, [facts, hidden] in float32; zero where a fact has no anchor.
        centre: by block, [hidden]: the mean state before objects of all kinds.
        counts: for each fact, the references behind its anchor; 0 for none.
    """

    blocks: tuple[int, ...]
    states: dict[int, torch.Tensor]
    centre: dict[int, torch.Tensor]
    counts: tuple[int, ...]


class Alignment:
    """The alignment term: weight x mean over blocks of 1 - cos(h, anchor), for facts that have an anchor.

    Cosines in float32, between states less the centre where `centred`.

    Args:
        anchors: of all facts.
        facts: indices of those that are optimised together.
        weight: lambda.
        centred: see above.
    """

    def __init__(self, anchors: Anchors, facts: Sequence[int], weight: float, centred: bool) -> None:
        self.blocks = anchors.blocks
        self.weight = weight
        self._centre = {b: c if centred else torch.zeros_like(c) for b, c in anchors.centre.items()}
        self._targets = {b: states[list(facts)] - self._centre[b] for b, states in anchors.states.items()}
        self._known = torch.tensor([float(anchors.counts[f] > 0) for f in facts])

    def loss(self, facts: Sequence[int], states: dict[int, torch.Tensor]) -> torch.Tensor:
        """The weighted term for each fact: [facts]."""
        distances = [
            1 - torch.cosine_similarity(state - self._centre[b].to(state), self._targets[b][facts].to(state), dim=-1)
            for b, state in states.items()
        ]
        distance = torch.stack(distances).mean(0)
        return self.weight * self._known[facts].to(distance) * distance


def build_anchors(base: Base, facts: Sequence[Fact], blocks: tuple[int, ...], config: SteamConfig) -> Anchors:
    """Anchors of the facts' targets, read on the clean model.

    References are recalled when every token of the object is the model's first choice; where fewer than five are, when the
    object's first token is among its first ten.
    """
    subjects = sorted({fact.subject for fact in facts})
    wanted = {fact.target.casefold(): fact.target for fact in facts}
    find = open_source(config.references, facts=facts)
    pools = {key: balanced(find(obj), 2 * config.max_references, config.max_per_relation) for key, obj in wanted.items()}
    general = _general(subjects)
    texts = [_text(r) for pool in pools.values() for r in pool] + [_text(r) for r in general]
    states, exact, near = _read(base, encode(base.tokenizer, texts), blocks)

    centre = {b: s[len(texts) - len(general) :].mean(0) for b, s in states.items()}
    means: dict[str, dict[int, torch.Tensor]] = {}
    counts: dict[str, int] = {}
    at = 0
    for key, pool in pools.items():
        rows = range(at, at + len(pool))
        at += len(pool)
        recalled = [i for i in rows if exact[i]]
        if len(recalled) < _ENOUGH_EXACT:
            recalled = [i for i in rows if near[i]]
        if len(recalled) >= config.min_references:
            recalled = recalled[: config.max_references]
            means[key] = {b: s[recalled].mean(0) for b, s in states.items()}
            counts[key] = len(recalled)
    nothing = {b: torch.zeros_like(c) for b, c in centre.items()}
    keys = [fact.target.casefold() for fact in facts]
    return Anchors(
        blocks,
        {b: torch.stack([means.get(key, nothing)[b] for key in keys]) for b in blocks},
        centre,
        tuple(counts.get(key, 0) for key in keys),
    )


def _general(exclude: Sequence[str]) -> list[Reference]:
    """References to objects of all kinds, evenly taken from the bank."""
    names = {name.casefold() for name in exclude}
    first = [group[0] for group in bank().values() if group[0].subject.casefold() not in names]
    return first[:: max(1, len(first) // _CENTRE_FACTS)][:_CENTRE_FACTS]


def _text(reference: Reference) -> Text:
    prompt = reference.prompts[0].replace("{}", reference.subject)
    whole = join(prompt, reference.object)
    return Text(whole, None, (len(prompt), len(whole)))


@torch.no_grad()
def _read(
    base: Base, texts: Sequence[EncodedText], blocks: tuple[int, ...], batch: int = 32
) -> tuple[dict[int, torch.Tensor], list[bool], list[bool]]:
    """At each text's last prompt token: states by block, whether all of the object is recalled, whether it nearly is."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    states: dict[int, dict[int, torch.Tensor]] = {b: {} for b in blocks}
    exact: dict[int, bool] = {}
    near: dict[int, bool] = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        rows = [texts[i] for i in group]
        reads = [(r, p - 1) for r, text in enumerate(rows) for p in range(*text.target)]
        starts = [n for n, (r, p) in enumerate(reads) if p == rows[r].target[0] - 1]
        out = SuffixCache(base.model, base.layout(), 0).add([t.ids for t in rows], [0] * len(rows), reads, blocks)
        assert out.logits is not None
        labels = torch.tensor([t for text in rows for t in text.labels], device=out.logits.device)
        hits = (out.logits.argmax(-1) == labels).tolist()
        top = (out.logits.topk(min(10, out.logits.shape[-1])).indices == labels[:, None]).any(1).tolist()
        for i, row, start in zip(group, rows, starts, strict=True):
            exact[i] = all(hits[start : start + len(row.labels)])
            near[i] = top[start]
            for b in blocks:
                states[b][i] = out.states[b][start].float().cpu()
    count = range(len(texts))
    return (
        {b: torch.stack([s[i] for i in count]) for b, s in states.items()},
        [exact[i] for i in count],
        [near[i] for i in count],
    )
