"""`LKSEditor`: a generator trained beforehand on many facts, for one base model.

It is what training begins with, and by itself edits facts that it has never seen, from their features alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..._version import __version__
from ...base import Base, seeded
from ...cache import atomic_path, cache_folder
from ...errors import BaseMismatchError, PackFormatError
from ...facts import Fact, read_facts
from ...suffix import frozen
from .bank_facts import bank_facts
from .config import LKSConfig
from .examples import build_examples
from .features import general_states, read_features
from .generator import FORMS, Generator, generator_of, make_generator, packed
from .training import train

__all__ = ["LKSEditor", "block_of", "open_editor"]

CONFIG_FILE, TENSORS_FILE = "editor_config.json", "editor.safetensors"
_FORMAT = 1
_DEPTH = 0.55
_BANK_FACTS = 1200
_BANK_EPOCHS = 3
_KEYS: dict[str, Any] = {
    "format_version": int,
    "generator": str,
    "layer": int,
    "base_fingerprint": str,
    "tokenizer_fingerprint": str,
    "num_facts": int,
    "tensors_sha256": str,
    "version": str,
}


@dataclass(frozen=True, eq=False)
class LKSEditor:
    """A trained generator with what it takes to use it.

    Attributes:
        form: of the generator, see `LKSConfig.generator`.
        layer: the block whose output is rewritten.
        generator: on the CPU.
        base_fingerprint, tokenizer_fingerprint: of the model that it was trained for.
        num_facts: that it was trained on.
    """

    form: str
    layer: int
    generator: Generator
    base_fingerprint: str
    tokenizer_fingerprint: str
    num_facts: int

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
                learns to put in what it is told. By default made-up facts on the subjects of the shipped bank.
            config: of the training; single settings by name. `editor` is what it begins with, by default nothing.
        """
        settings = {"editor": "none", **settings} if config is None else settings
        chosen = LKSConfig.combine(config, settings)
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
        if here != (self.base_fingerprint, self.tokenizer_fingerprint):
            raise BaseMismatchError(
                "the editor was trained for another base model; train one for this: LKSEditor.train(model, facts)"
            )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write the editor's two files into a folder, each replaced whole; `editor_config.json` comes last."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in packed(self.generator).items()}
        with atomic_path(folder / CONFIG_FILE) as config_path, atomic_path(folder / TENSORS_FILE) as tensors_path:
            save_file(dict(sorted(tensors.items())), tensors_path, {"format": "pt", "hf_edit_format": str(_FORMAT)})
            config = {
                "format_version": _FORMAT,
                "generator": self.form,
                "layer": self.layer,
                "base_fingerprint": self.base_fingerprint,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "num_facts": self.num_facts,
                "tensors_sha256": _sha256(tensors_path),
                "version": __version__,
            }
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        return folder

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> LKSEditor:
        """Read an editor from a folder.

        Raises:
            FileNotFoundError: there is none in this folder.
            PackFormatError: it is damaged, changed since it was written, or of a newer format.
        """
        folder = Path(directory)
        config = _read_config(folder)
        path = folder / TENSORS_FILE
        if not path.is_file():
            raise PackFormatError(f"{folder} has no {TENSORS_FILE}: the editor is incomplete")
        if _sha256(path) != config["tensors_sha256"]:
            raise PackFormatError(f"{path} is not the file that the editor was saved with (its hash differs): get it again")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            generator = generator_of(config["generator"], tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise PackFormatError(f"{path} does not hold a generator of the form {config['generator']!r}: {error}") from error
        expected = {name: t.dtype for name, t in packed(generator).items()}
        if {name: t.dtype for name, t in tensors.items()} != expected or not all(
            bool(t.isfinite().all()) for t in tensors.values()
        ):
            raise PackFormatError(f"{path} holds a tensor of another precision than an editor's, or NaN or infinity")
        known = (config["base_fingerprint"], config["tokenizer_fingerprint"], config["num_facts"])
        return cls(config["generator"], config["layer"], generator, *known)


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
    found = {"generator": editor.form, "layer": editor.layer, **_sizes(editor.generator, base.layout().hidden_size)}
    asked = {"generator": config.generator, "layer": block, "width": config.width, "target_tokens": config.target_tokens}
    if wrong := [name for name in asked if asked[name] != found[name]]:
        raise ValueError("the editor was trained with other settings; pass " + ", ".join(f"{n}={found[n]!r}" for n in wrong))
    return editor


def block_of(base: Base, config: LKSConfig) -> int:
    """The block that the settings name.

    Raises:
        ValueError: there is no such block, or nothing runs above it.
    """
    layout = base.layout()
    block = layout.at_depth(_DEPTH) if config.layer is None else layout.block(config.layer)
    if block == len(layout) - 1:
        raise ValueError(f"layer {block} is the last block, nothing runs above it; choose one from 0 to {len(layout) - 2}")
    return block


def _sizes(generator: Generator, hidden: int) -> dict[str, Any]:
    return {"width": generator.code_size / hidden, "target_tokens": generator.slots - 1}


def _fresh(base: Base, config: LKSConfig, seed: int) -> LKSEditor:
    """An untrained generator, standardised by the bank's facts."""
    hidden, block = base.layout().hidden_size, block_of(base, config)
    with seeded(seed, base.device), frozen(base.model):
        generator = make_generator(config.generator, hidden, round(config.width * hidden), config.slots)
        generator.standardise(*(t.cpu() for t in general_states(base, block, config.slots)))
    return LKSEditor(config.generator, block, generator, base.fingerprint, base.tokenizer_fingerprint, 0)


def _from_bank(base: Base, config: LKSConfig, progress: bool) -> LKSEditor:
    """The editor trained on the shipped bank: made once for a model and kept."""
    own = {name: getattr(config, name) for name in ("generator", "width", "target_tokens", "compute_dtype")}
    settings = LKSConfig(**own, layer=block_of(base, config), editor="none", epochs=_BANK_EPOCHS, variations=1)
    key = [base.fingerprint, base.tokenizer_fingerprint, settings.to_dict(), _BANK_FACTS, _FORMAT]
    folder = cache_folder("lks", "editors") / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if (folder / CONFIG_FILE).exists():
        try:
            return LKSEditor.from_pretrained(folder)
        except PackFormatError:
            pass  # a damaged cache is made anew
    editor = _train(base, bank_facts(_BANK_FACTS, 0), settings, 0, progress)
    editor.save_pretrained(folder)
    return editor


def _train(base: Base, facts: Sequence[Fact], config: LKSConfig, seed: int, progress: bool) -> LKSEditor:
    start = open_editor(base, config, seed, progress)
    with frozen(base.model):
        generator = generator_of(start.form, start.generator.state_dict()).to(base.device)
        features = read_features(base, start.layer, facts, generator.slots)
        examples = build_examples(base, facts, config, seed, progress)
        with seeded(seed, base.device):
            settings = LKSConfig.from_dict({**vars(config), "code_lr": 0.0})  # what a fact has of its own would not generalise
            path = checkpoint_path(base, facts, settings, start.generator, seed)
            train(base, start.layer, generator, features, examples, settings, seed, progress, path)
    known = (base.fingerprint, base.tokenizer_fingerprint, start.num_facts + len(facts))
    return LKSEditor(start.form, start.layer, generator_of(start.form, packed(generator)), *known)


def checkpoint_path(base: Base, facts: Sequence[Fact], config: LKSConfig, start: Generator, seed: int) -> Path:
    """A file for the state of one training, named after all that it depends on."""
    digest = hashlib.sha256()
    for part in (
        base.fingerprint,
        base.tokenizer_fingerprint,
        config.to_dict(),
        seed,
        [f.to_dict() for f in facts],
        __version__,
    ):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for name, tensor in sorted(start.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return cache_folder("lks", "training") / f"{digest.hexdigest()[:24]}.safetensors"


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no LKSEditor: there is no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise PackFormatError(f"{path} is not valid JSON: {error}"[:500]) from error
    if not isinstance(config, dict) or config.keys() != _KEYS.keys():
        raise PackFormatError(f"{path} has not just the keys {', '.join(sorted(_KEYS))}")
    for key, kind in _KEYS.items():
        if type(config[key]) is not kind:
            raise PackFormatError(f"{path}: {key!r} is of the wrong type ({type(config[key]).__name__})")
    if config["format_version"] != _FORMAT:
        raise PackFormatError(f"{path} has format {config['format_version']}, this version of hf_edit reads {_FORMAT}")
    if config["generator"] not in FORMS:
        raise PackFormatError(f"{path}: there is no generator of the form {config['generator']!r:.80}")
    return config


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
