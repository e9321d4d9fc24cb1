"""Leaving a model as it was, wherever the work on it is cut off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Turns", "Untouched", "uninterrupted"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the context ends, for steps that must be done whole. No other thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


class Turns:
    """One change at a time of what is active on a model, and none while another thread needs the model without edits.

    Attributes:
        lock: held for every change; the thread that holds it may take it again.
        clean: the threads that need the model without edits, once for each time.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clean: list[int] = []
        self._free = threading.Condition(self.lock)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the other threads, then hold the lock."""
        me = threading.get_ident()
        with self.lock:
            # who needs the model clean as well does not wait: two such threads would wait for each other
            while self.clean and me not in self.clean:
                self._free.wait()
            yield

    def done(self) -> None:
        """This thread needs the clean model once less; call it with the lock held."""
        self.clean.remove(threading.get_ident())
        self._free.notify_all()


class Untouched:
    """A model's tensors, hooks and modes by reference, to put back what was swapped, added or switched meanwhile.

    Nothing is copied: edits swap tensors for others, they never write into them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self._modules = [(m, m.training, {name: dict(getattr(m, name)) for name in _HOOKS}) for m in model.modules()]

    def put_back(self) -> None:
        """The model as it was when this was made."""
        for parameter, data, requires_grad in self._parameters:
            if _is_elsewhere(parameter, data):
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for module, training, hooks in self._modules:
            module.training = training
            for name, before in hooks.items():
                now: dict[int, Any] = getattr(module, name)
                if now != before:
                    now.clear()
                    now.update(before)


def _is_elsewhere(parameter: nn.Parameter, data: torch.Tensor) -> bool:
    plain = type(parameter.data) is type(data) is torch.Tensor
    return plain and (parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape)
