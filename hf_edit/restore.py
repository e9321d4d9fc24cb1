"""Leaving a model as it was, wherever the work on it is cut off."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import nn

__all__ = ["EditsOff", "Turns", "Untouched", "uninterrupted"]

logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds that a thread which needs the model clean lets waiting changes go first
_LONG = 30  # seconds of waiting after which it is said for what
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
    """A thread's or asynchronous task's need of a model without edits. While it lasts, edits at mentions are off there.

    What a context variable reaches counts: work that `asyncio.to_thread` hands on does, a thread that is started doesn't.

    Args:
        model: the base model.
    """

    _all: ContextVar[tuple[EditsOff, ...]] = ContextVar("edits_off", default=())

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        self._model: nn.Module | None = model
        self._ended = False
        self._all.set((*(one for one in self._all.get() if not one._ended), self))

    @classmethod
    def of(cls, model: nn.Module | None) -> bool:
        """Whether the edits at mentions of a model are off here."""
        return model is not None and any(one._model is model for one in cls._all.get())

    @property
    def here(self) -> bool:
        """Whether it was made by this thread or task, or by the one that handed on this work."""
        return self in self._all.get()

    @property
    def mine(self) -> bool:
        """Whether to wait for its end would be to wait for oneself."""
        return self.thread == threading.get_ident() or self.here

    def act(self) -> None:
        """Let the edits act again, though the model is still needed without those that were in force."""
        self._model = None

    def end(self) -> None:
        """Let the edits act again; also another thread may do this."""
        self._model, self._ended = None, True
        if self.here:
            self._all.set(tuple(one for one in self._all.get() if one is not self))


class Turns:
    """One change at a time of what is active on a model, none while another thread needs the model without edits, and none
    while another thread runs it.

    Attributes:
        lock: held for every change; the thread that holds it may take it again.
        clean: by number, in the order in which they began, the contexts that need the model without edits. Another thread than
            began one may end it: generators wander.
        shared: of these the ones beside which other threads run the edited model.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lock = threading.RLock()
        self.clean: dict[int, EditsOff] = {}
        self.shared: set[int] = set()
        self._model = model
        self._numbers = count()
        self._waiting = 0  # changes
        self._changing: int | None = None  # the thread that holds the lock for a change
        self._running: dict[object, int] = {}  # the runs of the model that are under way, each with its thread
        self._moved = threading.Condition(self.lock)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the other threads' contexts and runs to end, then hold the lock."""
        me = threading.get_ident()
        with self.lock:
            before = self._changing
            if before != me:  # to wait gives the lock away
                # who needs the model clean as well does not wait: two such threads would wait for each other
                self._wait_while(lambda: bool(self.clean and not self._mine()) or self._others_run(me))
            self._changing = me
            try:
                yield
            finally:
                self._changing = before

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run the model as it stands: changes by other threads wait meanwhile. While another thread changes it, or needs it
        without edits of weights, the run waits. In a thread that does so itself it never waits."""
        me, this = threading.get_ident(), object()
        try:
            try:
                with self.lock:
                    if me not in self._running.values() and not self._mine():
                        while self._waiting or self._exclusive():
                            self._wait()
                    self._running[this] = me
                yield
            finally:
                self._ran(this)
        except BaseException:  # also an interrupt on the way out
            self._ran(this)
            raise

    def _ran(self, run: object) -> None:
        with self.lock:
            self._running.pop(run, None)
            self._moved.notify_all()

    def _mine(self) -> bool:
        return any(one.mine for one in self.clean.values())

    def _exclusive(self) -> set[int]:
        return self.clean.keys() - self.shared

    def _others_run(self, me: int) -> bool:
        return any(thread != me for thread in self._running.values())

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        """Wait with the lock held; new runs wait, too."""
        while condition():
            self._waiting += 1
            try:
                self._wait()
            finally:
                self._waiting -= 1
                self._moved.notify_all()

    def _wait(self) -> None:
        if not self._moved.wait(_LONG):
            logger.warning(
                "waiting for another thread, which runs the model or has its edits disabled, for over %d seconds; a generator "
                "that is inside model.disable_edits() must be stepped by one thread",
                _LONG,
            )
            self._moved.wait()

    def enter(self, shared: Callable[[], bool]) -> int:
        """Begin to need the clean model; gives the number. Call it with the lock held.

        Args:
            shared: whether the edits, as they stand when this is called, can be off for one thread alone.
        """
        me = threading.get_ident()
        if self._changing != me and not self._mine():
            if self._waiting:  # threads that come and go would never let a change through
                self._moved.wait_for(lambda: not self._waiting, _PATIENCE)
            self._wait_while(lambda: not self.clean and self._others_run(me) and not shared())
        number = next(self._numbers)
        if not self._exclusive() and shared():
            self.shared.add(number)
        self.clean[number] = EditsOff(self._model)
        self._moved.notify_all()
        return number

    def leave(self, number: int) -> bool | None:
        """Need the clean model no more. Call it with the lock held.

        Returns:
            Whether nobody else needs it, but for those who share it; None where only contexts around this one do, in the same
            thread.
        """
        one = self.clean.pop(number)
        if number in self.shared and not one.here:
            logger.warning(
                "model.disable_edits() was left by another thread or task than entered it; what ran there was edited all the "
                "time. Enter and leave it in one thread, for each step of a generator anew"
            )
        self.shared.discard(number)
        one.end()
        self._moved.notify_all()
        rest = self._exclusive()
        own = [other for other in sorted(rest) if self.clean[other].mine]
        return not rest if not own or own[-1] > number else None


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
