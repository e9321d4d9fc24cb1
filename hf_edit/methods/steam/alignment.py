"""The alignment term of STEAM (arXiv 2510.10398): the edited stream is pulled towards its object's semantic anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .anchors import Anchors

__all__ = ["Alignment", "Contrast"]


class Alignment:
    """L_LA = mean over blocks of 1 - cos(h, anchor), over the blocks where a fact has an anchor; cosines in float32.

    Args:
        anchors: of all facts.
        facts: indices of those that are optimised together.
        weight: lambda; None takes `ratio`.
        ratio: |gradient of the term| over that of the rest, before the first step, which then sets each fact's lambda.
    """

    def __init__(self, anchors: Anchors, facts: Sequence[int], weight: float | None, ratio: float | None = None) -> None:
        self.blocks = anchors.blocks
        self.weight, self.ratio = weight, ratio
        chosen = list(facts)
        self._origin = {b: origin[chosen] for b, origin in anchors.origin.items()}
        self._targets = {b: states[chosen] for b, states in anchors.states.items()}
        # by block, the facts that have an anchor there
        known = torch.tensor([anchors.counts[f] > 0 for f in chosen])
        self._known = {b: (known.to(target.device) & (target != 0).any(-1)).float() for b, target in self._targets.items()}

    def loss(self, facts: Sequence[int], states: dict[int, torch.Tensor]) -> torch.Tensor:
        """The term for each fact, [facts]; zero where there is no anchor."""
        terms, counts = torch.zeros(()), torch.zeros(())
        for block, state in states.items():
            known = self._known[block][facts].to(state)
            origin = self._origin[block][facts].to(state)
            terms = terms.to(known) + known * self._term(block, list(facts), state - origin)
            counts = counts.to(known) + known
        return terms / counts.clamp(min=1)

    def _term(self, block: int, facts: Sequence[int], stream: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cosine_similarity(stream, self._targets[block][facts].to(stream), dim=-1)


class Contrast(Alignment):
    """The contrastive form: InfoNCE (arXiv 1807.03748) of the new object's anchor against those of the old and of others.

    Args:
        temperature: of the softmax over cosines.
    """

    def __init__(
        self, anchors: Anchors, facts: Sequence[int], weight: float | None, ratio: float | None = None, *, temperature: float
    ) -> None:
        super().__init__(anchors, facts, weight, ratio)
        self._temperature = temperature
        self._old = {b: states[list(facts)] for b, states in anchors.old.items()}
        self._others = anchors.others

    def _term(self, block: int, facts: Sequence[int], stream: torch.Tensor) -> torch.Tensor:
        own, old = (t[block][facts].to(stream) for t in (self._targets, self._old))
        others = self._others[block].to(stream).expand(len(stream), -1, -1)
        candidates = torch.cat([own[:, None], old[:, None], others], dim=1)
        cosines = torch.cosine_similarity(stream[:, None], candidates, dim=-1) / self._temperature
        unknown = torch.zeros_like(cosines, dtype=torch.bool)
        unknown[:, 1] = (old == 0).all(-1)
        return -cosines.masked_fill(unknown, -torch.inf).log_softmax(-1)[:, 0]
