"""Value optimisation: the vector that makes one MLP say a new fact (ROME, arXiv 2202.05262, sec. 3.1).

A residual `delta` is added to the MLP's output at the subject's last token and optimised so that the model goes on with
the target: L = mean NLL(target) + kl_factor KL(p_delta || p_0) + weight_decay |delta|/|v|^2, with Adam, |delta| clamped to
clamp |v| after each step. The KL is read after "{subject} is a" and, which is ours, over a few tokens behind the target,
where the sentence shall go on as the clean model would rather than say the target again. Facts are independent of each
other and run together; see `hf_edit.suffix` for what is not run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..base import Base
from ..facts import Fact
from ..layout import Layout, write_scale
from ..positions import EncodedText, encode, fact_text
from ..progress import bar
from ..suffix import SuffixBatch, SuffixCache, caches_exactly, length_groups
from ..texts import target_tails

__all__ = ["FactTexts", "Objective", "ValueSettings", "Values", "fact_texts", "optimize_values"]

ESSENCE = "{} is a"  # ROME's prompt for the KL term


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the value optimisation; see `SteamConfig` for their meaning."""

    block: int
    steps: int
    lr: float | None
    kl_factor: float
    tail_factor: float
    weight_decay: float
    clamp: float | None


@dataclass(frozen=True)
class FactTexts:
    """One fact's texts: `rewrites` are prompts with the target, the bare one first and with its tail; `kept` are read for the
    KL term at their last token."""

    rewrites: tuple[EncodedText, ...]
    kept: tuple[EncodedText, ...]


class Objective(Protocol):
    """A further term of the loss that reads hidden states where the target is predicted."""

    blocks: tuple[int, ...]

    def loss(self, facts: Sequence[int], states: dict[int, torch.Tensor]) -> torch.Tensor:
        """The term for each fact, already weighted: [facts].

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


def fact_texts(base: Base, facts: Sequence[Fact], contexts: Sequence[str], tail_tokens: int = 0) -> list[FactTexts]:
    """The texts that each fact's value is optimised on.

    Args:
        base: the clean model.
        contexts: put in front of the prompt; the bare prompt always comes first.
        tail_tokens: length of the clean model's own continuation behind the bare prompt's target.
    """
    prefixes = ("", *contexts)
    tails = target_tails(base, facts, tail_tokens)
    rewrites = encode(
        base.tokenizer,
        [
            fact_text(f, prefix=p, target=f.target, tail=tail if not p else "")
            for f, tail in zip(facts, tails, strict=True)
            for p in prefixes
        ],
    )
    kept = encode(base.tokenizer, [fact_text(f, prompt=ESSENCE) for f in facts])
    width = len(prefixes)
    return [FactTexts(tuple(rewrites[i * width : (i + 1) * width]), (kept[i],)) for i in range(len(facts))]


def optimize_values(
    base: Base,
    texts: Sequence[FactTexts],
    settings: ValueSettings,
    *,
    objective: Objective | None = None,
    layout: Layout | None = None,
    batch_facts: int = 16,
    progress: bool = True,
) -> Values:
    """Optimise each fact's residual at one block.

    Args:
        base: the model, frozen (`hf_edit.suffix.frozen`).
        texts: of each fact, from `fact_texts`.
        settings: block, steps, step size and so on.
        objective: a further term of the loss.
        layout: where the model's own does not tell the projections.
        batch_facts: how many facts run together.
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
            problem = _Problem(base, layout, place, [texts[i] for i in group], objective, prefixes)
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
    ) -> None:
        self.objective = objective
        self.place = place
        rows = [_Row(f, text, True, i == 0) for f, fact in enumerate(facts) for i, text in enumerate(fact.rewrites)]
        rows += [_Row(f, text, False, False) for f, fact in enumerate(facts) for text in fact.kept]
        bare = [r for r, row in enumerate(rows) if row.bare]
        kept = [(r, p) for r, row in enumerate(rows) for p in row.kept]

        cache = SuffixCache(base.model, layout, place.start)
        read_at = kept + [(r, rows[r].text.subject) for r in bare]
        clean = cache.add([r.ids for r in rows], [r.text.subject if prefixes else 0 for r in rows], read_at, (place.block,))
        assert clean.logits is not None
        kept_log_probs = dict(zip(kept, clean.logits[: len(kept)].log_softmax(-1), strict=True))
        self.states = clean.states[place.block][len(kept) :].float()
        self.parts = [
            _Part(cache, place, [(r, rows[r]) for r in group], facts, kept_log_probs)
            for group in length_groups([len(s.ids) - s.cut for s in cache.spans], base.device)
        ]
        # Where the MLP's output joins the stream as it is, |v| is the stream's norm (MEMIT); behind a norm it is the MLP
        # output's own (ROME).
        if place.scale is None:
            outputs = {row: output for part in self.parts for row, output in part.clean_outputs().items()}
            self.norms = torch.stack([outputs[r] for r in bare]).norm(dim=1)
        else:
            self.norms = self.states.norm(dim=1) / abs(place.scale)
        self.delta = torch.zeros_like(self.states)
        self.losses = torch.empty(0, len(facts))

    def optimize(self, settings: ValueSettings, facts: Sequence[int]) -> Iterator[None]:
        """Run the steps; yields after each. The result is in `delta` and `losses`."""
        norms = self.norms
        clamp = settings.clamp or (4.0 if self.place.scale is None else 0.75)
        # Adam moves each coordinate by about its step size: a tenth of the stream's own suits every width and scale
        unit = torch.full_like(norms, settings.lr) if settings.lr else 0.1 * norms / self.delta.shape[1] ** 0.5
        steps = (self.delta.detach() / unit[:, None]).requires_grad_()
        adam = torch.optim.Adam([steps], lr=1.0)
        losses = []
        for _ in range(settings.steps):
            adam.zero_grad()
            self.delta = steps * unit[:, None]
            fit, aligned = self.loss(settings.kl_factor, settings.tail_factor)
            losses.append(fit.detach())
            loss = (fit + settings.weight_decay * self.delta.norm(dim=1) / norms**2).sum()
            if self.objective is not None:
                loss = loss + self.objective.loss(facts, aligned).sum()
            loss.backward()
            adam.step()
            with torch.no_grad():
                length = steps.norm(dim=1) * unit
                steps *= torch.minimum(torch.ones_like(length), clamp * norms / length.clamp(min=1e-12))[:, None]
            yield
        self.delta = (steps * unit[:, None]).detach()
        if losses:
            self.losses = torch.stack(losses)

    def loss(self, kl_factor: float, tail_factor: float) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """NLL + KL of each fact, and the states that the objective reads, in the order of the facts."""
        blocks = self.objective.blocks if self.objective else ()
        total = torch.zeros(len(self.delta), device=self.delta.device)
        states: dict[int, dict[int, torch.Tensor]] = {block: {} for block in blocks}
        for part in self.parts:
            losses, found = part.loss(self.delta, kl_factor, tail_factor, blocks)
            total = total + losses
            for block in blocks:
                states[block].update(zip(part.state_facts, found[block], strict=True))
        return total, {b: torch.stack([by_fact[f] for f in range(len(self.delta))]) for b, by_fact in states.items()}


@dataclass(frozen=True)
class _Row:
    fact: int
    text: EncodedText
    rewrite: bool
    bare: bool

    @property
    def ids(self) -> tuple[int, ...]:
        # a rewrite's last token predicts nothing that is read, so it need not run
        return self.text.ids[:-1] if self.rewrite else self.text.ids

    @property
    def kept(self) -> range:
        """Positions where the clean distribution is kept: behind the target's last token, or a kept text's end."""
        return range(self.text.target[1] - 1, len(self.ids))


class _Part:
    """Rows of similar suffix length, which run as one padded batch."""

    def __init__(
        self,
        cache: SuffixCache,
        place: _Place,
        rows: Sequence[tuple[int, _Row]],
        facts: Sequence[FactTexts],
        kept_log_probs: dict[tuple[int, int], torch.Tensor],
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
        self.fact_of_row = torch.tensor([row.fact for row in self.rows], device=device)
        self.columns = [self.batch.column(i, row.text.subject) for i, row in enumerate(self.rows)]
        self.labels = torch.tensor([self.rows[i].text.ids[p + 1] for i, p in labels], dtype=torch.long, device=device)
        self.clean = torch.stack([kept_log_probs[self.numbers[i], p] for i, p in kept]) if kept else None

        def of(points: list[tuple[int, int]]) -> torch.Tensor:
            return torch.tensor([self.rows[i].fact for i, _ in points], dtype=torch.long, device=device)

        self.label_fact, self.kept_fact = of(labels), of(kept)
        # means over a text's target tokens, then over the fact's texts; over kept texts; over the tail
        self.label_weight = torch.tensor(
            [1 / (len(row.text.labels) * len(facts[row.fact].rewrites)) for row in (self.rows[i] for i, _ in labels)],
            device=device,
        )
        essence = [not self.rows[i].rewrite for i, _ in kept]
        shares = [1 / (len(row.kept) if row.rewrite else len(facts[row.fact].kept)) for row in (self.rows[i] for i, _ in kept)]
        self.kept_weight = torch.tensor([[s * e, s * (not e)] for s, e in zip(shares, essence, strict=True)], device=device)

    def clean_outputs(self) -> dict[int, torch.Tensor]:
        """By row number of the problem, the projection's clean output at the subject: [hidden]."""
        seen: list[torch.Tensor] = []

        def read(output: torch.Tensor) -> torch.Tensor:
            seen.append(output)
            return output

        with torch.no_grad():
            self.batch.run((), hooks={self.place.projection: read}, logits=False)
        return {n: seen[0][i, self.columns[i]].float() for i, n in enumerate(self.numbers)}

    def loss(
        self, delta: torch.Tensor, kl_factor: float, tail_factor: float, blocks: Sequence[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """NLL + KL, summed into [facts], and by block the states of `state_facts`."""

        def add(stream: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(len(self.rows), device=stream.device)
            columns = torch.tensor(self.columns, device=stream.device)
            residuals = delta[self.fact_of_row] * (self.place.scale or 1.0)
            return stream.index_put((rows, columns), residuals.to(stream.dtype), accumulate=True)

        labels, kept = self.counts
        reads = self.reads if blocks else self.reads[: labels + kept]
        if self.place.scale is None:
            out = self.batch.run(reads, states=blocks, hooks={self.place.projection: add})
        else:
            assert self.batch.inputs is not None
            out = self.batch.run(reads, states=blocks, inputs=add(self.batch.inputs))
        total = torch.zeros(len(delta), device=delta.device)
        assert out.logits is not None
        if labels:
            nll = torch.nn.functional.cross_entropy(out.logits[:labels], self.labels, reduction="none")
            total = total.index_add(0, self.label_fact, (self.label_weight * nll).to(total))
        if self.clean is not None:
            edited = out.logits[labels : labels + kept].log_softmax(-1)
            kl = (edited.exp() * (edited - self.clean)).sum(-1)
            weight = self.kept_weight @ self.kept_weight.new_tensor([kl_factor, tail_factor])
            total = total.index_add(0, self.kept_fact, (weight * kl).to(total))
        return total, {b: s[labels + kept :].float().to(delta.device) for b, s in out.states.items()}
