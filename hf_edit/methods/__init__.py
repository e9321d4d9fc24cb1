"""The registry of editing methods. A third party's method joins through `register_method` or the entry-point group
``hf_edit.methods``; it needs no fork."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from .base import EditConfig, Fit, Method

__all__ = ["EditConfig", "Fit", "Method", "available_methods", "get_method", "register_method"]

_BUILT_IN = {
    **dict.fromkeys(("steam", "rome", "memit", "alphaedit"), "hf_edit.methods.steam"),
    "lks": "hf_edit.methods.lks",
}
_methods: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make a method known under its name.

    Raises:
        ValueError: the name is taken by another method.
    """
    known = _methods.get(method.name)
    if known is not None and type(known) is not type(method):
        raise ValueError(f"there is already a method named {method.name!r}: {type(known).__name__}")
    _methods[method.name] = method
    return method


def available_methods() -> list[str]:
    """The names that `edit(method=...)` takes."""
    return sorted({*_BUILT_IN, *_methods, *(point.name for point in entry_points(group="hf_edit.methods"))})


def get_method(name: str) -> Method:
    """A method by name, imported at first use.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _methods:
        if name in _BUILT_IN:
            import_module(_BUILT_IN[name])
        else:
            for point in entry_points(group="hf_edit.methods", name=name):
                register_method(point.load())
    if name not in _methods:
        raise ValueError(f"there is no method {name!r}; there are: {', '.join(available_methods())}")
    return _methods[name]
