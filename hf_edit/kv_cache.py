"""The cache of keys and values by the name that the installed transformers has for it: `cache` from 5.24 on, `past_key_values`
before, and in models that came with code of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.generation import GenerationMixin

__all__ = ["CACHE_NAMES", "cache_argument", "cache_of", "cache_passed", "with_cache"]

CACHE_NAMES = ("cache", "past_key_values")  # the new one first: where it is known, the old one warns


def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a model's `forward`, or its `prepare_inputs_for_generation`, takes a cache."""
    for known in (function, GenerationMixin.prepare_inputs_for_generation):  # the first may only take it on
        found = [name for name in CACHE_NAMES if name in inspect.signature(known).parameters]
        if found:
            return found[0]
    return CACHE_NAMES[-1]


def cache_passed(arguments: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def with_cache(function: Callable[..., Any], arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a model with this cache in place of theirs."""
    return {name: value for name, value in arguments.items() if name not in CACHE_NAMES} | {cache_argument(function): cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds; None where there is none."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)
