"""`LKSEditor`: a generator trained beforehand on many facts, for one base model.

It is what training begins with, and by itself edits facts that it has never seen, from their features alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._version import __version__
from ...base import Base, seeded
from ...cache import cache_folder
from ...errors import BaseMismatchError, HubError, PackFormatError
from ...facts import Fact
from ...gate import LearnedGate, embedding_size, gate_block
from ...gate_training import tells_enough, train_gate
from ...hub import PushToHub, fetch, is_repo_id
from ...reading import read_facts
from ...storage import file_digest, located, read_bytes, read_whole, replacing, write_tensors
from ...strict import check_values, json_digest, parse_config, read_tensors
from ...suffix import frozen
from .bank_facts import bank_facts
from .config import RELEASED, LKSConfig
from .editor_card import editor_card
from .examples import build_examples
from .features import general_states, read_features
from .generator import FORMS, Generator, generator_of, make_generator, packed
from .retelling import retold
from .training import train

__all__ = ["LKSEditor", "block_of", "blocks_from", "open_editor"]

CONFIG_FILE, TENSORS_FILE = "editor_config.json", "editor.safetensors"
_FORMAT = 1
_DEPTH = 0.55
_BANK_FACTS = 1200
_BANK_EPOCHS = 6
_GATE = "gate."
_MAX_CONFIG_BYTES = 1 << 16
_MAX_TENSOR_BYTES = 1 << 33
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "generator": str,
    "layer": int,
    "base_model": (str, type(None)),
    "base_fingerprint": str,
    "tokenizer_fingerprint": str,
    "num_facts": int,
    "tensors_sha256": str,
    "version": str,
    "config_sha256": str,
}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "generator": lambda v: v in FORMS and v not in RELEASED,
    "layer": lambda v: 0 <= v < 1 << 16,
    "base_model": lambda v: v is None or is_repo_id(v),
    "base_fingerprint": lambda v: v.isalnum() and len(v) < 1 << 10,
    "tokenizer_fingerprint": lambda v: v.isalnum() and len(v) < 1 << 10,
    "num_facts": lambda v: 0 <= v < 1 << 63,
    "tensors_sha256": lambda v: bool(_SHA256.fullmatch(v)),
    "version": lambda v: v.isprintable() and len(v) < 1 << 10,
}


@dataclass(frozen=True, eq=False)
class LKSEditor(PushToHub):
    """A trained generator with what it takes to use it.

    Attributes:
        form: of the generator, see `LKSConfig.generator`.
        layer: the lowest block whose output is rewritten.
        generator: on the CPU.
        base_fingerprint, tokenizer_fingerprint: of the model that it was trained for.
        num_facts: that it was trained on.
        base_model: id of that model on the Hub; None where it has none.
        gate: that learned from the facts' wordings, in place of the one that is trained on the package's; None where they had
            too few, see `train`.
    """

    form: str
    layer: int
    generator: Generator
    base_fingerprint: str
    tokenizer_fingerprint: str
    num_facts: int
    base_model: str | None = None
    gate: LearnedGate | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `LKSConfig` that edits with this editor share."""
        sizes = _sizes(self.generator, self.generator.hidden)
        return {"generator": self.form, "layer": self.layer, **sizes}

    @classmethod
    def train(
        cls,
        model: Any,
        facts: Any = None,
        *,
        config: LKSConfig | None = None,
        seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> LKSEditor:
        """Train an editor; the model is left as it was.

        Args:
            model: an `EditableModelForCausalLM`; its edits are off meanwhile.
            facts: as for `model.edit`, the more and the more varied the better; what they say does not matter, as the editor
                learns to put in what it is told. By default made-up facts on the subjects of the shipped bank. Where 500 or
                more have both `rephrases` and `locality` questions, a gate learns from these what asks the same, and edits
                with this editor take it; `gate=False` leaves that out.
            config: of the training; single settings by name. `editor` is what it begins with, by default nothing. Each of the
                `epochs` tells the facts anew, in another of their wordings, `rephrases` among them, and most with another
                target: told the same again, it would learn them by heart.

        Raises:
            ValueError: a setting is wrong, or names a generator of a released form, which each edit trains from scratch.
        """
        settings = {"editor": "none", **settings} if config is None else settings
        chosen = LKSConfig.combine(config, settings)
        if chosen.released:
            raise ValueError(
                f"generator={chosen.generator!r} is trained from scratch by each edit and takes no editor; train one with "
                "generator='context' or 'residual'"
            )
        with model.disable_edits():
            base = Base(model.get_base_model(), model.tokenizer)
            known = bank_facts(_BANK_FACTS, seed) if facts is None else read_facts(facts)
            return _train(base, known, chosen, seed, progress)

    def check_base(self, base: Base) -> None:
        """Refuse another base than the editor was trained for; reads the clean model.

        Raises:
            BaseMismatchError: it is another model, or has another tokenizer.
        """
        here = (base.fingerprint, base.tokenizer_fingerprint)
        fits = self.generator.hidden == base.layout().hidden_size
        if self.gate is not None:
            fits &= self.gate.fits(base.layout().hidden_size, embedding_size(base)) and self.gate.block <= self.layer
        if here != (self.base_fingerprint, self.tokenizer_fingerprint) or not fits:
            named = f", {self.base_model}" if self.base_model else ""
            raise BaseMismatchError(
                f"the editor was trained for another base model{named}; train one for this: LKSEditor.train(model, facts)"
            )

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_kwargs: Any,
    ) -> Path:
        """Write `editor.safetensors` and `editor_config.json` into a folder, in place of those of an editor that is there:
        both, or none.

        Args:
            push_to_hub: push the editor as well.
            repo_id: where to; by default a repo of the folder's name.
            **hub_kwargs: for `push_to_hub`.

        Returns:
            The folder.

        Raises:
            PackFormatError: the tensors hold NaN or infinity, so that the editor could not be loaded.
            OSError: the disk is full or the folder can't be written to; what was there still is.
        """
        folder, tensors = Path(directory), packed(self.generator)
        if self.gate is not None:
            tensors |= self.gate.tensors(_GATE)
        check_values(tensors, "the editor")
        with replacing(folder) as (staging,):
            write_tensors(tensors, staging / TENSORS_FILE, {"hf_edit_format": str(_FORMAT)})
            config = {
                "format_version": _FORMAT,
                "generator": self.form,
                "layer": self.layer,
                "base_model": self.base_model,
                "base_fingerprint": self.base_fingerprint,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "num_facts": self.num_facts,
                "tensors_sha256": file_digest(staging / TENSORS_FILE),
                "version": __version__,
            }
            config["config_sha256"] = json_digest(config)
            (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **hub_kwargs)
        return folder

    def _write_for_hub(self, folder: Path, repo_id: str) -> str:
        self.save_pretrained(folder)
        (folder / "README.md").write_text(editor_card(self, repo_id), encoding="utf-8", newline="\n")
        return f"LKS editor, trained on {self.num_facts} facts"

    @classmethod
    def from_pretrained(
        cls,
        directory_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> LKSEditor:
        """Read what `save_pretrained` or `push_to_hub` wrote; from the Hub, both files of one commit.

        Args:
            directory_or_id: a folder, or the id of a repo on the Hub.
            revision: branch, tag, pull request (``refs/pr/1``) or sha of the repo; by default the main branch.
            cache_dir, token, force_download, local_files_only: as everywhere with the Hub.

        Raises:
            FileNotFoundError: there is none in this folder.
            HubError: the repo is missing, gated, out of reach, or holds none.
            PackFormatError: it is damaged, changed since it was written, or of a newer format.
            PackSecurityError: a file of it is a link to somewhere else.
        """
        at = fetch(
            directory_or_id,
            [CONFIG_FILE, TENSORS_FILE],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        if not os.path.lexists(located(at.folder, CONFIG_FILE)):
            kind = FileNotFoundError if at.repo_id is None else HubError
            raise kind(f"{at.name} holds no LKSEditor: there is no {CONFIG_FILE}")
        return read_whole(at.folder, CONFIG_FILE, lambda: cls._read(at.folder))

    @classmethod
    def _read(cls, folder: Path) -> LKSEditor:
        config = _read_config(folder)
        tensors = _read_tensors(folder, config["tensors_sha256"])
        of_gate = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_GATE)}
        generator = _checked_generator(folder, config["generator"], tensors)
        known = (config["base_fingerprint"], config["tokenizer_fingerprint"], config["num_facts"], config["base_model"])
        try:
            gate = LearnedGate.from_tensors(of_gate, _GATE, generator.hidden)
        except PackFormatError as error:
            raise PackFormatError(f"{folder / TENSORS_FILE}: {error}") from None
        return cls(config["generator"], config["layer"], generator, *known, gate)


def open_editor(base: Base, config: LKSConfig, seed: int, progress: bool) -> LKSEditor:
    """What the settings name as `editor`, for a base without edits.

    Raises:
        BaseMismatchError: the editor is for another base.
        ValueError: it is of another form, layer or size than the settings say.
    """
    if config.released or config.editor == "none":
        return _fresh(base, config, seed)
    if config.editor == "bank":
        return _from_bank(base, config, progress)
    if config.editor == "given":
        raise ValueError("these settings were saved without their editor, which was an object; give it again: editor=...")
    editor = config.editor if isinstance(config.editor, LKSEditor) else LKSEditor.from_pretrained(config.editor)
    editor.check_base(base)
    block = block_of(base, config)
    found = editor.settings
    asked = {"generator": config.generator, "layer": block, "width": config.width, "target_tokens": config.target_tokens}
    asked["carry"] = config.carry
    asked["writes"] = len(blocks_from(base, block, config.writes))
    if wrong := [name for name in asked if asked[name] != found[name]]:
        raise ValueError("the editor was trained with other settings; pass " + ", ".join(f"{n}={found[n]!r}" for n in wrong))
    return editor


def block_of(base: Base, config: LKSConfig) -> int:
    """The block that the settings name, the lowest that is rewritten.

    Raises:
        ValueError: there is no such block, or nothing runs above it.
    """
    layout = base.layout()
    block = layout.at_depth(_DEPTH) if config.layer is None else layout.block(config.layer)
    if block == len(layout) - 1:
        raise ValueError(f"layer {block} is the last block, nothing runs above it; choose one from 0 to {len(layout) - 2}")
    return block


def blocks_from(base: Base, lowest: int, writes: int) -> tuple[int, ...]:
    """So many blocks at even distances, from the lowest on, as far as there are such below the last one."""
    last = len(base.layout()) - 1
    apart = max(1, (last - lowest) // writes)
    return tuple(range(lowest, last, apart))[:writes]


def _sizes(generator: Generator, hidden: int) -> dict[str, Any]:
    return {
        "width": generator.code_size / hidden,
        "target_tokens": generator.slots - 1,
        "writes": generator.writes,
        "carry": generator.carries,
    }


def _fresh(base: Base, config: LKSConfig, seed: int) -> LKSEditor:
    """An untrained generator, standardised by the bank's facts."""
    hidden, block = base.layout().hidden_size, block_of(base, config)
    with seeded(seed, base.device), frozen(base.model):
        blocks = blocks_from(base, block, 1 if config.released else config.writes)
        generator = make_generator(
            config.generator, hidden, round(config.width * hidden), config.slots, len(blocks), config.carry
        )
        features, states = general_states(base, blocks)
        generator.standardise(features.cpu(), [s.cpu() for s in states])
    return LKSEditor(config.generator, block, generator, base.fingerprint, base.tokenizer_fingerprint, 0, _on_hub(base))


def _from_bank(base: Base, config: LKSConfig, progress: bool) -> LKSEditor:
    """The editor trained on the shipped bank: made once for a model and kept."""
    own = {name: getattr(config, name) for name in ("generator", "width", "target_tokens", "writes", "carry", "compute_dtype")}
    settings = LKSConfig(**own, layer=block_of(base, config), editor="none", epochs=_BANK_EPOCHS)
    key = [base.fingerprint, base.tokenizer_fingerprint, settings.to_dict(), _BANK_FACTS, _FORMAT]
    folder = cache_folder("lks", "editors") / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if located(folder, CONFIG_FILE).exists():
        try:
            return LKSEditor.from_pretrained(folder)
        except PackFormatError:
            pass  # a damaged cache is made anew
    editor = _train(base, bank_facts(_BANK_FACTS, 0), settings, 0, progress)
    editor.save_pretrained(folder)
    return editor


def _train(base: Base, facts: Sequence[Fact], config: LKSConfig, seed: int, progress: bool) -> LKSEditor:
    start = open_editor(base, config, seed, progress)
    tellings = config.passes(len(facts))
    told = retold(facts, tellings, seed)
    # a fact's wordings come with its tellings; what it has of its own would not generalise
    settings = LKSConfig.from_dict({**vars(config), "epochs": tellings, "variations": 0, "code_lr": 0.0})
    with frozen(base.model):
        generator = generator_of(start.form, start.generator.state_dict()).to(base.device)
        features = read_features(base, start.layer, told, generator.slots, progress)
        examples = build_examples(base, told, settings, seed, progress)
        with seeded(seed, base.device):
            path = checkpoint_path(base, facts, settings, start.generator, seed)
            blocks = blocks_from(base, start.layer, generator.writes)
            train(base, blocks, generator, features, examples, settings, seed, progress, path, tellings=tellings)
    gate = start.gate
    if config.gate and tells_enough(facts):
        gate = train_gate(base, gate_block(base.layout(), start.layer), facts, seed=seed, progress=progress)
    known = (base.fingerprint, base.tokenizer_fingerprint, start.num_facts + len(facts), _on_hub(base))
    return LKSEditor(start.form, start.layer, generator_of(start.form, packed(generator)), *known, gate)


def checkpoint_path(
    base: Base, facts: Sequence[Fact], config: LKSConfig, start: Generator, seed: int, codes_only: bool = False
) -> Path:
    """A file for the state of one training, named after all that it depends on."""
    digest = hashlib.sha256()
    for part in (
        base.fingerprint,
        base.tokenizer_fingerprint,
        config.to_dict(),
        seed,
        codes_only,
        [f.to_dict() for f in facts],
        __version__,
    ):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for name, tensor in sorted(start.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return cache_folder("lks", "training") / f"{digest.hexdigest()[:24]}.safetensors"


def _on_hub(base: Base) -> str | None:
    """The id of a model on the Hub; None for one from a local folder, whose place means nothing to others."""
    name = getattr(base.model, "name_or_path", None)
    return str(name) if is_repo_id(name) and not os.path.exists(str(name)) else None


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    config = parse_config(read_bytes(folder, CONFIG_FILE, _MAX_CONFIG_BYTES), path, _FORMAT, _KEYS)
    for key, good in _CHECKS.items():
        if not good(config[key]):
            raise PackFormatError(f"{path}: {key!r} is out of range or no such thing: {config[key]!r:.120}")
    if config["config_sha256"] != json_digest({k: v for k, v in config.items() if k != "config_sha256"}):
        raise PackFormatError(f"{path} was changed since the editor was saved (its hash differs): get it again")
    return config


def _read_tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    try:
        data = read_bytes(folder, TENSORS_FILE, _MAX_TENSOR_BYTES)
    except FileNotFoundError as error:
        raise PackFormatError(f"{error}: the editor is incomplete") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PackFormatError(f"{path} is not the file that the editor was saved with (its hash differs): get it again")
    return read_tensors(data, path)[1]


def _checked_generator(folder: Path, form: str, tensors: dict[str, Tensor]) -> Generator:
    path = folder / TENSORS_FILE
    try:
        generator = generator_of(form, tensors)
    except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise PackFormatError(f"{path} does not hold a generator of the form {form!r}: {str(error)[:300]}") from error
    if _types(tensors) != _types(packed(generator)):
        raise PackFormatError(f"{path} holds a tensor of another precision than an editor's")
    if any(name.endswith("_std") and not bool((t > 0).all()) for name, t in tensors.items()):
        raise PackFormatError(f"{path}: the generator divides by deviations that are not above zero")
    return generator


def _types(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.dtype for name, tensor in tensors.items()}
