"""Switching weight edits that are kept beside the weights by what a prompt asks (`hf_edit.gate`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..answers import mentions
from ..asked import asking
from ..base import Base
from ..facts import Fact
from ..gate import Gate, PromptEnd, read_queries

__all__ = ["GateSwitch"]


class GateSwitch:
    """A `Switch` for `WeightAttachment`: each fact is on for the rows whose prompt asks for it, until `detach`.

    Weights are edited below the gate's block, so the prompt is run through the lower blocks once more, with all facts off,
    before it runs. A forward of several tokens is taken as a prompt, one of a single token as its continuation.

    Args:
        base: the model, free of these edits.
        gate: on the model's device.
        block: the block that it reads.
        facts: in the order of the factors' columns.
    """

    def __init__(self, base: Base, gate: Gate, block: int, facts: Sequence[Fact]) -> None:
        self._base, self._gate, self._block, self._facts = base, gate, block, facts
        self._end = PromptEnd(base.tokenizer)
        rows = [base.tokenizer(f.question)["input_ids"] for f in facts]
        self._keys = gate.project(read_queries(base, block, rows, [self._end(row) for row in rows]))
        self._now = threading.local()
        self._handle = base.model.get_decoder().register_forward_pre_hook(self._read, with_kwargs=True)

    def __call__(self) -> torch.Tensor:
        """Float [rows, facts]: 1 for the fact that the row's prompt asks for."""
        return getattr(self._now, "on", torch.zeros(1, len(self._facts)))

    def detach(self) -> None:
        """Leave the model as it was; may be called again."""
        self._handle.remove()

    def _read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or getattr(self._now, "reading", False) or (ids.shape[1] == 1 and hasattr(self._now, "on")):
            return
        mask = kwargs.get("attention_mask")
        whole = torch.ones_like(ids) if not isinstance(mask, torch.Tensor) or mask.dim() != 2 else mask[:, -ids.shape[1] :]
        rows = [[t for t, kept in zip(r, m, strict=True) if kept] for r, m in zip(ids.tolist(), whole.tolist(), strict=True)]
        ends = asking() or [self._end(row) for row in rows]
        self._now.on, self._now.reading = torch.zeros(1, len(self._facts)), True
        try:
            queries = self._gate.project(read_queries(self._base, self._block, rows, list(ends)))
        finally:
            self._now.reading = False
        self._now.on = torch.stack([self._chosen(row, query) for row, query in zip(rows, queries, strict=True)])

    def _chosen(self, row: Sequence[int], query: torch.Tensor) -> torch.Tensor:
        text = self._base.tokenizer.decode(row)
        on = torch.zeros(len(self._facts))
        asked = [i for i, f in enumerate(self._facts) if any(mentions(text, name) for name in (f.subject, *f.aliases))]
        if asked and (best := self._gate.choose(query, self._keys[asked])) >= 0:
            on[asked[best]] = 1.0
        return on
