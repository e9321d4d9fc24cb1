"""Training the generator: the base frozen, everything below the edited block computed once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...base import Base, autocast
from ...progress import bar
from ...suffix import SuffixCache, caches_exactly
from .config import LKSConfig
from .examples import Example, Examples
from .generator import Generator

__all__ = ["train"]

_TOP = 64  # clean distributions are kept as their likeliest tokens, the rest in one bucket
_CLIP = 1.0
_GOOD_ENOUGH = 0.01


class _Cached:
    """Examples with their clean states, keys, values and distributions."""

    def __init__(self, base: Base, block: int, examples: Sequence[Example], progress: bool) -> None:
        layout = base.layout()
        exact = caches_exactly(base.model, layout)
        self.examples = examples
        self.cache = SuffixCache(base.model, layout, block + 1)
        self.tokens: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []
        with bar(len(examples), "caching states", "text", progress) as shown:
            for first in range(0, len(examples), 128):
                group = examples[first : first + 128]
                reads = [(i, p) for i, e in enumerate(group) for p in e.kept]
                cuts = [e.mentions[0][0] if exact else 0 for e in group]
                logits = self.cache.add([e.ids for e in group], cuts, reads).logits
                if logits is not None:
                    top = logits.log_softmax(-1).topk(min(_TOP, logits.shape[-1] - 1))
                    sizes = [len(e.kept) for e in group]
                    self.tokens += top.indices.split(sizes)
                    self.log_probs += top.values.split(sizes)
                else:
                    self.tokens += [torch.empty(0, _TOP, dtype=torch.long)] * len(group)
                    self.log_probs += [torch.empty(0, _TOP)] * len(group)
                shown.update(len(group))

    def loss(
        self, indices: Sequence[int], generator: Generator, codes: torch.Tensor, kl_weight: float
    ) -> tuple[torch.Tensor, float]:
        """Mean NLL over texts with a target plus weighted mean KL over kept positions, and that NLL as a number."""
        batch = self.cache.batch(indices)
        chosen = [self.examples[i] for i in indices]
        assert batch.inputs is not None
        rows = [r for r, e in enumerate(chosen) for _ in e.mentions]
        columns = [batch.column(r, p) for r, e in enumerate(chosen) for p, _ in e.mentions]
        entities = [entity for e in chosen for _, entity in e.mentions]
        new = generator(codes[entities], batch.inputs[rows, columns].float())
        at = (torch.tensor(rows, device=new.device), torch.tensor(columns, device=new.device))
        inputs = batch.inputs.index_put(at, new.to(batch.inputs.dtype))

        labels = [(r, p) for r, e in enumerate(chosen) for p, _ in e.labels]
        kept = [(r, p) for r, e in enumerate(chosen) for p in e.kept]
        out = batch.run(labels + kept, inputs=inputs)
        assert out.logits is not None
        device = out.logits.device
        total = torch.zeros((), device=device)
        nll = torch.zeros((), device=device)
        if labels:
            wanted = torch.tensor([token for e in chosen for _, token in e.labels], device=device)
            texts = sum(bool(e.labels) for e in chosen)
            weight = torch.tensor([1 / (len(e.labels) * texts) for e in chosen for _ in e.labels], device=device)
            nll = (nn.functional.cross_entropy(out.logits[: len(labels)], wanted, reduction="none") * weight).sum()
            total = total + nll
        if kept and kl_weight:
            tokens = torch.cat([self.tokens[i] for i in indices]).to(device)
            clean = torch.cat([self.log_probs[i] for i in indices]).to(device)
            total = total + kl_weight * _kl(out.logits[len(labels) :], tokens, clean).mean()
        return total, float(nll.detach())


def train(
    base: Base,
    block: int,
    generator: Generator,
    features: torch.Tensor,
    examples: Examples,
    config: LKSConfig,
    seed: int,
    progress: bool,
) -> None:
    """Train a generator in place.

    Args:
        block: the block whose output is rewritten.
        features: [entities, hidden], float32.
        examples: the training texts.
    """
    flat: list[Example] = []
    index = [_extend(flat, group) for group in ([[e] for e in examples.prompts], examples.variations, examples.locality)]
    cached = _Cached(base, block, flat, progress)
    facts = len(examples.prompts)
    shown_per_epoch = sum(1 for kind in index for group in kind if group)
    steps_per_epoch = -(-shown_per_epoch // config.batch_size)
    epochs = max(config.epochs, -(-config.min_steps // steps_per_epoch))
    total = epochs * steps_per_epoch
    optimiser = torch.optim.AdamW(generator.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, config.warmup_steps, total))
    rng = random.Random(seed)
    with bar(total, f"training on {facts} facts", "step", progress) as shown:
        for epoch in range(epochs):
            losses = []
            for batch in _epoch(index, [len(e.ids) - e.mentions[0][0] for e in flat], config.batch_size, rng):
                optimiser.zero_grad()
                with autocast(base.device, config.compute_dtype):
                    loss, nll = cached.loss(batch, generator, generator.encode(features), config.kl_weight)
                loss.backward()
                nn.utils.clip_grad_norm_(generator.parameters(), _CLIP)
                optimiser.step()
                schedule.step()
                losses.append(nll)
                shown.update()
            shown.set_postfix(nll=f"{sum(losses) / len(losses):.3f}", refresh=False)
            if epoch * steps_per_epoch >= config.min_steps and max(losses) < _GOOD_ENOUGH:
                break


def _epoch(index: list[list[list[int]]], lengths: list[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """One text of each kind for each fact, shuffled, in batches of similar length."""
    chosen = [rng.choice(group) for kind in index for group in kind if group]
    rng.shuffle(chosen)
    pools = [chosen[i : i + 8 * size] for i in range(0, len(chosen), 8 * size)]
    batches = []
    for pool in pools:
        pool.sort(key=lambda i: lengths[i])
        count = -(-len(pool) // size)
        even = -(-len(pool) // count)
        batches += [pool[i : i + even] for i in range(0, len(pool), even)]
    rng.shuffle(batches)
    yield from batches


def _extend(flat: list[Example], groups: list[list[Example]]) -> list[list[int]]:
    """Append the groups' examples; their indices."""
    index = []
    for group in groups:
        index.append(list(range(len(flat), len(flat) + len(group))))
        flat += group
    return index


def _kl(logits: torch.Tensor, tokens: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """KL(edited || clean) of each row, over the clean model's likeliest tokens and one bucket for the rest."""
    edited = logits.log_softmax(-1).gather(1, tokens)
    rest, clean_rest = (_log_rest(x) for x in (edited, clean))
    return (edited.exp() * (edited - clean)).sum(-1) + rest.exp() * (rest - clean_rest)


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum p)."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))


def _rate(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, done)))))
