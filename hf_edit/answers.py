"""What a model answers: greedy continuations, and the probability of a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from .base import Base
from .facts import Fact
from .positions import EncodedText, encode, fact_text, joined_without_space, pad
from .progress import bar
from .texts import generate_ids

__all__ = ["greedy", "says", "target_probabilities"]


def greedy(base: Base, prompts: Sequence[str], length: int = 16, batch: int = 32, progress: bool = False) -> list[str]:
    """Greedy continuations of prompts, as the model stands now.

    Args:
        length: new tokens at most.

    Returns:
        The continuations, without the prompts.
    """
    rows = [base.tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, str] = {}
    with bar(len(rows), "asking", "prompt", progress) as shown:
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            new = generate_ids(base, [rows[i] for i in group], length)
            texts = base.tokenizer.batch_decode(new, skip_special_tokens=True)
            found.update(zip(group, texts, strict=True))
            shown.update(len(group))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def target_probabilities(base: Base, facts: Sequence[Fact], batch: int = 32) -> list[float]:
    """P(target | prompt) of each fact: the product over the target's tokens, teacher-forced."""
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    found: dict[int, float] = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        for i, log_probs in zip(group, target_log_probs(base.model, [texts[i] for i in group]), strict=True):
            found[i] = float(log_probs.sum().exp())
    return [found[i] for i in range(len(texts))]


@torch.no_grad()
def target_log_probs(model: Any, texts: Sequence[EncodedText]) -> list[torch.Tensor]:
    """Log-probabilities of each text's target tokens, float32 on the CPU, from one batched forward."""
    device = model.get_input_embeddings().weight.device
    ids, mask = pad([t.ids for t in texts], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for i, text in enumerate(texts):
        first, end = text.target
        log_probs = logits[i, first - 1 : end - 1].float().log_softmax(-1)
        labels = torch.tensor(text.labels, device=log_probs.device)
        found.append(log_probs.gather(1, labels[:, None])[:, 0].cpu())
    return found


def says(answer: str, target: str) -> bool:
    """Whether an answer holds the target, as whole words, whatever their case."""
    before = "" if joined_without_space(target[0]) else r"(?<!\w)"
    after = "" if joined_without_space(target[-1]) else r"(?!\w)"
    return re.search(before + re.escape(target) + after, answer, re.IGNORECASE) is not None
