"""The gate: which of a subject's facts a prompt asks for, if any.

An edit that is kept beside the weights can be switched by the prompt as a whole. A middle block's state at the last token of
the prompt's content holds what is asked; a learned projection of it, standardised, is compared by its cosine with the same
projection of the state behind the fact's own prompt. The words of both are compared too (`hf_edit.wording`), which tell apart
what asks for the same kind of thing. The decision is hard: where the score reaches the threshold the fact is on.

The gate is trained beforehand, on wordings of many relations that come with the package (see `hf_edit.gate_training`), so it
also serves a single fact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .base import Base
from .errors import PackFormatError
from .layout import Layout
from .suffix import read_keys_and_states
from .wording import SENTENCE_END, Words, word_weights

__all__ = [
    "Gate",
    "LearnedGate",
    "PromptEnd",
    "asks_about_another",
    "block_read",
    "embedding_size",
    "gate_block",
    "read_queries",
]

_DEPTH = 0.45
_SHAPES = {  # by letters, each of which stands for one size
    "mean": "h",
    "std": "h",
    "projection": "hs",
    "word_projection": "ew",
    "word_offset": "w",
    "word_weight": "e",
    "word_bias": "1",
    "head": "4",
    "threshold": "1",
}
_MOST = 4096  # directions of a projection
_OTHERS, _BLOCK = "others", "block"


@dataclass(frozen=True)
class Gate:
    """A learned comparison of what two prompts ask.

    Attributes:
        mean, std: float32 [hidden], of the states.
        projection: float32 [hidden, size].
        word_projection, word_offset: float32 [embedding, word size] and [word size], of a word's embedding.
        word_weight, word_bias: float32 [embedding] and [1], of how much a word says.
        head: float32 [4], what the cosine of the states counts, what either prompt's words found in the other, a constant.
        threshold: float32 [1]; a score that reaches it means that both ask the same.
    """

    mean: torch.Tensor
    std: torch.Tensor
    projection: torch.Tensor
    word_projection: torch.Tensor
    word_offset: torch.Tensor
    word_weight: torch.Tensor
    word_bias: torch.Tensor
    head: torch.Tensor
    threshold: torch.Tensor

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Unit vectors to compare: states [n, hidden] to float32 [n, size]."""
        standard = (states.to(self.projection) - self.mean) / self.std
        return torch.nn.functional.normalize(standard @ self.projection, dim=-1)

    def words(self, embeddings: torch.Tensor, there: torch.Tensor) -> Words:
        """Words to compare.

        Args:
            embeddings: [questions, words, embedding].
            there: bool [questions, words], where there is a word.
        """
        embeddings, there = embeddings.to(self.word_projection), there.to(self.word_projection)
        vectors = torch.nn.functional.normalize(embeddings @ self.word_projection + self.word_offset, dim=-1)
        return Words(vectors, word_weights(embeddings @ self.word_weight + self.word_bias) * there)

    def scores(self, cosines: torch.Tensor, agreement: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """How much pairs of prompts ask the same, [pairs]: log-odds, before a threshold is taken.

        Args:
            cosines: [pairs], of the `project`ed states.
            agreement: of the words, see `hf_edit.wording.agreement`.
        """
        return self.head[0] * cosines + self.head[1] * agreement[0] + self.head[2] * agreement[1] + self.head[3]

    @property
    def sure(self) -> torch.Tensor:
        """The score from which on a text that was not written as a question is taken to ask for a fact: halfway from the
        threshold to what a prompt scores with itself."""
        return (self.threshold + self.head.sum()) / 2

    def to(self, device: torch.device) -> Gate:
        """The same gate on a device."""
        return Gate(**{name: getattr(self, name).to(device) for name in _SHAPES})

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The gate's tensors by name, to keep in a pack."""
        return {prefix + name: getattr(self, name).detach().float().cpu().clone() for name in _SHAPES}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], prefix: str, hidden: int | None = None, embedding: int | None = None
    ) -> Gate | None:
        """The gate among a pack's tensors, checked; None where there is none.

        Args:
            hidden, embedding: widths of the model and of its embeddings, where they are known.

        Raises:
            PackFormatError: tensors are missing, of the wrong shape or type, or not finite.
        """
        found = {name: tensors[prefix + name] for name in _SHAPES if prefix + name in tensors}
        if not found:
            return None
        if missing := [name for name in _SHAPES if name not in found]:
            raise PackFormatError(f"the gate has no {', '.join(missing)}")
        sizes = {"1": 1, "4": 4} | {letter: size for letter, size in (("h", hidden), ("e", embedding)) if size is not None}
        for name, letters in _SHAPES.items():
            shape = tuple(found[name].shape)
            expected = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, shape, strict=False))
            if len(shape) != len(letters) or shape != expected:
                raise PackFormatError(f"the gate does not fit: {name} is {list(shape)}, not {list(expected)}")
        if not all(1 <= sizes[letter] <= _MOST for letter in "sw"):
            raise PackFormatError(f"the gate projects to {sizes['s']} and {sizes['w']} directions; 1 to {_MOST} are possible")
        if any(t.dtype != torch.float32 or not bool(t.isfinite().all()) for t in found.values()) or bool(
            (found["std"] <= 0).any()
        ):
            raise PackFormatError("the gate holds numbers that are not finite float32, or a deviation of zero or less")
        return cls(**found)


@dataclass(frozen=True)
class LearnedGate:
    """A gate from which a threshold can still be taken.

    Attributes:
        gate: its threshold means nothing.
        others: float32 [n], scores that other questions about a subject reach, held out of the training, in rising order; each
            n-th of such questions scores no more than the next of them.
        block: whose output the gate reads.
    """

    gate: Gate
    others: torch.Tensor
    block: int

    def at(self, quiet: float) -> Gate:
        """The gate below whose threshold this share of other questions about a subject stays. Those held out of the training
        are harder to tell apart than facts' in the wild."""
        return replace(self.gate, threshold=self.others[[round(quiet * (len(self.others) - 1))]])

    def fits(self, hidden: int, embedding: int) -> bool:
        """Whether the gate is for a model and embeddings of these widths."""
        return len(self.gate.mean) == hidden and len(self.gate.word_weight) == embedding

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors by name, to keep in a file."""
        own = {_OTHERS: self.others.clone(), _BLOCK: torch.tensor([float(self.block)])}
        return self.gate.tensors(prefix) | {prefix + name: t for name, t in own.items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], prefix: str, hidden: int | None = None, embedding: int | None = None
    ) -> LearnedGate | None:
        """What `tensors` gave, checked; None where no tensor's name begins with the prefix.

        Args:
            hidden, embedding: widths of the model and of its embeddings, where they are known.

        Raises:
            PackFormatError: tensors are missing or too many, of the wrong shape or type, or not finite.
        """
        names = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        if not names:
            return None
        gate = Gate.from_tensors(tensors, prefix, hidden, embedding)
        if gate is None or names != {*_SHAPES, _OTHERS, _BLOCK}:
            raise PackFormatError(f"the gate is incomplete, or has more than a gate has: {', '.join(sorted(names))[:300]}")
        others, block = tensors[prefix + _OTHERS], tensors[prefix + _BLOCK]
        rising = others.dim() == 1 and len(others) > 1 and others.dtype == torch.float32 and bool(others.isfinite().all())
        if not rising or bool((others.diff() < 0).any()):
            raise PackFormatError("the gate's scores of other questions are no finite float32 numbers in rising order")
        return cls(gate, others, block_read(block))


def block_read(tensor: torch.Tensor, blocks: int = 1 << 16) -> int:
    """The number of the block that a gate from a file reads, of so many.

    Raises:
        PackFormatError: it is no such number.
    """
    if tensor.shape != (1,) or tensor.dtype != torch.float32 or float(tensor) not in range(blocks):
        raise PackFormatError(f"the gate reads no block of the model: {tensor.dtype} {list(tensor.shape)}")
    return int(tensor)


def embedding_size(base: Base) -> int:
    """The width of the model's embeddings of tokens."""
    module = base.model.get_input_embeddings()
    return int(getattr(module, "embedding_dim", None) or module.weight.shape[1])


class PromptEnd:
    """Where a prompt's content ends: before the tokens that a chat template or the tokenizer sets behind it, and before blanks.

    Args:
        tokenizer: with or without a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._special = frozenset(tokenizer.all_special_ids)
        self._tails = _template_tails(tokenizer)
        self._blank: dict[int, bool] = {}
        self._tokenizer = tokenizer

    def __call__(self, ids: Sequence[int]) -> int:
        """Index of the content's last token in a row of ids without padding; 0 in a row without content."""
        end = len(ids)
        for tail in self._tails:
            if len(tail) < end and tuple(ids[end - len(tail) : end]) == tail:
                end -= len(tail)
                break
        while end > 1 and self.is_blank(ids[end - 1]):
            end -= 1
        return max(end - 1, 0)

    @property
    def spread(self) -> int:
        """How many tokens the longest of what may end a turn has more than the shortest."""
        sizes = [len(tail) for tail in self._tails]
        return max(sizes) - min(sizes) if sizes else 0

    def ends_turn(self, ids: Sequence[int], index: int) -> bool:
        """Whether what the template sets after a turn ends with this token."""
        return any(self._matches(ids, index, tail, len(tail)) for tail in self._tails if tail[-1] == ids[index])

    def in_tail(self, ids: Sequence[int], index: int) -> bool:
        """Whether this token is of what the template sets after a turn, or may be so with the tokens to come."""
        token = ids[index]
        return any(
            self._matches(ids, index, tail, length)
            for tail in self._tails
            if token in tail
            for length in range(1, len(tail) + 1)
            if tail[length - 1] == token
        )

    @staticmethod
    def _matches(ids: Sequence[int], index: int, tail: Sequence[int], length: int) -> bool:
        """Whether a text that ends with a token ends in the first tokens of a tail."""
        return index + 1 >= length and tuple(ids[index + 1 - length : index + 1]) == tuple(tail[:length])

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's special ones."""
        return token in self._special

    def is_blank(self, token: int) -> bool:
        """Whether a token is no content."""
        if token not in self._blank:
            self._blank[token] = token in self._special or not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def _template_tails(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """What the chat template sets behind a user's message, longest first, as token ids."""
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    tails = set()
    for prompt in (True, False):
        rows = []
        for content in ("Where is it?", "It is 7", "the"):
            try:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=prompt
                )
            except Exception:  # templates are programs of strangers and raise what they like
                return ()
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        shared = 0
        while shared < min(map(len, rows)) and len({row[-1 - shared] for row in rows}) == 1:
            shared += 1
        if shared:
            tails.add(tuple(rows[0][-shared:]))
    return tuple(sorted(tails, key=len, reverse=True))


_WORD = re.compile(r"\w+")
_OWN_WORDS = 4  # as many words of a mention may be all that its later mentions say


def asks_about_another(before: str, after: str, prompt: str = "") -> bool:
    """Whether a text goes on, in a later sentence than that of a mention, to ask about somebody else who is named there.

    What is asked is in the state at a prompt's end, about whom is hardly. So a rule must do, which goes by capitals: the last
    sentence does not hold the mention, and holds a capitalised word that is not one of the mention's own, in the middle of the
    sentence, or at its beginning where the text also has it in the middle of one. It stays silent in scripts without capitals,
    and about two names in one sentence.

    Args:
        before: the text up to the end of the mention.
        after: what follows, up to the end of the prompt.
        prompt: the fact's own prompt; whoever it names belongs to the question.
    """
    begin = max((m.end() for m in SENTENCE_END.finditer(after) if after[m.end() :].strip()), default=0)
    if not begin:
        return False
    text = before + after
    starts = {0, *(m.end() for m in SENTENCE_END.finditer(text))}
    names = {m.group() for m in _WORD.finditer(text) if m.group()[0].isupper() and m.start() not in starts}
    own = {"I", *_WORD.findall(before)[-_OWN_WORDS:], *_WORD.findall(prompt)}
    return any(word in names and word not in own for word in _WORD.findall(after[begin:]))


def gate_block(layout: Layout, highest: int | None = None) -> int:
    """The block whose output the gate reads: at 45 % of the depth, or `highest` where that comes before."""
    block = layout.at_depth(_DEPTH)
    return block if highest is None else min(block, highest)


def read_queries(base: Base, block: int, texts: Sequence[Sequence[int]], positions: Sequence[int]) -> torch.Tensor:
    """States to `Gate.project`: the block's output at a position of each text, float32 [texts, hidden].

    Nothing above the block runs.
    """
    _, states = read_keys_and_states(base.model, base.layout(), texts, list(enumerate(positions)), blocks=(block,), last=block)
    return states[block].float()
