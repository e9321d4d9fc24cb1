"""Training the gate: beforehand, on the package's own wordings, once a model; or on facts' wordings as well.

Prompts (`hf_edit.gate_prompts`) are read at the gate's block. Of those about one subject, prompts of the same relation are
pulled together, the others apart. The words learn from more than what is read: all of the package's wordings, by themselves,
cost no forward.

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
from .questions import asked_relations, subjects
from .suffix import frozen
from .wording import Words, agreement, asked_words, word_ids, word_weights

__all__ = ["tells_enough", "train_gate"]

_PREFIX = "gate."
_VERSION = 6  # of the training: another number is another entry in the cache, as are other prompts
_SIZE = 64
_STEPS = 400
_GROUPS_A_STEP = 24
_PAIRS_A_STEP = 3000
_FEWEST = 500  # facts with wordings of their own; of fewer the gate would learn the letters
_TURNS = 12  # of each such fact
_KINDS_A_STEP = 2  # of subjects, whose relations are told apart by words alone
_RELATIONS_A_KIND = 24
_WORDINGS = 4
_OTHERS_A_KIND = 1500
_WORD_HEAD = (9.0, 9.0, -6.0)
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


class _Wordings:
    """The package's wordings by their words alone.

    Attributes:
        words: int64 [wordings, words], rows of `embeddings`.
        there: bool [wordings, words], where there is a word.
        embeddings: float32 [known words, embedding].
    """

    def __init__(self, base: Base) -> None:
        relations = asked_relations()
        known = [(n, prompt) for n, relation in enumerate(relations) for prompt in relation.prompts]
        ids, self.there = word_ids(base.tokenizer, [asked_words(prompt) for _, prompt in known])
        self.words, self.embeddings = _embedded(base, ids)
        self._relation = torch.tensor([n for n, _ in known])
        near = {name: n for n, name in enumerate(dict.fromkeys(r.near for r in relations))}
        self._near = torch.tensor([near[relations[n].near] for n, _ in known])
        self._of = [(self._relation == n).nonzero().flatten() for n in range(len(relations))]
        self._kinds = [[n for n, r in enumerate(relations) if kind in r.kinds] for kind in sorted(subjects())]

    def pairs(self, without: Collection[int], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(wording, other wording, whether both ask the same), as indices, of relations that are asked of one kind.

        Args:
            without: numbers of relations that are held out.
        """
        kinds = [[n for n in kind if n not in without] for kind in self._kinds]
        (kind,) = rng.choices(kinds, [len(k) for k in kinds])
        chosen = rng.sample(kind, min(_RELATIONS_A_KIND, len(kind)))
        own = torch.cat([self._of[n][rng.sample(range(len(self._of[n])), min(_WORDINGS, len(self._of[n])))] for n in chosen])
        one, other = (own[i.flatten()] for i in torch.meshgrid(torch.arange(len(own)), torch.arange(len(own)), indexing="ij"))
        same = self._relation[one] == self._relation[other]
        apart = (self._near[one] != self._near[other]).nonzero().flatten()
        apart = apart[torch.tensor(rng.sample(range(len(apart)), min(_OTHERS_A_KIND, len(apart))), dtype=torch.long)]
        kept = torch.cat([(same & (one != other)).nonzero().flatten(), apart])
        return one[kept], other[kept], same[kept]


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
    read = sha256(repr([*prompts, *own]).encode()).hexdigest()[:16]  # goes by the chat template as well
    name = f"{base.tokenizer_fingerprint}-{block}-{seed}-v{_VERSION}-{read}.safetensors"
    path = cache_folder("gates", base.fingerprint) / name
    kept = _kept(path, base)
    if kept is None:
        with frozen(base.model), seeded(seed, base.device):
            states = _read(base, block, [*prompts, *own], progress)
            kept = LearnedGate(*_fitted(states, len(prompts), _Wordings(base), seed), block)
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
    words, embeddings = _embedded(base, ids)
    states = []
    with bar(len(rows), "reading prompts for the gate", "prompt", progress) as shown:
        for first in range(0, len(rows), 512):
            part = slice(first, first + 512)
            with autocast(base.device, "auto"):
                states.append(read_queries(base, block, rows[part], ends[part]).cpu())
            shown.update(len(states[-1]))
    labels = torch.tensor([(p.group, p.relation, p.near, int(p.plain)) for p in prompts])
    return _Read(torch.cat(states).float(), words, there, embeddings, labels)


@torch.no_grad()
def _embedded(base: Base, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as rows of a matrix of the embeddings of those that occur."""
    known, words = torch.unique(ids, return_inverse=True)
    return words, base.model.get_input_embeddings()(known.to(base.device)).float().cpu()


def _asked(text: str, subject: str) -> str:
    return asked_words(text, [m.span() for m in re.finditer(re.escape(subject), text)])


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fitted(read: _Read, beforehand: int, wordings: _Wordings, seed: int) -> tuple[Gate, torch.Tensor]:
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
    gate = _descended(read.without(held_out), groups, wordings, held_out, seed)
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
        start = _discriminant(self._x, read.labels)
        self.projection = nn.Parameter(start * (8 / start.norm()))
        e = (read.embeddings - self._word_mean) / self._word_std
        self.word_projection = nn.Parameter(torch.linalg.svd(e, full_matrices=False).Vh[:_SIZE].T.clone())
        self.word_weight = nn.Parameter(torch.zeros(e.shape[1]))
        self.word_bias = nn.Parameter(torch.tensor([0.5]))
        self.head = nn.Parameter(torch.tensor(_HEAD))
        self.word_head = nn.Parameter(torch.tensor(_WORD_HEAD))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Scores of pairs of prompts, by their indices."""
        used, at = torch.unique(torch.cat([one, other]), return_inverse=True)
        z = nn.functional.normalize(nn.functional.dropout(self._x[used], _DROPOUT) @ self.projection, dim=-1)
        words = self._words(self._read, used)
        a, b = at[: len(one)], at[len(one) :]
        forth, back = agreement(words[a], words[b])
        return self.head @ torch.stack([(z[a] * z[b]).sum(-1), forth, back, torch.ones(len(a))])

    def by_words(self, wordings: _Wordings, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Scores of pairs of wordings, by their indices, from their words alone."""
        used, at = torch.unique(torch.cat([one, other]), return_inverse=True)
        words = self._words(wordings, used)
        forth, back = agreement(words[at[: len(one)]], words[at[len(one) :]])
        return self.word_head @ torch.stack([forth, back, torch.ones(len(one))])

    def _words(self, read: _Read | _Wordings, prompts: torch.Tensor) -> Words:
        known, at = torch.unique(read.words[prompts], return_inverse=True)
        e = (read.embeddings[known] - self._word_mean) / self._word_std
        vectors = nn.functional.normalize(nn.functional.dropout(e, _DROPOUT) @ self.word_projection, dim=-1)
        weights = word_weights(e @ self.word_weight + self.word_bias)
        return Words(vectors[at], weights[at] * read.there[prompts])

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


def _descended(
    read: _Read, groups: Sequence[Collection[int]], wordings: _Wordings, held_out: Collection[int], seed: int
) -> Gate:
    """A gate that has learned by the logistic loss on pairs, those that ask the same and those that don't weighing alike.

    Args:
        groups: those of the package's prompts, then those of facts'; there may be none of the latter.
        held_out: numbers of relations that nothing may be learned of.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    learner = _Learner(read)
    optimiser = torch.optim.AdamW(
        [
            {"params": [learner.projection], "weight_decay": 0.05, "lr": 1e-3},
            {"params": [learner.word_projection], "weight_decay": 0.05, "lr": 3e-3},
            {"params": [learner.word_weight, learner.word_bias], "weight_decay": 0.0, "lr": 3e-3},
            {"params": [learner.head, learner.word_head], "weight_decay": 0.0, "lr": 0.05},
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
            loss = loss + _logistic(learner(anchors[chosen], queries[chosen]), same[chosen])
        for _ in range(_KINDS_A_STEP):
            one, other, alike = wordings.pairs(held_out, rng)
            loss = loss + _logistic(learner.by_words(wordings, one, other), alike) / _KINDS_A_STEP
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return learner.gate()


def _logistic(scores: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    return nn.functional.softplus(-scores[same]).mean() + nn.functional.softplus(scores[~same]).mean()


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
