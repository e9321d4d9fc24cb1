"""The texts that a value is optimised on: prompts that must go on with the target, and prompts that must go on as before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base import Base
from ..facts import Fact
from ..lm.chat_forms import chat_forms
from ..positions import EncodedText, Text, encode, fact_text
from ..questions import other_wordings
from ..suffix import read_keys_and_states
from ..texts import target_tails

__all__ = ["GENERIC_PROMPTS", "FactTexts", "fact_texts", "spared_prompts"]

_READ_DEPTH = 0.7
_TOO_SIMILAR = 6  # a quarter of the pool

# The first is ROME's. The others ask, in wordings of our own, what is asked about people, places, works and firms.
GENERIC_PROMPTS = (
    "{} is a",
    "{} grew out of",
    "What kind of thing is {}? It is",
    "{} started out in the year",
    "The faith of {} is",
    "{} has its home in",
    "{} has earned money as",
    "{}, whose father was",
    "{} usually talks in",
    "How large is {}? It is",
    "{} owes its existence to",
    "{} is famous because of",
    "{} forms a part of",
    "{} spent childhood in",
    "{} lies on the continent of",
    "The leader of {} is",
    "{} can be described as",
    "The name {} stands for",
    "{} likes to",
    "{} came to an end in",
    "{} together with",
    "{} won",
    "Next to {} there is",
    "What is {} like? It is",
)


@dataclass(frozen=True)
class FactTexts:
    """One fact's texts: `rewrites` are prompts with the target, the bare one first and with its tail; `kept` are read for the
    KL term at their last token."""

    rewrites: tuple[EncodedText, ...]
    kept: tuple[EncodedText, ...]


def fact_texts(
    base: Base,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    tail_tokens: int = 0,
    kept_prompts: int = 1,
    wordings: int = 0,
    chats: int = 0,
    keys_only: bool = False,
) -> list[FactTexts]:
    """The texts that each fact's value is optimised on.

    Args:
        base: the clean model.
        contexts: put in front of the prompt; the bare prompt always comes first.
        tail_tokens: length of the clean model's own continuation behind the bare prompt's target.
        wordings: how many contexts give way to the prompt in other words, where the package knows such.
        kept_prompts: how many of `GENERIC_PROMPTS` are kept, see `spared_prompts`.
        chats: how many contexts give way to chats in which the fact is asked for and answered, where the model has a chat
            template.
        keys_only: nothing behind the subject is read: spare the model the answers.
    """
    tails = target_tails(base, facts, tail_tokens)
    asked = chat_forms(base, facts, min(chats, len(contexts)), answered=not keys_only)
    rewrites = encode(
        base.tokenizer,
        [
            text
            for f, chat in zip(facts, asked, strict=True)
            for text in (fact_text(f, target=f.target), *_elsewhere(f, contexts[len(chat) :], wordings), *chat)
        ],
    )
    spared = spared_prompts(base, facts, kept_prompts)
    kept = encode(base.tokenizer, [fact_text(f, prompt=prompt) for f, own in zip(facts, spared, strict=True) for prompt in own])
    width, each = 1 + len(contexts), kept_prompts
    found = []
    for i, tail in enumerate(tails):
        bare, *others = rewrites[i * width : (i + 1) * width]
        found.append(FactTexts((bare.followed_by(tail), *others), tuple(kept[i * each : (i + 1) * each])))
    return found


def _elsewhere(fact: Fact, contexts: Sequence[str], wordings: int) -> list[Text]:
    """The fact behind contexts and in other words, as many as there are contexts."""
    known = other_wordings(fact)
    chosen = random.Random(fact.question).sample(known, min(wordings, len(known), len(contexts)))
    reworded = [fact_text(fact, prompt=wording, target=fact.target) for wording in chosen]
    return [fact_text(fact, prefix=prefix, target=fact.target) for prefix in contexts[len(chosen) :]] + reworded


def spared_prompts(base: Base, facts: Sequence[Fact], count: int) -> list[tuple[str, ...]]:
    """For each fact, the generic prompts after which its subject shall go on as before.

    Of the pool, those that ask for the most similar thing to the fact's own prompt stay out: to keep their answers would hold
    back the fact's paraphrases. Similar is what the clean model reads out of both at 0.7 of its depth: the cosine of the states
    at the prompts' ends, less their mean over the pool, each dimension by its deviation.

    Args:
        count: how many for each fact; with one it is ROME's "{} is a" for all.
    """
    if count == 1 or not facts:
        return [GENERIC_PROMPTS[:1]] * len(facts)
    layout = base.layout()
    block = layout.at_depth(_READ_DEPTH)
    texts = encode(base.tokenizer, [fact_text(f, prompt=prompt) for f in facts for prompt in (f.prompt, *GENERIC_PROMPTS)])
    ends = [(i, len(text.ids) - 1) for i, text in enumerate(texts)]
    _, states = read_keys_and_states(base.model, layout, [t.ids for t in texts], ends, blocks=(block,), last=block)
    found = states[block].float().view(len(facts), 1 + len(GENERIC_PROMPTS), -1)
    centred = found - found[:, 1:].mean(1, keepdim=True)
    centred = centred / centred.flatten(0, 1).std(0).clamp(min=1e-6)
    likeness = torch.cosine_similarity(centred[:, :1], centred[:, 1:], dim=-1)
    out = min(_TOO_SIMILAR, len(GENERIC_PROMPTS) - count)
    left = [sorted(row.argsort()[: len(GENERIC_PROMPTS) - out].tolist())[:count] for row in likeness]
    return [tuple(GENERIC_PROMPTS[i] for i in row) for row in left]
