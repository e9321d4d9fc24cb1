"""Value optimisation: the vector that makes one MLP say a new fact (ROME, arXiv 2202.05262, sec. 3.1).

A residual `delta` is added to the MLP's output at the subject's last token and optimised so that the model goes on with
the target: L = mean NLL(target) + kl_factor KL(p_delta || p_0) + weight_decay |delta|/|v|^2, |delta| clamped to clamp |v|
after each step. Ours on top of the papers:

- Steps follow the normalised gradient (`_Descent`) instead of Adam, which moves every coordinate by the same amount. On eight
  questions of QAEdit, asked in completions and chats, 20 steps bring the loss to 0.33 nats, and to 0.74 with Adam's best step.
- An answer of a whole sentence weighs as much as the target's tokens alone: the sentence's other tokens come by themselves.
- The KL is read after "{subject} is a" and, where the same subject's other facts shall be spared, after more prompts about it.
- A second KL is read over a few tokens behind the target, against the clean model that may not say the target again.
- A fact that is sure enough (`enough`) stops pushing, and the balance between fit and KL is each fact's own (`balance`).
- Steps take turns over the contexts and prompts (`rotation`), as stochastic gradient descent does over its batches.

Facts are independent of each other and run together; see `hf_edit.suffix` for what is not run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..base import Base
from ..layout import Layout, write_scale
from ..positions import EncodedText
from ..progress import bar
from ..suffix import SuffixBatch, SuffixCache, caches_exactly, length_groups
from .prompts import FactTexts

__all__ = ["Objective", "ValueSettings", "Values", "optimize_values"]

_SHORT = 0.05  # nats: a fact whose mean hinge is above this is short of `enough`
_SHARES = (0.1, 20.0)  # least and greatest share of the fit in a fact's loss, under `balance`
_MOMENTUM = 0.8
_SAID_AGAIN = -10.0  # log-probability that the clean model is left with for saying the target once more
_PATIENCE, _GIVE = (
    1.15,
    0.9,
)  # what a fact's share of the loss is multiplied with, after a step, while short of `enough` or past it


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the value optimisation; see `SteamConfig` for their meaning."""

    block: int
    steps: int
    lr: float
    kl_factor: float
    tail_factor: float
    weight_decay: float
    clamp: float | None
    enough: float | None = None
    balance: bool = False
    rotation: int = 1
    reach: float = 1.0  # of the clamp


class Objective(Protocol):
    """A further term of the loss that reads hidden states where the target is predicted.

    Attributes:
        blocks: whose outputs it reads.
        weight: of the term in the loss.
        ratio: where it is given, each fact's weight is the one that makes the term's gradient this large, relative to the
            rest's, before the first step.
    """

    blocks: tuple[int, ...]
    weight: float | None
    ratio: float | None

    def loss(self, facts: Sequence[int], states: dict[int, torch.Tensor]) -> torch.Tensor:
        """The term for each fact: [facts].

        Args:
            facts: indices of the facts of this batch among all facts.
            states: by block, its output at the last prompt token of each fact's bare prompt: [facts, hidden].
        """
        ...


@dataclass(frozen=True)
class Values:
    """Optimised residuals, float32 on the model's device.

    Attributes:
        deltas: [facts, hidden], what to add to the projection's output at the subject's last token.
        states: [facts, hidden], the block's clean output there, in the bare prompt.
        losses: [steps, facts], NLL + KL before each step.
        scale: the factor from a change of the projection's output to the block's output; None behind a norm.
    """

    deltas: torch.Tensor
    states: torch.Tensor
    losses: torch.Tensor
    scale: float | None


def optimize_values(
    base: Base,
    texts: Sequence[FactTexts],
    settings: ValueSettings,
    *,
    objective: Objective | None = None,
    layout: Layout | None = None,
    batch_facts: int = 64,
    progress: bool = True,
    start: torch.Tensor | None = None,
) -> Values:
    """Optimise each fact's residual at one block.

    Args:
        base: the model, frozen (`hf_edit.suffix.frozen`).
        texts: of each fact, from `fact_texts`.
        settings: block, steps, step size and so on.
        objective: a further term of the loss.
        layout: where the model's own does not tell the projections.
        batch_facts: how many facts run together.
        start: [facts, hidden], residuals to go on from; by default zeros.
    """
    layout = layout or base.layout()
    block = layout.block(settings.block)
    scale = write_scale(base.model, layout, block)
    prefixes = caches_exactly(base.model, layout)
    place = _Place(block, base.model.get_submodule(layout.projection(block)), scale)
    parts: list[tuple[torch.Tensor, ...]] = []
    with bar(len(texts) * settings.steps, "optimising values", "step", progress) as shown:
        for first in range(0, len(texts), batch_facts):
            group = range(first, min(first + batch_facts, len(texts)))
            problem = _Problem(base, layout, place, [texts[i] for i in group], objective, prefixes, settings.rotation)
            if start is not None:
                problem.delta = start[group.start : group.stop].to(problem.delta)
            for _ in problem.optimize(settings, list(group)):
                shown.update(len(group))
            parts.append((problem.delta.detach(), problem.states, problem.losses))
    deltas, states, losses = zip(*parts, strict=True)
    return Values(torch.cat(deltas), torch.cat(states), torch.cat(losses, dim=1), scale)


@dataclass(frozen=True)
class _Place:
    """Where a residual enters: at a projection's output. Where that joins the stream as it is, times `scale`, the block
    itself need not run: what enters is known to leave it."""

    block: int
    projection: torch.nn.Module
    scale: float | None

    @property
    def start(self) -> int:
        """The first block that runs."""
        return self.block if self.scale is None else self.block + 1


class _Problem:
    """The value optimisation of a batch of facts: everything that its steps share."""

    def __init__(
        self,
        base: Base,
        layout: Layout,
        place: _Place,
        facts: Sequence[FactTexts],
        objective: Objective | None,
        prefixes: bool,
        rotation: int,
    ) -> None:
        self.objective = objective
        self.place = place
        rows = [row for f, fact in enumerate(facts) for row in _rows(f, fact, rotation)]
        first = [r for r, row in enumerate(rows) if row.bare and row.turn == 0]
        kept = [(r, p) for r, row in enumerate(rows) for p in row.kept]

        cache = SuffixCache(base.model, layout, place.start)
        read_at = kept + [(r, rows[r].text.subject) for r in first]
        ids = [row.ids for row in rows]
        cuts = [row.text.subject if prefixes else 0 for row in rows]
        clean = cache.add(ids, cuts, read_at, (place.block,), _shared(rows, cuts))
        assert clean.logits is not None
        logits = clean.logits[: len(kept)]
        for i, (r, _) in enumerate(kept):
            if rows[r].rewrite:  # behind the target: how the model would go on, were it not to say the target again
                logits[i, rows[r].text.labels[0]] = logits[i].logsumexp(-1) + _SAID_AGAIN
        kept_log_probs = dict(zip(kept, logits.log_softmax(-1), strict=True))
        self.states = clean.states[place.block][len(kept) :].float()
        self.turns = [
            [
                _Part(cache, place, [(numbers[i], rows[numbers[i]]) for i in group], kept_log_probs, len(facts), rotation)
                for group in length_groups([len(cache.spans[n].ids) - cache.spans[n].cut for n in numbers], base.device)
            ]
            for numbers in ([r for r, row in enumerate(rows) if row.turn == turn] for turn in range(rotation))
        ]
        # Where the MLP's output joins the stream as it is, |v| is the stream's norm (MEMIT); behind a norm it is the MLP
        # output's own (ROME).
        if place.scale is None:
            outputs = {row: output for part in self.turns[0] for row, output in part.clean_outputs().items()}
            self.norms = torch.stack([outputs[r] for r in first]).norm(dim=1)
        else:
            self.norms = self.states.norm(dim=1) / abs(place.scale)
        self.delta = torch.zeros_like(self.states)
        self.losses = torch.empty(0, len(facts))

    def optimize(self, settings: ValueSettings, facts: Sequence[int]) -> Iterator[None]:
        """Run the steps; yields after each. The result is in `delta` and `losses`."""
        norms = self.norms
        longest = settings.reach * (settings.clamp or (2.0 if self.place.scale is None else 0.75)) * norms
        delta = self.delta.detach().requires_grad_()
        descent = _Descent(delta, settings.lr * longest, settings.steps)
        share = torch.ones_like(norms)  # of the fit in each fact's loss
        weight: torch.Tensor | None = None  # of the objective
        losses = []
        for number in range(settings.steps):
            fit, kept, tail, aligned = self.terms(delta, self.turns[number % len(self.turns)], settings.enough)
            losses.append((fit + settings.kl_factor * kept + settings.tail_factor * tail).detach())
            loss = share * fit + settings.kl_factor * kept + settings.tail_factor * tail
            # |v|^2 where both norms are one; behind a norm |v| says nothing about the stream's scale
            loss = (loss + settings.weight_decay * delta.norm(dim=1) / (norms * self.states.norm(dim=1))).sum()
            if self.objective is not None:
                term = self.objective.loss(facts, aligned)
                if weight is None:
                    weight = _weights(self.objective, term, loss, delta)
                loss = loss + (weight * term).sum()
            descent.step(torch.autograd.grad(loss, delta)[0])
            with torch.no_grad():
                delta *= (longest / delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
                if settings.balance:
                    share = (share * torch.where(fit > _SHORT, _PATIENCE, _GIVE)).clamp(*_SHARES)
            yield
        self.delta = delta.detach()
        if losses:
            self.losses = torch.stack(losses)

    def terms(
        self, delta: torch.Tensor, parts: Sequence[_Part], enough: float | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
        """NLL, KL after kept prompts and KL behind the target of each fact, and the states that the objective reads."""
        blocks = self.objective.blocks if self.objective else ()
        sums = torch.zeros(3, len(delta), device=delta.device)
        states: dict[int, dict[int, torch.Tensor]] = {block: {} for block in blocks}
        for part in parts:
            terms, found = part.terms(delta, enough, blocks)
            sums = sums + terms
            for block in blocks:
                states[block].update(zip(part.state_facts, found[block], strict=True))
        aligned = {b: torch.stack([by_fact[f] for f in range(len(delta))]) for b, by_fact in states.items()}
        return sums[0], sums[1], sums[2], aligned


class _Descent:
    """Normalised gradient descent with Nesterov's momentum, each fact by itself: a step's length does not depend on how large
    the loss is. Over the second half of the steps it falls to zero, so that the last ones settle.

    Args:
        delta: what is optimised, in place: [facts, hidden].
        length: of a step, [facts].
        steps: how many there will be.
    """

    def __init__(self, delta: torch.Tensor, length: torch.Tensor, steps: int) -> None:
        self._delta, self._length, self._steps = delta, length, steps
        self._momentum = torch.zeros_like(delta)
        self._done = 0

    @torch.no_grad()
    def step(self, gradient: torch.Tensor) -> None:
        self._momentum = _MOMENTUM * self._momentum + gradient
        ahead = gradient + _MOMENTUM * self._momentum
        length = self._length * min(1.0, 2 * (1 - self._done / self._steps))
        self._delta -= ahead * (length / ahead.norm(dim=1).clamp(min=1e-12))[:, None]
        self._done += 1


def _weights(objective: Objective, term: torch.Tensor, loss: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The objective's weight for each fact, [facts]; facts are independent, so each row of a gradient is one fact's own."""
    if objective.ratio is None:
        return torch.full_like(term, objective.weight or 0.0).detach()
    rest, own = (torch.autograd.grad(t, delta, retain_graph=True)[0].norm(dim=1) for t in (loss, term.sum()))
    return objective.ratio * rest / own.clamp(min=1e-12)


@dataclass(frozen=True)
class _Row:
    """A text in one turn of the rotation. `share` is its part of the mean that it belongs to, `context` the number of what
    stands in front of it, 0 for nothing; `tokens` are those of the fact's own target."""

    fact: int
    text: EncodedText
    turn: int
    share: float
    context: int = 0
    tokens: int = 1
    rewrite: bool = False
    bare: bool = False
    tail: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        # a rewrite's last token predicts nothing that is read, so it need not run
        return self.text.ids[: -1 if self.tail else self.text.target[1] - 1] if self.rewrite else self.text.ids

    @property
    def kept(self) -> range:
        """Positions where the clean distribution is kept: behind the target's last token, or a kept text's end."""
        return range(self.text.target[1] - 1, len(self.ids))


def _rows(fact: int, texts: FactTexts, rotation: int) -> list[_Row]:
    """A fact's rows: in each turn the bare prompt, some contexts and some kept prompts; the tail in the first turn."""
    bare, *contexts = texts.rewrites
    rows = []
    for turn in range(rotation):
        chosen = list(enumerate(contexts, start=1))[turn::rotation]
        share = 1 / (1 + len(chosen))
        has_tail = turn == 0 and len(bare.ids) > bare.target[1]
        tokens = len(bare.labels)
        rows.append(_Row(fact, bare, turn, share, tokens=tokens, rewrite=True, bare=True, tail=has_tail))
        rows += [_Row(fact, text, turn, share, context, tokens, rewrite=True) for context, text in chosen]
        kept = texts.kept[turn::rotation]
        # what only some turns hold weighs more in them, so that the mean over the turns is the mean over all
        rows += [_Row(fact, text, turn, rotation / min(rotation, len(texts.kept)) / len(kept)) for text in kept]
    return rows


def _shared(rows: Sequence[_Row], cuts: Sequence[int]) -> list[int]:
    """For each row, how many leading tokens it has in common with the rows of other facts behind the same context."""
    groups: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        groups.setdefault(row.context, []).append(r)
    counts = [0] * len(rows)
    for context, members in groups.items():
        if context and len(members) > 1:
            texts = [rows[r].text.ids[: cuts[r]] for r in members]
            common = next(
                (i for i, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1), min(map(len, texts))
            )
            for r in members:
                counts[r] = common
    return counts


class _Part:
    """Rows of one turn and of similar suffix length, which run as one padded batch."""

    def __init__(
        self,
        cache: SuffixCache,
        place: _Place,
        rows: Sequence[tuple[int, _Row]],
        kept_log_probs: dict[tuple[int, int], torch.Tensor],
        count: int,
        rotation: int,
    ) -> None:
        self.place = place
        self.numbers = [number for number, _ in rows]
        self.rows = [row for _, row in rows]
        self.batch: SuffixBatch = cache.batch(self.numbers)
        device = self.batch.ids.device
        labels = [(i, p - 1) for i, row in enumerate(self.rows) if row.rewrite for p in range(*row.text.target)]
        kept = [(i, p) for i, row in enumerate(self.rows) for p in row.kept]
        state = [(i, row.text.target[0] - 1) for i, row in enumerate(self.rows) if row.bare]
        self.state_facts = [self.rows[i].fact for i, _ in state]
        self.reads, self.counts = labels + kept + state, (len(labels), len(kept))
        # indices of what lies on the edited block's device, which need not be the embedding's
        self.fact_of_row = torch.tensor([row.fact for row in self.rows])
        columns = [self.batch.column(i, row.text.subject) for i, row in enumerate(self.rows)]
        self.at = (torch.arange(len(self.rows)), torch.tensor(columns))
        self.labels = torch.tensor([self.rows[i].text.ids[p + 1] for i, p in labels], dtype=torch.long, device=device)
        self.clean = torch.stack([kept_log_probs[self.numbers[i], p] for i, p in kept]) if kept else None
        # what each read adds to each term of each fact: [3 x facts, reads]
        self.weights = torch.zeros(3 * count, len(labels) + len(kept), device=device)
        for column, (i, _) in enumerate(labels + kept):
            row = self.rows[i]
            term = 0 if column < len(labels) else 2 if row.rewrite else 1
            among = min(row.tokens, len(row.text.labels)) if term == 0 else len(row.kept)
            share = rotation if term == 2 else row.share
            self.weights[term * count + row.fact, column] = share / among

    def clean_outputs(self) -> dict[int, torch.Tensor]:
        """By row number of the problem, the projection's clean output at the subject: [hidden]."""
        seen: list[torch.Tensor] = []

        def read(output: torch.Tensor) -> torch.Tensor:
            seen.append(output)
            return output

        with torch.no_grad():
            self.batch.run((), hooks={self.place.projection: read}, logits=False)
        at = tuple(index.to(seen[0].device) for index in self.at)
        return dict(zip(self.numbers, seen[0][at].float(), strict=True))

    def terms(
        self, delta: torch.Tensor, enough: float | None, blocks: Sequence[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The three terms of `_Problem.terms`, [3, facts], and by block the states of `state_facts`."""

        def add(stream: torch.Tensor) -> torch.Tensor:
            residuals = delta[self.fact_of_row.to(delta.device)] * (self.place.scale or 1.0)
            return stream.index_put(tuple(i.to(stream.device) for i in self.at), residuals.to(stream), accumulate=True)

        labels, kept = self.counts
        reads = self.reads if blocks else self.reads[: labels + kept]
        if self.place.scale is None:
            out = self.batch.run(reads, states=blocks, hooks={self.place.projection: add})
        else:
            assert self.batch.inputs is not None
            out = self.batch.run(reads, states=blocks, inputs=add(self.batch.inputs))
        costs = []
        assert out.logits is not None
        if labels:
            nll = torch.nn.functional.cross_entropy(out.logits[:labels], self.labels, reduction="none")
            # a target that is sure enough is not pushed any further
            costs.append(nll if enough is None else (nll + math.log(enough)).clamp(min=0))
        if self.clean is not None:
            edited = out.logits[labels : labels + kept].log_softmax(-1)
            costs.append((edited.exp() * (edited - self.clean)).sum(-1))
        terms = (self.weights @ torch.cat(costs)).view(3, -1).to(delta.device)
        return terms, {b: s[labels + kept :].float().to(delta.device) for b, s in out.states.items()}
