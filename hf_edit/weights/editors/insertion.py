"""What every base editor works on: keys of the facts, optimised values, and the system that puts one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from ...base import Base
from ...layout import Layout
from ...moments import Moment
from ...positions import EncodedText
from ...statistics import KeyStatistics
from ...suffix import Frontier
from ..attach import WeightAttachment
from ..prompts import FactTexts
from ..solve import Protected, Update, insert

__all__ = ["Insertion", "spread"]

Precondition = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Insertion:
    """What a base editor needs.

    Attributes:
        base: the model.
        layout: its blocks and projections.
        layers: the blocks to edit, ascending; `deltas` were optimised at the last.
        texts: of each fact.
        deltas: of each fact, what its key shall add to the last layer's projection: float32 [facts, hidden].
        scale: the factor from a change of the projection's output to the block's output; None behind a norm.
        statistics: second moments of the layers' keys.
        earlier: bare prompts of facts edited before, whose keys the new edit must not move.
        covariance_weight: MEMIT's lambda.
        null_space_threshold: AlphaEdit's bound on the eigenvalues that count as null, relative to the mean one.
        ridge: AlphaEdit's L2, relative to the mean squared length of the facts' keys.
        bare_share: the bare prompt's share in a fact's key; None counts it as one context among the others.
        bystanders: weight of the keys of the bare prompts' other tokens, at which the edit must change nothing.
    """

    base: Base
    layout: Layout
    layers: Sequence[int]
    texts: Sequence[FactTexts]
    deltas: torch.Tensor
    scale: float | None
    statistics: KeyStatistics
    earlier: Sequence[EncodedText]
    covariance_weight: float
    null_space_threshold: float
    ridge: float
    bare_share: float | None = None
    bystanders: float = 0.0

    def moment(self, block: int) -> Moment:
        """The second moment of a block's keys."""
        return self.statistics.moments[self.layout.projection(block)]

    def keys(self, block: int, *, bare: bool = False) -> torch.Tensor:
        """Keys of the facts at a block, as the model stands now: [facts, in], see `Reader.keys`.

        Args:
            bare: of the bare prompt alone, rather than the weighted mean over contexts.
        """
        return Reader(self, bare=bare).keys(block)


class Reader:
    """Reads keys and states layer by layer, upwards: what lies below the layers read is not run again.

    Keys are float64 on the CPU, wherever the model is: the systems are solved there, and some accelerators lack float64.

    Args:
        problem: whose facts.
        bare: leave the contexts out.
    """

    def __init__(self, problem: Insertion, *, bare: bool = False) -> None:
        self._problem = problem
        weighed = [
            (f, text, share)
            for f, texts in enumerate(problem.texts)
            for text, share in zip(
                texts.rewrites, _shares(len(texts.rewrites), 1.0 if bare else problem.bare_share), strict=True
            )
            if share
        ]
        self._owners = torch.tensor([f for f, _, _ in weighed])
        self._weights = torch.tensor([share for _, _, share in weighed], dtype=torch.float64)
        self._facts = _Prompts(problem, [text for _, text, _ in weighed])
        prompts = [texts.rewrites[0] for texts in problem.texts]
        self._bare = _Prompts(problem, prompts)
        self._earlier = _Prompts(problem, problem.earlier)
        self._bystanders = _Prompts(problem, prompts if problem.bystanders else (), of_subject=False)

    def keys(self, block: int) -> torch.Tensor:
        """Each fact's key, the weighted mean over its contexts at the subject's last token: [facts, in]."""
        found = self._facts.keys(block)
        sums = found.new_zeros(len(self._problem.texts), found.shape[1])
        return sums.index_add(0, self._owners, found * self._weights[:, None])

    def states(self, block: int) -> torch.Tensor:
        """What the last edit layer's block gives for the bare prompts at the subject's last token: float32 [facts, hidden].

        Args:
            block: the lowest one whose weights may have changed since the last call.
        """
        return self._bare.states(block)

    def protected_keys(self, block: int) -> torch.Tensor:
        """Keys that the edit must not move: of the facts edited before, and of the prompts' other tokens, each of these times
        the root of its weight. [keys, in]."""
        return torch.cat([self._earlier.keys(block), self._bystanders.keys(block) * self._problem.bystanders**0.5])


class _Prompts:
    """Prompts and where they are read: at their subject's last token, which is also the last that runs, or at all others."""

    def __init__(self, problem: Insertion, texts: Sequence[EncodedText], *, of_subject: bool = True) -> None:
        self._problem = problem
        ends = [t.subject + 1 if of_subject else t.target[0] for t in texts]
        self._points = [(i, p) for i, t in enumerate(texts) for p in range(ends[i]) if (p == t.subject) == of_subject]
        rows = [t.ids[:end] for t, end in zip(texts, ends, strict=True)]
        self._frontier = Frontier(problem.base.model, problem.layout, rows)

    def keys(self, block: int) -> torch.Tensor:
        if not self._points:
            return torch.zeros(0, self._problem.moment(block).width, dtype=torch.float64)
        name = self._problem.layout.projection(block)
        self._frontier.advance(block)
        return self._frontier.read(self._points, modules=(name,), last=block)[0][name].cpu().double()

    def states(self, block: int) -> torch.Tensor:
        last = self._problem.layers[-1]
        self._frontier.advance(block)
        return self._frontier.read(self._points, blocks=(last,), last=last)[1][last].float()


def _shares(count: int, bare: float | None) -> list[float]:
    """What the bare prompt and each of the contexts weigh in a fact's key, of so many texts."""
    first = 1 / count if bare is None or count == 1 else bare
    return [first, *[(1 - first) / (count - 1)] * (count - 1)] if count > 1 else [1.0]


def spread(problem: Insertion, precondition: Precondition) -> dict[str, Update]:
    """Spread all facts over the layers, each with the layers below already edited (MEMIT, arXiv 2210.07229, algorithm 1).

    Args:
        precondition: (block, K [in, facts]) -> M K, what the editor puts in front of the keys; see `hf_edit.weights.solve`.

    Raises:
        ValueError: several layers in a model whose blocks normalise the MLP's output before they add it.
    """
    scale, updates = problem.scale, {}
    if scale is None and len(problem.layers) > 1:
        raise ValueError(
            "this model's blocks normalise what the MLP writes, so a residual can't be spread over several layers; "
            f"give one: layers=[{problem.layers[-1]}]"
        )
    reader = Reader(problem)
    goal: torch.Tensor | None = None  # what the last layer's block shall give in the end
    with ExitStack() as edited:
        for done, block in enumerate(problem.layers):
            name = problem.layout.projection(block)
            if scale is None or len(problem.layers) == 1:
                residuals = problem.deltas
            else:
                states = reader.states(block)
                if goal is None:
                    goal = states + scale * problem.deltas.to(states.device)
                residuals = (goal - states) / (scale * (len(problem.layers) - done))
            K = reader.keys(block).T
            protected = Protected.of(reader.protected_keys(block).T, partial(precondition, block))
            updates[name] = insert(K, protected.precondition(K), residuals.T)
            attachment = WeightAttachment(problem.base.model, {name: updates[name].factors})
            edited.callback(attachment.detach)
    return updates
