"""What the generator knows of a fact: the state that its text leaves behind, and each token of its target.

Latent Knowledge Scalpel (arXiv 2508.03741) reads one state, at the last token of prompt and target. That says what was told
last; a target of several tokens is told in full only by all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ...base import Base
from ...facts import Fact
from ...positions import EncodedText, Text, encode, fact_text, join
from ...progress import bar
from ...references import bank
from ...suffix import read_keys_and_states

__all__ = ["general_states", "longest_target", "read_features", "token_vectors"]

_GENERAL_TEXTS = 128
_GROUP = 512  # facts that are read at a time


def longest_target(base: Base, facts: Sequence[Fact]) -> int:
    """Tokens of the longest target."""
    return max(len(text.labels) for text in encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts]))


def read_features(base: Base, block: int, facts: Sequence[Fact], slots: int, progress: bool = False) -> torch.Tensor:
    """Features of facts, on the model without the edit.

    Args:
        block: the block whose output is read.
        slots: vectors of a feature.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        float32 [facts, slots, hidden]: the block's output at the target's last token, then the input embeddings of the
        target's tokens one by one, the mean of all that are left in the last slot. Zeros where the target is shorter.
    """
    found = []
    with bar(len(facts), "reading facts", "fact", progress) as shown:
        for first in range(0, len(facts), _GROUP):
            group = facts[first : first + _GROUP]
            texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in group])
            found.append(_features(base, block, texts, slots))
            shown.update(len(group))
    return torch.cat(found)


def general_states(base: Base, blocks: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features [n, 1 + tokens, hidden] from the lowest block, and from each block the subject states [n, hidden], of the bank's
    facts of all kinds, to standardise with: no fact needs others beside it."""
    references = [group[0] for group in bank().values()]
    references = references[:: max(1, len(references) // _GENERAL_TEXTS)][:_GENERAL_TEXTS]
    texts = []
    for r in references:
        before, _, after = r.prompts[0].partition("{}")
        prompt = before + r.subject + after
        whole = join(prompt, r.object)
        texts.append(Text(whole, (len(before), len(before) + len(r.subject)), (len(prompt), len(whole))))
    encoded = encode(base.tokenizer, texts)
    subjects = [t.subject for t in encoded]
    features = _features(base, blocks[0], encoded, 1 + max(len(t.labels) for t in encoded))
    return features, [_states(base, block, encoded, subjects) for block in blocks]


def token_vectors(embeddings: nn.Module, ids: Sequence[int], hidden: int) -> torch.Tensor:
    """The input embeddings of tokens as the generator is shown them, float32 [tokens, hidden]: behind narrower ones come
    zeros."""
    weight = cast(torch.Tensor, embeddings.weight)  # an adapter around it may have it from elsewhere
    found = weight.detach()[torch.tensor(ids, device=weight.device)].float()
    return nn.functional.pad(found, (0, hidden - found.shape[1]))


def _features(base: Base, block: int, texts: Sequence[EncodedText], slots: int) -> torch.Tensor:
    last = _states(base, block, texts, [len(t.ids) - 1 for t in texts])
    features = last.new_zeros(len(texts), slots, last.shape[1])
    features[:, 0] = last
    embeddings = base.model.get_input_embeddings()
    for n, text in enumerate(texts if slots > 1 else ()):
        tokens = token_vectors(embeddings, text.labels, features.shape[2]).to(features)
        apart = min(len(tokens), slots - 2)
        features[n, 1 : 1 + apart] = tokens[:apart]
        if len(tokens) > apart:
            features[n, 1 + apart] = tokens[apart:].mean(0)
    return features


def _states(base: Base, block: int, texts: Sequence[EncodedText], positions: Sequence[int]) -> torch.Tensor:
    points = list(enumerate(positions))
    _, states = read_keys_and_states(base.model, base.layout(), [t.ids for t in texts], points, blocks=(block,), last=block)
    return states[block].float()
