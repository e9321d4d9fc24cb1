"""The base editors: how optimised values get into weights. Each is a function from an `Insertion` to updates by module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..base import Base
from ..layout import Layout
from ..statistics import KeyStatistics
from ..suffix import read_keys_and_states
from .attach import Factors, WeightAttachment
from .solve import Update, insert
from .values import FactTexts, Values

__all__ = ["EDITORS", "Insertion", "memit", "r_rome", "rome"]


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
        covariance_weight: MEMIT's lambda.
    """

    base: Base
    layout: Layout
    layers: Sequence[int]
    texts: Sequence[FactTexts]
    values: Values
    statistics: KeyStatistics
    covariance_weight: float

    def keys(self, block: int, *, bare: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of the facts at a block, as the model stands now.

        Args:
            bare: of the bare prompt alone, rather than the mean over contexts.

        Returns:
            [facts, in] keys, and [facts, hidden] outputs of the last edit layer's block, both at the subject's last
            token; the outputs are those of the bare prompt.
        """
        texts = [t for fact in self.texts for t in (fact.rewrites[:1] if bare else fact.rewrites)]
        owner = [f for f, fact in enumerate(self.texts) for _ in (fact.rewrites[:1] if bare else fact.rewrites)]
        name = self.layout.projection(block)
        keys, states = read_keys_and_states(
            self.base.model,
            self.layout,
            [t.ids[: t.subject + 1] for t in texts],
            [(i, t.subject) for i, t in enumerate(texts)],
            modules=(name,),
            blocks=(self.layers[-1],),
            last=self.layers[-1],
        )
        found = keys[name].double()
        owners = torch.tensor(owner, device=found.device)
        sums = torch.zeros(len(self.texts), found.shape[1], dtype=torch.float64, device=found.device)
        counts = owners.bincount(minlength=len(self.texts))
        first = [owner.index(f) for f in range(len(self.texts))]
        return sums.index_add(0, owners, found) / counts[:, None], states[self.layers[-1]][first].float()


def rome(problem: Insertion) -> dict[str, Update]:
    """Rank-one edit of a single fact (arXiv 2202.05262, eq. 2): W += delta u^T / (k0 . u), u = C^-1 k."""
    return _rank_one(problem, problem.keys(problem.layers[-1], bare=True)[0])


def r_rome(problem: Insertion) -> dict[str, Update]:
    """ROME with one and the same key, averaged over contexts, in both places (arXiv 2403.07175)."""
    return _rank_one(problem, problem.keys(problem.layers[-1])[0])


def _rank_one(problem: Insertion, inserted: torch.Tensor) -> dict[str, Update]:
    name = problem.layout.projection(problem.layers[-1])
    keys, _ = problem.keys(problem.layers[-1])
    direction = problem.statistics.moments[name].solve(keys.T)[:, 0]
    direction = direction / direction.norm()
    left = problem.values.deltas[0].double().cpu() / (inserted[0].cpu() @ direction)
    return {name: Update(Factors(left[:, None].float(), direction[None].float()), torch.zeros(1, 1))}


def memit(problem: Insertion) -> dict[str, Update]:
    """Spread all facts over several layers (arXiv 2210.07229, algorithm 1).

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
            whitened = problem.statistics.moments[name].solve(keys.T) / problem.covariance_weight
            updates[name] = insert(keys.T, whitened, residuals.T)
            attachment = WeightAttachment(problem.base.model, {name: updates[name].factors})
            edited.callback(attachment.detach)
    return updates


EDITORS: dict[str, Callable[[Insertion], dict[str, Update]]] = {"rome": rome, "r_rome": r_rome, "memit": memit}
