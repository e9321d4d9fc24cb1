"""Texts that the model writes itself: material for statistics, and contexts to put in front of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig

from .base import Base, seeded
from .facts import Fact
from .positions import encode, fact_text, pad

__all__ = ["STARTERS", "generate_ids", "sample_contexts", "sample_ids", "target_tails"]

# Frequent openings of English sentences: varied starts give varied samples, with or without a BOS token.
STARTERS = (
    "The", "In", "I", "A", "It", "When", "He", "She", "We", "They", "This", "There", "If", "For", "As", "At", "After",
    "One", "Many", "My", "You", "Because", "Therefore", "However", "During", "First", "How", "What", "Why", "On", "An",
    "According to", "The city of", "The history of", "In the early", "Scientists have", "The company", "The film",
    "Born in", "Although", "Since", "Once upon a time", "Today", "Most people", "The best way to", "Here is", "With",
    "Over the years", "The first", "His",
)  # fmt: skip


def generate_ids(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    sample: bool = False,
    full_length: bool = False,
) -> list[list[int]]:
    """Continue prompts, left-padded as one batch.

    Args:
        base: model and tokenizer.
        prompts: token ids.
        length: new tokens at most.
        sample: sample from the 50 likeliest tokens rather than take the likeliest.
        full_length: never stop early.

    Returns:
        For each prompt, the new token ids up to and without the end of sequence.
    """
    ids, mask = pad(prompts, side="left", device=base.device)
    own = base.model.generation_config
    end = own.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    config = GenerationConfig(
        max_new_tokens=length,
        min_new_tokens=length if full_length else None,
        do_sample=sample,
        top_k=50 if sample else None,
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else min(ends, default=0),
    )
    with torch.no_grad():
        out = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows = out[:, ids.shape[1] :].tolist()
    if full_length:
        return rows
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def sample_ids(
    base: Base,
    count: int,
    length: int,
    seed: int,
    starters: Sequence[str] = STARTERS,
    batch: int = 64,
    listener: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Texts sampled by the model, each a starter and `length` tokens more.

    Args:
        listener: called with the number of tokens after each batch.

    Returns:
        `count` rows of token ids.
    """
    starts = [base.tokenizer(starters[i % len(starters)])["input_ids"] for i in range(count)]
    texts: list[list[int]] = []
    with seeded(seed, base.device):
        for first in range(0, count, batch):
            group = starts[first : first + batch]
            rows = generate_ids(base, group, length=length, sample=True, full_length=True)
            texts += [[*start, *row] for start, row in zip(group, rows, strict=True)]
            if listener:
                listener(sum(map(len, texts[first:])))
    return texts


def sample_contexts(base: Base, count: int, length: int, seed: int) -> list[str]:
    """Short prefixes to put in front of a prompt, so that an edit holds in more than one context.

    ROME (arXiv 2202.05262) samples them from the model as well; each ends with a full stop and a space.
    """
    if not count:
        return []
    texts = sample_ids(base, count, length, seed)
    decoded = (base.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts)
    return [" ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(" .,;:") + ". " for text in decoded]


def target_tails(base: Base, facts: Sequence[Fact], length: int) -> list[str]:
    """How the clean model goes on once a fact's target has been said: up to `length` tokens for each fact, as text."""
    if not length:
        return [""] * len(facts)
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    tails: list[str] = []
    for first in range(0, len(texts), 64):
        rows = [t.ids for t in texts[first : first + 64]]
        for row, new in zip(rows, generate_ids(base, rows, length=length), strict=True):
            # decoded with what stands before it, so that its first space is kept
            before = base.tokenizer.decode(row, skip_special_tokens=True)
            tails.append(base.tokenizer.decode([*row, *new], skip_special_tokens=True)[len(before) :])
    return tails
