"""`EditableModelForCausalLM`: a causal language model whose knowledge can be edited."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .answers import greedy, says, target_probabilities
from .base import Base
from .errors import BaseMismatchError, ConflictingEditsError, HfEditError, MergeError, PackFormatError
from .facts import Fact, read_facts, resolve_conflicts
from .health import COLLAPSE, Health
from .methods import EditConfig, get_method
from .methods.base import Attachment
from .pack import CONFIG_FILE, FILES, EditPack, describe_base, versions
from .report import EditReport, EvalReport, FactResult

if TYPE_CHECKING:
    from .evaluation import CleanAnswers

__all__ = ["EditableModelForCausalLM"]

logger = logging.getLogger(__name__)

_ANSWER_TOKENS = 16


class EditableModelForCausalLM(nn.Module):
    """A causal language model that can be edited; everything it does not define itself is the base model's.

    The base model is changed in place while edits are in force (its class and its state dict's keys stay as they are)
    and is bit for bit as before after `rollback` or `unload`.

    Args:
        base_model: a causal language model of transformers.
        tokenizer: its fast tokenizer; by default loaded from where the model came from.
        base_revision: revision of the base, to be recorded in packs.

    Raises:
        ValueError: no tokenizer was given and none is found by the model's name.
    """

    def __init__(self, base_model: Any, tokenizer: Any = None, *, base_revision: str | None = None) -> None:
        super().__init__()
        if isinstance(base_model, EditableModelForCausalLM):
            raise ValueError("the model is editable already; wrap its base: model.get_base_model()")
        name = getattr(base_model, "name_or_path", "") or None
        if name and Path(name).is_dir():
            name = str(Path(name).resolve())  # a pack must find its base from any working directory
        if tokenizer is None:
            if not name:
                raise ValueError("this model does not say where it came from; pass its tokenizer: tokenizer=...")
            tokenizer = AutoTokenizer.from_pretrained(name)
        self.base_model = base_model
        self.tokenizer = tokenizer
        self._base = Base(base_model, tokenizer)
        self._origin = {"base_model_name_or_path": name, "base_model_revision": base_revision}
        self._packs: dict[str, EditPack] = {}
        self._active: tuple[str, ...] = ()
        self._attached: list[Attachment] = []
        self._health: Health | None = None

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_or_pack_id: str | os.PathLike[str],
        *,
        base_model: Any = None,
        pack_name: str = "default",
        revision: str | None = None,
        base_revision: str | None = None,
        tokenizer: Any = None,
        verify_base: str = "error",
        **base_model_kwargs: Any,
    ) -> EditableModelForCausalLM:
        """Load a base model, or a pack with the base that it names.

        Args:
            model_or_pack_id: id or folder of a base model, or folder of a pack.
            base_model: id, folder or loaded model to use as the base; it is checked to be the right one all the same.
            pack_name: the name for the pack that lies in the folder itself; packs in subfolders keep theirs.
            revision: of `model_or_pack_id`.
            base_revision: of the base model.
            tokenizer: by default the base model's.
            verify_base: "error", "warn" or "off": what happens when the base is not the one the pack was made for.
            **base_model_kwargs: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            BaseMismatchError: the base is another model than the pack was made for.
            PackFormatError: the pack is damaged.
        """
        folder = Path(model_or_pack_id)
        packs = _packs_in(folder, pack_name)
        source: Any = model_or_pack_id if not packs else base_model
        if packs and source is None:
            names = {pack.base["base_model_name_or_path"] for pack in packs.values()}
            source = next(iter(names))
            base_revision = base_revision or next(iter(packs.values())).base["base_model_revision"]
            if len(names) > 1:
                raise BaseMismatchError(
                    f"the packs in {folder} name different bases: {sorted(map(str, names))}; pass base_model=..."
                )
            if source is None:
                raise BaseMismatchError(f"the pack in {folder} does not name its base model; pass base_model=...")
        elif not packs and base_model is not None:
            raise FileNotFoundError(f"{folder} holds no edit pack, so there is nothing to put on base_model")
        revision = base_revision if packs else revision
        if isinstance(source, (str, os.PathLike)):
            at = {"revision": revision} if revision else {}
            loaded = AutoModelForCausalLM.from_pretrained(source, **at, **base_model_kwargs)
            if tokenizer is None:
                shared = {k: v for k, v in base_model_kwargs.items() if k in ("token", "cache_dir", "local_files_only")}
                tokenizer = AutoTokenizer.from_pretrained(source, **at, **shared)
        else:
            loaded = source
        model = cls(loaded, tokenizer, base_revision=revision)
        for name, pack in packs.items():
            model.load_pack(pack, name, verify_base=verify_base)
        return model

    def save_pretrained(self, directory: str | os.PathLike[str], *, selected_packs: str | Sequence[str] | None = None) -> None:
        """Write packs: "default" into the folder itself, others into subfolders of their names. Never the base weights.

        Raises:
            ValueError: there is nothing to save.
        """
        selected = (selected_packs,) if isinstance(selected_packs, str) else selected_packs
        names = list(self._packs) if selected is None else list(selected)
        if not names:
            raise ValueError("there are no edits to save; call model.edit(...) first")
        for name in names:
            self._pack(name).save_pretrained(Path(directory) / ("" if name == "default" else name))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Not there yet; defined so that the base model's own, which would upload its weights, is not reached."""
        raise HfEditError(
            "pushing packs is not supported by this version; save the pack with model.save_pretrained(folder) and upload the "
            "folder: hf upload USER/NAME folder"
        )

    # --- editing ------------------------------------------------------------------------------------------------------

    def edit(
        self,
        facts: Any,
        method: str = "steam",
        *,
        config: EditConfig | Mapping[str, Any] | None = None,
        pack_name: str = "default",
        on_conflict: str = "error",
        verify: bool = True,
        seed: int = 0,
        progress: bool = True,
        **config_overrides: Any,
    ) -> EditReport:
        """Make the model say some facts: all of them, or none where anything goes wrong.

        Args:
            facts: a `Fact`, a dict, a list of them, a path (.jsonl, .json, .csv) or a `datasets.Dataset`.
            method: see `hf_edit.available_methods`.
            config: the method's settings.
            pack_name: the pack that the facts join; a new one where there is none of that name.
            on_conflict: what to do about facts that contradict each other or those in force: "error", "replace" (the newest
                wins) or "keep" (the oldest wins).
            verify: ask the model before and after, for the report.
            seed: of everything random.
            progress: show progress bars for what takes longer than two seconds.
            **config_overrides: single settings over `config`.

        Raises:
            ConflictingEditsError: contradictions under "error", or the pack holds another method's edits.
            ValueError: a fact or a setting is wrong.
            UnsupportedArchitectureError: the method can't edit this model.
        """
        how = get_method(method)
        _check_name(pack_name)
        settings = how.config_class.combine(config, config_overrides)
        previous = self._packs.get(pack_name)
        inactive = previous.facts if previous is not None and pack_name not in self._active else ()
        known = {fact.key: name for name in self._active for fact in self._packs[name].facts}
        wanted = resolve_conflicts(read_facts(facts), [*self.list_edits(), *inactive], on_conflict)
        _check_ids(wanted, previous.facts if previous is not None else ())
        if previous is not None and previous.method != method:
            raise ConflictingEditsError(
                f"pack {pack_name!r} holds edits by {previous.method!r}; give these a pack of their own: "
                f"model.edit(..., method={method!r}, pack_name={method!r})"
            )
        elsewhere = next((f for f in wanted if known.get(f.key, pack_name) != pack_name), None)
        if elsewhere is not None:
            raise ConflictingEditsError(
                f"pack {known[elsewhere.key]!r} holds another target for {elsewhere.question!r}; take it out first: "
                "model.remove_edits([...]) with its id from model.list_edits()"
            )
        if previous is not None:
            explicit = config.to_dict() if isinstance(config, EditConfig) else dict(config or {})
            settings = settings.joining(previous.config, {**explicit, **config_overrides})
        if not wanted:
            return EditReport(method, pack_name, (), 0.0, notes=("all of these facts are in force already",))

        started = time.perf_counter()
        before = self._ask(wanted, progress) if verify else None
        asked = time.perf_counter() - started
        state = self._packs.copy(), self._active
        try:
            pack = self._fit(wanted, method, settings, pack_name, seed, progress)
            fitted = time.perf_counter() - started - asked
            self._put({**self._packs, pack_name: pack}, (*(n for n in self._active if n != pack_name), pack_name))
            after = self._ask(wanted, progress) if verify else None
            health = self._check_health() if verify and how.in_weights else {}
        except BaseException:
            self._put(*state)
            raise
        notes = pack.fit.notes
        if before is None or after is None:
            results = tuple(FactResult(f, note=notes.get(str(f.id), "")) for f in wanted)
        else:
            results = tuple(
                FactResult(f, b, a, says(a, f.target), pb, pa, notes.get(str(f.id), ""))
                for f, (b, pb), (a, pa) in zip(wanted, before, after, strict=True)
            )
        return EditReport(method, pack_name, results, fitted, time.perf_counter() - started - fitted, **health)

    def _check_health(self) -> dict[str, Any]:
        """Perplexity on the model's own text before all edits and now, for the report; warns of a collapse."""
        try:
            now = self.perplexity()
        except (ValueError, OSError, SafetensorError) as error:  # a measure must not undo a good edit
            return {"notes": (f"perplexity could not be measured: {error}",)}
        assert self._health is not None
        clean = self._health.clean
        notes: tuple[str, ...] = ()
        if not now < COLLAPSE * clean:
            notes = (
                f"the model writes worse than before its edits: perplexity {now:.1f}, not {clean:.1f}, on text of its own. "
                "Roll back, edit fewer facts or fewer at a time, or take a larger covariance_weight or method='lks'.",
            )
            logger.warning(notes[0])
        return {"perplexity_clean": clean, "perplexity": now, "notes": notes}

    def _fit(
        self, facts: Sequence[Fact], method: str, settings: EditConfig, pack_name: str, seed: int, progress: bool
    ) -> EditPack:
        """Fit facts on top of the weight edits in force; edits that work by hooks are off meanwhile."""
        how = get_method(method)
        previous = self._packs.get(pack_name)
        if previous is not None:
            replaced = {f.key for f in facts}
            kept = [i for i, f in enumerate(previous.facts) if f.key not in replaced]
            if not kept:
                previous = None
            elif len(kept) < len(previous.facts):
                previous = replace(previous, fit=how.remove(previous.fit, kept))
        under = [self._packs[n] for n in self._active if n != pack_name and get_method(self._packs[n].method).in_weights]
        if previous is not None and how.in_weights:
            under.append(previous)
        with self.disable_edits():
            self._base.forget()  # the clean weights may be others than at the last edit
            _ = self._base.fingerprint
            try:
                self._attach_all(under)
                with torch.inference_mode(False), torch.enable_grad():
                    fit = how.fit(
                        self._base,
                        facts,
                        settings,
                        previous=previous.fit if previous is not None else None,
                        clean=lambda: self._lifted(under),
                        seed=seed,
                        progress=progress,
                    )
                how.validate(fit, settings, self._base)  # nothing is made that could not be loaded
            finally:
                self._detach()
            base = describe_base(self._base, fit.modules, known=self._origin)
        return EditPack(method, settings, fit, base, seed, versions())

    def _ask(self, facts: Sequence[Fact], progress: bool) -> list[tuple[str, float]]:
        answers = greedy(self._base, [f.question for f in facts], _ANSWER_TOKENS, progress=progress)
        return list(zip(answers, target_probabilities(self._base, facts), strict=True))

    def ask(self, prompts: str | Sequence[str], *, max_new_tokens: int = _ANSWER_TOKENS) -> list[str]:
        """Greedy continuations of prompts as they are, without a chat template, with the edits in force.

        Args:
            prompts: one or several texts; they run as one left-padded batch.
            max_new_tokens: length of an answer at most.

        Returns:
            The continuations, without the prompts.
        """
        return greedy(self._base, [prompts] if isinstance(prompts, str) else prompts, max_new_tokens)

    def perplexity(self) -> float:
        """Perplexity of the model, with the edits in force, on text that it wrote without them (see `hf_edit.health`)."""
        if self._health is None or self._health.fingerprint != self._base.fingerprint:
            with self.disable_edits():
                self._health = Health(self._base)
        return self._health.now()

    def evaluate(
        self,
        facts: Any = None,
        *,
        metrics: Sequence[str] | None = None,
        mode: str = "generate",
        batch_size: int = 32,
        max_new_tokens: int = 20,
        text_tokens: int = 100,
        generation_prompts: Mapping[str, Sequence[str]] | None = None,
        reference_texts: Mapping[str, Sequence[str]] | None = None,
        clean: CleanAnswers | None = None,
        progress: bool = True,
    ) -> EvalReport:
        """Evaluate the edits in force by the metrics of the literature; `hf_edit.metrics` defines each. The model is
        left as it was.

        Args:
            facts: as for `edit`; by default the facts in force. What they are asked beyond their prompt is in their fields
                `rephrases`, `locality` and `portability`.
            metrics: names of metrics; by default all that the facts and the mode have something for.
            mode: "generate" reads the model's own greedy continuations of bare prompts, "teacher_forced" the probabilities of
                given ones, each token predicted from the right ones before it; "both" does both.
            batch_size: texts in a forward at most.
            max_new_tokens: of an answer in free generation.
            text_tokens: of a text whose fluency or consistency is measured.
            generation_prompts: by fact id, beginnings of texts about the subject, for fluency and consistency.
            reference_texts: by fact id, texts about the target, for consistency.
            clean: `EvalReport.clean` of an earlier evaluation of the same base model: what the unedited model said.
            progress: show progress bars for what takes longer than two seconds.

        Raises:
            ValueError: no facts, an unknown metric or mode, a metric that no fact has anything for.
        """
        from .evaluation import evaluate

        chosen = self.list_edits() if facts is None else read_facts(facts)
        if not chosen:
            raise ValueError("there are no edits in force; pass the facts to ask about: model.evaluate(facts)")
        return evaluate(
            self._base,
            chosen,
            metrics=metrics,
            mode=mode,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            text_tokens=text_tokens,
            generation_prompts=generation_prompts,
            reference_texts=reference_texts,
            clean=clean,
            unedited=self.disable_edits,
            progress=progress,
        )

    # --- packs --------------------------------------------------------------------------------------------------------

    @property
    def packs(self) -> dict[str, EditPack]:
        """All packs by name, whether active or not."""
        return dict(self._packs)

    @property
    def active_packs(self) -> list[str]:
        """The names of the packs in force, in the order in which they were put on."""
        return list(self._active)

    def load_pack(
        self, pack_or_folder: EditPack | str | os.PathLike[str], pack_name: str = "default", *, verify_base: str = "error"
    ) -> None:
        """Put a pack in force beside those that are.

        Raises:
            BaseMismatchError: it was made for another base; `verify_base` "warn" logs it, "off" does not look.
            ConflictingEditsError: there is a pack of that name, or one in force holds another target for the same fact.
            PackFormatError: the pack is damaged.
        """
        if verify_base not in ("error", "warn", "off"):
            raise ValueError(f"verify_base is 'error', 'warn' or 'off', not {verify_base!r}")
        _check_name(pack_name)
        pack = pack_or_folder if isinstance(pack_or_folder, EditPack) else EditPack.from_pretrained(pack_or_folder)
        if pack_name in self._packs:
            raise ConflictingEditsError(f"there is a pack {pack_name!r} already; load this one under another pack_name")
        if len(resolve_conflicts(pack.facts, self.list_edits())) < len(pack.facts):
            raise ConflictingEditsError(
                "some of the pack's facts are in force already; take them out first (model.remove_edits)"
            )
        if verify_base != "off":
            try:
                with self.disable_edits():
                    pack.check_base(self._base)
            except BaseMismatchError as error:
                if verify_base == "error":
                    raise
                logger.warning("%s", error)
        get_method(pack.method).validate(pack.fit, pack.config, self._base)
        self._put({**self._packs, pack_name: pack}, (*self._active, pack_name))

    def set_packs(self, names: str | Sequence[str]) -> None:
        """Put just these packs in force, in this order.

        Raises:
            KeyError: there is no pack of that name.
        """
        chosen = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        facts: list[Fact] = []
        for name in chosen:
            resolve_conflicts(self._pack(name).facts, facts)
            facts += self._pack(name).facts
        self._put(self._packs, chosen)

    def delete_pack(self, name: str) -> None:
        """Take a pack out of force and forget it.

        Raises:
            KeyError: there is no pack of that name.
        """
        self._pack(name)
        rest = {n: p for n, p in self._packs.items() if n != name}
        self._put(rest, tuple(n for n in self._active if n != name))

    def list_edits(self) -> list[Fact]:
        """The facts in force, pack by pack."""
        return [fact for name in self._active for fact in self._packs[name].facts]

    def remove_edits(self, ids: str | Sequence[str]) -> None:
        """Take single facts out of force, without training; a pack left empty is deleted.

        Args:
            ids: `Fact.id` of facts in force (see `list_edits`).

        Raises:
            KeyError: no fact in force has that id.
        """
        wanted = {ids} if isinstance(ids, str) else set(ids)
        if missing := wanted - {str(f.id) for f in self.list_edits()}:
            raise KeyError(f"no fact in force has the id {sorted(missing)[0]!r}; see model.list_edits()")
        packs = dict(self._packs)
        for name in self._active:
            here = [str(f.id) for f in packs[name].facts if f.id in wanted]
            if len(here) == len(packs[name].facts):
                del packs[name]
            elif here:
                packs[name] = packs[name].remove(here)
        self._put(packs, tuple(name for name in self._active if name in packs))

    def rollback(self) -> None:
        """Back to the clean base model, bit for bit; all packs are forgotten."""
        self._put({}, ())

    @contextmanager
    def disable_edits(self) -> Iterator[None]:
        """The clean base model inside the context; nothing is subtracted, the original weights are put back."""
        names = self._active
        self._put(self._packs, ())
        try:
            yield
        finally:
            kept = [name for name in names if name in self._packs]
            self._put(
                self._packs, (*kept, *(name for name in self._active if name not in kept))
            )  # what was put on inside stays

    def _pack(self, name: str) -> EditPack:
        if name not in self._packs:
            raise KeyError(f"there is no pack {name!r}; there are: {', '.join(self._packs) or 'none'}")
        return self._packs[name]

    def _attach(self, pack: EditPack) -> Attachment:
        return get_method(pack.method).attach(self._base, pack.fit, pack.config)

    def _put(self, packs: Mapping[str, EditPack], active: tuple[str, ...]) -> None:
        """Put packs in force in place of those that are; on an error these are in force again."""
        before = self._packs, self._active
        self._detach()
        try:
            self._attach_all([packs[name] for name in active])
        except BaseException:
            self._detach()
            self._attach_all([before[0][name] for name in before[1]])
            raise
        self._packs, self._active = dict(packs), active

    @contextmanager
    def _lifted(self, packs: Sequence[EditPack]) -> Iterator[None]:
        """The clean model while a fit runs on top of packs."""
        self._detach()
        try:
            yield
        finally:
            self._attach_all(packs)

    def _attach_all(self, packs: Sequence[EditPack]) -> None:
        for pack in packs:
            self._attached.append(self._attach(pack))

    def _detach(self) -> None:
        while self._attached:
            self._attached.pop().detach()

    # --- the base model -----------------------------------------------------------------------------------------------

    def get_base_model(self) -> Any:
        """The base model, with the edits that are in force."""
        return self.base_model

    def unload(self) -> Any:
        """The clean base model; the edits are forgotten."""
        self.rollback()
        return self.base_model

    def merge_and_unload(self) -> Any:
        """The base model with the edits written into its weights for good.

        Raises:
            MergeError: edits in force that are no change of weights, or weights that can't take one.
        """
        for name in self._active:
            if not get_method(self._packs[name].method).in_weights:
                raise MergeError(
                    f"pack {name!r} ({self._packs[name].method}) rewrites hidden states and can't become weights; share the "
                    "pack itself (model.save_pretrained), or make the edit with method='steam'"
                )
        if not all(getattr(attachment, "in_place", False) for attachment in self._attached):
            raise MergeError(
                "the base's weights are in half precision, quantised or offloaded, where a merged edit would be rounded away; "
                "load the base with dtype=torch.float32, or share the pack itself (model.save_pretrained)"
            )
        self._attached, self._packs, self._active = [], {}, ()
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the edits in force."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, with the edits in force."""
        return self.base_model.generate(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `half`, `cuda` and the like: edits are taken off, so that they move the originals, and put on again."""
        with self.disable_edits():
            return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __repr__(self) -> str:
        name = self._origin["base_model_name_or_path"] or type(self.base_model).__name__
        packs = ", ".join(f"{n}: {self._packs[n].method}, {len(self._packs[n].facts)} facts" for n in self._active)
        return f"EditableModelForCausalLM({name!r}, edits in force: {packs or 'none'})"


def _packs_in(folder: Path, pack_name: str) -> dict[str, EditPack]:
    """The packs in a local folder: its own and those of its subfolders; none where it holds no pack."""
    if not folder.is_dir():
        return {}
    packs = {}
    if (folder / CONFIG_FILE).exists():
        packs[pack_name] = EditPack.from_pretrained(folder)
    elif (folder / "edits.safetensors").exists():
        raise PackFormatError(f"{folder} has no {CONFIG_FILE}: the pack is incomplete, save or download it again")
    if not packs and (folder / "config.json").exists():
        return {}  # a model; packs that happen to lie below it were not asked for
    for child in sorted(p for p in folder.iterdir() if (p / CONFIG_FILE).exists()):
        if child.name in packs:
            raise ConflictingEditsError(
                f"{folder} has a pack {child.name!r} of its own; pass another pack_name for the main one"
            )
        packs[child.name] = EditPack.from_pretrained(child)
    return packs


def _check_ids(facts: Sequence[Fact], known: Sequence[Fact]) -> None:
    replaced = {f.key for f in facts}
    ids = [f.id for f in facts] + [f.id for f in known if f.key not in replaced]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ConflictingEditsError(f"two facts have the id {twice!r}; give them different ids, or none")


def _check_name(name: str) -> None:
    if not name or len(name) > 64 or name.startswith(".") or name in FILES or any(c in name for c in '/\\:*?"<>|\0\n\r'):
        raise ValueError(f'{name!r:.80} is no name for a pack: up to 64 characters, none of them / \\ : * ? " < > |')
