"""Leaving a model as it was, wherever the work on it is cut off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import nn

__all__ = ["EditsOff", "Turns", "Untouched", "edits_off", "uninterrupted"]

_PATIENCE = 1.0  # seconds that a thread which needs the model clean lets waiting changes go first
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


class EditsOff:
    """While it lasts, the edits at mentions of one model don't act on the thread or asynchronous task that made this.

    A thread that is started meanwhile has its own context, so the edits do act there. `end` may be called anywhere.

    Args:
        model: the base model.
    """

    _all: ContextVar[tuple[EditsOff, ...]] = ContextVar("edits_off", default=())

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._all.set((*self._all.get(), self))

    @classmethod
    def of(cls, model: nn.Module | None) -> bool:
        """Whether the edits at mentions of a model are off here."""
        return any(one._model is model for one in cls._all.get())

    def end(self) -> None:
        """Let the edits act again, also where another thread does this."""
        self._model = None
        self._all.set(tuple(one for one in self._all.get() if one is not self))


@contextmanager
def edits_off(model: nn.Module) -> Iterator[None]:
    """A context in which no edit at mentions acts on a base model, on the thread or task that enters it alone."""
    off = EditsOff(model)
    try:
        yield
    finally:
        off.end()


class Turns:
    """One change at a time of what is active on a model, none while another thread needs the model without edits, and none
    while another thread runs it.

    Attributes:
        lock: held for every change; the thread that holds it may take it again.
        clean: by number, in the order in which they began, the contexts that need the model without edits, each with the
            thread that entered it. Another thread may leave it: generators wander.
        shared: of these the ones beside which other threads run the edited model.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clean: dict[int, int] = {}
        self.shared: set[int] = set()
        self._numbers = count()
        self._waiting = 0  # changes
        self._changing: int | None = None  # the thread that holds the lock for a change
        self._running: dict[int, int] = {}  # by thread, how many runs of the model are under way
        self._moved = threading.Condition(self.lock)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the other threads' contexts and runs to end, then hold the lock."""
        me = threading.get_ident()
        with self.lock:
            before = self._changing
            if before != me:  # to wait gives the lock away
                # who needs the model clean as well does not wait: two such threads would wait for each other
                self._wait_while(lambda: bool(self.clean and me not in self.clean.values()) or self._others_run(me))
            self._changing = me
            try:
                yield
            finally:
                self._changing = before

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run the model as it stands: changes by other threads wait meanwhile. While another thread changes it, or needs it
        without edits, the run waits. In a thread that does so itself it never waits."""
        me = threading.get_ident()
        with self.lock:
            if me not in self._running and me not in self.clean.values():
                while self._waiting or self.clean.keys() - self.shared:
                    self._moved.wait()
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self.lock:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._moved.notify_all()

    def _others_run(self, me: int) -> bool:
        return any(thread != me for thread in self._running)

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        """Wait with the lock held; new runs wait, too."""
        while condition():
            self._waiting += 1
            try:
                self._moved.wait()
            finally:
                self._waiting -= 1
                self._moved.notify_all()

    def enter(self, shared: Callable[[], bool]) -> int:
        """Begin to need the clean model; gives the number. Call it with the lock held.

        Args:
            shared: whether the edits, as they stand when this is called, can be off for one thread alone.
        """
        me = threading.get_ident()
        if self._changing != me and me not in self.clean.values():
            if self._waiting:  # threads that come and go would never let a change through
                self._moved.wait_for(lambda: not self._waiting, _PATIENCE)
            self._wait_while(lambda: not self.clean and self._others_run(me) and not shared())
        number = next(self._numbers)
        if not self.clean.keys() - self.shared and shared():
            self.shared.add(number)
        self.clean[number] = me
        self._moved.notify_all()
        return number

    def leave(self, number: int) -> bool | None:
        """Need the clean model no more. Call it with the lock held.

        Returns:
            Whether nobody else needs it; None where only contexts around this one do, in the same thread.
        """
        me = self.clean.pop(number)
        self.shared.discard(number)
        self._moved.notify_all()
        own = [other for other, thread in self.clean.items() if thread == me]
        return not self.clean if not own or own[-1] > number else None


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
