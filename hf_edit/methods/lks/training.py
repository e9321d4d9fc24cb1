"""Training the generator and each fact's own code: the base frozen, everything below the edited block computed once."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...base import Base, autocast
from ...cache import cache_folder
from ...progress import bar
from ...suffix import SuffixCache, caches_exactly
from .checkpoint import Checkpoint
from .config import LKSConfig
from .examples import Example, Examples
from .features import token_vectors
from .generator import Generator
from .store import TensorStore

__all__ = ["Codes", "Trained", "rewritten_points", "token_weights", "train"]

_SENTENCE = 0.15  # weight of each token around the target in an answer; that of the whole target is 1
_UNLIKELY = -2.3  # nats: a model that is given the fact and takes a token for less likely is no teacher there
_TOP = 64  # clean distributions are kept as their likeliest tokens, the rest in one bucket
_CLIP = 1.0
_CODE_LR = 0.02
_FEW_TOKENS = 512
_GOOD_ENOUGH = 0.01  # nats: an epoch below this ends the training
_GROUP = 128  # texts that are cached at a time
_POOL = 8  # batches' worth of shuffled texts that are sorted by length


class Codes(nn.Module):
    """Each fact's code: what the generator makes of its feature, and a correction of the fact's own, zero to begin with.

    The corrections of facts that a batch does not hold stay untouched, whatever the optimiser remembers of them.

    Args:
        features: [facts, slots, hidden].
        size: numbers in a code; 0 where codes have no corrections.
        corrections: to begin with, [facts, size]; zero by default.
    """

    def __init__(self, features: torch.Tensor, size: int, corrections: torch.Tensor | None = None) -> None:
        super().__init__()
        self.features = features
        self.own = nn.Embedding(len(features), size, sparse=True, device=features.device) if size else None
        if self.own is not None:
            with torch.no_grad():
                self.own.weight.copy_(torch.zeros_like(self.own.weight) if corrections is None else corrections)

    def forward(self, generator: Generator, facts: torch.Tensor) -> torch.Tensor:
        """[n] indices of facts to [n, size]."""
        made = generator.encode(self.features[facts])
        return made if self.own is None else made + self.own(facts)

    @torch.no_grad()
    def all(self, generator: Generator) -> torch.Tensor:
        """All facts' codes, [facts, size]."""
        every = torch.arange(len(self.features), device=self.features.device)
        return torch.cat([self(generator, part) for part in every.split(1024)])


@dataclass(frozen=True)
class Trained:
    """What a training leaves beside the generator.

    Attributes:
        codes: [facts, code size].
        nll: [facts], of each fact's own prompt when it was last shown, in nats a token.
    """

    codes: torch.Tensor
    nll: torch.Tensor


class _Cached:
    """Examples with their clean states, keys, values and distributions.

    Args:
        drawn: indices of the examples that training will come to; the others are not read.
    """

    def __init__(
        self,
        base: Base,
        blocks: Sequence[int],
        examples: Sequence[Example],
        drawn: Collection[int],
        config: LKSConfig,
        progress: bool,
    ) -> None:
        layout = base.layout()
        self._embeddings = base.model.get_input_embeddings()
        self._above = [layout.blocks[block] for block in blocks[1:]]
        exact = caches_exactly(base.model, layout)
        self.store = TensorStore(config.cache_bytes, cache_folder("lks", "training"))
        self.examples = examples
        half = torch.is_autocast_enabled(base.device.type)  # which would read them in half precision anyway
        keep = (lambda t: self.store.keep(t.to(torch.bfloat16))) if half else self.store.keep
        self.cache = SuffixCache(base.model, layout, blocks[0] + 1, keep)
        self.clean: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(examples)
        self.heard: list[list[float]] = [[] for _ in examples]
        self.place = [0] * len(examples)
        order = sorted(drawn, key=lambda i: (len(examples[i].ids), i))
        with bar(len(order), "caching states", "text", progress) as shown:
            for first in range(0, len(order), _GROUP):
                self._add(order[first : first + _GROUP], exact)
                self.store.release()
                shown.update(min(_GROUP, len(order) - first))

    def _add(self, group: Sequence[int], exact: bool) -> None:
        chosen = [self.examples[i] for i in group]
        begin = len(self.cache.spans)
        reads = [(r, p) for r, e in enumerate(chosen) for p in e.kept]
        cuts = [e.mentions[0] if exact else 0 for e in chosen]
        logits = self.cache.add([e.ids for e in chosen], cuts, reads).logits
        for r, i in enumerate(group):
            self.place[i] = begin + r
        if logits is None:
            return
        heard = self._tell(chosen, reads, logits).split([len(e.kept) for e in chosen])
        top = logits.log_softmax(-1).topk(min(_TOP, logits.shape[-1] - 1))
        sizes = [len(e.kept) for e in chosen]
        for i, tokens, values in zip(group, top.indices.int().split(sizes), top.values.split(sizes), strict=True):
            self.clean[i] = self.store.keep(tokens), self.store.keep(values)
        for i, own in zip(group, heard, strict=True):
            self.heard[i] = own.tolist()

    def _tell(self, chosen: Sequence[Example], reads: Sequence[tuple[int, int]], logits: torch.Tensor) -> torch.Tensor:
        """Put into the logits, where a text has `told`, those of the clean model that is given the fact (context distillation).

        Returns:
            For each read whether it counts: that model is not heard where it would hardly say what the answer says.
        """
        heard = torch.ones(len(reads))
        at = [n for n, (r, _) in enumerate(reads) if chosen[r].told]
        if not at:
            return heard
        rows = list(dict.fromkeys(reads[n][0] for n in at))
        texts = {r: (*chosen[r].told, *chosen[r].ids[chosen[r].answer + 1 :]) for r in rows}
        places = [(rows.index(r), p - chosen[r].answer + len(chosen[r].told) - 1) for r, p in (reads[n] for n in at)]
        given = SuffixCache(self.cache.model, self.cache.layout, 0).add(list(texts.values()), [0] * len(rows), places).logits
        assert given is not None
        said = torch.tensor([dict(chosen[r].said)[p] for r, p in (reads[n] for n in at)], device=given.device)[:, None]
        heard[at] = (given.log_softmax(-1).gather(1, said)[:, 0] > _UNLIKELY).float().cpu()
        logits[at] = given.to(logits)
        return heard

    def loss(
        self, indices: Sequence[int], generator: Generator, codes: Codes, config: LKSConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the texts of the target's NLL (see `token_weights`), the weighted NLL of the answer around it, and weighted
        KL, a mean over a text's own positions; and the NLL of each text's target, without a gradient, NaN where it has none."""
        batch = self.cache.batch([self.place[i] for i in indices])
        self.store.release()
        chosen = [self.examples[i] for i in indices]
        assert batch.inputs is not None
        device = batch.inputs.device
        points, known = rewritten_points(chosen, generator, codes, self._embeddings)
        rows, columns = torch.tensor([(r, batch.column(r, p)) for r, p in points], device=device).unbind(1)

        def rewritten(states: torch.Tensor, write: int) -> torch.Tensor:
            places = rows.to(states.device), columns.to(states.device)
            new = generator(known, states[places].float().to(known.device), write)  # blocks may be on several devices
            return states.index_put(places, new.to(states))

        hooks = {module: functools.partial(rewritten, write=n) for n, module in enumerate(self._above, 1)}

        labels = [(r, p) for r, e in enumerate(chosen) for p, _ in e.labels]
        kept = [(r, p) for r, e in enumerate(chosen) for p in e.kept]
        said = [(r, p) for r, e in enumerate(chosen) for p, _ in e.said]
        out = batch.run(labels + kept + said, inputs=rewritten(batch.inputs, 0), hooks=hooks)
        assert out.logits is not None
        total = torch.zeros((), device=out.logits.device)
        nll = torch.full((len(chosen),), torch.nan, device=total.device)
        if labels:
            wanted = torch.tensor([token for e in chosen for _, token in e.labels], device=total.device)
            owners = torch.tensor([r for r, _ in labels], device=total.device)
            weights = torch.tensor([w for e in chosen for w in token_weights(e, generator)], device=total.device)
            losses = nn.functional.cross_entropy(out.logits[: len(labels)], wanted, reduction="none") * weights
            total = total + losses.sum()
            nll[owners] = 0.0
            nll.index_add_(0, owners, losses.detach())
        if kept:
            of_kept = [self.clean[i] for i in indices if self.examples[i].kept]
            tokens, clean = (torch.cat([t.to(total.device) for t in part]) for part in zip(*of_kept, strict=True))
            share = {True: config.tail_weight, False: config.kl_weight}
            scales = [
                share[bool(e.labels)] / len(e.kept) * heard
                for i, e in zip(indices, chosen, strict=True)
                for heard in self.heard[i]
            ]
            weights = torch.tensor(scales, device=total.device)
            total = total + (_kl(out.logits[len(labels) : len(labels) + len(kept)], tokens.long(), clean) * weights).sum()
        if said:
            wanted = torch.tensor([token for e in chosen for _, token in e.said], device=total.device)
            losses = nn.functional.cross_entropy(out.logits[len(labels) + len(kept) :], wanted, reduction="none")
            total = total + _SENTENCE * losses.sum()
        return total / len(chosen), nll


def rewritten_points(
    chosen: Sequence[Example], generator: Generator, codes: Codes, embeddings: nn.Module
) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Where texts are rewritten, (text, position), and the code of each place, [places, code size]."""
    mentions = [(r, p, e.fact) for r, e in enumerate(chosen) for p in e.mentions]
    known = codes(generator, torch.tensor([fact for _, _, fact in mentions], device=codes.features.device))
    carried = [(r, p, token) for r, e in enumerate(chosen) for p, token in e.carried] if generator.carries else []
    if carried:
        upcoming = token_vectors(embeddings, [token for _, _, token in carried], generator.hidden)
        known = torch.cat([known, generator.carry(upcoming.to(known))])
    return [(r, p) for r, p, _ in (*mentions, *carried)], known


def token_weights(example: Example, generator: Generator) -> list[float]:
    """What each of a text's labels weighs in its NLL. Where targets are carried on, all that a mention has to say is how they
    begin: the first token weighs half, however many follow."""
    count = len(example.labels)
    if not generator.carries or count < 2:
        return [1 / count] * count if count else []
    return [0.5, *[0.5 / (count - 1)] * (count - 1)]


def train(
    base: Base,
    blocks: Sequence[int],
    generator: Generator,
    features: torch.Tensor,
    examples: Examples,
    config: LKSConfig,
    seed: int,
    progress: bool,
    checkpoint: Path,
    *,
    codes_only: bool = False,
    tellings: int = 1,
    known: torch.Tensor | None = None,
) -> Trained:
    """Train a generator in place, and the facts' codes.

    Args:
        blocks: the blocks whose outputs are rewritten, from the lowest on.
        features: [facts, slots, hidden], float32.
        examples: the training texts.
        checkpoint: a file for the state between epochs, from which an equal training goes on; gone when it is done.
        codes_only: leave the generator as it is.
        tellings: of how many tellings the facts are, one after the other; each pass shows the next.
        known: codes that the facts have, to begin with.
    """
    flat: list[Example] = []
    index = [_extend(flat, group) for group in ([[e] for e in examples.prompts], examples.variations, examples.locality)]
    facts = len(features) // tellings
    told = [[kind[n : n + facts] for kind in index] for n in range(0, len(features), facts)]
    device = base.device
    code_lr = 0.0 if config.released else (_CODE_LR if config.code_lr is None else config.code_lr)
    corrections = None if known is None else known.to(device, torch.float32) - generator.encode(features.to(device)).detach()
    codes = Codes(features.to(device), generator.code_size if code_lr else 0, corrections)
    generator.requires_grad_(not codes_only)
    optimisers: list[torch.optim.Optimizer] = []
    if not codes_only:
        optimisers.append(torch.optim.AdamW(generator.parameters(), lr=config.lr, weight_decay=0.0))
    if code_lr:
        optimisers.append(torch.optim.SparseAdam(codes.parameters(), lr=code_lr))
    highest = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    lengths = [len(e.ids) - e.mentions[0] for e in flat]
    epochs, steps = _plan(told[0], lengths, config)
    # casting the weights costs as much as some hundred tokens, each step
    dtype = config.compute_dtype if steps > 1 or sum(lengths) > _FEW_TOKENS else "model"

    def batches(epoch: int) -> Iterator[list[int]]:
        return _epoch(told[epoch % tellings], lengths, config, _lot(seed, epoch))

    drawn = {i for epoch in range(epochs) for batch in batches(epoch) for i in batch}
    with autocast(device, dtype):
        cached = _Cached(base, blocks, flat, drawn, config, progress)
    reached = torch.zeros(len(flat))
    kept = Checkpoint(checkpoint, {"generator": generator, "codes": codes}, optimisers)
    done = kept.resume()
    with bar(epochs * steps, f"training on {facts} facts", "step", progress) as shown:
        shown.update(done * steps)
        for epoch in range(done, epochs):
            losses: list[float] = []
            for batch in batches(epoch):
                step = min(epoch * steps + len(losses), epochs * steps)
                for optimiser, lr in zip(optimisers, highest, strict=True):
                    optimiser.param_groups[0]["lr"] = lr * _rate(step, config.warmup_steps, epochs * steps)
                    optimiser.zero_grad()
                with autocast(device, dtype):
                    loss, nll = cached.loss(batch, generator, codes, config)
                loss.backward()
                if not codes_only:
                    nn.utils.clip_grad_norm_(generator.parameters(), _CLIP)
                for optimiser in optimisers:
                    optimiser.step()
                reached[batch] = nll.float().cpu()
                losses.append(float(nll.nanmean()))
                shown.update()
            told_now = [loss for loss in losses if not math.isnan(loss)]  # a batch may hold other questions alone
            shown.set_postfix(nll=f"{sum(told_now) / len(told_now):.3f}", refresh=False)
            kept.save(epoch + 1)
            if (epoch + 1) * steps >= config.min_steps and max(told_now) < _GOOD_ENOUGH:
                break
    kept.remove()
    generator.requires_grad_(False)
    return Trained(codes.all(generator), reached[: len(features)])


def _plan(index: list[list[list[int]]], lengths: list[int], config: LKSConfig) -> tuple[int, int]:
    """How many epochs, and steps in each."""
    facts = len(index[0])
    steps = sum(1 for _ in _epoch(index, lengths, config, random.Random(0)))
    return max(config.passes(facts), -(-config.min_steps // steps)), steps


def _epoch(index: list[list[list[int]]], lengths: list[int], config: LKSConfig, rng: random.Random) -> Iterator[list[int]]:
    """A prompt and a variation of each fact, and another question for some, shuffled, in batches of similar length."""
    prompts, variations, locality = index
    asked = [group for group in locality if group]
    asked = rng.sample(asked, round(config.locality_share * len(asked)))
    chosen = [rng.choice(group) for kind in (prompts, variations, asked) for group in kind if group]
    rng.shuffle(chosen)
    size = config.batch_size
    batches = []
    for first in range(0, len(chosen), _POOL * size):
        pool = sorted(chosen[first : first + _POOL * size], key=lambda i: lengths[i])
        even = -(-len(pool) // -(-len(pool) // size))
        batches += [pool[i : i + even] for i in range(0, len(pool), even)]
    rng.shuffle(batches)
    yield from batches


def _lot(seed: int, epoch: int) -> random.Random:
    """What decides an epoch's draws."""
    return random.Random(f"{seed}:{epoch}")


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
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
