"""Rewriting the states of mentioned entities while the model runs."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...base import Base
from ...suffix import hidden_of
from .generator import Generator
from .scope import Scope, mentions_in_tokens

__all__ = ["LKSAttachment"]


class LKSAttachment:
    """An LKS edit in force on a model, until `detach`.

    Every mention of an edited entity is rewritten where it ends: in prompts, behind left padding, in later chunks of a
    prefill, in continued conversations, and in text that the model itself generates. Mentions are found in the whole text,
    so the ids behind a cache are remembered; inside `generate` the model is handed them, which also holds for beams.

    Args:
        base: model and tokenizer.
        block: the block whose output is rewritten.
        scope: the entities.
        generator: on the model's device.
        codes: [entities, width], `Generator.encode` of each entity's feature.
    """

    def __init__(self, base: Base, block: int, scope: Scope, generator: Generator, codes: torch.Tensor) -> None:
        self._tokenizer = base.tokenizer
        self._scope, self._generator, self._codes = scope, generator, codes
        self._now = threading.local()
        self._past: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()
        self._window = scope.longest + 8
        decoder = base.model.get_decoder()
        self._signature = inspect.signature(decoder.forward)
        self._handles = [
            decoder.register_forward_pre_hook(self._find, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(self._remember),
            base.layout().blocks[block].register_forward_hook(self._rewrite, prepend=True),
        ]
        self._model = base.model
        self._prepare()

    def detach(self) -> None:
        """Leave the model as it was; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._model is not None:
            if self._wrapped_before is None:
                del self._model.prepare_inputs_for_generation
            else:
                self._model.prepare_inputs_for_generation = self._wrapped_before
        self._model = None

    def _prepare(self) -> None:
        """Have `generate` show the whole text of each row, which the model itself only gets token by token."""
        self._wrapped_before = self._model.__dict__.get("prepare_inputs_for_generation")
        original = self._model.prepare_inputs_for_generation

        @functools.wraps(original)
        def prepare(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._now.text = input_ids
            return original(input_ids, *args, **kwargs)

        self._model.prepare_inputs_for_generation = prepare

    def _find(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: which of the tokens it is given end a mention."""
        shown = self._now.__dict__.pop("text", None)
        self._now.points = None
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments.get("kwargs", {}), **arguments}
        ids = arguments.get("input_ids")
        if ids is None:
            return
        cache = arguments.get("past_key_values")
        done = _length(cache)
        text = self._whole(ids, done, cache, shown)
        self._now.seen = text
        mask = arguments.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= text.shape[1]:
            mask = mask[:, : text.shape[1]] if mask.shape[1] == done + ids.shape[1] else mask[:, -text.shape[1] :]
        else:
            mask = None
        self._now.points = self._points(text, mask, text.shape[1] - ids.shape[1])

    def _remember(self, _: nn.Module, __: Any, output: Any) -> None:
        """Behind the decoder: what the cache that it gives back holds, for the next call."""
        seen = self._now.__dict__.pop("seen", None)
        cache = getattr(output, "past_key_values", None)
        if cache is not None and seen is not None:
            with suppress(TypeError):  # a cache that can't be referred to weakly is not remembered
                self._past[cache] = seen

    def _whole(self, ids: torch.Tensor, done: int, cache: Any, shown: torch.Tensor | None) -> torch.Tensor:
        """The rows' ids from the beginning, as far as they are known: what the cache holds, then `ids`."""
        if not done:
            return ids
        new = ids.shape[1]
        if shown is not None and shown.shape[0] == ids.shape[0] and shown.shape[1] >= done + new:
            return shown[:, : done + new]
        past = self._past.get(cache)
        if past is not None and past.shape[0] == ids.shape[0] and past.shape[1] >= done:
            return torch.cat([past[:, :done].to(ids.device), ids], dim=1)
        return ids

    def _points(
        self, text: torch.Tensor, mask: torch.Tensor | None, first: int
    ) -> tuple[list[int], list[int], list[int]] | None:
        """(rows, columns, entities) of mentions that end at or behind column `first`; columns count from there."""
        begin = max(0, first - self._window)  # a mention that ends behind `first` can't begin further back
        rows, columns, entities = [], [], []
        kept = None if mask is None else mask[:, begin:].tolist()
        for row, ids in enumerate(text[:, begin:].tolist()):
            real = range(len(ids)) if kept is None else [i for i, keep in enumerate(kept[row]) if keep]
            for index, entity in mentions_in_tokens(self._tokenizer, self._scope, [ids[i] for i in real]):
                column = begin + real[index] - first
                if column >= 0:
                    rows.append(row)
                    columns.append(column)
                    entities.append(entity)
        return (rows, columns, entities) if rows else None

    def _rewrite(self, _: nn.Module, __: Sequence[Any], output: Any) -> Any:
        """Behind the block: put the generator's states in the place of the mentions'."""
        points = getattr(self._now, "points", None)
        if points is None:
            return None
        rows, columns, entities = points
        states = hidden_of(output)
        own = states[rows, columns].to(self._codes)
        new = self._generator(self._codes[entities], own)
        states = states.clone()
        states[rows, columns] = new.to(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states


def _length(cache: Any) -> int:
    """How many tokens a cache holds."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
