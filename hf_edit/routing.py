"""The gate of a pack: trained with it, shipped in it, and put in force with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from .base import Base
from .errors import MergeError, PackFormatError
from .facts import Fact
from .gate import Gate, LearnedGate, PromptEnd, block_read, embedding_size, gate_block, read_queries
from .gate_training import train_gate
from .lm.chat import chat_frame
from .own_prompts import OwnPrompts, user_says
from .wording import Words, agreement, asked_words, word_ids

__all__ = ["GATE", "Routing", "fit_routing", "gate_names", "joined_routing", "kept_routing", "load_routing", "validate_routing"]


class Routing:
    """Which fact of an entity a prompt asks for.

    Args:
        base: model and tokenizer.
        gate: what compares prompts.
        keys: [facts, size], `Gate.project` of the state behind each fact's own prompt.
        prompts: the facts' own prompts, with ``{}``.
        block: the block whose output the gate reads. Where the edit acts below it, a prompt that asks for a fact runs twice.
        own: recognises the facts' own prompts, which need no gate.
    """

    def __init__(
        self,
        base: Base,
        gate: Gate,
        keys: torch.Tensor,
        prompts: Sequence[str],
        block: int,
        own: OwnPrompts | None = None,
    ) -> None:
        self.gate, self.block = gate.to(base.device), block
        self._base, self._keys, self._prompts, self._own = base, keys.to(base.device), prompts, own
        self._known: dict[tuple[int, ...], Words] = {}  # of facts that were asked for: few are

    @property
    def window(self) -> int:
        """How many tokens at the end of a text `own` has to see."""
        return 0 if self._own is None else self._own.longest

    def own(self, text: str, facts: Sequence[int], remark: bool) -> list[int]:
        """Of some facts those whose own prompt ends a text: they are asked for, whatever the scores are.

        Args:
            text: the last `window` tokens up to the end of its content.
            remark: whether a remark may follow a question.
        """
        return [] if self._own is None else self._own.asked_by(text, facts, remark)

    def may_be_own(self, tail: str, facts: Sequence[int]) -> bool:
        """Whether a text may end in one of the facts' own prompts, by its last characters."""
        return self._own is not None and self._own.may_end(tail, facts)

    @torch.no_grad()
    def hopeful(self, queries: torch.Tensor, facts: Sequence[int]) -> list[bool]:
        """For each query, [n, size], whether a fact's score may reach the threshold, whatever the words say."""
        cosines = queries @ self._keys[list(facts)].T
        most = self.gate.scores(cosines, (torch.ones_like(cosines), torch.ones_like(cosines)))
        return (most >= self.gate.threshold).any(1).tolist()

    def prompt(self, fact: int) -> str:
        """A fact's own prompt, with ``{}``."""
        return self._prompts[fact]

    def scores(self, query: torch.Tensor, facts: Sequence[int], asked: Callable[[], str], least: torch.Tensor) -> torch.Tensor:
        """How much a prompt asks for each of some facts, [facts], see `Gate.scores`; -inf where that is below `least`.

        Args:
            query: [size], the prompt's `Gate.project`ed state.
            facts: their numbers.
            asked: gives the words of the prompt's question (`hf_edit.wording.asked_words`); called only where they count.
            least: the score that matters.
        """
        cosines = self._keys[list(facts)] @ query
        most = self.gate.scores(cosines, (torch.ones_like(cosines), torch.ones_like(cosines)))
        if bool((most < least).all()):
            return torch.full_like(cosines, -torch.inf)
        scores = self.gate.scores(cosines, agreement(self._words_of(tuple(facts)), self._read([asked()])))
        return scores.masked_fill(scores < least, -torch.inf)

    def _words_of(self, facts: tuple[int, ...]) -> Words:
        if facts not in self._known:
            self._known[facts] = self._read([asked_words(self._prompts[fact]) for fact in facts])
        return self._known[facts]

    @torch.no_grad()
    def _read(self, questions: Sequence[str]) -> Words:
        ids, there = (t.to(self._base.device) for t in word_ids(self._base.tokenizer, questions))
        return self.gate.words(self._base.model.get_input_embeddings()(ids), there)


GATE = "gate."  # what the names of its tensors begin with
_KEYS, _BLOCK = GATE + "keys", GATE + "block"


def fit_routing(
    base: Base,
    facts: Sequence[Fact],
    previous: Mapping[str, torch.Tensor],
    clean: Callable[[], AbstractContextManager[None]],
    seed: int,
    progress: bool,
    quiet: float,
    highest: int | None = None,
    learned: LearnedGate | None = None,
    telling: Sequence[Fact] = (),
) -> dict[str, torch.Tensor]:
    """The tensors of a gate for facts.

    Args:
        base: the model, with the weight edits in force that this edit comes on top of.
        facts: all facts of the pack, those that it had before in front.
        previous: the tensors that the pack had before; its gate stays as it is.
        clean: gives a context in which the model is free of edits: there the gate is trained, because its training is kept.
        quiet: the share of other questions that a new gate keeps quiet, see `LearnedGate.at`.
        highest: the last block that the gate may read, for edits that are made behind it in the same run.
        learned: a new pack's gate; by default one is trained.
        telling: facts whose wordings such a one also learns from, see `hf_edit.gate_training.train_gate`.
    """
    gate = Gate.from_tensors(previous, GATE)
    known = previous[_KEYS] if gate is not None else None
    if gate is None:
        if learned is None:
            with clean():
                learned = train_gate(base, gate_block(base.layout(), highest), telling, seed=seed, progress=progress)
        gate, read_at = learned.at(quiet), learned.block
    else:
        read_at = int(previous[_BLOCK])
    new = facts if known is None else facts[len(known) :]
    end = PromptEnd(base.tokenizer)
    rows = [base.tokenizer(f.question)["input_ids"] for f in new]
    keys = gate.project(read_queries(base, read_at, rows, [end(row) for row in rows]).cpu())
    keys = keys if known is None else torch.cat([known, keys])
    return gate.tensors(GATE) | {_KEYS: keys, _BLOCK: torch.tensor([float(read_at)])}


def kept_routing(tensors: Mapping[str, torch.Tensor], keep: Sequence[int]) -> dict[str, torch.Tensor]:
    """The gate's tensors with the facts `keep` only; empty where there is no gate."""
    own = {name: t for name, t in tensors.items() if name.startswith(GATE)}
    return own | {_KEYS: own[_KEYS][list(keep)].clone()} if own else {}


def joined_routing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gate's tensors for the facts of two packs, those of the one in front; empty where neither has one.

    Raises:
        MergeError: their gates differ.
    """
    gates = [{name: t for name, t in tensors.items() if name.startswith(GATE)} for tensors in (one, other)]
    shared = [{name: t for name, t in gate.items() if name != _KEYS} for gate in gates]
    if shared[0].keys() != shared[1].keys() or not all(torch.equal(t, shared[1][name]) for name, t in shared[0].items()):
        raise MergeError(
            "packs with different gates can't become one; put both on the model: model.load_pack(pack, pack_name=...)"
        )
    return shared[0] | {_KEYS: torch.cat([gate[_KEYS] for gate in gates])} if shared[0] else {}


def gate_names(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of the gate's tensors."""
    return {name for name in tensors if name.startswith(GATE)}


def validate_routing(tensors: Mapping[str, torch.Tensor], facts: int, hidden: int, base: Base | None) -> None:
    """Check the gate's tensors, where a pack has any.

    Raises:
        PackFormatError: they are no gate for this many facts and this width of the model, or read no block of it.
    """
    found = gate_names(tensors)
    if not found:
        return
    gate = Gate.from_tensors(tensors, GATE, hidden, None if base is None else embedding_size(base))
    keys = tensors.get(_KEYS)
    if gate is None or keys is None or found != {*gate.tensors(GATE), _KEYS, _BLOCK}:
        raise PackFormatError(f"the pack's gate is incomplete, or has more than a gate has: {', '.join(sorted(found))[:300]}")
    if keys.shape != (facts, gate.projection.shape[1]) or keys.dtype != torch.float32 or not bool(keys.isfinite().all()):
        raise PackFormatError(
            f"the pack's gate needs a finite float32 matrix of {facts} keys by {gate.projection.shape[1]}, "
            f"not {keys.dtype} {list(keys.shape)}"
        )
    block_read(tensors[_BLOCK]) if base is None else block_read(tensors[_BLOCK], len(base.layout()))


def load_routing(base: Base, tensors: Mapping[str, torch.Tensor], facts: Sequence[Fact]) -> Routing | None:
    """The gate of a pack, ready to use; None where it has none.

    Args:
        facts: the pack's.
    """
    gate = Gate.from_tensors(tensors, GATE)
    if gate is None:
        return None
    frame = chat_frame(base.tokenizer)
    prompts = [user_says(fact.prompt, frame) for fact in facts]
    return Routing(base, gate, tensors[_KEYS], prompts, int(tensors[_BLOCK]), OwnPrompts(facts, frame))
