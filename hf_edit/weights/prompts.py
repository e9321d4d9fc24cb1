"""The texts that a value is optimised on: prompts that must go on with the target, and prompts that must go on as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..base import Base
from ..facts import Fact
from ..positions import EncodedText, encode, fact_text
from ..texts import target_tails

__all__ = ["GENERIC_PROMPTS", "FactTexts", "fact_texts"]

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
    base: Base, facts: Sequence[Fact], contexts: Sequence[str], tail_tokens: int = 0, kept_prompts: int = 1
) -> list[FactTexts]:
    """The texts that each fact's value is optimised on.

    Args:
        base: the clean model.
        contexts: put in front of the prompt; the bare prompt always comes first.
        tail_tokens: length of the clean model's own continuation behind the bare prompt's target.
        kept_prompts: how many of `GENERIC_PROMPTS` are kept.
    """
    prefixes = ("", *contexts)
    tails = target_tails(base, facts, tail_tokens)
    rewrites = encode(
        base.tokenizer,
        [
            fact_text(f, prefix=p, target=f.target, tail=tail if not p else "")
            for f, tail in zip(facts, tails, strict=True)
            for p in prefixes
        ],
    )
    generic = GENERIC_PROMPTS[:kept_prompts]
    kept = encode(base.tokenizer, [fact_text(f, prompt=prompt) for f in facts for prompt in generic])
    width, each = len(prefixes), len(generic)
    return [
        FactTexts(tuple(rewrites[i * width : (i + 1) * width]), tuple(kept[i * each : (i + 1) * each]))
        for i in range(len(facts))
    ]
