"""`EditableModelForCausalLM`: a causal language model whose knowledge can be edited."""

from __future__ import annotations

import copy
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .answers import answer_lengths, check_positions, fits, greedy, says, target_probabilities
from .base import Base, float32_by_default
from .card import card
from .composition import in_order, relinked
from .errors import (
    BaseMismatchError,
    ConflictingEditsError,
    HubError,
    MergeError,
    PackFormatError,
    PackSecurityError,
    UnsupportedArchitectureError,
)
from .facts import Fact, resolve_conflicts, superseded
from .health import COLLAPSE, Health
from .hub import PushToHub, Snapshot, check_base_of, fetch
from .layout import is_transposed
from .lm.chat import Messages, chat_frame, chat_text, is_messages
from .lm.chat_forms import asked_plainly
from .lm.supported import check_language_model, check_tokenizer
from .message_prompts import as_given, as_text, fit_as_text
from .methods import EditConfig, get_method
from .methods.base import Attachment
from .methods.scope.attachment import MentionAttachment
from .pack import CONFIG_FILE, HUB_FILES, EditPack, check_name, describe_base, save_packs, subpacks, versions
from .positions import Text, encode, fact_text
from .questions import asked_afterwards
from .reading import read_facts
from .report import Answer, EditReport, EvalReport, FactResult
from .restore import EditsOff, Turns, Untouched, uninterrupted
from .storage import located
from .suffix import frozen
from .weights.attach import Factors, WeightAttachment
from .weights.merge import can_be_merged, merged

if TYPE_CHECKING:
    from .evaluation import CleanAnswers

__all__ = ["EditableModelForCausalLM", "packs_in"]

logger = logging.getLogger(__name__)

_ANSWER_TOKENS = 16  # of a text that is continued
_CHAT_TOKENS = 32  # of a chat's answer that is searched for a fact's target
_OF_BOTH = ("gguf_file", "subfolder", "trust_remote_code")  # where a model and its tokenizer are
_CHAT_ANSWER_TOKENS = 64  # of a chat's answer that is read

# whose packs are on a base model; the wrapper may be gone
_WRAPPERS: WeakKeyDictionary[nn.Module, weakref.ref[EditableModelForCausalLM]] = WeakKeyDictionary()

F = TypeVar("F", bound=Callable[..., Any])


def _changes(method: F) -> F:
    """For what changes which edits are active: other threads' changes wait until it is done."""

    @functools.wraps(method)
    def run(self: EditableModelForCausalLM, *args: Any, **kwargs: Any) -> Any:
        with self._change():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def _one_at_a_time(method: F) -> F:
    """For what leaves the active edits as they are in the end, and may take them off meanwhile."""

    @functools.wraps(method)
    def run(self: EditableModelForCausalLM, *args: Any, **kwargs: Any) -> Any:
        with self._turn():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class EditableModelForCausalLM(PushToHub, nn.Module):
    """A causal language model that can be edited; everything it does not define itself is the base model's.

    The base model is changed in place while edits are in force (its class and its state dict's keys stay as they are)
    and is bit for bit as before after `rollback` or `unload`.

    Several threads may edit, load, disable, roll back and run the model: `forward`, `generate`, `ask` and `evaluate` give each
    thread what it would get alone. Changes happen one after the other. A change waits for runs that are under way, and runs
    wait for changes. `disable_edits` acts on its own thread alone where all edits in force act at mentions; where one changes
    weights, other threads' runs wait until it ends. Calls of the base model itself are not guarded.

    Args:
        base_model: a causal language model of transformers.
        tokenizer: its fast tokenizer, or where to load it from; by default where the model came from.
        base_revision: revision of the base, to be recorded in packs.

    Raises:
        ConflictingEditsError: the base model has the edits of another wrapper.
        TypeError: `base_model` is no model.
        UnsupportedArchitectureError: it is no causal language model.
        ValueError: no tokenizer was given and none is found by the model's name, or the tokenizer is not a fast one.
    """

    def __init__(self, base_model: Any, tokenizer: Any = None, *, base_revision: str | None = None) -> None:
        super().__init__()
        if isinstance(base_model, EditableModelForCausalLM):
            raise ValueError("the model is editable already; wrap its base: model.get_base_model()")
        check_language_model(getattr(base_model, "_orig_mod", base_model))
        name = getattr(base_model, "name_or_path", "") or None
        if name and Path(name).is_dir():
            name = str(Path(name).resolve())  # a pack must find its base from any working directory
        if tokenizer is None:
            if not name:
                raise ValueError("this model does not say where it came from; pass its tokenizer: tokenizer=...")
            tokenizer = name
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        check_tokenizer(tokenizer)
        self.base_model = base_model
        self._check_alone()
        self.tokenizer = tokenizer
        self._base = Base(base_model, tokenizer)
        self._origin = {"base_model_name_or_path": name, "base_model_revision": base_revision}
        self._packs: dict[str, EditPack] = {}
        self._active: tuple[str, ...] = ()
        self._attached: list[Attachment] = []
        self._turns = Turns(base_model)
        self._set_aside: dict[int, tuple[str, ...]] = {}  # the packs that each `disable_edits` took off
        self._health: Health | None = None
        self._measured: list[tuple[dict[str, EditPack], EditReport | EvalReport]] = []  # for model cards

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
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **base_model_kwargs: Any,
    ) -> EditableModelForCausalLM:
        """Load a base model, or a pack with the base that it names. From the Hub, all files of a repo are of one commit,
        also when its branch moves meanwhile.

        Args:
            model_or_pack_id: id or folder of a base model or of a pack.
            base_model: id, folder or loaded model to use as the base; it is checked to be the right one all the same.
            pack_name: the name for the pack that lies in the folder itself; packs in subfolders keep theirs.
            revision: of `model_or_pack_id`: branch, tag, pull request (``refs/pr/1``) or sha.
            base_revision: of the base model; by default the one that the pack names.
            tokenizer: by default the base model's.
            verify_base: "error", "warn" or "off": what happens when the base is not the one the pack was made for.
            cache_dir, token, force_download, local_files_only: for pack, base and tokenizer, as everywhere with the Hub.
            **base_model_kwargs: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            BaseMismatchError: the base is another model than the pack was made for.
            HubError: a repo is missing, gated, empty, or out of reach.
            PackFormatError: the pack is damaged.
            PackSecurityError: a pack from the Hub names a base that is not on the Hub.
        """
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        at = fetch(model_or_pack_id, (*HUB_FILES, "config.json"), revision=revision, **hub)
        packs = packs_in(at.folder, pack_name)
        for pack in packs.values():
            check_base_of(pack.base, at)
        if not packs:
            if base_model is not None:
                raise PackFormatError(f"{at.name} holds no edit pack (no {CONFIG_FILE}): there is nothing to put on base_model")
            _check_model(at, base_model_kwargs)
            base: Any = at
        elif base_model is None:
            base = _named_base(at, packs, base_revision, hub)
        elif isinstance(base_model, (str, os.PathLike)):
            base = fetch(base_model, ["config.json"], revision=base_revision, **hub)
        else:
            base = base_model
        base_revision = base_revision if base is base_model else base.revision
        if isinstance(base, Snapshot):
            base, tokenizer = _load(base, tokenizer, hub, base_model_kwargs)
        model = cls(base, tokenizer, base_revision=base_revision)
        for name, pack in packs.items():
            model.load_pack(pack, name, verify_base=verify_base)
        return model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        selected_packs: str | Sequence[str] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Write packs: "default" into the folder itself, others into subfolders of their names. Never the base weights.

        Each pack is replaced whole, however the save ends, and several take effect together. Where a kill fell while the new
        files were being moved, the next load or save by the same user completes that; to others the pack is damaged until then.

        Args:
            selected_packs: their names; by default all.
            push_to_hub: push them as well.
            repo_id: where to; by default a repo of the folder's name.
            **hub_kwargs: for `push_to_hub`.

        Raises:
            KeyError: there is no pack of that name.
            ValueError: there is nothing to save.
        """
        folder = Path(directory)
        self._write(folder, self._select(selected_packs), folder.resolve().name)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, selected_packs=selected_packs, **hub_kwargs)

    def _write_for_hub(self, folder: Path, repo_id: str, *, selected_packs: str | Sequence[str] | None = None) -> str:
        packs = {name: pack.shareable() for name, pack in self._select(selected_packs).items()}
        self._write(folder, packs, repo_id)
        if "default" not in packs:  # the repo's own card
            (folder / "README.md").write_text(card(packs, repo_id, self._reports()), encoding="utf-8", newline="\n")
        return f"{sum(len(pack.facts) for pack in packs.values())} edited facts"

    def _select(self, names: str | Sequence[str] | None) -> dict[str, EditPack]:
        chosen = list(self._packs) if names is None else [names] if isinstance(names, str) else list(names)
        if not chosen:
            raise ValueError("there are no edits to save; call model.edit(...) first")
        return {name: self._pack(name) for name in chosen}

    def _write(self, folder: Path, packs: Mapping[str, EditPack], where: str) -> None:
        """Packs with their cards, that of "default" also being the whole folder's."""
        saved = {}
        for name, pack in packs.items():
            shown = packs if name == "default" else {name: pack}
            saved[folder if name == "default" else folder / name] = pack, card(shown, where, self._reports())
        save_packs(saved)

    def _reports(self) -> dict[str, list[EditReport | EvalReport]]:
        """What was measured of packs that are still as they were then."""
        found: dict[str, list[EditReport | EvalReport]] = {}
        for packs, report in self._measured:
            if all(self._packs.get(name) is pack for name, pack in packs.items()):
                for name in packs:
                    found.setdefault(name, []).append(report)
        return found

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
            UnsupportedArchitectureError: the method can't edit this model, or the edit would have no effect on it.
        """
        settings = get_method(method).config_class.combine(config, config_overrides)
        check_name(pack_name)
        explicit = config.to_dict() if isinstance(config, EditConfig) else dict(config or {})
        given = {**explicit, **config_overrides}
        made: dict[str, EditPack] | None = None
        try:
            with self._change():
                state = self._packs.copy(), self._active
                try:
                    report = self._edit(facts, method, settings, given, pack_name, on_conflict, verify, seed, progress)
                    made = self._packs
                    return report
                except BaseException:
                    self._put(*state)
                    raise
        except BaseException:
            if made is not None:  # interrupted on the way out; another thread may have had its turn since
                with self._turns.lock:
                    if self._packs is made:
                        self._put(*state)
            raise

    def _edit(
        self,
        facts: Any,
        method: str,
        settings: EditConfig,
        given: Mapping[str, Any],
        pack_name: str,
        on_conflict: str,
        verify: bool,
        seed: int,
        progress: bool,
    ) -> EditReport:
        """See `edit`; on an error the caller puts back what was active."""
        previous = self._packs.get(pack_name)
        inactive = previous.facts if previous is not None and pack_name not in self._active else ()
        wanted = resolve_conflicts(read_facts(facts), [*self.list_edits(), *inactive], on_conflict)
        check_positions(self._base, as_text(self.tokenizer, wanted))
        _check_ids(wanted, previous.facts if previous is not None else ())
        as_text(self.tokenizer, wanted)  # raises where a fact is a chat that the model can't read
        if previous is not None and previous.method != method:
            raise ConflictingEditsError(
                f"pack {pack_name!r} holds edits by {previous.method!r}; give these a pack of their own: "
                f"model.edit(..., method={method!r}, pack_name={method!r})"
            )
        if previous is not None:
            settings = settings.joining(previous.config, given)
        if not wanted:
            return EditReport(method, pack_name, (), 0.0, notes=("all of these facts are in force already",))

        started = time.perf_counter()
        before = self._ask(wanted, progress) if verify else None
        asked = time.perf_counter() - started
        if replaced := superseded(self.list_edits(), wanted):
            self._put(*self._without(replaced, progress))
        answered = self._next_token_logits(wanted)
        if not all(bool(logits.isfinite().all()) for logits in answered):
            raise ValueError(
                "the model's own logits hold NaN or infinity, so it can't be edited: check its weights and its dtype"
            )
        pack = self._fit(wanted, method, settings, pack_name, seed, progress)
        fitted = time.perf_counter() - started - asked
        active = (*(n for n in self._active if n != pack_name), pack_name)
        self._put(relinked({**self._packs, pack_name: pack}, active), active)
        self._check_effect(method, answered, self._next_token_logits(wanted))
        after = self._ask(wanted, progress) if verify else None
        health = self._check_health() if verify and pack.in_weights else {}
        results = _results(wanted, before, after, pack.fit.notes)
        report = EditReport(method, pack_name, results, fitted, time.perf_counter() - started - fitted, **health)
        self._measured = [({pack_name: self._packs[pack_name]}, report)]
        return report

    def _next_token_logits(self, facts: Sequence[Fact]) -> list[torch.Tensor]:
        """What is likely to follow the prompts of the first and the last fact, each [vocabulary]."""
        found = []
        asked = [fact_text(fact) for fact in as_text(self.tokenizer, [facts[0], *facts[1:][-1:]])]
        with frozen(self.base_model), torch.no_grad():  # dropout would look like an effect
            for text in encode(self.tokenizer, asked):
                ids = torch.tensor([text.ids], device=self._base.device)
                found.append(self.base_model(input_ids=ids, use_cache=False, return_dict=True).logits[0, -1].float().cpu())
        return found

    @staticmethod
    def _check_effect(method: str, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
        """Refuse an edit that changes nothing, or breaks everything."""
        if all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            way_out = "method='steam'" if method == "lks" else "method='lks', or another layer"
            raise UnsupportedArchitectureError(f"the edit has no effect on this model, so it was taken back; try {way_out}")
        if not all(bool(logits.isfinite().all()) for logits in after):
            raise ValueError("the edited model's logits hold NaN or infinity, so the edit was taken back; load it in float32")

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
        if previous is not None:  # of one in force, what these facts replace is taken out already
            replaced = {f.key for f in superseded(previous.facts, facts)}
            kept = [i for i, f in enumerate(previous.facts) if f.key not in replaced]
            if not kept:
                previous = None
            elif len(kept) < len(previous.facts):
                previous = replace(previous, fit=how.remove(previous.fit, kept))
        under = [self._packs[n] for n in self._active if n != pack_name and self._packs[n].in_weights]
        if previous is not None and previous.in_weights:
            under.append(previous)
        with self._taken_off():
            with self._with_only(under) as clean:
                fit = how.fit(
                    self._base,
                    as_text(self.tokenizer, facts),
                    settings,
                    previous=fit_as_text(self.tokenizer, previous.fit) if previous is not None else None,
                    clean=clean,
                    seed=seed,
                    progress=progress,
                )
                fit = as_given(fit, (*(previous.facts if previous is not None else ()), *facts))
                how.validate(fit, settings, self._base)  # nothing is made that could not be loaded
            base = describe_base(self._base, fit.modules, known=self._origin)
        beneath = [pack for pack in under if pack is not previous]
        return EditPack(method, settings, fit, base, seed, versions(), beneath[-1].digest if beneath else None)

    @contextmanager
    def _with_only(self, packs: Sequence[EditPack]) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """The model with just these weight edits in force, for a method to work on; what it leaves behind is put back. Gives
        what the method takes as `clean`."""
        with self._taken_off():
            self._base.forget()  # the clean weights may be others than at the last edit
            _ = self._base.fingerprint
            untouched = Untouched(self.base_model)
            try:
                self._attach_all(packs)
                with torch.inference_mode(False), torch.enable_grad():
                    yield lambda: self._lifted(packs)
            finally:
                with uninterrupted():
                    self._detach()
                    untouched.put_back()

    def _ask(self, facts: Sequence[Fact], progress: bool) -> list[Answer]:
        """What the model says of facts as they are given and, where it has a chat template, in the chat in another wording."""
        facts = as_text(self.tokenizer, facts)
        lengths = answer_lengths(self._base, [fact_text(f, target=f.target) for f in facts], _ANSWER_TOKENS)
        given = greedy(self._base, [f.question for f in facts], lengths, progress=progress)
        probabilities = target_probabilities(self._base, facts)
        frame = chat_frame(self.tokenizer)
        answers = [Answer(t, says(t, f.target), p) for f, t, p in zip(facts, given, probabilities, strict=True)]
        if frame is None:
            return answers
        asked = {i: asked_plainly(frame, fact) for i, fact in enumerate(facts)}
        questions = {i: asked_afterwards(own).replace("{}", own.subject) for i, own in asked.items() if own is not None}
        turns = {i: frame.around(Text(question)) for i, question in questions.items()}
        encoded = dict(zip(turns, encode(self.tokenizer, list(turns.values())), strict=True))
        wanted = {i: _CHAT_TOKENS - _ANSWER_TOKENS + lengths[i] for i in turns}
        chats = [i for i in turns if fits(self._base, encoded[i], wanted[i])]  # a chat takes more positions than its question
        said = greedy(self._base, [turns[i] for i in chats], [wanted[i] for i in chats], progress=progress)
        for i, text in zip(chats, said, strict=True):
            in_chat = says(text, facts[i].target)
            answers[i] = replace(answers[i], question=questions[i], chat=text.strip(), said_in_chat=in_chat)
        return answers

    def ask(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        *,
        chat: bool = False,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """The model's greedy answers, with the edits in force.

        Args:
            prompts: one or several of: a text, which the model continues as it is; a chat, as a list of messages with `role`
                and `content`, which it answers through its chat template.
            chat: take a text for a user's turn, too, and answer it through the chat template.
            max_new_tokens: length of an answer at most; by default 16 for a text that is continued, 64 in a chat.

        Returns:
            The answers, without the prompts: one for each text or chat.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        if isinstance(prompts, Mapping):
            raise ValueError("a chat is a list of messages; put this one into a list")
        several: list[Any] = [prompts] if isinstance(prompts, str) or is_messages(prompts) else list(prompts)
        in_chat = [chat or not isinstance(prompt, str) for prompt in several]
        texts = [_chat_of(self.tokenizer, prompt) if c else prompt for prompt, c in zip(several, in_chat, strict=True)]
        usual = [_CHAT_ANSWER_TOKENS if c else _ANSWER_TOKENS for c in in_chat]
        lengths = usual if max_new_tokens is None else [max_new_tokens] * len(several)
        with self._turns.run():
            return greedy(self._base, texts, lengths)

    @_one_at_a_time
    def perplexity(self) -> float:
        """Perplexity of the model, with the edits in force, on text that it wrote without them (see `hf_edit.health`)."""
        if self._health is None or self._health.fingerprint != self._base.fingerprint:
            with self._taken_off():
                self._health = Health(self._base)
        return self._health.now()

    @_one_at_a_time
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
            max_new_tokens: of an answer in free generation; where its target does not fit in, as many more as it needs.
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
        measured = {name: self._packs.get(name) for name in self._active}
        if not chosen:
            raise ValueError("there are no edits in force; pass the facts to ask about: model.evaluate(facts)")
        report = evaluate(
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
        pack = next(iter(measured.values()), None)
        if facts is None and len(measured) == 1 and pack is not None:
            self._measured.append((dict.fromkeys(measured, pack), report))
        return report

    # --- packs --------------------------------------------------------------------------------------------------------

    @property
    def packs(self) -> dict[str, EditPack]:
        """All packs by name, whether active or not."""
        return dict(self._packs)

    @property
    def active_packs(self) -> list[str]:
        """The names of the packs in force, in the order in which they were put on."""
        return list(self._acting)

    @property
    def _acting(self) -> tuple[str, ...]:
        """The packs in force on this thread."""
        return () if EditsOff.of(self.base_model) else self._active

    def load_pack(
        self,
        pack_or_id: EditPack | str | os.PathLike[str],
        pack_name: str = "default",
        *,
        on_conflict: str = "error",
        verify_base: str = "error",
        **hub_kwargs: Any,
    ) -> None:
        """Put a pack in force beside those that are, or nothing if anything is wrong with it.

        Args:
            pack_or_id: a pack, its folder, or the id of its repo on the Hub.
            pack_name: the name that it gets here.
            on_conflict: what to do about facts that are in force already, with this target or another: "error", "replace" (the
                pack's take their place) or "keep" (they stay, the pack is loaded without its own).
            verify_base: "error", "warn" or "off": what happens when the base is not the one the pack was made for, or without
                the edits that it was made on top of.
            **hub_kwargs: for `EditPack.from_pretrained`: `revision`, `token`, ...

        Raises:
            BaseMismatchError: it was made for another base, or on top of edits that are not in force.
            ConflictingEditsError: there is a pack of that name, or its facts are in force already.
            PackFormatError: the pack is damaged.
            PackSecurityError: the pack asks for what no pack may ask for.
        """
        if verify_base not in ("error", "warn", "off"):
            raise ValueError(f"verify_base is 'error', 'warn' or 'off', not {verify_base!r}")
        check_name(pack_name)
        # read before the others have to wait
        pack = pack_or_id if isinstance(pack_or_id, EditPack) else EditPack.from_pretrained(pack_or_id, **hub_kwargs)
        self._load_pack(pack, pack_name, on_conflict, verify_base)

    @_changes
    def _load_pack(self, pack: EditPack, pack_name: str, on_conflict: str, verify_base: str) -> None:
        if pack_name in self._packs:
            raise ConflictingEditsError(f"there is a pack {pack_name!r} already; load this one under another pack_name")
        if verify_base != "off":
            try:
                self._check_beneath(pack)
                with self._taken_off():
                    pack.check_base(self._base)
            except BaseMismatchError as error:
                if verify_base == "error":
                    raise
                logger.warning("%s", error)
        get_method(pack.method).validate(pack.fit, pack.config, self._base)
        in_force = self.list_edits()
        if len(resolve_conflicts(pack.facts, in_force, on_conflict)) < len(pack.facts) and on_conflict == "error":
            raise ConflictingEditsError(
                "some of the pack's facts are in force already; pass on_conflict='replace' or 'keep', or take them out first "
                "(model.remove_edits)"
            )
        packs, active = self._packs, self._active
        if on_conflict == "replace":
            packs, active = self._without(superseded(in_force, pack.facts))
        elif on_conflict == "keep" and (mine := superseded(pack.facts, in_force)):
            if len(mine) == len(pack.facts):
                raise ConflictingEditsError("all of the pack's facts are in force already; nothing of it is left to load")
            pack = pack.remove([str(fact.id) for fact in mine])
        self._put({**packs, pack_name: pack}, (*active, pack_name))

    def _check_beneath(self, pack: EditPack) -> None:
        beneath = (self._packs[name].digest for name in self._active)
        if pack.parent is not None and pack.parent not in beneath:
            raise BaseMismatchError(
                f"the pack was made on top of other edits (their digest begins with {pack.parent[:12]}) that are not in force; "
                "load those first, or pass verify_base='warn' to do without"
            )

    def _without(self, facts: Sequence[Fact], progress: bool = True) -> tuple[dict[str, EditPack], tuple[str, ...]]:
        """The packs, and the names of those in force, when facts are taken out of them; packs left empty are gone."""
        packs, keys = dict(self._packs), {fact.key for fact in facts}
        for name in self._active:
            here = [str(f.id) for f in packs[name].facts if f.key in keys]
            if not here:
                continue
            if len(here) == len(packs[name].facts):
                del packs[name]
            else:
                packs[name] = self._less(name, here, progress)
        active = tuple(name for name in self._active if name in packs)
        return relinked(packs, active), active

    def _less(self, name: str, ids: Sequence[str], progress: bool) -> EditPack:
        """A pack in force without some of its facts: exactly, where its method can do that with the model."""
        pack = self._packs[name]
        how = get_method(pack.method)
        remove = getattr(how, "remove_exactly", None)
        if remove is None or not pack.in_weights:
            return pack.remove(ids)
        out = set(ids)
        keep = [i for i, fact in enumerate(pack.facts) if fact.id not in out]
        beneath = [self._packs[n] for n in self._active[: self._active.index(name)] if self._packs[n].in_weights]
        with self._with_only(beneath) as clean:
            text = fit_as_text(self.tokenizer, pack.fit)
            fit = as_given(remove(self._base, text, keep, pack.config, clean=clean, progress=progress), pack.facts)
            how.validate(fit, pack.config, self._base)
        return replace(pack, fit=fit)

    @_changes
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

    @_changes
    def delete_pack(self, name: str) -> None:
        """Take a pack out of force and forget it.

        Raises:
            KeyError: there is no pack of that name.
        """
        self._pack(name)
        rest = {n: p for n, p in self._packs.items() if n != name}
        active = tuple(n for n in self._active if n != name)
        self._put(relinked(rest, active), active)

    def list_edits(self) -> list[Fact]:
        """The facts in force, pack by pack."""
        packs = self._packs  # which another thread may swap for others
        return [fact for name in self._acting if name in packs for fact in packs[name].facts]

    @_changes
    def remove_edits(self, ids: str | Sequence[str], *, progress: bool = True) -> None:
        """Take single facts out of force, without training; a pack left empty is deleted. What is left of it is what the same
        values make where those facts never were.

        A weight edit inserts the values of the others anew for that, which takes a small part of the edit's time, and the key
        statistics where they are not in the cache. Where it can't (a sum of packs, edits of one pack with different settings,
        statistics that are not at hand), a warning says so, and the facts are solved out of what the pack stores, as
        `EditPack.remove` does. Other packs stay as they are, also those that were made on top.

        Args:
            ids: `Fact.id` of facts in force (see `list_edits`).
            progress: show progress bars for what takes longer than two seconds.

        Raises:
            KeyError: no fact in force has that id.
        """
        wanted = {ids} if isinstance(ids, str) else set(ids)
        if missing := wanted - {str(f.id) for f in self.list_edits()}:
            raise KeyError(f"no fact in force has the id {sorted(missing)[0]!r}; see model.list_edits()")
        self._put(*self._without([fact for fact in self.list_edits() if str(fact.id) in wanted], progress))

    @_changes
    def rollback(self) -> None:
        """Back to the clean base model, bit for bit; all packs are forgotten."""
        self._put({}, ())

    def disable_edits(self) -> AbstractContextManager[None]:
        """The clean base model inside the context; nothing is subtracted, the original weights are put back.

        Where all edits in force act at mentions (LKS, a gate), the context acts on its own thread or asynchronous task alone,
        and other threads go on running the edited model. Threads that are started inside it are other threads. Where an edit
        changes weights, it acts on all threads: runs by others wait until it ends, and where several are in one at once, the
        edits return when the last of them leaves. Enter and leave it in one thread: a generator that others step is edited.

        Changes by threads that are in no such context wait until all have left. A thread that changes what is active inside
        its own context does so at once, for all.
        """
        self._check_alone()
        return self._disabled(self._act_at_mentions)

    def _taken_off(self) -> AbstractContextManager[None]:
        """The clean base model with no edit attached to it, for a thread that holds the turn to change it."""
        return self._disabled(lambda: False)

    @contextmanager
    def _disabled(self, alone: Callable[[], bool]) -> Iterator[None]:
        number: int | None = None
        try:
            try:
                with self._turns.lock, uninterrupted():
                    number = self._turns.enter(shared=alone)
                    if number not in self._turns.shared:
                        self._set_aside[number] = self._active
                        self._put(self._packs, ())
                yield
            finally:
                self._leave(number)
        except BaseException:  # also an interrupt on the way out
            self._leave(number)
            raise

    def _act_at_mentions(self) -> bool:
        """Whether no edit in force changes weights, so that single threads can do without."""
        return all(isinstance(attachment, MentionAttachment) for attachment in self._attached)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Work with the model while no other thread does."""
        with self._turns.change(), float32_by_default():
            self._check_alone()
            yield

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Change which edits are active. Contexts of `disable_edits` that act on their own threads act on all from then on."""
        with self._turn():
            with uninterrupted():
                for number in sorted(self._turns.shared):  # the first is of the changing thread, else none is left
                    self._set_aside[number] = self._active
                    self._put(self._packs, ())
                    self._turns.shared.discard(number)
                for one in self._turns.clean.values():
                    if one.here:
                        one.act()
            yield

    def _leave(self, number: int | None) -> None:
        """End a context of `disable_edits`; may be called again."""
        with uninterrupted(), self._turns.lock:
            if number in self._turns.clean:
                self._enable(number)

    def _enable(self, number: int) -> None:
        """Put packs in force again, beneath what was put on meanwhile; or leave it to the contexts that still need them off."""
        shared = number in self._turns.shared
        last = self._turns.leave(number)
        if shared or last is False:
            return
        if last:
            names = tuple(name for _, own in sorted(self._set_aside.items()) for name in own)
            self._set_aside = {}
        else:
            names = self._set_aside.pop(number)
        kept = [name for name in dict.fromkeys(names) if name in self._packs]
        self._put(self._packs, (*kept, *(name for name in self._active if name not in kept)))

    def _pack(self, name: str) -> EditPack:
        if name not in self._packs:
            raise KeyError(f"there is no pack {name!r}; there are: {', '.join(self._packs) or 'none'}")
        return self._packs[name]

    def _attach(self, pack: EditPack) -> Attachment:
        fit = pack.fit if pack.in_weights else fit_as_text(self.tokenizer, pack.fit)
        return get_method(pack.method).attach(self._base, fit, pack.config)

    def _put(self, packs: Mapping[str, EditPack], active: tuple[str, ...]) -> None:
        """Put packs in force in place of those that are; on an error these are in force again."""
        with uninterrupted():
            before = self._packs, self._active
            self._detach()
            try:
                self._attach_all([packs[name] for name in active])
            except BaseException:
                self._detach()
                self._attach_all([before[0][name] for name in before[1]])
                raise
            self._packs, self._active = dict(packs), active
            if active or self._turns.clean:
                _WRAPPERS[_plain(self.base_model)] = weakref.ref(self)
            else:
                _WRAPPERS.pop(_plain(self.base_model), None)

    def _check_alone(self) -> None:
        """Refuse a base model on which another wrapper has packs: it isn't clean."""
        wrapper = _WRAPPERS.get(_plain(self.base_model), lambda: self)()
        if wrapper is not self:
            way_out = "load the base model again" if wrapper is None else "use that wrapper, or roll its edits back first"
            raise ConflictingEditsError(f"the base model has the edits of another EditableModelForCausalLM: {way_out}")

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
            self._attached[-1].detach()
            self._attached.pop()

    # --- the base model -----------------------------------------------------------------------------------------------

    def get_base_model(self) -> Any:
        """The base model, with the edits that are in force."""
        return self.base_model

    def unload(self) -> Any:
        """The clean base model; the edits are forgotten."""
        self.rollback()
        return self.base_model

    @_changes
    def merge_and_unload(self) -> Any:
        """The base model with the edits written into its weights for good.

        Weights in half precision are changed in float32 and rounded once, stochastically. How much of the change arrived is
        logged. The facts are asked for before and after that.

        Raises:
            MergeError: active edits that are no change of weights, weights that can't take one, or facts that would be lost
                in rounding; nothing has changed then.
        """
        if self._turns.clean:
            raise MergeError("the edits are disabled (disable_edits), so there is nothing to merge: leave that context first")
        for name in self._active:
            if not self._packs[name].in_weights:
                raise MergeError(
                    f"pack {name!r} ({self._packs[name].method}) acts beside the weights and can't become part of them; share "
                    "the pack itself (model.save_pretrained), or make the edit with method='steam' and without a gate"
                )
        attached = [attachment for attachment in self._attached if isinstance(attachment, WeightAttachment)]
        beside: dict[str, list[Factors]] = {}
        for attachment in attached:
            for name, change in attachment.beside.items():
                beside.setdefault(name, []).append(change)
        if not all(can_be_merged(self.base_model.get_submodule(name).weight) for name in beside):
            raise MergeError(
                "the base's weights are quantised or offloaded, where an edit can't be merged; load the base with "
                "dtype=torch.float32, or share the pack itself (model.save_pretrained)"
            )
        if beside:
            self._round(attached, beside)
        for attachment in attached:
            attachment.settle()
        self._attached, self._packs, self._active = [], {}, ()
        _WRAPPERS.pop(_plain(self.base_model), None)
        return self.base_model

    def _round(self, attached: Sequence[WeightAttachment], beside: Mapping[str, Sequence[Factors]]) -> None:
        """Write changes into weights in half precision, if no fact is lost."""
        facts, packs, active = self.list_edits(), self._packs, self._active
        said = [answer.said for answer in self._ask(facts, progress=False)]
        weights = {name: self.base_model.get_submodule(name).weight for name in beside}
        before = {name: weight.data for name, weight in weights.items()}
        lost: list[Fact] = facts
        try:
            for attachment in attached:
                attachment.lift_beside()
            generator, arrived = torch.Generator().manual_seed(0), []
            for name, changes in beside.items():
                transposed = is_transposed(self.base_model.get_submodule(name))
                weights[name].data, share = merged(before[name], changes, transposed, generator)
                arrived.append(share)
            now = self._ask(facts, progress=False)
            lost = [fact for fact, was, is_ in zip(facts, said, now, strict=True) if was and not is_.said]
        finally:
            if lost:
                for name, weight in weights.items():
                    weight.data = before[name]
                self._put(packs, active)
        if lost:
            raise MergeError(
                f"rounded to {self.base_model.dtype}, {len(lost)} of {sum(said)} facts would no longer be said, the first "
                f"of them {lost[0].question!r:.80}; load the base with dtype=torch.float32, or share the pack itself "
                "(model.save_pretrained)"
            )
        logger.info(
            "merged into %s: %.1f %% of the change arrived, all of %d facts that were said still are",
            self.base_model.dtype,
            100 * sum(arrived) / len(arrived),
            sum(said),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the edits in force."""
        with self._turns.run():
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, with the edits in force."""
        with self._turns.run():
            return self.base_model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's continuous batching, with the edits in force.

        Raises:
            NotImplementedError: an edit acts at mentions (LKS, a gate); several texts share a row there.
        """
        at_mentions = any(isinstance(attachment, MentionAttachment) for attachment in self._attached)
        if at_mentions and self._acting:
            raise NotImplementedError(
                "edits that act at mentions (LKS, a gate) don't work with continuous batching, where several texts share a "
                "row: use model.generate, or model.disable_edits()"
            )
        if not at_mentions:
            with self._turns.run():
                return self.base_model.generate_batch(*args, **kwargs)
        with self._turn(), self._taken_off():  # it works in a thread of its own
            return self.base_model.generate_batch(*args, **kwargs)

    @_one_at_a_time
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `half`, `cuda` and the like: edits are taken off, so that they move the originals, and put on again."""
        with self._taken_off():
            return super()._apply(fn, recurse)

    @_one_at_a_time
    def __deepcopy__(self, memo: dict[int, Any]) -> EditableModelForCausalLM:
        """A model of its own, with the same packs in force."""
        with self._taken_off():
            base = copy.deepcopy(self.base_model, memo)
        twin = type(self)(base, self.tokenizer)
        memo[id(self)] = twin
        twin._origin = dict(self._origin)
        twin._put(self._packs, self._acting)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an editable model is not pickled: save its packs (model.save_pretrained) and load them where they are needed, or "
            "pickle the plain model that model.merge_and_unload() gives"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def __repr__(self) -> str:
        name = self._origin["base_model_name_or_path"] or type(self.base_model).__name__
        known = self._packs
        packs = ", ".join(f"{n}: {known[n].method}, {len(known[n].facts)} facts" for n in self._acting if n in known)
        return f"EditableModelForCausalLM({name!r}, edits in force: {packs or 'none'})"


def packs_in(folder: Path, pack_name: str = "default") -> dict[str, EditPack]:
    """The packs in a local folder: its own and those of its subfolders; none where it holds no pack."""
    if not folder.is_dir():
        return {}
    packs = {}
    if located(folder, CONFIG_FILE).exists():
        packs[pack_name] = EditPack.from_pretrained(folder)
    elif (folder / "edits.safetensors").exists():
        raise PackFormatError(f"{folder} has no {CONFIG_FILE}: the pack is incomplete, save or download it again")
    if not packs and (folder / "config.json").exists():
        return {}  # a model; packs that happen to lie below it were not asked for
    for child in subpacks(folder):
        if child.name in packs:
            raise ConflictingEditsError(
                f"{folder} has a pack {child.name!r} of its own; pass another pack_name for the main one"
            )
        packs[child.name] = EditPack.from_pretrained(child)
    return in_order(packs)


def _plain(model: nn.Module) -> nn.Module:
    """The model in a compiled one."""
    return getattr(model, "_orig_mod", model)


def _results(
    facts: Sequence[Fact], before: Sequence[Answer] | None, after: Sequence[Answer] | None, notes: Mapping[str, str]
) -> tuple[FactResult, ...]:
    """What the report says of each fact; without answers where the model was not asked."""
    if before is None or after is None:
        return tuple(FactResult(f, note=notes.get(str(f.id), "")) for f in facts)
    return tuple(FactResult.of(f, was, now, notes.get(str(f.id), "")) for f, was, now in zip(facts, before, after, strict=True))


def _chat_of(tokenizer: Any, prompt: str | Messages) -> Text:
    """A prompt as a chat: a text is the user's turn."""
    return chat_text(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _check_model(at: Snapshot, base_model_kwargs: Mapping[str, Any]) -> None:
    """Say what a repo or folder is not, where it is neither a pack nor a model."""
    elsewhere = {"gguf_file", "subfolder", "config"} & set(base_model_kwargs)
    if elsewhere or (at.folder / "config.json").exists():
        return
    neither = f"{at.name} holds neither an edit pack (edit_config.json) nor a model (config.json)"
    if at.repo_id is not None:
        raise HubError(f"{neither}; if you work offline, the cache may have a part of it only")
    if not (at.folder / "adapter_config.json").exists():  # transformers loads an adapter with the base that it names
        raise PackFormatError(neither)


def _named_base(at: Snapshot, packs: Mapping[str, EditPack], revision: str | None, hub: Mapping[str, Any]) -> Snapshot:
    """The base that packs name, at the commit that they were made for."""
    bases = {(pack.base["base_model_name_or_path"], pack.base["base_model_revision"]) for pack in packs.values()}
    names = {name for name, _ in bases}
    if len(names) > 1:
        raise BaseMismatchError(f"the packs in {at.name} name different bases: {sorted(map(str, names))}; pass base_model=...")
    name, pinned = min(bases, key=str)
    if name is None:
        raise BaseMismatchError(f"the pack in {at.name} does not name its base model; pass base_model=...")
    if at.repo_id is not None and os.path.exists(name):
        raise PackSecurityError(
            f"{at.name} names the base {name!r}, and a local path of that name would be loaded in place of the repo on the "
            "Hub: pass base_model=... to say which you mean, or go to another folder"
        )
    try:
        return fetch(name, ["config.json"], revision=revision or pinned, **hub)
    except (FileNotFoundError, HubError) as error:
        raise type(error)(
            f"the base that the pack in {at.name} is for can't be had: {error}. If you have it elsewhere, pass base_model=..."
        ) from error


def _load(base: Snapshot, tokenizer: Any, hub: Mapping[str, Any], base_model_kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """A base model and its tokenizer, of one commit."""
    source = base.folder if base.repo_id is None else base.repo_id
    pinned = {} if base.revision is None else {"revision": base.revision, **hub}
    model = AutoModelForCausalLM.from_pretrained(source, **pinned, **base_model_kwargs)
    if tokenizer is None:
        shared = {name: base_model_kwargs[name] for name in _OF_BOTH if name in base_model_kwargs}
        tokenizer = AutoTokenizer.from_pretrained(source, **pinned, **shared)
    return model, tokenizer


def _check_ids(facts: Sequence[Fact], known: Sequence[Fact]) -> None:
    replaced = {f.key for f in superseded(known, facts)}
    ids = [f.id for f in facts] + [f.id for f in known if f.key not in replaced]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ConflictingEditsError(f"two facts have the id {twice!r}; give them different ids, or none")
