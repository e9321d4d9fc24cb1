"""STEAM and its base editors as methods: values, anchors, insertion, and a pack of low-rank factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ...answers import score_targets
from ...base import Base
from ...errors import PackFormatError
from ...facts import Fact, fold
from ...layout import Layout, weight_shape, write_scale
from ...mentions import MentionAttachment
from ...positions import encode, fact_text
from ...routing import GATE, fit_routing, gate_names, joined_routing, kept_routing, load_routing, validate_routing
from ...scope import Entities
from ...statistics import KeyStatistics, open_statistics
from ...suffix import frozen
from ...texts import sample_contexts
from ...weights.attach import ActingAlone, Factors, WeightAttachment, check_changes
from ...weights.editors import EDITORS, ONE_BY_ONE, Insertion
from ...weights.prompts import FactTexts, fact_texts
from ...weights.solve import Update
from ...weights.values import Objective, Values, ValueSettings, optimize_values
from .. import Fit, register_method
from ..base import Attachment, require
from .alignment import Alignment, Contrast
from .anchors import Anchors, build_anchors, informative_blocks
from .config import BaselineConfig, SteamConfig

__all__ = ["Steam"]

_PARTS = ("left", "right", "gram")
_JOINED: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "left": partial(torch.cat, dim=1),
    "right": torch.cat,
    "gram": lambda grams: torch.block_diag(*grams),
}

ObjectiveOf = Callable[[Sequence[int]], Objective | None]  # the alignment term of facts of a group, by their indices in it


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
                job = _Job.prepare(base, config, editor, seed, progress)
                anchors = job.anchors(facts) if self._anchored and (config.anchor_weight or config.anchor_ratio) else None
            before = previous.tensors if previous else {}
            tensors = {name: t for name, t in before.items() if not name.startswith(GATE)}
            groups = _groups(facts, editor, config.gate)
            for group in groups:
                subjects = {fold(facts[i].subject) for i in group}
                # what stands about the same subject has the same key: to protect it would keep the new fact out
                protected = [f for f in earlier if fold(f.subject) not in subjects]
                updates = job.fit([facts[i] for i in group], partial(job.objective, anchors, group), protected)
                earlier += [facts[i] for i in group]
                tensors = _appended(tensors, updates, _PARTS[:2] if config.gate else _PARTS)
                if not config.gate:  # behind a gate, facts never meet
                    stack.enter_context(job.in_force(updates))
            everything = (*(previous.facts if previous else ()), *facts)
            gate = fit_routing(base, everything, before, clean, seed, progress, config.gate_quiet) if config.gate else {}
        notes = {str(f.id): _note(n) for f, n in zip(facts, anchors.counts, strict=True)} if anchors else {}
        modules = tuple(sorted({name.rpartition(".")[0] for name in tensors}))
        ordered = (facts[i] for group in groups for i in group)
        return Fit(tensors | gate, modules, (*(previous.facts if previous else ()), *ordered), notes)

    def remove(self, fit: Fit, keep: Sequence[int]) -> Fit:
        """The same edit with only the facts `keep`: each weight's update is solved again from its stored gram matrix.

        In one layer without `bystanders` that is the edit of the same values without the other facts. Otherwise the other
        tokens of their prompts stay protected, and of several layers the upper ones keep the residuals that they were given
        with those facts in force below: of 20 facts of a batch, 19 are then left with weights 5 to 7 % from an edit of these
        alone (without `retries`), and targets' NLL within 0.006. Behind a gate facts stand by themselves, and the others stay
        bit for bit.
        """
        keep = list(keep)
        facts = tuple(fit.facts[i] for i in keep)
        if any(name.startswith(GATE) for name in fit.tensors):
            return Fit(_chosen(fit, keep) | kept_routing(fit.tensors, keep), fit.modules, facts)
        tensors: dict[str, torch.Tensor] = {}
        for module in fit.modules:
            left, right, gram = (fit.tensors[f"{module}.{part}"].double() for part in _PARTS)
            whitened = (torch.eye(len(gram), dtype=torch.float64) + gram) @ right  # M K, see hf_edit.weights.solve
            gram = gram[keep][:, keep]
            solved = torch.linalg.solve(torch.eye(len(keep), dtype=torch.float64) + gram, whitened[keep])
            tensors |= {f"{module}.{p}": t.float() for p, t in zip(_PARTS, (left[:, keep], solved, gram), strict=True)}
        return Fit(tensors, fit.modules, facts)

    def join(self, one: Fit, other: Fit) -> Fit:
        """Both edits in one: their changes add up.

        Raises:
            MergeError: they have different gates.
        """
        gate = joined_routing(one.tensors, other.tensors)
        own = {name: t for name, t in one.tensors.items() if name not in gate}
        tensors = _appended(own, {m: _update(other, m) for m in other.modules}, _PARTS[:2] if gate else _PARTS)
        return Fit(tensors | gate, tuple(sorted({*one.modules, *other.modules})), (*one.facts, *other.facts))

    def validate(self, fit: Fit, config: SteamConfig, base: Base | None) -> None:
        """See `hf_edit.methods.Method.validate`."""
        count = len(fit.facts)
        if len(set(fit.modules)) < len(fit.modules):
            raise PackFormatError("the pack names a module twice")
        of_gate = gate_names(fit.tensors)
        if bool(of_gate) != config.gate:
            raise PackFormatError(f"the pack says gate={config.gate} and has {'one' if of_gate else 'none'}")
        parts = _PARTS[:2] if of_gate else _PARTS
        expected = {f"{module}.{part}" for module in fit.modules for part in parts}
        if wrong := sorted(expected ^ (set(fit.tensors) - of_gate)):
            raise PackFormatError(f"the pack's tensors do not match its modules: {', '.join(wrong)[:300]}")
        for module in fit.modules:
            left, right, *gram = (fit.tensors[f"{module}.{part}"] for part in parts)
            if any(t.dtype != torch.float32 or t.dim() != 2 for t in (left, right, *gram)):
                raise PackFormatError(f"the factors of {module} must be float32 matrices")
            if any(size != count for size in (left.shape[1], right.shape[0], *(n for g in gram for n in g.shape))):
                raise PackFormatError(f"the factors of {module} are not for {count} facts")
        if of_gate and not fit.modules:
            raise PackFormatError("the pack has a gate and nothing behind it")
        if of_gate:
            validate_routing(fit.tensors, count, fit.tensors[f"{fit.modules[0]}.left"].shape[0], base)
        if base is not None:
            check_changes(self.factors(fit), base, config.edit_module)

    def factors(self, fit: Fit) -> dict[str, Factors]:
        """The changes of weights by module; column i of `left` and row i of `right` belong to fact i."""
        return {m: Factors(fit.tensors[f"{m}.left"], fit.tensors[f"{m}.right"]) for m in fit.modules}

    def attach(self, base: Base, fit: Fit, config: SteamConfig) -> Attachment:
        """See `hf_edit.methods.Method.attach`."""
        if config.gate:
            modules: dict[str, nn.Module] = {name: base.model.get_submodule(name) for name in fit.modules}
            effects = {modules[name]: ActingAlone(change) for name, change in self.factors(fit).items()}
            return MentionAttachment(base, Entities.of(fit.facts), effects, load_routing(base, fit.tensors, fit.facts))
        return WeightAttachment(base.model, self.factors(fit))


@dataclass(frozen=True)
class _Job:
    """What the groups of one fit share."""

    base: Base
    config: SteamConfig
    editor: str
    layout: Layout
    layers: tuple[int, ...]
    statistics: KeyStatistics
    contexts: list[str]
    progress: bool

    @classmethod
    def prepare(cls, base: Base, config: SteamConfig, editor: str, seed: int, progress: bool) -> _Job:
        layout = base.layout(config.edit_module)
        layers = _layers(base, layout, config, editor)
        modules = [layout.projection(block) for block in layers]
        statistics = open_statistics(base, modules, config.statistics, num_tokens=config.statistics_tokens, progress=progress)
        contexts = sample_contexts(base, config.contexts, config.context_length, seed)
        return cls(base, config, editor, layout, layers, statistics, contexts, progress)

    def anchor_blocks(self) -> tuple[int, ...]:
        """The blocks to align at, all above the last edit layer; none where that is the model's last block."""
        chosen = self.config.anchor_blocks
        third = range(self.layout.at_depth(1 / 3), self.layout.at_depth(2 / 3) + 1)
        above = range(self.layers[-1] + 1, len(self.layout))
        if chosen is None or not above:
            return tuple(b for b in third if b in above) or tuple(above[:1])
        if isinstance(chosen, str):
            return informative_blocks(self.base, self.layers[-1], len(third))
        blocks = tuple(self.layout.block(b) for b in chosen)
        if min(blocks) <= self.layers[-1]:
            raise ValueError(
                f"anchor_blocks must all lie above the last edited block, {self.layers[-1]}; "
                f"block {min(blocks)} does not see the edit"
            )
        return blocks

    def anchors(self, facts: Sequence[Fact]) -> Anchors | None:
        """Anchors of the facts' targets; None where no block lies above the edit."""
        config = self.config
        blocks = self.anchor_blocks()
        contrast = config.negatives if config.alignment == "contrastive" else 0
        if not blocks:
            return None
        return build_anchors(self.base, facts, blocks, config.anchor_settings, contrast=contrast, progress=self.progress)

    def objective(self, anchors: Anchors | None, group: Sequence[int], within: Sequence[int]) -> Alignment | None:
        """The alignment term of facts that are optimised together; None where none of them has an anchor.

        Args:
            group: the facts that are edited together, by their indices among all.
            within: those to optimise, by their indices in the group.
        """
        config, chosen = self.config, [group[i] for i in within]
        if anchors is None or not any(anchors.counts[i] for i in chosen):
            return None
        if config.alignment == "contrastive":
            return Contrast(anchors, chosen, config.anchor_weight, config.anchor_ratio, temperature=config.temperature)
        return Alignment(anchors, chosen, config.anchor_weight, config.anchor_ratio)

    def fit(self, facts: Sequence[Fact], objective: ObjectiveOf, earlier: Sequence[Fact]) -> dict[str, Update]:
        """Values and their insertion, for facts that are edited together on top of earlier ones.

        Where blocks normalise what an MLP writes, a residual can't be spread over several of them, and one of them can only do
        so much: its write has the length that the norm gives it. So each layer is edited by itself there, on top of those
        below, and its KL terms hold to the model as it stands then.
        """
        if len(self.layers) == 1 or write_scale(self.base.model, self.layout, self.layers[-1]) is not None:
            return self._fit_together(facts, objective, earlier)
        updates: dict[str, Update] = {}
        with ExitStack() as stack:
            for block in self.layers:
                found = replace(self, layers=(block,))._fit_together(facts, objective, earlier)
                updates |= found
                stack.enter_context(self.in_force(found))
        return updates

    def _fit_together(self, facts: Sequence[Fact], objective: ObjectiveOf, earlier: Sequence[Fact]) -> dict[str, Update]:
        """Values and their insertion; then values of facts that the insertion did not carry over are raised and all are
        inserted anew, up to `retries` times. The insertion in which most facts hold is kept, of two the likelier one."""
        config = self.config
        tail = config.tail_tokens if config.tail_factor else 0
        wordings = 2 * config.gate if config.wordings is None else config.wordings
        texts = fact_texts(self.base, facts, self.contexts, tail, config.kept_prompts, wordings)
        values = self._values(texts, objective(range(len(facts))))
        width = weight_shape(self.base.model.get_submodule(self.layout.projection(self.layers[-1])))[1]
        problem = Insertion(
            self.base,
            self.layout,
            self.layers,
            texts,
            values.deltas,
            values.scale,
            self.statistics,
            encode(self.base.tokenizer, [fact_text(f) for f in earlier]),
            covariance_weight=config.covariance_weight or 0.1 * width * min(max(1.0, len(facts) / 100) ** 2, 10.0),
            null_space_threshold=config.null_space_threshold,
            ridge=config.ridge,
            bare_share=config.bare_share,
            bystanders=config.bystanders,
        )
        best = updates = EDITORS[self.editor](problem)
        lowest = (len(facts) + 1, 0.0)
        retries = 0 if config.gate else config.retries  # behind a gate nothing gets between a value and its fact
        for left in reversed(range(retries + 1)) if retries else ():
            with self.in_force(updates):
                scores = score_targets(self.base, [text.rewrites[0] for text in texts])
                short = [i for i, score in enumerate(scores) if not score.right]
                if (reached := (len(short), sum(score.nll for score in scores))) < lowest:
                    best, lowest = updates, reached
                if not short or not left:
                    break
                further = self._values([texts[i] for i in short], objective(short))
            # what was asked for and what is still missing there, since an insertion carries over a part only
            deltas = problem.deltas.index_add(0, torch.tensor(short, device=problem.deltas.device), further.deltas)
            problem = replace(problem, deltas=deltas)
            updates = EDITORS[self.editor](problem)
        return best

    def _values(self, texts: Sequence[FactTexts], objective: Objective | None) -> Values:
        config = self.config
        settings = ValueSettings(
            block=self.layers[-1],
            steps=config.steps,
            lr=config.lr,
            kl_factor=config.kl_factor,
            tail_factor=config.tail_factor,
            weight_decay=config.weight_decay,
            clamp=config.clamp,
            enough=config.enough,
            balance=config.balance,
            rotation=config.rotation,
        )
        return optimize_values(
            self.base,
            texts,
            settings,
            objective=objective,
            layout=self.layout,
            batch_facts=config.batch_facts,
            progress=self.progress,
        )

    @contextmanager
    def in_force(self, updates: dict[str, Update]) -> Iterator[None]:
        """The model with updates of its weights."""
        attachment = WeightAttachment(self.base.model, {name: u.factors for name, u in updates.items()})
        try:
            yield
        finally:
            attachment.detach()


def _layers(base: Base, layout: Layout, config: SteamConfig, editor: str) -> tuple[int, ...]:
    if config.layers is not None:
        layers = tuple(sorted({layout.block(b) for b in config.layers}))
    else:
        layers = tuple(layout.recall_blocks())
    return layers[-1:] if editor in ONE_BY_ONE else layers


def _apart(facts: Sequence[Fact]) -> list[list[int]]:
    """Indices of facts that can be edited together: no two of a group are about the same subject, whose one key would get the
    mean of both values."""
    groups: list[list[int]] = []
    taken: list[set[str]] = []
    for i, fact in enumerate(facts):
        subject = fold(fact.subject)
        free = next((n for n, subjects in enumerate(taken) if subject not in subjects), len(groups))
        if free == len(groups):
            groups.append([])
            taken.append(set())
        groups[free].append(i)
        taken[free].add(subject)
    return groups


def _groups(facts: Sequence[Fact], editor: str, gate: bool) -> list[list[int]]:
    """Indices of facts that are edited together, group on top of group."""
    if gate:
        return [list(range(len(facts)))]
    return [[i] for i in range(len(facts))] if editor in ONE_BY_ONE else _apart(facts)


def _chosen(fit: Fit, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    """The factors of some of the facts."""
    parts = {f"{m}.left": fit.tensors[f"{m}.left"][:, list(keep)] for m in fit.modules}
    return parts | {f"{m}.right": fit.tensors[f"{m}.right"][list(keep)] for m in fit.modules}


def _update(fit: Fit, module: str) -> Update:
    left, right = (fit.tensors[f"{module}.{part}"] for part in _PARTS[:2])
    alone = torch.zeros(1, 1).expand(len(right), len(right))  # behind a gate
    return Update(Factors(left, right), fit.tensors.get(f"{module}.gram", alone))


def _appended(
    tensors: dict[str, torch.Tensor], updates: dict[str, Update], parts: Sequence[str] = _PARTS
) -> dict[str, torch.Tensor]:
    """Earlier factors with new ones beside them; a module that only one of the two edits gets zeros for the other."""
    new = {m: dict(zip(_PARTS, (u.factors.left, u.factors.right, u.gram), strict=True)) for m, u in updates.items()}
    old: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        old.setdefault(module, {})[part] = tensor
    counts = [next((len(side[m]["right"]) for m in side), 0) for side in (old, new)]
    joined = {}
    for module in sorted({*old, *new}):
        like = old.get(module) or new[module]
        sides = [
            side.get(module)
            or {
                "left": torch.zeros(len(like["left"]), count),
                "right": torch.zeros(count, like["right"].shape[1]),
                "gram": torch.zeros(1, 1).expand(count, count),
            }
            for side, count in zip((old, new), counts, strict=True)
        ]
        for part in parts:
            joined[f"{module}.{part}"] = _JOINED[part]([side[part] for side in sides])
    return joined


def _note(count: int) -> str:
    return f"{count} references" if count else "no anchor: too few references are recalled"


register_method(Steam("steam"))
register_method(Steam("rome", "rome", anchored=False))
register_method(Steam("memit", "memit", anchored=False))
register_method(Steam("alphaedit", "alphaedit", anchored=False))
