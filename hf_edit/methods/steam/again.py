"""An edit made again without some of its facts: the others' values, inserted into the model as if those had never been."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch
from safetensors import SafetensorError

from ...base import Base
from ...errors import HfEditError
from ...statistics import KeyStatistics
from ...suffix import frozen
from ...weights.attach import Factors
from ...weights.solve import Update
from ..base import Fit
from .config import SteamConfig
from .job import Job, in_force
from .parts import appended, chosen, update_of
from .record import Group, Record

__all__ = ["NotRepeatableError", "insert_again"]

# of what is sampled, which a stranger's settings could ask for without end
_MOST = {"contexts": 1000, "context_length": 1000, "statistics_tokens": 10**8}
_SAME = 1e-3  # of a change's norm: far above rounding, far below what other contexts or statistics make


class NotRepeatableError(Exception):
    """An edit can't be made again here; says why."""


def insert_again(
    base: Base,
    fit: Fit,
    keep: Sequence[int],
    config: SteamConfig,
    clean: Callable[[], AbstractContextManager[None]],
    progress: bool,
) -> Fit:
    """See `Steam.remove_exactly`. What lies below the first group that changes stays as it is.

    Raises:
        NotRepeatableError: with all of their facts, the groups would not become what the pack holds.
    """
    record = Record.read(fit.tensors)
    kept = record.kept(keep)
    before = record.groups(fit.facts)
    after = [replace(g, facts=tuple(keep[i] for i in g.facts)) for g in kept.groups([fit.facts[i] for i in keep])]
    same = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(after))
    made: list[dict[str, Update]] = []
    if after[same:]:
        with frozen(base.model):
            try:
                with clean():
                    jobs = _jobs(base, _at_hand(config), before[same:], progress)
                as_it_was = _inserted(base, fit, jobs, before, same)
            except (HfEditError, ValueError, OSError, SafetensorError, torch.linalg.LinAlgError) as error:
                raise NotRepeatableError(str(error)) from error
            for group, updates in zip(before[same:], as_it_was, strict=True):
                _check(fit, group, updates)
            made = _inserted(base, fit, jobs, after, same)
    tensors = chosen(fit, [i for group in after[:same] for i in group.facts])
    for updates in made:
        tensors = appended(tensors, updates)
    order = [i for group in after for i in group.facts]
    rest = Record(record.values[order], kept.edits).tensors()
    return Fit(tensors | rest, fit.modules, tuple(fit.facts[i] for i in order))


def _at_hand(config: SteamConfig) -> SteamConfig:
    """The settings, which may be a stranger's, with their statistics read: nothing is downloaded for them, and nothing without
    end is sampled.

    Raises:
        ValueError: they ask for more than any edit does.
        HfEditError, OSError: the statistics are not here, or damaged.
    """
    for name, most in _MOST.items():
        if (getattr(config, name) or 0) > most:
            raise ValueError(f"the pack's {name} is {getattr(config, name)}")
    if not isinstance(config.statistics, (str, os.PathLike)) or config.statistics == "given":
        return config
    return replace(config, statistics=KeyStatistics.from_pretrained(config.statistics, local_files_only=True))


def _jobs(base: Base, config: SteamConfig, groups: Sequence[Group], progress: bool) -> dict[tuple[str, int], Job]:
    """What the groups were edited with, by editor and seed."""
    return {key: Job.prepare(base, config, *key, progress) for key in {(g.editor, g.seed): None for g in groups}}


def _inserted(
    base: Base, fit: Fit, jobs: Mapping[tuple[str, int], Job], groups: Sequence[Group], first: int
) -> list[dict[str, Update]]:
    """Updates of the groups from the one with the number `first` on, each with those before it in force."""
    values, made = Record.read(fit.tensors).values, []
    below = [i for group in groups[:first] for i in group.facts]
    earlier = [fit.facts[i] for i in below]
    with ExitStack() as stack:
        stack.enter_context(in_force(base, {module: _factors(fit, module, below) for module in fit.modules} if below else {}))
        for group in groups[first:]:
            facts = [fit.facts[i] for i in group.facts]
            updates = jobs[group.editor, group.seed].insert(facts, values[list(group.facts)], earlier)
            stack.enter_context(in_force(base, {module: update.factors for module, update in updates.items()}))
            earlier += facts
            made.append(updates)
    return made


def _factors(fit: Fit, module: str, facts: Sequence[int]) -> Factors:
    whole = update_of(fit, module).factors
    return Factors(whole.left[:, list(facts)], whole.right[list(facts)])


def _check(fit: Fit, group: Group, updates: Mapping[str, Update]) -> None:
    """Compare a group's insertion with what the pack holds of it."""
    for module in sorted({*fit.modules, *updates}):
        if module not in fit.modules:
            raise NotRepeatableError(f"it would change {module} as well")
        stored = _factors(fit, module, group.facts)
        left, right = [stored.left], [stored.right]
        if module in updates:
            left.append(-updates[module].factors.left)
            right.append(updates[module].factors.right)
        difference = Factors(torch.cat(left, dim=1), torch.cat(right)).norm()
        if not difference <= _SAME * stored.norm():  # also where it is no number
            raise NotRepeatableError(
                f"made again as it was, it changes {module} otherwise. It was made with other settings, "
                "statistics or edits beneath, is a sum, or was solved for fewer facts before"
            )
