"""Training the gate beforehand, on the package's own wordings, once a model.

For many subjects, prompts that ask for several relations in several wordings are read at the gate's block. Prompts of the same
relation are pulled together, the others apart; relations that are nearly alike are left out. Prompts stand behind other
sentences, behind a mention of somebody else, in the model's chat template, and as questions.

What a prompt asks is told apart by it, whom it asks about is hardly: at this block the state at a prompt's end says little of
the subject's name. So the gate is for choosing among the facts of subjects that a prompt mentions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .base import Base, autocast, seeded
from .cache import atomic_path, cache_folder
from .gate import Gate, PromptEnd, read_queries
from .progress import bar
from .questions import AskedRelation, asked_relations, subjects
from .references import bank_relations
from .suffix import frozen

__all__ = ["train_gate"]

_PREFIX = "gate."
_VERSION = 2  # of texts and training: another number is another entry in the cache
_SIZE = 64
_GROUPS = 160
_RELATIONS = 6
_QUERIES = 3
_STEPS = 150
_GROUPS_A_STEP = 24
_HELD_OUT = 0.2
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
        group: the subject that it is read for.
        relation: what it asks, by number.
        near: relations of the same number are too alike to be told apart.
        plain: whether it is a prompt as a fact's own would be, which others are compared with.
        chat: whether the text is a chat template's, special tokens and all.
    """

    text: str
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
        labels: int64 [prompts, 4]: group, relation, near, and whether it is plain.
    """

    states: torch.Tensor
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
        return _Read(self.states[keep], self.labels[keep])


def train_gate(base: Base, block: int, *, seed: int = 0, progress: bool = False) -> Gate:
    """A gate for a model, trained on the package's own wordings.

    That takes a minute on two CPU cores for a model of 135M parameters, once a model; the result is kept in the cache. No fact
    is read: trained further on facts' prompts, put on each other's subjects, it tells paraphrases from other questions worse,
    on the very data set that they are from (`examples/benchmarks/README.md`).

    Args:
        base: the clean model.
        block: whose output the gate reads, see `hf_edit.gate.gate_block`.
        seed: of everything random.
        progress: show progress bars for what takes longer than two seconds.
    """
    path = cache_folder("gates", base.fingerprint) / f"{base.tokenizer_fingerprint}-{block}-{seed}-v{_VERSION}.safetensors"
    try:
        gate = Gate.from_tensors(load_file(path), _PREFIX, base.layout().hidden_size)
        if gate is not None:
            return gate
    except (FileNotFoundError, ValueError, SafetensorError):
        pass  # nothing there, or damaged: made anew
    with frozen(base.model), seeded(seed, base.device):
        gate = _fitted(_read(base, block, _bank_prompts(base, seed), progress), seed)
    with atomic_path(path) as target:
        save_file(gate.tensors(_PREFIX), target)
    return gate


def _read(base: Base, block: int, prompts: Sequence[_Prompt], progress: bool) -> _Read:
    end = PromptEnd(base.tokenizer)
    rows = [base.tokenizer(p.text, add_special_tokens=not p.chat)["input_ids"] for p in prompts]
    ends = [end(row) for row in rows]
    states = []
    with bar(len(rows), "reading prompts for the gate", "prompt", progress) as shown:
        for first in range(0, len(rows), 512):
            part = slice(first, first + 512)
            with autocast(base.device, "auto"):
                states.append(read_queries(base, block, rows[part], ends[part]).cpu())
            shown.update(len(states[-1]))
    labels = torch.tensor([(p.group, p.relation, p.near, int(p.plain)) for p in prompts])
    return _Read(torch.cat(states).float(), labels)


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
    """Relations that one asks of a kind, and one of another kind, no two alike."""
    own = [r for r in relations if kind in r.kinds]
    chosen = rng.sample([r for r in relations if kind not in r.kinds], 1) + rng.sample(own, min(len(own), 3 * _RELATIONS))
    return list({r.near: r for r in chosen}.values())[:_RELATIONS]


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
        plain = _Prompt(self._filled(chosen[0], self._subject), self._group, relation, near, plain=True)
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


def _fitted(read: _Read, seed: int) -> Gate:
    """A gate on all prompts, with the threshold that does best on relations that a gate of the others has not seen."""
    relations = sorted({int(r) for r in read.labels[:, 1]})
    held_out = set(random.Random(seed).sample(relations, round(_HELD_OUT * len(relations))))
    trial = _descended(read.without(held_out), seed)
    threshold = _best_threshold(trial, read, held_out)
    return replace(_descended(read, seed), threshold=torch.tensor(threshold))


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


def _descended(read: _Read, seed: int) -> Gate:
    """Mean, deviation and projection: the discriminant, improved by the logistic loss on pairs, those that ask the same and
    those that don't weighing alike."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = read.states.mean(0), read.states.std(0)
    std = std.clamp(min=1e-3 * float(read.states.std()))
    x = (read.states - mean) / std
    start = _discriminant(x, read.labels)
    projection = nn.Parameter(start * (8 / start.norm()))
    head = nn.Parameter(torch.tensor([10.0, 0.3]))  # slope and middle of the logistic
    decayed = [{"params": [projection], "weight_decay": 0.05}, {"params": [head], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(decayed, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    anchors, queries, same = read.pairs()
    batches = _batches(read.labels[anchors, 0], generator)
    for _ in range(_STEPS):
        chosen = next(batches)
        used, where = torch.unique(torch.cat([anchors[chosen], queries[chosen]]), return_inverse=True)
        z = nn.functional.normalize(nn.functional.dropout(x[used], 0.3) @ projection, dim=-1)
        cosines = (z[where[: len(chosen)]] * z[where[len(chosen) :]]).sum(-1)
        logits = head[0] * (cosines - head[1])
        yes = same[chosen]
        loss = nn.functional.softplus(-logits[yes]).mean() + nn.functional.softplus(logits[~yes]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return Gate(mean, std, projection.detach(), head.detach()[1].clone())


def _batches(groups: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Pairs of some groups at a time, all groups in turn, in new orders."""
    order = groups.argsort(stable=True)
    pieces = order.split(torch.bincount(groups).tolist())
    pieces = tuple(p for p in pieces if len(p))
    while True:
        shuffled = torch.randperm(len(pieces), generator=generator).tolist()
        for first in range(0, len(shuffled), _GROUPS_A_STEP):
            yield torch.cat([pieces[i] for i in shuffled[first : first + _GROUPS_A_STEP]])


def _best_threshold(gate: Gate, read: _Read, held_out: set[int]) -> float:
    """Where the shares of pairs that fire and that stay quiet, as they should, are largest together."""
    anchors, queries, same = read.pairs(held_out)
    vectors = gate.project(read.states)
    cosines, order = (vectors[anchors] * vectors[queries]).sum(-1).sort()
    fires = same[order].float()
    quiet = 1 - fires
    right = quiet.cumsum(0) / quiet.sum() + (fires.sum() - fires.cumsum(0)) / fires.sum()
    best = int(right.argmax())
    return float(cosines[best : best + 2].mean())
