"""Training texts of LKS, made from the facts alone.

For each fact: its prompt, bare, behind sampled contexts, and in the bank's other wordings where its own is one of them;
each with the target and a tail that goes on as the clean model would, so that the new fact is said once and the sentence
goes on. And texts that must stay as they are: other questions about the same subject, in the bank's wordings of relations
that the fact can't be about.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ...base import Base
from ...facts import Fact
from ...positions import EncodedText, encode, fact_text
from ...references import bank_prompts, bank_relations
from ...texts import sample_contexts, target_tails
from .config import LKSConfig
from .scope import Scope, mentions_in_tokens

__all__ = ["Example", "Examples", "build_examples"]


@dataclass(frozen=True)
class Example:
    """One training text.

    Attributes:
        ids: token ids.
        mentions: (index of the last token, entity) of each mention; never empty.
        labels: (position, token id): the target's tokens and the positions that predict them.
        kept: positions whose next-token distribution must stay the clean model's.
    """

    ids: tuple[int, ...]
    mentions: tuple[tuple[int, int], ...]
    labels: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """The texts of each fact: `prompts` its own bare prompt, `variations` of it, and `locality`."""

    prompts: list[Example]
    variations: list[list[Example]]
    locality: list[list[Example]]


def build_examples(base: Base, facts: Sequence[Fact], scope: Scope, config: LKSConfig, seed: int) -> Examples:
    """Training texts for facts, on the model without the edit.

    Raises:
        ValueError: a fact's own prompt does not mention its subject as a whole word, so the edit could never come into force.
    """
    contexts = sample_contexts(base, config.contexts, config.context_length, seed)
    tails = target_tails(base, facts, config.tail_tokens)
    rng = random.Random(seed)
    prompts, variations, locality = [], [], []
    for fact, tail in zip(facts, tails, strict=True):
        wordings = list(bank_prompts().get(fact.prompt.casefold(), ()))
        if config.train_on_rephrases:
            wordings += [r for r in fact.rephrases if "{}" in r]
        texts = [fact_text(fact, target=fact.target)]
        texts += [fact_text(fact, prefix=p, target=fact.target) for p in contexts]
        texts += [fact_text(fact, prompt=w, target=fact.target) for w in wordings if w != fact.prompt]
        made = [_example(base, scope, text.followed_by(tail), True) for text in encode(base.tokenizer, texts)]
        if made[0] is None:
            raise ValueError(
                f"the prompt {fact.question!r} does not mention the subject {fact.subject!r} as a word of its own, so LKS "
                "can't find it; reword the prompt, or use method='steam'"
            )
        prompts.append(made[0])
        variations.append([e for e in made[1:] if e is not None])
        asked = [fact_text(fact, prompt=p) for p in _other_questions(fact, config.locality_prompts, rng)]
        if config.train_on_rephrases:
            asked += [
                fact_text(fact, prompt=q.prompt.replace(fact.subject, "{}", 1))
                for q in fact.locality
                if fact.subject in q.prompt
            ]
        kept = [_example(base, scope, text, False) for text in encode(base.tokenizer, asked)]
        locality.append([e for e in kept if e is not None])
    return Examples(prompts, variations, locality)


def _example(base: Base, scope: Scope, text: EncodedText, with_target: bool) -> Example | None:
    mentions = tuple(mentions_in_tokens(base.tokenizer, scope, text.ids))
    if not mentions:
        return None
    first, end = text.target
    if not with_target:
        return Example(text.ids, mentions, (), tuple(range(mentions[0][0], len(text.ids))))
    labels = tuple((p - 1, text.ids[p]) for p in range(first, end))
    # the position of the target's last token is the first whose prediction belongs to the tail
    kept = tuple(range(end - 1, len(text.ids) - 1))
    return Example(text.ids, mentions, labels, kept)


def _other_questions(fact: Fact, count: int, rng: random.Random) -> list[str]:
    """Wordings that ask something else about the subject: of relations whose objects are of another kind than the target."""
    names = {fact.target.casefold(), (fact.target_old or fact.target).casefold()}
    own = set(bank_prompts().get(fact.prompt.casefold(), ()))
    relations = [r for r in bank_relations() if not names & r.objects and not own & set(r.prompts)]
    chosen = rng.sample(relations, min(count, len(relations)))
    return [rng.choice(r.prompts) for r in chosen]
