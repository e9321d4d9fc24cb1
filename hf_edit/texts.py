"""Texts that the model writes itself: material for statistics, and contexts to put in front of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .base import Base, seeded
from .facts import Fact
from .kv_cache import cache_of, with_cache
from .lm.chat import chat_frame
from .positions import Text, encode, fact_text, pad
from .progress import bar

__all__ = [
    "STARTERS", "generate_ids", "sample_chats", "sample_contexts", "sample_freely", "sample_ids", "target_tails",
]  # fmt: skip

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

    Samples from the 50 likeliest tokens.

    Args:
        listener: called with the number of new tokens after each step.

    Returns:
        `count` rows of token ids.
    """
    starts = [base.tokenizer(starters[i % len(starters)])["input_ids"] for i in range(count)]
    with seeded(seed, base.device):
        return [[*start, *new] for start, new in zip(starts, _sampled(base, starts, length, 50, batch, listener), strict=True)]


def sample_freely(
    base: Base, count: int, length: int, seed: int, batch: int = 128, listener: Callable[[int], None] | None = None
) -> list[list[int]]:
    """Texts of `length` tokens that the model samples from nothing, out of its whole distribution, none ending early.

    They are closer than those of `sample_ids` to what a model was trained on: prose, lists, code, tables, other languages. The
    token that begins a text (BOS, or the end of the text before) is part of a row only where the tokenizer puts it there.

    Args:
        listener: called with the number of new tokens after each step.

    Returns:
        `count` rows of token ids.
    """
    given = list(base.tokenizer("")["input_ids"])
    first = next((i for i in (base.tokenizer.bos_token_id, *_ends(base)) if i is not None), None)
    opening = given or ([first] if first is not None else [])
    if not opening:
        return [row[:length] for row in sample_ids(base, count, length, seed, batch=batch, listener=listener)]
    with seeded(seed, base.device):
        rows = _sampled(base, [opening] * count, length, None, batch, listener)
    return [[*given, *row][:length] for row in rows]


def sample_chats(
    base: Base, count: int, length: int, seed: int, batch: int = 128, listener: Callable[[int], None] | None = None
) -> list[list[int]]:
    """Chats in the model's own template of which the model writes both turns, out of its whole distribution.

    Args:
        length: tokens of each turn at most.
        listener: called with the number of new tokens after each step.

    Returns:
        `count` rows of token ids, with what the template puts around the turns; none where there is no chat template, or where
        such a chat is longer than the model has positions.
    """
    frame = chat_frame(base.tokenizer)
    limit = getattr(base.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if frame is None or (limit and len(_ids(base, frame.before + frame.between + frame.after)) + 2 * length > limit):
        return []
    ends = [*_ends(base), *_ids(base, frame.between)[:1]]
    with seeded(seed, base.device):
        asked = _turns(base, [_ids(base, frame.before)] * count, length, ends, batch, listener)
        turns = [Text(turn or "Hello!") for turn in asked]
        opened = [list(text.ids) for text in encode(base.tokenizer, [frame.around(turn) for turn in turns])]
        answers = _turns(base, opened, length, ends, batch, listener)
    whole = [frame.around(turn, answer or "Hello!") for turn, answer in zip(turns, answers, strict=True)]
    return [list(text.ids) for text in encode(base.tokenizer, whole)]


def _turns(
    base: Base,
    starts: Sequence[Sequence[int]],
    length: int,
    ends: Sequence[int],
    batch: int,
    listener: Callable[[int], None] | None,
) -> list[str]:
    """What the model says next, as text, up to where a turn ends."""
    rows = _sampled(base, starts, length, None, batch, listener, may_end=True)
    said = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]
    return [text.strip() for text in base.tokenizer.batch_decode(said, skip_special_tokens=True)]


def _ids(base: Base, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _sampled(
    base: Base,
    starts: Sequence[Sequence[int]],
    length: int,
    top: int | None,
    batch: int,
    listener: Callable[[int], None] | None,
    may_end: bool = False,
) -> list[list[int]]:
    """`length` tokens after each start, from the `top` likeliest ones or from all. `generate` would take twice as long: it
    sorts, masks and draws over the whole vocabulary."""
    ends, numbered = _ends(base), "position_ids" in inspect.signature(base.model.forward).parameters
    found: list[list[int]] = []
    for first in range(0, len(starts), batch):
        group = starts[first : first + batch]
        ids, mask = pad(group, side="left", device=base.device)
        steps: list[torch.Tensor] = []
        past = None
        for _ in range(length):
            arguments = {"next_sequence_length": None if past is None else 1, "attention_mask": mask, "use_cache": True}
            if numbered:  # else some multimodal models go on from the positions of an earlier prompt
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            prepare = base.model.prepare_inputs_for_generation
            out = base.model(**prepare(ids, is_first_iteration=past is None, **with_cache(prepare, arguments, past)))
            past = cache_of(out)
            logits = out.logits[:, -1].float()
            if not may_end:
                logits[:, ends] = -torch.inf
            if top is None:
                chosen = torch.multinomial(logits.softmax(-1), 1)
            else:
                likeliest = logits.topk(min(top, logits.shape[-1]))
                chosen = likeliest.indices.gather(1, torch.multinomial(likeliest.values.softmax(-1), 1))
            steps.append(chosen)
            ids, mask = torch.cat([ids, chosen.to(ids)], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if listener:
                listener(len(group))
        found += torch.cat(steps, 1).tolist()
    return found


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
