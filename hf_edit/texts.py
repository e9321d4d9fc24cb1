"""Texts that the model writes itself: material for statistics, and contexts to put in front of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .base import Base, seeded
from .facts import Fact
from .kv_cache import cache_of, with_cache
from .positions import encode, fact_text, pad
from .progress import bar

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
    base: Base, prompts: Sequence[Sequence[int]], length: int, banned: Sequence[int] | None = None
) -> list[list[int]]:
    """Continue prompts greedily, left-padded as one batch.

    Args:
        base: model and tokenizer.
        prompts: token ids.
        length: new tokens at most.
        banned: for each prompt, a token that is never chosen.

    Returns:
        For each prompt, the new token ids up to and without the end of sequence.
    """
    ids, mask = pad(prompts, side="left", device=base.device)
    ends = _ends(base)
    own = base.model.generation_config
    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else min(ends, default=0),
    )
    with torch.no_grad():
        ban = LogitsProcessorList([_Ban(banned)]) if banned is not None else None
        out = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=ban)
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


class _Ban(LogitsProcessor):
    """Never chooses one token a row."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = torch.tensor(tokens)[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, self._tokens.to(scores.device), -torch.inf)


@torch.no_grad()
def sample_ids(
    base: Base,
    count: int,
    length: int,
    seed: int,
    starters: Sequence[str] = STARTERS,
    batch: int = 128,
    listener: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Texts sampled by the model, each a starter and `length` tokens more, none ending early.

    Samples from the 50 likeliest tokens. `generate` would take twice as long: it sorts, masks and draws over the whole
    vocabulary.

    Args:
        listener: called with the number of new tokens after each step.

    Returns:
        `count` rows of token ids.
    """
    starts = [base.tokenizer(starters[i % len(starters)])["input_ids"] for i in range(count)]
    ends = _ends(base)
    texts: list[list[int]] = []
    with seeded(seed, base.device):
        for first in range(0, count, batch):
            group = starts[first : first + batch]
            ids, mask = pad(group, side="left", device=base.device)
            steps: list[torch.Tensor] = []
            past = None
            for _ in range(length):
                arguments = {"next_sequence_length": None if past is None else 1, "attention_mask": mask, "use_cache": True}
                prepare = base.model.prepare_inputs_for_generation
                out = base.model(**prepare(ids, is_first_iteration=past is None, **with_cache(prepare, arguments, past)))
                past = cache_of(out)
                logits = out.logits[:, -1].float()
                logits[:, ends] = -torch.inf
                top = logits.topk(min(50, logits.shape[-1]))
                chosen = top.indices.gather(1, torch.multinomial(top.values.softmax(-1), 1))
                steps.append(chosen)
                ids, mask = torch.cat([ids, chosen.to(ids)], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                if listener:
                    listener(len(group))
            new = torch.cat(steps, 1).tolist()
            texts += [[*start, *row] for start, row in zip(group, new, strict=True)]
    return texts


def _ends(base: Base) -> list[int]:
    """The ids that end a text."""
    end = base.model.generation_config.eos_token_id
    return [end] if isinstance(end, int) else list(end or ())


def sample_contexts(base: Base, count: int, length: int, seed: int) -> list[str]:
    """Short prefixes to put in front of a prompt, so that an edit holds in more than one context.

    ROME (arXiv 2202.05262) samples them from the model as well; each ends with a full stop and a space.
    """
    if not count:
        return []
    texts = sample_ids(base, count, length, seed)
    decoded = (base.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts)
    return [" ".join(text.replace("{", " ").replace("}", " ").split()).rstrip(" .,;:") + ". " for text in decoded]


def target_tails(base: Base, facts: Sequence[Fact], length: int, progress: bool = False) -> list[list[int]]:
    """How the model, as it stands, goes on once a fact's target has been said, without saying its first token again: up to
    `length` token ids for each fact. As tokens, because as text they could merge with the target."""
    if not length:
        return [[] for _ in facts]
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    tails: dict[int, list[int]] = {}
    with bar(len(texts), "going on behind targets", "text", progress) as shown:
        for first in range(0, len(order), 64):
            group = [texts[i] for i in order[first : first + 64]]
            made = generate_ids(base, [t.ids for t in group], length, [t.labels[0] for t in group])
            tails.update(zip(order[first : first + 64], made, strict=True))
            shown.update(len(group))
    return [tails[i] for i in range(len(texts))]
