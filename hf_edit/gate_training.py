"""Training the gate: beforehand, on the package's own wordings, once a model; or on facts' wordings as well.

Prompts (`hf_edit.gate_prompts`) are read at the gate's block. Of those about one subject, prompts of the same relation are
pulled together, the others apart.

What a prompt asks is told apart by it, whom it asks about is hardly: at this block the state at a prompt's end says little of
the subject's name. So the gate is for choosing among the facts of subjects that a prompt mentions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .base import Base, autocast, seeded
from .cache import atomic_path, cache_folder
from .errors import PackFormatError
from .facts import Fact
from .gate import Gate, LearnedGate, PromptEnd, embedding_size, read_queries
from .gate_prompts import Prompt, bank_prompts, fact_prompts, telling
from .progress import bar
from .suffix import frozen
from .wording import Words, agreement, asked_words, word_ids, word_weights

__all__ = ["tells_enough", "train_gate"]

_PREFIX = "gate."
_VERSION = 5  # of texts and training: another number is another entry in the cache
_SIZE = 64
_STEPS = 400
_GROUPS_A_STEP = 24
_PAIRS_A_STEP = 3000
_FEWEST = 500  # facts with wordings of their own; of fewer the gate would learn the letters
_TURNS = 12  # of each such fact
_DROPOUT = 0.3
_HEAD = (7.0, 9.0, 9.0, -9.0)
_HELD_OUT = 0.1
_RIDGE = 0.3


@dataclass(frozen=True)
class _Read:
    """Prompts as the gate sees them.

    Attributes:
        states: float32 [prompts, hidden].
        words: int64 [prompts, words], rows of `embeddings`.
        there: bool [prompts, words], where there is a word.
        embeddings: float32 [known words, embedding].
        labels: int64 [prompts, 4]: group, relation, near, and whether it is plain.
    """

    states: torch.Tensor
    words: torch.Tensor
    there: torch.Tensor
    embeddings: torch.Tensor
    labels: torch.Tensor

    def pairs(self, held_out: set[int] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(plain prompt, other prompt, whether both ask the same), as indices; `held_out` keeps pairs of plain prompts of
        these relations only."""
        anchors, queries, same = [], [], []
        rows = self.labels.tolist()
        by_group: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_group.setdefault(row[0], []).append(i)
        for members in by_group.values():
            for a in members:
                if not rows[a][3] or (held_out is not None and rows[a][1] not in held_out):
                    continue
                for q in members:
                    alike = rows[q][1] == rows[a][1]
                    if q == a or (not alike and rows[q][2] == rows[a][2]):
                        continue
                    anchors.append(a)
                    queries.append(q)
                    same.append(alike)
        return torch.tensor(anchors), torch.tensor(queries), torch.tensor(same)

    def without(self, relations: set[int]) -> _Read:
        """The prompts of other relations."""
        keep = torch.tensor([int(r) not in relations for r in self.labels[:, 1]])
        return replace(self, states=self.states[keep], words=self.words[keep], there=self.there[keep], labels=self.labels[keep])


def train_gate(base: Base, block: int, facts: Sequence[Fact] = (), *, seed: int = 0, progress: bool = False) -> LearnedGate:
    """A gate for a model, trained on the package's own wordings; kept in the cache.

    That takes some three minutes of a CPU core for a model of 135M parameters, once a model.

    Args:
        base: the clean model.
        block: whose output the gate reads, see `hf_edit.gate.gate_block`.
        facts: it also learns from those that have both `rephrases` and `locality` questions, where they are 500 or more; at
            most 3,000 are read. Prompts alone are of no use: trained further on facts' own prompts, put on each other's
            subjects, it tells paraphrases from other questions worse, on the very data set that they are from
            (`examples/benchmarks/README.md`).
        seed: of everything random.
        progress: show progress bars for what takes longer than two seconds.
    """
    prompts = bank_prompts(base, seed)
    own = fact_prompts(base, telling(facts, seed), prompts, seed) if tells_enough(facts) else []
    known = "".join("-" + sha256(repr(own).encode()).hexdigest()[:16] for _ in own[:1])
    name = f"{base.tokenizer_fingerprint}-{block}-{seed}-v{_VERSION}{known}.safetensors"
    path = cache_folder("gates", base.fingerprint) / name
    kept = _kept(path, base)
    if kept is None:
        with frozen(base.model), seeded(seed, base.device):
            kept = LearnedGate(*_fitted(_read(base, block, [*prompts, *own], progress), len(prompts), seed), block)
        with atomic_path(path) as target:
            save_file(kept.tensors(_PREFIX), target)
    return kept


def tells_enough(facts: Sequence[Fact]) -> bool:
    """Whether a gate would learn from the wordings of these facts."""
    return len(telling(facts, 0)) >= _FEWEST


def _kept(path: Path, base: Base) -> LearnedGate | None:
    """A gate from the cache; None where it is not there, or damaged."""
    try:
        return LearnedGate.from_tensors(load_file(path), _PREFIX, base.layout().hidden_size, embedding_size(base))
    except (FileNotFoundError, PackFormatError, SafetensorError):
        return None


def _read(base: Base, block: int, prompts: Sequence[Prompt], progress: bool) -> _Read:
    end = PromptEnd(base.tokenizer)
    rows = [base.tokenizer(p.text, add_special_tokens=not p.chat)["input_ids"] for p in prompts]
    ends = [end(row) for row in rows]
    ended = [base.tokenizer.decode(r[: e + 1], skip_special_tokens=True) for r, e in zip(rows, ends, strict=True)]
    ids, there = word_ids(base.tokenizer, [_asked(t, p.subject) for t, p in zip(ended, prompts, strict=True)])
    known, words = torch.unique(ids, return_inverse=True)
    states = []
    with bar(len(rows), "reading prompts for the gate", "prompt", progress) as shown:
        for first in range(0, len(rows), 512):
            part = slice(first, first + 512)
            with autocast(base.device, "auto"):
                states.append(read_queries(base, block, rows[part], ends[part]).cpu())
            shown.update(len(states[-1]))
    labels = torch.tensor([(p.group, p.relation, p.near, int(p.plain)) for p in prompts])
    with torch.no_grad():
        embeddings = base.model.get_input_embeddings()(known.to(base.device)).float().cpu()
    return _Read(torch.cat(states).float(), words, there, embeddings, labels)


def _asked(text: str, subject: str) -> str:
    return asked_words(text, [m.span() for m in re.finditer(re.escape(subject), text)])


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fitted(read: _Read, beforehand: int, seed: int) -> tuple[Gate, torch.Tensor]:
    """A gate that has learned from most relations; and from those that it has not seen, the scores that each thousandth of
    other questions stays below, from which a threshold is taken.

    Args:
        beforehand: of the prompts that were read, how many are the package's; the others are facts'.
    """
    groups, held_out = [], set()
    for labels in (read.labels[:beforehand], read.labels[beforehand:]):
        # what is held out are relations in which a plain prompt asks
        relations = sorted({int(r) for r in labels[labels[:, 3] == 1][:, 1]})
        held_out |= set(random.Random(seed).sample(relations, round(_HELD_OUT * len(relations))))
        groups.append({int(g) for g in labels[:, 0]})
    gate = _descended(read.without(held_out), groups, seed)
    anchors, queries, same = read.pairs(held_out)
    return gate, _scores(gate, read, anchors, queries)[~same].cpu().quantile(torch.linspace(0, 1, 1001))


def _discriminant(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Fisher's linear discriminant, [hidden, size]: directions in which wordings of one relation, asked of one subject, lie
    close together and a subject's relations apart; the deviation within a relation is 1 in all of them.

    Args:
        x: standardised states [prompts, hidden].
    """
    _, relation = torch.unique(labels[:, :2], dim=0, return_inverse=True)
    own, subject = (_means(x, number)[number] for number in (relation, labels[:, 0]))
    within, between = (d.T @ d / len(x) for d in (x - own, own - subject))
    within = within + _RIDGE * within.diagonal().mean() * torch.eye(len(within))
    values, vectors = torch.linalg.eigh(within)
    white = vectors / values.sqrt()
    return white @ torch.linalg.eigh(white.T @ between @ white).eigenvectors[:, -_SIZE:]


def _means(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Means of rows by their number: [numbers, hidden]."""
    count = number.bincount()
    return x.new_zeros(len(count), x.shape[1]).index_add(0, number, x) / count.clamp(min=1)[:, None]


def _standard(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the columns; a dimension that hardly varies is not blown up."""
    return x.mean(0), x.std(0).clamp(min=1e-3 * float(x.std()))


class _Learner(nn.Module):
    """A gate while it learns, on standardised states and embeddings; it begins with the discriminant of the states, the
    principal directions of the embeddings, and all words alike."""

    def __init__(self, read: _Read) -> None:
        super().__init__()
        self._read = read
        self._mean, self._std = _standard(read.states)
        self._word_mean, self._word_std = _standard(read.embeddings)
        self._x = (read.states - self._mean) / self._std
        self._e = (read.embeddings - self._word_mean) / self._word_std
        start = _discriminant(self._x, read.labels)
        self.projection = nn.Parameter(start * (8 / start.norm()))
        self.word_projection = nn.Parameter(torch.linalg.svd(self._e, full_matrices=False).Vh[:_SIZE].T.clone())
        self.word_weight = nn.Parameter(torch.zeros(self._e.shape[1]))
        self.word_bias = nn.Parameter(torch.tensor([0.5]))
        self.head = nn.Parameter(torch.tensor(_HEAD))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Scores of pairs of prompts, by their indices."""
        used, at = torch.unique(torch.cat([one, other]), return_inverse=True)
        z = nn.functional.normalize(nn.functional.dropout(self._x[used], _DROPOUT) @ self.projection, dim=-1)
        words = self._words(used)
        a, b = at[: len(one)], at[len(one) :]
        forth, back = agreement(words[a], words[b])
        return self.head @ torch.stack([(z[a] * z[b]).sum(-1), forth, back, torch.ones(len(a))])

    def _words(self, prompts: torch.Tensor) -> Words:
        known, at = torch.unique(self._read.words[prompts], return_inverse=True)
        e = self._e[known]
        vectors = nn.functional.normalize(nn.functional.dropout(e, _DROPOUT) @ self.word_projection, dim=-1)
        weights = word_weights(e @ self.word_weight + self.word_bias)
        return Words(vectors[at], weights[at] * self._read.there[prompts])

    def gate(self) -> Gate:
        """What was learned, for states and embeddings as they are."""
        scaled, weight = (
            p.detach() / self._word_std.reshape(-1, *[1] * (p.dim() - 1)) for p in (self.word_projection, self.word_weight)
        )
        return Gate(
            mean=self._mean,
            std=self._std,
            projection=self.projection.detach(),
            word_projection=scaled,
            word_offset=-(self._word_mean @ scaled),
            word_weight=weight,
            word_bias=self.word_bias.detach() - self._word_mean @ weight,
            head=self.head.detach(),
            threshold=torch.zeros(1),
        )


def _descended(read: _Read, groups: Sequence[Collection[int]], seed: int) -> Gate:
    """A gate that has learned by the logistic loss on pairs, those that ask the same and those that don't weighing alike.

    Args:
        groups: those of the package's prompts, then those of facts'; there may be none of the latter.
    """
    generator = torch.Generator().manual_seed(seed)
    learner = _Learner(read)
    optimiser = torch.optim.AdamW(
        [
            {"params": [learner.projection], "weight_decay": 0.05, "lr": 1e-3},
            {"params": [learner.word_projection], "weight_decay": 0.05, "lr": 3e-3},
            {"params": [learner.word_weight, learner.word_bias], "weight_decay": 0.0, "lr": 3e-3},
            {"params": [learner.head], "weight_decay": 0.0, "lr": 0.05},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    anchors, queries, same = read.pairs()
    sizes = (_GROUPS_A_STEP, max(1, _TURNS * len(groups[1]) // _STEPS))
    sources = []
    for own, size in zip(groups, sizes, strict=True):
        pairs = torch.isin(read.labels[anchors, 0], torch.tensor(sorted(own))).nonzero().flatten()
        if len(pairs):
            sources.append(_batches(pairs, read.labels[anchors[pairs], 0], size, generator))
    for _ in range(_STEPS):
        loss = torch.zeros(())
        for batches in sources:
            chosen = next(batches)
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[:_PAIRS_A_STEP]]
            logits, yes = learner(anchors[chosen], queries[chosen]), same[chosen]
            loss = loss + nn.functional.softplus(-logits[yes]).mean() + nn.functional.softplus(logits[~yes]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return learner.gate()


def _batches(pairs: torch.Tensor, groups: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Pairs of so many groups at a time, all groups in turn, in new orders."""
    order = groups.argsort(stable=True)
    pieces = tuple(p for p in pairs[order].split(torch.bincount(groups).tolist()) if len(p))
    while True:
        shuffled = torch.randperm(len(pieces), generator=generator).tolist()
        for first in range(0, len(shuffled), size):
            yield torch.cat([pieces[i] for i in shuffled[first : first + size]])


def _scores(gate: Gate, read: _Read, anchors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Scores of pairs of prompts, by their indices."""
    vectors, found = gate.project(read.states), []
    for a, q in zip(anchors.split(4096), queries.split(4096), strict=True):
        words = [gate.words(read.embeddings[read.words[i]], read.there[i]) for i in (a, q)]
        found.append(gate.scores((vectors[a] * vectors[q]).sum(-1), agreement(*words)))
    return torch.cat(found)
