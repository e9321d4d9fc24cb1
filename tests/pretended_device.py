"""Accelerators for machines without one: the CPU does the arithmetic, and each tensor's storage says which device it is on.

Inside `pretended_devices()`, tensors and models can be created on or moved to `cuda:0`, `cuda:1` and so on, and report that
device. An operation on tensors of several devices raises the RuntimeError of a real accelerator, with the same exceptions:
numbers (tensors without dimensions) and indices may stay on the CPU.

The device is an attribute of the storage, so views share it, and tensors and parameters keep their plain types: code that
checks types runs as on real hardware. Kernels, autocast, missing dtypes and a device's own random numbers are not imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["pretended_devices"]

_CPU = torch.device("cpu")
_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._foreach_copy_, _aten.fill_}  # from any device to any other
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
_FILLING = {_aten.masked_fill, _aten.masked_fill_}  # take a number, though not tagged as pointwise


@contextmanager
def pretended_devices() -> Iterator[None]:
    """A context in which `cuda:N` exists for every N. Tensors that were made there are of no use afterwards."""
    autocast = torch.autocast
    with (
        mock.patch("torch.cuda.get_rng_state", return_value=None),
        mock.patch("torch.cuda.set_rng_state"),
        mock.patch("torch.autocast", lambda device, *a, **k: nullcontext() if device == "cuda" else autocast(device, *a, **k)),
        mock.patch("torch._C._group_tensors_by_device_and_dtype", _grouped),
        _Operations() as operations,
        _Functions(operations),
    ):
        yield


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """The tensors that own a tensor's memory."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def _place(tensor: Tensor) -> torch.device:
    """The device that a tensor reports."""
    return tensor.device if tensor.is_meta else getattr(_parts(tensor)[-1].untyped_storage(), "place", _CPU)


def _put(tensor: Tensor, device: torch.device) -> None:
    for part in _parts(tensor):
        part.untyped_storage().place = device


def _device(given: Any) -> torch.device:
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


# --- calls of torch that name a device or ask for one -------------------------------------------------------------------


class _Moved(torch.autograd.Function):
    """A copy on another device; its gradient is moved back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.before = _place(tensor)
        copy = tensor.clone()
        _put(copy, device)
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Moved.apply(gradient, ctx.before), None


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which takes a device, a dtype, both, or a tensor that has them."""
    first, *rest = args or [kwargs.pop("other", kwargs.pop("device", None))]
    device = _place(tensor)
    if isinstance(first, Tensor):
        device, first = _place(first), first.dtype
    elif first is not None and not isinstance(first, torch.dtype):
        device, first = _device(first), _CPU
    converted = tensor.to(_CPU if first is None else first, *rest, **kwargs)
    return converted if device == _place(tensor) else _Moved.apply(converted, device)


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    copy = tensor.__deepcopy__(memo)
    _put(copy, _place(tensor))
    return copy


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _place(tensor) != _CPU:
        raise TypeError(f"can't convert {_place(tensor)} device type tensor to numpy. Use Tensor.cpu() first.")
    return tensor.numpy(*args, **kwargs)


def _grouped(lists: Sequence[Sequence[Any]], with_indices: bool = False) -> dict[Any, tuple[list[list[Any]], list[int]]]:
    """For optimisers that update many tensors at once; torch's own function asks for devices in C++, and would get CPUs."""
    groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
    for index, tensor in enumerate(lists[0]):
        own, indices = groups.setdefault((_place(tensor), tensor.dtype), ([[] for _ in lists], []))
        for kept, given in zip(own, lists, strict=True):
            kept += given[index : index + 1]  # a list may be empty
        indices += [index] * with_indices
    return groups


_METHODS: Mapping[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _place,
    Tensor.is_cpu.__get__: lambda tensor: _place(tensor) == _CPU,
    Tensor.is_cuda.__get__: lambda tensor: _place(tensor).type == "cuda",
    Tensor.to: _to,
    Tensor.cpu: lambda tensor: _to(tensor, _CPU),
    Tensor.cuda: lambda tensor, device="cuda": _to(tensor, device),
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.__deepcopy__: _deep_copy,
}


class _Functions(TorchFunctionMode):
    """Answers questions about devices, and creates and moves tensors."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _METHODS:
            return _METHODS[function](*args, **kwargs)
        given = _tensors((*args, *kwargs.values()))
        device = None if kwargs.get("device") is None else _device(kwargs["device"])
        if device is not None and device.type == "cuda":
            kwargs["device"] = _CPU
        operations = self._operations
        before, operations.creating_on = operations.creating_on, device or (_place(given[0]) if given else _CPU)
        try:
            made = function(*args, **kwargs)
        finally:
            operations.creating_on = before
        if device is None or device.type == "meta" or _place(made) == device:
            return made
        if given:  # `made` may share memory with it, as in as_tensor
            return _Moved.apply(made, device)
        _put(made, device)
        return made


# --- operations, whose arguments must share a device --------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Checks the arguments of every operation, and puts its results on the same device."""

    creating_on = _CPU  # where results of operations without tensor arguments go

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if function.overloadpacket in _COPIES:
                return function(*args, **kwargs)
            given = [tensor for tensor in _tensors((*args, *kwargs.values())) if not _is_anywhere(tensor)]
            device = _shared_place(function, args, given) if given else self.creating_on
            made = function(*args, **kwargs)
            if not given and torch._C._current_graph_task_id() != -1:
                # made by a gradient's formula, which knows the real device of what it is for
                for tensor in _tensors((made,)):
                    tensor.untyped_storage().anywhere = True
                return made
            for tensor in _tensors((made,)):
                if _place(tensor) == _CPU != device:
                    _put(tensor, device)
        return made


def _is_anywhere(tensor: Tensor) -> bool:
    return not tensor.is_meta and hasattr(_parts(tensor)[-1].untyped_storage(), "anywhere")


def _shared_place(function: Any, args: Sequence[Any], given: Sequence[Tensor]) -> torch.device:
    """The device of an operation's arguments.

    Raises:
        RuntimeError: they are on several, and it is no exception.
    """
    places = {_place(tensor) for tensor in given}
    if len(places) > 1:
        counted = [tensor for tensor in given if _place(tensor) != _CPU]
        if function.overloadpacket in _INDEXING:
            counted += [args[0], *(value for value in _tensors(args[2:]) if value.dim() and not _is_anywhere(value))]
        elif function.overloadpacket in _FILLING or torch.Tag.pointwise in function.tags:
            counted += [tensor for tensor in given if tensor.dim() or (tensor is args[0] and function._schema.is_mutable)]
        else:
            counted = list(given)
        places = {_place(tensor) for tensor in counted}
    if len(places) > 1:
        found = f"found at least two devices, {' and '.join(sorted(map(str, places), reverse=True))}!"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {found} ({function})")
    return places.pop()
