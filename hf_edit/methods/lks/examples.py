"""Training texts of LKS, made from the facts alone.

For each fact: its prompt, bare, behind sampled contexts, in the bank's other wordings where its own is one of them, and in the
rephrases of all facts that are asked in its words, where these may be trained on, and in chats, where the model has a chat
template. Each has the target and, for some, a tail that goes on as the clean model would, so that the new fact is said once
and the sentence goes on. In a chat the target stands in a sentence, as the model would answer if it knew the fact. And texts
that must stay as they are: other questions about the same subject, in the bank's wordings of relations that the fact can't be
about.

In each text the subject's mentions are rewritten by the code of the one fact that is asked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...answers import fits, place
from ...base import Base
from ...facts import Fact, fold
from ...lm.chat import ChatFrame
from ...lm.chat_forms import asked_plainly, chat_frames, given_chat, natural_answers, worded_answer
from ...lm.paraphrases import wordings_in_chat
from ...positions import EncodedText, Text, encode, fact_text
from ...progress import bar
from ...questions import other_wordings
from ...references import bank_relations
from ...scope import Scope, mentions_in_tokens
from ...texts import sample_contexts, target_tails
from .config import LKSConfig

__all__ = ["Example", "Examples", "build_examples"]

_TAILS = 400  # facts that get a tail, and chats, at most: how to go on, and how to answer, is learnt for all facts alike
_PHRASED = 200  # facts whose answers the model phrases itself, at most; the rest are answered in the words of their questions


@dataclass(frozen=True)
class Example:
    """One training text.

    Attributes:
        fact: index of the fact whose code is put in.
        ids: token ids.
        mentions: index of the last token of each mention of the fact's subject; never empty.
        labels: (position, token id): the target's tokens and the positions that predict them.
        kept: positions whose next-token distribution must stay the clean model's.
        said: (position, token id): the answer's other tokens, where the target stands in a sentence.
        told: the beginning of the chat in which the clean model is given the fact, up to the answer. With it, what is kept at
            the answer's tokens is what that model says there.
    """

    fact: int
    ids: tuple[int, ...]
    mentions: tuple[int, ...]
    labels: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    said: tuple[tuple[int, int], ...] = ()
    told: tuple[int, ...] = ()

    @property
    def answer(self) -> int:
        """The position that predicts an answer's first token, of a text with `told`."""
        return min(self.labels[0][0], self.said[0][0])

    @property
    def carried(self) -> tuple[tuple[int, int], ...]:
        """(position, token id): the target's tokens from which it can be carried on, and what comes next."""
        return self.labels[1:]


@dataclass(frozen=True)
class Examples:
    """The texts of each fact: `prompts` its own bare prompt, `variations` of it, and `locality`."""

    prompts: list[Example]
    variations: list[list[Example]]
    locality: list[list[Example]]


def build_examples(base: Base, facts: Sequence[Fact], config: LKSConfig, seed: int, progress: bool = False) -> Examples:
    """Training texts for facts, on the model without the edit.

    Raises:
        ValueError: a fact's own prompt does not mention its subject as a whole word, so the edit could never come into force.
    """
    subjects = _Subjects(base, facts)
    contexts = sample_contexts(base, config.contexts, config.context_length, seed)
    every = max(1, -(-len(facts) // _TAILS))
    tails = dict(
        zip(range(0, len(facts), every), target_tails(base, facts[::every], config.tail_tokens, progress), strict=True)
    )
    rng = random.Random(seed)
    reworded = _reworded(facts) if config.train_on_rephrases else {}
    variety = config.variety(len(facts))
    frames = chat_frames(base) if config.chats and not config.released else []
    answers = _answers(base, facts, frames, every, progress)
    prompts, variations, locality = [], [], []
    with bar(len(facts), "writing texts", "fact", progress) as shown:
        for i, fact in enumerate(facts):
            texts = [fact_text(fact, target=fact.target), *_variations(fact, contexts, reworded, variety, rng)]
            chatting = frames if i % every == 0 else []
            tail = tails.get(i, [])
            own, *others = encode(base.tokenizer, texts)
            asking = [own, *(text for text in others if fits(base, text, len(tail)))]
            made = [subjects.asking(i, text, tail if config.tail_tokens else None) for text in asking]
            if i in answers:
                made += [subjects.answering(i, *chat) for chat in _chats(base, frames, config.chats, i, *answers[i])]
            if made[0] is None:
                raise ValueError(
                    f"the prompt {fact.question!r} does not mention the subject {fact.subject!r} as a word of its own, so "
                    "LKS can't find it; reword the prompt, or use method='steam'"
                )
            prompts.append(made[0])
            variations.append([e for e in made[1:] if e is not None])
            asked = _other_questions(fact, config, rng)
            asked[1::2] = [chatting[i % len(frames)].around(text) if chatting else text for text in asked[1::2]]
            kept = [subjects.other(i, text) for text in encode(base.tokenizer, asked) if fits(base, text)]
            locality.append([e for e in kept if e is not None])
            shown.update()
    return Examples(prompts, variations, locality)


class _Subjects:
    """Finds a fact's own subject in texts, among the names of all facts: the longest name at a place counts."""

    def __init__(self, base: Base, facts: Sequence[Fact]) -> None:
        names: dict[str, list[str]] = {}
        for fact in facts:
            names.setdefault(fact.subject.casefold(), []).extend((fact.subject, *fact.aliases))
        keys = {key: i for i, key in enumerate(names)}
        self._tokenizer = base.tokenizer
        self._scope = Scope(list(names.values()))
        self._entity = [keys[fact.subject.casefold()] for fact in facts]

    def asking(self, fact: int, text: EncodedText, tail: Sequence[int] | None) -> Example | None:
        """A text that ends in a fact's target as an example of it, or None where its subject is not found.

        Args:
            tail: tokens that go on behind the target as the clean model would; None leaves free what comes there.
        """
        first, end = text.target
        mentions = self._mentions(fact, text.ids[:first])
        if not mentions:
            return None
        labels = tuple((p - 1, text.ids[p]) for p in range(first, end))
        if tail is None:
            return Example(fact, text.ids[: end - 1], mentions, labels, ())
        # where the target's last token stands, the first token behind the target is predicted
        ids = (*text.ids, *tail[:-1])
        return Example(fact, ids, mentions, labels, tuple(range(end - 1, len(ids))))

    def answering(self, fact: int, whole: EncodedText, target: tuple[int, int], told: tuple[int, ...]) -> Example | None:
        """A chat in which the target is answered in a sentence, or None where its question does not mention the subject.

        Mentions count up to the target: behind it the edit leaves them alone.

        Args:
            whole: the chat; its target is the whole answer with what ends it.
            target: the tokens of the fact's target.
            told: see `Example`.
        """
        (begin, end), ids = whole.target, whole.ids
        mentions = self._mentions(fact, ids[: target[0]])
        if not mentions or mentions[0] >= begin:
            return None
        labels = tuple((p - 1, ids[p]) for p in range(*target))
        said = tuple((p - 1, ids[p]) for p in range(begin, end) if not target[0] <= p < target[1])
        kept = tuple(p for p, _ in said) if told else ()
        return Example(fact, ids[: end - 1], mentions, labels, kept, said, told)

    def other(self, fact: int, text: EncodedText) -> Example | None:
        """A text that asks something else about a fact's subject, or None where that is not found."""
        mentions = self._mentions(fact, text.ids)
        return Example(fact, text.ids, mentions, (), tuple(range(mentions[0], len(text.ids)))) if mentions else None

    def _mentions(self, fact: int, ids: Sequence[int]) -> tuple[int, ...]:
        found = mentions_in_tokens(self._tokenizer, self._scope, ids)
        return tuple(p for p, entity in found if entity == self._entity[fact])


def _reworded(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """Other wordings by prompt: what one fact's rephrases make of it serves all facts that are asked in the same words."""
    found: dict[str, dict[str, None]] = {}
    for fact in facts:
        found.setdefault(fold(fact.prompt), {}).update((r, None) for r in fact.rephrases if "{}" in r)
    return {prompt: list(wordings) for prompt, wordings in found.items()}


def _variations(
    fact: Fact, contexts: Sequence[str], reworded: Mapping[str, Sequence[str]], most: int, rng: random.Random
) -> list[Text]:
    """Other texts that ask for the fact, with the target: as many as there are, up to `most`."""
    wordings = dict.fromkeys((*other_wordings(fact), *reworded.get(fold(fact.prompt), ())))
    asked = [("", wording) for wording in wordings] + [(context, fact.prompt) for context in contexts]
    chosen = rng.sample(asked, min(most, len(asked)))
    return [fact_text(fact, prefix=prefix, prompt=wording, target=fact.target) for prefix, wording in chosen]


def _answers(
    base: Base, facts: Sequence[Fact], frames: Sequence[ChatFrame], every: int, progress: bool
) -> dict[int, tuple[Fact, str]]:
    """By index, facts as they are asked in chats, and how they are answered."""
    asked = [(i, asked_plainly(frames[0], facts[i])) for i in range(0, len(facts), every)] if frames else []
    plain = [(i, fact) for i, fact in asked if fact is not None]
    answers = natural_answers(base, [fact for _, fact in plain[:_PHRASED]], progress)
    answers += [worded_answer(fact) for _, fact in plain[_PHRASED:]]
    return {i: (fact, answer) for (i, fact), answer in zip(plain, answers, strict=True)}


def _chats(
    base: Base, frames: Sequence[ChatFrame], count: int, first: int, fact: Fact, answer: str
) -> list[tuple[EncodedText, tuple[int, int], tuple[int, ...]]]:
    """Chats in which a fact is asked for and answered, in turn in each of the frames; for `_Subjects.answering`."""
    at = place(answer, fact.target)
    if at is None:  # a target that begins or ends inside a word
        return []
    begin, end = at
    begin -= answer[:begin].endswith(" ")  # the blank is part of the target's first token
    given = given_chat(base, fact)
    texts, parts, told = [], [], []
    for n, wording in enumerate(wordings_in_chat(fact, count), first):
        frame = frames[n % len(frames)]
        text = frame.around(fact_text(fact, prompt=wording), answer)
        assert text.target is not None
        texts.append(text)
        parts.append(replace(text, target=(text.target[0] + begin, text.target[0] + end)))
        ended = given.text + answer + frame.after if given else text.text
        told.append(Text(ended, target=(len(given.text), len(ended)), special=False) if given else text)
    found = []
    for whole, part, known in zip(*(encode(base.tokenizer, group) for group in (texts, parts, told)), strict=True):
        if whole.ids == part.ids and fits(base, whole):
            same = given is not None and known.labels == whole.labels
            found.append((whole, part.target, known.ids[: known.target[0]] if same else ()))
    return found


def _other_questions(fact: Fact, config: LKSConfig, rng: random.Random) -> list[Text]:
    """Texts that ask something else about the subject: of relations whose objects are of another kind than the target."""
    names = {fact.target.casefold(), (fact.target_old or fact.target).casefold()}
    own = {fact.prompt, *other_wordings(fact)}
    relations = [r for r in bank_relations() if not names & r.objects and not own & set(r.prompts)]
    chosen = rng.sample(relations, min(config.locality_prompts, len(relations)))
    prompts = [rng.choice(r.prompts) for r in chosen]
    if config.train_on_rephrases:
        prompts += [q.prompt.replace(fact.subject, "{}", 1) for q in fact.locality if fact.subject in q.prompt]
    return [fact_text(fact, prompt=prompt) for prompt in prompts]
