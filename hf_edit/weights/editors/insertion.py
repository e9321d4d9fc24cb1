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
from ...suffix import read_keys_and_states
from ..attach import WeightAttachment
from ..prompts import FactTexts
from ..solve import Protected, Update, insert
from ..values import Values

__all__ = ["Insertion", "spread"]

Precondition = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Insertion:
    """What a base editor needs.

    Attributes:
        base: the model.
        layout: its blocks and projections.
        layers: the blocks to edit, ascending; the values were optimised at the last.
        texts: of each fact.
        values: of each fact.
        statistics: second moments of the layers' keys.
        earlier: bare prompts of facts edited before, whose keys the new edit must not move.
        covariance_weight: MEMIT's lambda.
        null_space_threshold: AlphaEdit's bound on the eigenvalues that count as null, relative to the mean one.
        ridge: AlphaEdit's L2, relative to the mean squared length of the facts' keys.
    """

    base: Base
    layout: Layout
    layers: Sequence[int]
    texts: Sequence[FactTexts]
    values: Values
    statistics: KeyStatistics
    earlier: Sequence[EncodedText]
    covariance_weight: float
    null_space_threshold: float
    ridge: float

    def moment(self, block: int) -> Moment:
        """The second moment of a block's keys."""
        return self.statistics.moments[self.layout.projection(block)]

    def keys(self, block: int, *, bare: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of the facts at a block, as the model stands now.

        Args:
            bare: of the bare prompt alone, rather than the mean over contexts.

        Returns:
            [facts, in] keys in float64, and [facts, hidden] outputs of the last edit layer's block, both at the subject's
            last token; the outputs are those of the bare prompt.
        """
        chosen = [fact.rewrites[:1] if bare else fact.rewrites for fact in self.texts]
        owner = [f for f, texts in enumerate(chosen) for _ in texts]
        found, states = self._read(block, [text for texts in chosen for text in texts])
        owners = torch.tensor(owner, device=found.device)
        sums = torch.zeros(len(self.texts), found.shape[1], dtype=torch.float64, device=found.device)
        counts = owners.bincount(minlength=len(self.texts))
        first = [owner.index(f) for f in range(len(self.texts))]
        return sums.index_add(0, owners, found) / counts[:, None], states[first].float()

    def earlier_keys(self, block: int) -> torch.Tensor:
        """Keys of the facts edited before: [earlier, in], float64."""
        if not self.earlier:
            return torch.zeros(0, self.moment(block).width, dtype=torch.float64)
        return self._read(block, self.earlier)[0]

    def _read(self, block: int, texts: Sequence[EncodedText]) -> tuple[torch.Tensor, torch.Tensor]:
        name, last = self.layout.projection(block), self.layers[-1]
        keys, states = read_keys_and_states(
            self.base.model,
            self.layout,
            [t.ids[: t.subject + 1] for t in texts],
            [(i, t.subject) for i, t in enumerate(texts)],
            modules=(name,),
            blocks=(last,),
            last=last,
        )
        return keys[name].double(), states[last]


def spread(problem: Insertion, precondition: Precondition) -> dict[str, Update]:
    """Spread all facts over the layers, each with the layers below already edited (MEMIT, arXiv 2210.07229, algorithm 1).

    Args:
        precondition: (block, K [in, facts]) -> M K, what the editor puts in front of the keys; see `hf_edit.weights.solve`.

    Raises:
        ValueError: several layers in a model whose blocks normalise the MLP's output before they add it.
    """
    values, updates = problem.values, {}
    if values.scale is None and len(problem.layers) > 1:
        raise ValueError(
            "this model's blocks normalise what the MLP writes, so a residual can't be spread over several layers; "
            f"give one: layers=[{problem.layers[-1]}]"
        )
    with ExitStack() as edited:
        for done, block in enumerate(problem.layers):
            name = problem.layout.projection(block)
            keys, states = problem.keys(block)
            if values.scale is None:
                residuals = values.deltas
            else:
                goal = values.states + values.scale * values.deltas
                residuals = (goal - states.to(goal.device)) / (values.scale * (len(problem.layers) - done))
            K = keys.T.cpu()
            protected = Protected.of(problem.earlier_keys(block).T.cpu(), partial(precondition, block))
            updates[name] = insert(K, protected.precondition(K), residuals.T)
            attachment = WeightAttachment(problem.base.model, {name: updates[name].factors})
            edited.callback(attachment.detach)
    return updates
