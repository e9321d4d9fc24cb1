"""STEAM and its base editors as methods: values, anchors, insertion, and a pack of low-rank factors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from torch import nn

from ...base import Base
from ...errors import PackFormatError
from ...facts import Fact
from ...routing import GATE, fit_routing, gate_names, joined_routing, kept_routing, load_routing, validate_routing
from ...scope import Entities
from ...suffix import frozen
from ...weights.attach import ActingAlone, Factors, WeightAttachment, check_changes, check_values
from ...weights.editors import ONE_BY_ONE
from .. import Fit, register_method
from ..base import Attachment, require
from ..scope.attachment import MentionAttachment
from .again import NotRepeatableError, insert_again
from .anchors import Anchors
from .config import BaselineConfig, SteamConfig
from .job import Job
from .parts import PARTS, appended, chosen, update_of
from .record import RECORD, Record, groups_of

__all__ = ["Steam"]

logger = logging.getLogger(__name__)


class Steam:
    """Weight edits: a base editor, with semantic anchors where `anchored`.

    Args:
        name: of the method.
        editor: the base editor, or None for the configuration's choice.
        anchored: whether values are pulled towards semantic anchors.
    """

    in_weights = True

    def __init__(self, name: str, editor: str | None = None, anchored: bool = True) -> None:
        self.name = name
        self._editor = editor
        self._anchored = anchored
        self.config_class: type[SteamConfig] = SteamConfig if anchored else BaselineConfig

    def fit(
        self,
        base: Base,
        facts: Sequence[Fact],
        config: SteamConfig,
        *,
        previous: Fit | None,
        clean: Callable[[], AbstractContextManager[None]],
        seed: int,
        progress: bool,
    ) -> Fit:
        """See `hf_edit.methods.Method.fit`. ROME edits one fact at a time, each on top of the last; others all at once."""
        require(
            self._editor is None or config.base_editor in (None, self._editor),
            f"method={self.name!r} is an editor by itself; for base_editor={config.base_editor!r} take method='steam'",
        )
        require(
            not config.gate or self._editor in (None, *ONE_BY_ONE),
            f"with a gate each fact is inserted by itself, which {self.name!r} does not do; take method='steam'",
        )
        editor = self._editor or config.base_editor or ("rome" if len(facts) == 1 or config.gate else "memit")
        earlier = list(previous.facts) if previous else []
        with ExitStack() as stack:
            stack.enter_context(frozen(base.model))
            with clean():
                job = Job.prepare(base, config, editor, seed, progress)
                anchors = job.anchors(facts) if self._anchored and (config.anchor_weight or config.anchor_ratio) else None
            before = previous.tensors if previous else {}
            tensors = {name: t for name, t in before.items() if name not in RECORD and not name.startswith(GATE)}
            # behind a gate, facts never meet
            groups = [list(range(len(facts)))] if config.gate else groups_of(facts, editor)
            values = []
            for group in groups:
                new = [facts[i] for i in group]
                objective = partial(job.objective, anchors, group)
                if config.gate:
                    tensors = appended(tensors, job.alone(new, objective), PARTS[:1])
                    continue
                updates, found = job.fit(new, objective, earlier)
                values.append(found)
                earlier += new
                tensors = appended(tensors, updates)
                stack.enter_context(job.in_force(updates))
            everything = (*(previous.facts if previous else ()), *facts)
            gate = fit_routing(base, everything, before, clean, seed, progress, config.gate_quiet) if config.gate else {}
        notes = {str(fact.id): _note(anchors, i) for i, fact in enumerate(facts)} if anchors else {}
        modules = tuple(sorted({name.rpartition(".")[0] for name in tensors}))
        ordered = (facts[i] for group in groups for i in group)
        record = {} if config.gate else Record.of(torch.cat(values), seed, editor).behind(before).tensors()
        return Fit(tensors | gate | record, modules, (*(previous.facts if previous else ()), *ordered), notes)

    def remove(self, fit: Fit, keep: Sequence[int]) -> Fit:
        """The same edit with only the facts `keep`: each weight's update is solved again from its stored gram matrix.

        In one layer without `bystanders` that is the edit of the same values without the other facts. Otherwise the other
        tokens of their prompts stay protected, and of several layers the upper ones keep the residuals that they were given
        with those facts in force below: of 20 facts of a batch, 19 are then left with weights 8 to 11 % from an edit of these
        alone (without `retries`), and targets' NLL within 0.02; see `remove_exactly`. Behind a gate facts stand by themselves,
        and the others stay bit for bit.
        """
        keep = list(keep)
        facts = tuple(fit.facts[i] for i in keep)
        if gate_names(fit.tensors):
            return Fit(chosen(fit, keep) | kept_routing(fit.tensors, keep), fit.modules, facts)
        tensors = Record.read(fit.tensors).kept(keep).tensors()
        for module in fit.modules:
            left, right, gram = (fit.tensors[f"{module}.{part}"].double() for part in PARTS)
            whitened = (torch.eye(len(gram), dtype=torch.float64) + gram) @ right  # M K, see hf_edit.weights.solve
            gram = gram[keep][:, keep]
            solved = torch.linalg.solve(torch.eye(len(keep), dtype=torch.float64) + gram, whitened[keep])
            tensors |= {f"{module}.{p}": t.float() for p, t in zip(PARTS, (left[:, keep], solved, gram), strict=True)}
        return Fit(tensors, fit.modules, facts)

    def remove_exactly(
        self,
        base: Base,
        fit: Fit,
        keep: Sequence[int],
        config: SteamConfig,
        *,
        clean: Callable[[], AbstractContextManager[None]],
        progress: bool,
    ) -> Fit:
        """The edit that the values of the facts `keep` make where the other facts never were: they are inserted into the model
        anew, group on top of group, and nothing is optimised.

        That takes what the fit had: the statistics of keys, contexts, settings, and edits beneath. So the groups are first
        inserted with all of their facts. Where that does not give what the pack holds, as of a sum of packs or of edits with
        different settings, the facts are taken out by `remove`, with a warning. Values that `retries` raised, with all facts in
        force, stay as they are: 19 of 20 facts are then 2 to 4 % from an edit of their own, without them the same to the bit.

        Args:
            base: the model, with the weight edits in force that this one was made on top of, and without this one.
            keep: indices of facts, ascending.
            config, clean, progress: as for `fit`.
        """
        if config.gate:
            return self.remove(fit, keep)
        try:
            return insert_again(base, fit, keep, config, clean, progress)
        except NotRepeatableError as error:
            logger.warning("the edit can't be made again without these facts, they are solved out of it instead: %s", error)
            return self.remove(fit, keep)

    def join(self, one: Fit, other: Fit) -> Fit:
        """Both edits in one: their changes add up.

        Raises:
            MergeError: they have different gates.
        """
        gate = joined_routing(one.tensors, other.tensors)
        own = {name: t for name, t in one.tensors.items() if name not in gate and name not in RECORD}
        tensors = appended(own, {m: update_of(other, m) for m in other.modules}, PARTS[:1] if gate else PARTS)
        rest = gate or Record.read(other.tensors).behind(one.tensors).tensors()
        return Fit(tensors | rest, tuple(sorted({*one.modules, *other.modules})), (*one.facts, *other.facts))

    def validate(self, fit: Fit, config: SteamConfig, base: Base | None) -> None:
        """See `hf_edit.methods.Method.validate`."""
        count = len(fit.facts)
        if len(set(fit.modules)) < len(fit.modules):
            raise PackFormatError("the pack names a module twice")
        of_gate = gate_names(fit.tensors)
        if bool(of_gate) != config.gate:
            raise PackFormatError(f"the pack says gate={config.gate} and has {'one' if of_gate else 'none'}")
        parts = PARTS[:1] if of_gate else PARTS
        expected = {f"{module}.{part}" for module in fit.modules for part in parts} | (set() if of_gate else set(RECORD))
        if wrong := sorted(expected ^ (set(fit.tensors) - of_gate)):
            raise PackFormatError(f"the pack's tensors do not match its modules: {', '.join(wrong)[:300]}")
        for module in fit.modules:
            left, *rest = (fit.tensors[f"{module}.{part}"] for part in parts)
            if any(t.dtype != torch.float32 or t.dim() != 2 for t in (left, *rest)):
                raise PackFormatError(f"the factors of {module} must be float32 matrices")
            counts = (left.shape[1], *(t.shape[0] for t in rest), *(t.shape[1] for t in rest[1:]))
            if any(size != count for size in counts):
                raise PackFormatError(f"the factors of {module} are not for {count} facts")
        if not fit.modules:
            raise PackFormatError("the pack changes no module" + (": it has a gate and nothing behind it" if of_gate else ""))
        hidden = len(fit.tensors[f"{fit.modules[0]}.left"])
        if of_gate:
            validate_routing(fit.tensors, count, hidden, base)
        else:
            Record.validate(fit.tensors, count, len(fit.modules), hidden)
        if base is not None and of_gate:
            check_values(_values(fit), base, config.edit_module)
        elif base is not None:
            check_changes(self.factors(fit), base, config.edit_module)

    def factors(self, fit: Fit) -> dict[str, Factors]:
        """The changes of weights by module; column i of `left` and row i of `right` belong to fact i."""
        return {m: Factors(fit.tensors[f"{m}.left"], fit.tensors[f"{m}.right"]) for m in fit.modules}

    def attach(self, base: Base, fit: Fit, config: SteamConfig) -> Attachment:
        """See `hf_edit.methods.Method.attach`."""
        if config.gate:
            modules: dict[str, nn.Module] = {name: base.model.get_submodule(name) for name in fit.modules}
            effects = {modules[name]: ActingAlone(values.to(base.device)) for name, values in _values(fit).items()}
            return MentionAttachment(base, Entities.of(fit.facts), effects, load_routing(base, fit.tensors, fit.facts))
        return WeightAttachment(base.model, self.factors(fit))


def _values(fit: Fit) -> dict[str, torch.Tensor]:
    """What acts behind a gate, by module: [out, facts]."""
    return {module: fit.tensors[f"{module}.left"] for module in fit.modules}


def _note(anchors: Anchors, fact: int) -> str:
    count = anchors.counts[fact]
    if fact in anchors.in_context:
        return f"in-context anchor, {count} prompt{'s'[: count != 1]}"
    return f"{count} references" if count else "no anchor: too few references are recalled"


register_method(Steam("steam"))
register_method(Steam("rome", "rome", anchored=False))
register_method(Steam("memit", "memit", anchored=False))
register_method(Steam("alphaedit", "alphaedit", anchored=False))
