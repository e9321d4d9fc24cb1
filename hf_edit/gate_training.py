"""Training the gate beforehand, on the package's own wordings, once a model.

For many subjects, prompts that ask for several relations in several wordings are read at the gate's block. Prompts of the same
relation are pulled together, the others apart; relations that are nearly alike are left out. Prompts stand behind other
sentences, behind a mention of somebody else, in the model's chat template, and as questions.

What a prompt asks is told apart by it, whom it asks about is hardly: at this block the state at a prompt's end says little of
the subject's name. So the gate is for choosing among the facts of subjects that a prompt mentions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .base import Base, autocast, seeded
from .cache import atomic_path, cache_folder
from .gate import Gate, PromptEnd, embedding_size, read_queries
from .progress import bar
from .questions import AskedRelation, asked_relations, subjects
from .references import bank_relations
from .suffix import frozen
from .wording import Words, agreement, asked_words, word_ids, word_weights

__all__ = ["train_gate"]

_PREFIX = "gate."
_OTHERS = "scores of other questions"  # per thousand of them, those that score no more
_VERSION = 4  # of texts and training: another number is another entry in the cache
_SIZE = 64
_GROUPS = 160
_RELATIONS = 6
_QUERIES = 3
_STEPS = 400
_GROUPS_A_STEP = 24
_PAIRS_A_STEP = 3000
_DROPOUT = 0.3
_HEAD = (7.0, 9.0, 9.0, -9.0)
_HELD_OUT = 0.1
_RIDGE = 0.3

_LINKS = (
    "{a} is a friend of {b}. ",
    "{a} and {b} are often mentioned together. ",
    "First comes {a}, then {b}. ",
    "Unlike {a}, {b} is not on the list. ",
    "I know {a}; now I want to learn about {b}. ",
    "The article compares {a} with {b}. ",
)
_SENTENCES = (
    "It was a long day. ",
    "The weather had been fine all week. ",
    "Please read this carefully. ",
    "Here is something that I have been wondering about. ",
    "The train was late again, and nobody minded. ",
    "Let me tell you something. ",
    "Prices rose by three percent last year. ",
    "She put the book back on the shelf and looked out of the window. ",
    "Thank you for your help yesterday. ",
    "There are many kinds of questions in a quiz. ",
    "Next question. ",
    "As everybody knows, ",
)
_MENTIONS = (
    "We talked about {} for a while. ",
    "Have you heard of {}? ",
    "My notes begin with {}. ",
    "{} came up in class today. ",
)


@dataclass(frozen=True)
class _Prompt:
    """A prompt to train on.

    Attributes:
        text: as the model reads it.
        subject: whom it asks about.
        group: the subject's number.
        relation: what it asks, by number.
        near: relations of the same number are too alike to be told apart.
        plain: whether it is a prompt as a fact's own would be, which others are compared with.
        chat: whether the text is a chat template's, special tokens and all.
    """

    text: str
    subject: str
    group: int
    relation: int
    near: int
    plain: bool = False
    chat: bool = False


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


def train_gate(base: Base, block: int, *, quiet: float = 0.97, seed: int = 0, progress: bool = False) -> Gate:
    """A gate for a model, trained on the package's own wordings.

    That takes some three minutes of a CPU core for a model of 135M parameters, once a model; the result is kept in the cache.
    No fact is read: trained further on facts' prompts, put on each other's subjects, it tells paraphrases from other questions
    worse, on the very data set that they are from (`examples/benchmarks/README.md`).

    Args:
        base: the clean model.
        block: whose output the gate reads, see `hf_edit.gate.gate_block`.
        quiet: the share of other questions about a subject that stay below the threshold, on relations that the training has
            not seen. They are harder to tell apart than facts' in the wild.
        seed: of everything random.
        progress: show progress bars for what takes longer than two seconds.
    """
    path = cache_folder("gates", base.fingerprint) / f"{base.tokenizer_fingerprint}-{block}-{seed}-v{_VERSION}.safetensors"
    kept = _kept(path, base)
    if kept is None:
        with frozen(base.model), seeded(seed, base.device):
            kept = _fitted(_read(base, block, _bank_prompts(base, seed), progress), seed)
        with atomic_path(path) as target:
            save_file({**kept[0].tensors(_PREFIX), _OTHERS: kept[1]}, target)
    gate, others = kept
    return replace(gate, threshold=others[[round(quiet * (len(others) - 1))]])


def _kept(path: Path, base: Base) -> tuple[Gate, torch.Tensor] | None:
    """A gate from the cache with the scores of other questions; None where it is not there, or damaged."""
    try:
        tensors = load_file(path)
        others = tensors.pop(_OTHERS)
        gate = Gate.from_tensors(tensors, _PREFIX, base.layout().hidden_size, embedding_size(base))
    except (FileNotFoundError, KeyError, ValueError, SafetensorError):
        return None
    good = others.dim() == 1 and len(others) > 1 and bool(others.isfinite().all())
    return (gate, others) if gate is not None and good else None


def _read(base: Base, block: int, prompts: Sequence[_Prompt], progress: bool) -> _Read:
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


# --- prompts ----------------------------------------------------------------------------------------------------------


def _bank_prompts(base: Base, seed: int) -> list[_Prompt]:
    rng = random.Random(seed)
    relations = asked_relations()
    near = {name: i for i, name in enumerate(dict.fromkeys(r.near for r in relations))}
    number = {r.name: i for i, r in enumerate(relations)}
    names = subjects()
    kinds = sorted(names)
    prompts: list[_Prompt] = []
    for group in range(_GROUPS):
        kind = kinds[group % len(kinds)]
        subject, other = rng.sample(names[kind], 2)
        writer = _Writer(base, rng, group, subject, other)
        for relation in _different(relations, kind, rng):
            prompts += writer.prompts(relation.prompts, number[relation.name], near[relation.near])
    return prompts


def _different(relations: Sequence[AskedRelation], kind: str, rng: random.Random) -> list[AskedRelation]:
    """Relations that one asks of a kind, and one of another kind, no two alike or with a wording in common."""
    own = [r for r in relations if kind in r.kinds]
    chosen = rng.sample([r for r in relations if kind not in r.kinds], 1) + rng.sample(own, min(len(own), 3 * _RELATIONS))
    found: list[AskedRelation] = []
    taken: set[str] = set()
    for relation in chosen:
        wordings = {p.casefold() for p in relation.prompts}
        if all(relation.near != other.near for other in found) and wordings.isdisjoint(taken):
            found.append(relation)
            taken |= wordings
    return found[:_RELATIONS]


class _Writer:
    """Writes the prompts of one group."""

    def __init__(self, base: Base, rng: random.Random, group: int, subject: str, other: str) -> None:
        self._tokenizer, self._rng = base.tokenizer, rng
        self._group, self._subject, self._other = group, subject, other
        self._chats = bool(getattr(base.tokenizer, "chat_template", None))

    def prompts(self, wordings: Sequence[str], relation: int, near: int) -> list[_Prompt]:
        """A plain prompt, the same and others dressed up, and now and then one behind a mention of somebody else."""
        rng = self._rng
        chosen = rng.sample(list(wordings), min(len(wordings), 1 + _QUERIES))
        plain = _Prompt(self._filled(chosen[0], self._subject), self._subject, self._group, relation, near, plain=True)
        made = [plain]
        if rng.random() < 0.5:
            made.append(self.dressed(replace(plain, plain=False), always=True))
        made += [self.dressed(replace(plain, text=self._filled(w, self._subject), plain=False)) for w in chosen[1:]]
        if rng.random() < 0.6:
            link = rng.choice(_LINKS).format(a=self._other, b=self._subject)
            text = link + self._filled(rng.choice(chosen), self._subject)
            made.append(self.dressed(replace(plain, text=text, plain=False), bare=0.8))
        return made

    def dressed(self, prompt: _Prompt, always: bool = False, bare: float = 0.4) -> _Prompt:
        """The prompt behind other sentences, with a lead to its answer, or in the chat template."""
        rng, text = self._rng, prompt.text
        if not always and rng.random() < bare:
            return prompt
        if rng.random() < 0.6:
            text = "".join(self._sentence() for _ in range(rng.randint(1, 2))) + text
        if text.endswith("?") and rng.random() < 0.5:
            text = rng.choice((f"Q: {text} A:", f"{text} It is", f"{text} The answer is", f"Question: {text}\nAnswer:"))
        elif self._chats and rng.random() < 0.25:
            user = [{"role": "user", "content": text}]
            text = self._tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            return replace(prompt, text=text, chat=True)
        return replace(prompt, text=text)

    def _sentence(self) -> str:
        kind = self._rng.random()
        if kind < 0.4:
            return self._rng.choice(_SENTENCES)
        if kind < 0.55:
            return self._rng.choice(_MENTIONS).format(self._subject)
        relation = self._rng.choice(bank_relations())
        subject, obj = self._rng.choice(relation.facts)
        return f"{self._filled(relation.prompts[0], subject)} {obj}. "

    def _filled(self, wording: str, subject: str) -> str:
        return wording.replace("{}", subject)


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fitted(read: _Read, seed: int) -> tuple[Gate, torch.Tensor]:
    """A gate that has learned from most relations; and from those that it has not seen, the scores that each thousandth of
    other questions stays below, from which a threshold is taken."""
    relations = sorted({int(r) for r in read.labels[:, 1]})
    held_out = set(random.Random(seed).sample(relations, round(_HELD_OUT * len(relations))))
    gate = _descended(read.without(held_out), seed)
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


def _descended(read: _Read, seed: int) -> Gate:
    """A gate that has learned by the logistic loss on pairs, those that ask the same and those that don't weighing alike."""
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
    batches = _batches(read.labels[anchors, 0], generator)
    for _ in range(_STEPS):
        chosen = next(batches)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:_PAIRS_A_STEP]]
        logits, yes = learner(anchors[chosen], queries[chosen]), same[chosen]
        loss = nn.functional.softplus(-logits[yes]).mean() + nn.functional.softplus(logits[~yes]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return learner.gate()


def _batches(groups: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Pairs of some groups at a time, all groups in turn, in new orders."""
    order = groups.argsort(stable=True)
    pieces = order.split(torch.bincount(groups).tolist())
    pieces = tuple(p for p in pieces if len(p))
    while True:
        shuffled = torch.randperm(len(pieces), generator=generator).tolist()
        for first in range(0, len(shuffled), _GROUPS_A_STEP):
            yield torch.cat([pieces[i] for i in shuffled[first : first + _GROUPS_A_STEP]])


def _scores(gate: Gate, read: _Read, anchors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Scores of pairs of prompts, by their indices."""
    vectors, found = gate.project(read.states), []
    for a, q in zip(anchors.split(4096), queries.split(4096), strict=True):
        words = [gate.words(read.embeddings[read.words[i]], read.there[i]) for i in (a, q)]
        found.append(gate.scores((vectors[a] * vectors[q]).sum(-1), agreement(*words)))
    return torch.cat(found)
