"""Where subject and target stand among a text's tokens.

One tokenisation of the whole text, read through its character offsets. Tokenising the subject or the target by itself
gives other tokens in most vocabularies ("German" is not " German"), so nothing here ever does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import SubjectNotFoundError
from .facts import Fact

__all__ = ["EncodedText", "Text", "encode", "fact_text", "join", "pad"]

_NO_SPACE_BEFORE = "([{\"'“‘«"
_NO_SPACE_SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3000, 0x30FF),  # CJK punctuation, Hiragana, Katakana
    (0x3400, 0x9FFF),  # CJK ideographs
    (0xF900, 0xFAFF),
    (0xFF00, 0xFF60),  # full-width forms
    (0x20000, 0x3FFFF),
)


@dataclass(frozen=True)
class Text:
    """A text with the character spans that matter; offsets count code points.

    Attributes:
        text: the whole text.
        subject: (start, end) of the subject's mention that is edited, or None.
        target: (start, end) of the target with the separator before it, or None.
        special: whether the tokenizer adds its special tokens; the text of a chat template holds them already.
    """

    text: str
    subject: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    special: bool = True


@dataclass(frozen=True)
class EncodedText:
    """A tokenised text.

    Attributes:
        ids: token ids, special tokens as the tokenizer sets them in front; none behind the text.
        subject: index of the subject's last token, -1 where the text has no subject.
        target: (first, end) token indices of the target; (len, len) where it has none.
    """

    ids: tuple[int, ...]
    subject: int
    target: tuple[int, int]

    @property
    def labels(self) -> tuple[int, ...]:
        """The target's token ids."""
        return self.ids[self.target[0] : self.target[1]]

    def followed_by(self, ids: Sequence[int]) -> EncodedText:
        """The same text with tokens behind it."""
        return EncodedText((*self.ids, *ids), self.subject, self.target)


def joined_without_space(character: str) -> bool:
    """Whether a script writes this character without spaces between words."""
    return any(low <= ord(character) <= high for low, high in _NO_SPACE_SCRIPTS)


def join(prompt: str, target: str) -> str:
    """Prompt and target as running text: one space between, except after a blank or an opening mark and in scripts without
    spaces."""
    if not prompt or prompt[-1].isspace():
        return prompt + target
    if prompt[-1] in _NO_SPACE_BEFORE or joined_without_space(prompt[-1]) or joined_without_space(target[0]):
        return prompt + target
    return f"{prompt} {target}"


def fact_text(fact: Fact, *, prefix: str = "", prompt: str | None = None, target: str | None = None) -> Text:
    """A fact's prompt as running text, with the spans of subject and target.

    Args:
        fact: the fact.
        prefix: text in front of the prompt.
        prompt: another wording, with ``{}`` for the subject; by default the fact's own.
        target: the continuation to append; None for the bare prompt.

    Raises:
        SubjectNotFoundError: `prompt` has no ``{}``.
        ValueError: the fact's prompt is a chat, see `hf_edit.message_prompts`.
    """
    template = fact.prompt if prompt is None else prompt
    if not isinstance(template, str):
        raise ValueError("the prompt is a chat; render it first, with hf_edit.message_prompts.as_text(tokenizer, facts)")
    at = template.find("{}")
    if at < 0:
        raise SubjectNotFoundError(f"there is no {{}} for the subject in {template!r:.120}")
    start = len(prefix) + at
    text = prefix + template[:at] + fact.subject + template[at + 2 :]
    span = (start, start + len(fact.subject))
    if target is None:
        return Text(text, span)
    whole = join(text, target)
    return Text(whole, span, (len(text), len(whole)))


def encode(tokenizer: Any, texts: Sequence[Text]) -> list[EncodedText]:
    """Tokenise texts, each in one go, and map their character spans to tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: texts with spans.

    Raises:
        ValueError: the tokenizer is a slow one (it has no offsets), or a span holds no token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets; load the tokenizer with "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    found = _located(tokenizer, texts)
    begins = {i: text.target[0] for i, text in enumerate(texts) if text.target is not None}
    cut = {i: at for i, at in begins.items() if texts[i].text[:at][-1:].isspace()}
    # a tokenizer may take a blank at a prompt's end together with what follows, which a prompt by itself can't show
    prompts = [replace(texts[i], text=texts[i].text[:at], target=None) for i, at in cut.items()]
    for (i, at), prompt in zip(cut.items(), _located(tokenizer, prompts), strict=True):
        if found[i].ids[: len(prompt.ids)] != prompt.ids:
            ids = (*prompt.ids, *tokenizer(texts[i].text[at:], add_special_tokens=False)["input_ids"])
            found[i] = EncodedText(ids, prompt.subject, (len(prompt.ids), len(ids)))
    return found


def _located(tokenizer: Any, texts: Sequence[Text]) -> list[EncodedText]:
    found: dict[int, EncodedText] = {}
    added = frozenset(tokenizer.all_special_ids)
    for special in (True, False):
        group = [i for i, text in enumerate(texts) if text.special == special]
        if not group:
            continue
        batch = tokenizer(
            [texts[i].text for i in group],
            return_offsets_mapping=True,
            add_special_tokens=special,
            padding=False,
            truncation=False,
        )
        for i, ids, offsets in zip(group, batch["input_ids"], batch["offset_mapping"], strict=True):
            found[i] = _locate(texts[i], ids, offsets, added)
    return [found[i] for i in range(len(texts))]


def _locate(text: Text, ids: Sequence[int], offsets: Sequence[tuple[int, int]], added: Collection[int]) -> EncodedText:
    # An added token has an empty span, and so has a blank of some tokenizers. What was added behind the text (an EOS) goes.
    own = (i + 1 for i, (a, b) in enumerate(offsets) if b > a or ids[i] not in added)
    end = max(own, default=len(ids))
    spans = offsets[:end]
    subject = -1
    if text.subject is not None:
        subject = max((i for i, (a, b) in enumerate(spans) if b > a and a < text.subject[1]), default=-1)
        if subject < 0 or spans[subject][1] <= text.subject[0]:
            raise ValueError(f"the tokenizer gives no token for the subject in {text.text!r:.120}")
    target = (end, end)
    if text.target is not None:
        inside = [i for i, (a, b) in enumerate(spans) if b > a and b > text.target[0] and a < text.target[1]]
        if not inside or inside[0] == 0:
            raise ValueError(f"the tokenizer gives no token for the target in {text.text!r:.120}")
        target = (inside[0], inside[-1] + 1)
    return EncodedText(tuple(ids[:end]), subject, target)


def pad(rows: Sequence[Sequence[int]], side: str = "right", device: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as one tensor, with the attention mask: both int64 [rows, longest]. The padding id is 0 and never read."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)
