"""Prompts that the gate learns from: the package's own wordings of many relations, and those of facts at hand.

For many subjects there are prompts that ask for several relations in several wordings; relations that are nearly alike are left
out. Prompts stand behind other sentences, behind a mention of somebody else, in the model's chat template, and as questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .base import Base
from .facts import Fact
from .questions import AskedRelation, asked_relations, subjects
from .references import bank_relations

__all__ = ["Prompt", "bank_prompts", "fact_prompts", "telling"]

_GROUPS = 160
_RELATIONS = 6
_QUERIES = 3
_FACTS = 3000

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
class Prompt:
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


def bank_prompts(base: Base, seed: int) -> list[Prompt]:
    """Prompts of the package's relations."""
    rng = random.Random(seed)
    relations = asked_relations()
    near = {name: i for i, name in enumerate(dict.fromkeys(r.near for r in relations))}
    number = {r.name: i for i, r in enumerate(relations)}
    names = subjects()
    kinds = sorted(names)
    prompts: list[Prompt] = []
    for group in range(_GROUPS):
        kind = kinds[group % len(kinds)]
        subject, other = rng.sample(names[kind], 2)
        writer = _Writer(base, rng, group, subject, other)
        for relation in _different(relations, kind, rng):
            prompts += writer.prompts(relation.prompts, number[relation.name], near[relation.near])
    return prompts


def telling(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The facts that tell what asks the same and what doesn't, by a rephrase and a question about the same subject of their
    own: at most 3,000 of them, a random sample."""
    found = [f for f in facts if any("{}" in r for r in f.rephrases) and any(f.subject in q.prompt for q in f.locality)]
    return random.Random(seed).sample(found, min(_FACTS, len(found)))


def fact_prompts(base: Base, facts: Sequence[Fact], beyond: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Prompts of facts: each fact's own, one of its rephrases and a question about the same subject, the latter two dressed up.

    Other facts' prompts about the same subject would be questions too, but nobody says which of them ask the same.

    Args:
        facts: see `telling`. Facts with the same prompt count as one relation.
        beyond: other prompts to train on; numbers begin behind theirs.
    """
    rng = random.Random(seed)
    groups, relations, near = (1 + max(getattr(p, name) for p in beyond) for name in ("group", "relation", "near"))
    prompts: list[Prompt] = []
    known = {prompt: n for n, prompt in enumerate(dict.fromkeys(f.prompt for f in facts))}
    for n, fact in enumerate(facts):
        writer = _Writer(base, rng, groups + n, fact.subject, fact.subject)
        number = known[fact.prompt]
        own = Prompt(fact.question, fact.subject, groups + n, relations + number, near + number, plain=True)
        wording = rng.choice([r for r in fact.rephrases if "{}" in r])
        question = rng.choice([q.prompt for q in fact.locality if fact.subject in q.prompt])
        number = len(known) + n
        other = replace(own, text=question, relation=relations + number, near=near + number, plain=False)
        same = replace(own, text=wording.replace("{}", fact.subject), plain=False)
        prompts += [own, writer.dressed(same), writer.dressed(other)]
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

    def prompts(self, wordings: Sequence[str], relation: int, near: int) -> list[Prompt]:
        """A plain prompt, the same and others dressed up, and now and then one behind a mention of somebody else."""
        rng = self._rng
        chosen = rng.sample(list(wordings), min(len(wordings), 1 + _QUERIES))
        plain = Prompt(self._filled(chosen[0], self._subject), self._subject, self._group, relation, near, plain=True)
        made = [plain]
        if rng.random() < 0.5:
            made.append(self.dressed(replace(plain, plain=False), always=True))
        made += [self.dressed(replace(plain, text=self._filled(w, self._subject), plain=False)) for w in chosen[1:]]
        if rng.random() < 0.6:
            link = rng.choice(_LINKS).format(a=self._other, b=self._subject)
            text = link + self._filled(rng.choice(chosen), self._subject)
            made.append(self.dressed(replace(plain, text=text, plain=False), bare=0.8))
        return made

    def dressed(self, prompt: Prompt, always: bool = False, bare: float = 0.4) -> Prompt:
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
