"""`EditPack`: an edit as a value, and as a folder that can be shared.

A pack is read as data from a stranger: nothing in it is imported, evaluated or unpickled, every file is checked against
its hash and every tensor against its method before a model is touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .base import Base
from .card import card
from .composition import PackDiff, difference, joined
from .errors import BaseMismatchError, HubError, PackFormatError, PackSecurityError
from .export import export_peft
from .facts import Fact
from .hub import PushToHub, Snapshot, check_base_of, fetch, is_repo_id, safetensors_header
from .methods import EditConfig, Fit, get_method
from .storage import file_digest, located, read_bytes, read_start, read_whole, replacing, write_tensors
from .strict import TensorFile, check_values, json_digest, parse_config, parse_json, read_tensors

__all__ = ["CARD_FILE", "CONFIG_FILE", "EditPack", "check_name", "save_packs", "subpacks"]

logger = logging.getLogger(__name__)

CONFIG_FILE = "edit_config.json"
FACTS_FILE = "facts.jsonl"
TENSORS_FILE = "edits.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, FACTS_FILE, TENSORS_FILE, CARD_FILE)
FORMAT_VERSION = 1

_READ = (CONFIG_FILE, FACTS_FILE, TENSORS_FILE)
HUB_FILES = (*_READ, *(f"*/{name}" for name in _READ))  # what is downloaded of a repo of packs

_MAX_CONFIG_BYTES = 1 << 20
_MAX_FACTS_BYTES = 1 << 28
_MAX_FACT_BYTES = 1 << 18
_MAX_FACTS = 100_000
_MAX_TENSOR_BYTES = 1 << 33
_MAX_NAMES = 1 << 10
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "method": str,
    "method_config": dict,
    "base_model_name_or_path": (str, type(None)),
    "base_model_revision": (str, type(None)),
    "base_model_type": str,
    "sizes": dict,
    "base_fingerprint": str,
    "tokenizer_fingerprint": str,
    "modules": list,
    "num_facts": int,
    "facts_sha256": str,
    "tensors_sha256": str,
    "versions": dict,
    "seed": int,
    "parent": (str, type(None)),
    "config_sha256": str,
}


@dataclass(frozen=True, eq=False)
class EditPack(PushToHub):
    """An edit: facts, tensors, and the base model that they are for.

    Attributes:
        method: the method's name.
        config: its settings.
        fit: tensors, edited modules and facts.
        base: what is known of the base model: name, revision, type, sizes, fingerprints.
        seed: of the fit.
        versions: of the libraries that made it.
        parent: `digest` of the weight edits that this pack was fitted on top of, or None.
    """

    method: str
    config: EditConfig
    fit: Fit
    base: Mapping[str, Any]
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts, in the order of the tensors."""
        return self.fit.facts

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return self.fit.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EditPack):
            return NotImplemented
        return (
            self.method == other.method
            and self.config.to_dict() == other.config.to_dict()
            and self.facts == other.facts
            and dict(self.base) == dict(other.base)
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(t, other.tensors[name]) for name, t in self.tensors.items())
        )

    __hash__ = None  # type: ignore[assignment]  # holds tensors

    def __repr__(self) -> str:
        where = self.base.get("base_model_name_or_path") or self.base.get("base_model_type")
        return f"EditPack({self.method!r}, {len(self.facts)} facts, {self.nbytes / 1e6:.2f} MB, base {where!r})"

    @cached_property
    def digest(self) -> str:
        """Hash of the edit: of its facts, settings and tensors, and of the packs beneath it. Packs on top name it `parent`."""
        about = {
            "method": self.method,
            "method_config": type(self.config).from_dict(self.config.to_dict()).to_dict(),
            "facts": [fact.to_dict() for fact in self.facts],
            "modules": list(self.fit.modules),
            "base_fingerprint": self.base["base_fingerprint"],
            "seed": self.seed,
            "parent": self.parent,
            "tensors": [[name, str(t.dtype), list(t.shape)] for name, t in sorted(self.tensors.items())],
        }
        found = hashlib.sha256(json_digest(about).encode())
        for _, tensor in sorted(self.tensors.items()):
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def __add__(self, other: EditPack) -> EditPack:
        """One pack with the facts of both, this one's first: for a base that is free of edits, the sum of both changes.

        Raises:
            BaseMismatchError: they were made for different bases.
            ConflictingEditsError: they share facts, or contradict each other.
            MergeError: they are by different methods, or by one whose edits can't be added up (LKS).
        """
        if not isinstance(other, EditPack):
            return NotImplemented
        return joined(self, other)

    def diff(self, other: EditPack) -> PackDiff:
        """What it takes to get from this pack to another: facts added, removed and changed, settings; printed line by line."""
        return difference(self, other)

    def remove(self, ids: Sequence[str]) -> EditPack:
        """The pack without some facts, solved from what it stores: no training, no model. Of weight edits a rest of what was
        done for those facts stays, which `EditableModelForCausalLM.remove_edits` does not leave.

        Args:
            ids: ids of the facts to take out.

        Raises:
            KeyError: the pack has no fact of that id.
            ValueError: nothing would be left.
        """
        known = [f.id for f in self.facts]
        for id in ids:
            if id not in known:
                raise KeyError(f"the pack has no fact with id {id!r}; see the ids with [fact.id for fact in pack.facts]")
        keep = [i for i, id in enumerate(known) if id not in set(ids)]
        if not keep:
            raise ValueError("no fact would be left; delete the pack instead: model.delete_pack(name)")
        return replace(self, fit=get_method(self.method).remove(self.fit, keep))

    @property
    def in_weights(self) -> bool:
        """Whether the edit becomes part of the model's weights, so that others are made on top of it."""
        return get_method(self.method).in_weights and not self.config.conditional

    def check_base(self, base: Base) -> None:
        """Refuse another base than the pack was made for; reads the clean model.

        Raises:
            BaseMismatchError: another architecture, size, set of weights or tokenizer.
        """
        here = describe_base(base, self.fit.modules, known=self.base)
        for key, what in (
            ("base_model_type", "another architecture"),
            ("sizes", "another size"),
            ("tokenizer_fingerprint", "another tokenizer"),
            ("base_fingerprint", "other weights in the edited modules"),
        ):
            if here[key] != self.base[key]:
                raise BaseMismatchError(
                    f"this model has {what} than the edits were made for ({key}: here {here[key]}, in the pack "
                    f"{self.base[key]}). Load the base that the pack names: "
                    f"{self.base['base_model_name_or_path']!r}, or pass verify_base='warn' if you know that it serves. "
                    "(float16 rounds a float32 checkpoint otherwise than bfloat16 does: load the base in float32 or bfloat16.)"
                )

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        readme: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_kwargs: Any,
    ) -> Path:
        """Write the pack's files into a folder, in place of those of a pack that is there: all of them, or none.

        Args:
            readme: the model card; by default one is made from the pack.
            push_to_hub: push the pack as well.
            repo_id: where to; by default a repo of the folder's name.
            **hub_kwargs: for `push_to_hub`.

        Returns:
            The folder.

        Raises:
            PackFormatError: the tensors hold NaN or infinity, so that the pack could not be loaded.
            OSError: the disk is full or the folder can't be written to; what was there still is.
        """
        folder = Path(directory)
        save_packs({folder: (self, readme or card({"default": self}, folder.resolve().name))})
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **hub_kwargs)
        return folder

    def _write(self, folder: Path, readme: str) -> None:
        """The pack's files, the configuration last."""
        facts = "".join(json.dumps(f.to_dict(), ensure_ascii=False, sort_keys=True) + "\n" for f in self.facts)
        write_tensors(self.tensors, folder / TENSORS_FILE, {"hf_edit_format": str(FORMAT_VERSION)})
        (folder / FACTS_FILE).write_text(facts, encoding="utf-8", newline="\n")
        (folder / CARD_FILE).write_text(readme, encoding="utf-8", newline="\n")
        config = self._config_json(file_digest(folder / FACTS_FILE), file_digest(folder / TENSORS_FILE))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")

    def export_peft(self, directory: str | os.PathLike[str]) -> None:
        """Write the edit as a LoRA adapter, which PEFT, plain transformers and inference servers load without this library.

        Its logits are the edited model's to rounding. Nothing checks there that the base is the right one, as a pack does; and
        single facts can't be taken out of it.

        Args:
            directory: the adapter's folder; not the pack's own, which would then be taken for an adapter.

        Raises:
            MergeError: the method does not edit weights.
            ValueError: there is a pack in the folder.
        """
        folder = Path(directory)
        if located(folder, CONFIG_FILE).exists():
            raise ValueError(f"{folder} holds a pack; give the adapter a folder of its own")
        export_peft(self, folder)

    def _write_for_hub(self, folder: Path, repo_id: str, *, pack_name: str = "default") -> str:
        """The pack as it may be read by strangers: "default" in the repo itself, others in subfolders of their names."""
        pack = self.shareable()
        pack.save_pretrained(_below(folder, pack_name), readme=card({pack_name: pack}, repo_id))
        return f"{len(self.facts)} edited facts ({self.method})"

    def shareable(self) -> EditPack:
        """The pack without paths of this machine, such as that of a base in a local folder, which mean nothing to others."""
        if (settings := self.config.shareable()) is not self.config:
            return replace(self, config=settings).shareable()
        name = self.base["base_model_name_or_path"]
        if name is None or is_repo_id(name):
            return self
        logger.warning(
            "the base is a local folder, which the shared pack does not name: whoever loads it has to pass base_model=..."
        )
        return replace(self, base={**self.base, "base_model_name_or_path": None, "base_model_revision": None})

    def _config_json(self, facts_sha256: str, tensors_sha256: str) -> dict[str, Any]:
        config = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "method_config": self.config.to_dict(),
            **self.base,
            "modules": list(self.fit.modules),
            "num_facts": len(self.facts),
            "facts_sha256": facts_sha256,
            "tensors_sha256": tensors_sha256,
            "versions": dict(self.versions),
            "seed": self.seed,
            "parent": self.parent,
        }
        return {**config, "config_sha256": json_digest(config)}

    @classmethod
    def inspect(
        cls,
        pack_or_id: str | os.PathLike[str],
        *,
        pack_name: str = "default",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> dict[str, Any]:
        """The checked contents of a pack's `edit_config.json`, its tensors' names, types and shapes, and the names of the other
        packs there (`other_packs`), which `EditableModelForCausalLM.from_pretrained` loads along with it. Reads no tensor, and
        downloads none.

        Args:
            pack_or_id: as for `from_pretrained`, as are the others.

        Raises:
            FileNotFoundError: there is no such folder.
            HubError: the repo is missing, gated, or out of reach.
            PackFormatError: there is no pack (no `edit_config.json`), or it is damaged or of a format that this version does
                not read.
        """
        at = fetch(
            pack_or_id,
            [CONFIG_FILE, f"*/{CONFIG_FILE}"],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        _check_there(at, pack_name)
        folder = _below(at.folder, pack_name)
        others = {"other_packs": [name for name in pack_names(at.folder) if name != pack_name]}
        config = _read_config(folder)
        _check_unchanged(config, folder)
        config |= others
        origin = {} if at.repo_id is None else {"repo_id": at.repo_id, "revision": at.revision}
        if at.repo_id is not None and not located(folder, TENSORS_FILE).exists():
            tensors, size = safetensors_header(at, _in_repo(pack_name, TENSORS_FILE), token)
            return {**config, "tensors": tensors, "bytes": size, **origin}
        try:
            start, size = read_start(folder, TENSORS_FILE)
        except FileNotFoundError as error:
            raise PackFormatError(f"{error}: the pack is incomplete") from error
        file = TensorFile.of(start, size, folder / TENSORS_FILE)
        tensors = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape, _, _) in file.tensors.items()}
        return {**config, "tensors": tensors, "bytes": size, **origin}

    @classmethod
    def from_pretrained(
        cls,
        pack_or_id: str | os.PathLike[str],
        *,
        pack_name: str = "default",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> EditPack:
        """Read a pack from a folder, or from a repo on the Hub: all its files of one commit.

        Args:
            pack_or_id: a folder, or the id of a repo.
            pack_name: which of several packs there: "default" lies in the folder itself, others in subfolders.
            revision: branch, tag, pull request (``refs/pr/1``) or sha of the repo; by default the main branch.
            cache_dir, token, force_download, local_files_only: as everywhere with the Hub.

        Raises:
            FileNotFoundError: there is no such folder.
            HubError: the repo is missing, gated, or out of reach.
            PackFormatError: a file (`edit_config.json` in a folder without a pack) is missing, damaged, changed since it was
                written, or of a newer format.
            PackSecurityError: the pack asks for what no pack may ask for: a file outside of its folder; from the Hub, a base
                that is not there.
        """
        at = fetch(
            pack_or_id,
            [_in_repo(pack_name, name) for name in _READ],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        _check_there(at, pack_name)
        folder = _below(at.folder, pack_name)
        return read_whole(folder, CONFIG_FILE, lambda: cls._read(folder, at))

    @classmethod
    def _read(cls, folder: Path, at: Snapshot) -> EditPack:
        config = _read_config(folder)
        check_base_of(config, at)
        facts = _read_facts(folder, config)
        tensors = _read_tensors(folder, config)
        try:
            method = get_method(config["method"])
            settings = method.config_class.from_dict(config["method_config"])
        except (ValueError, OverflowError) as error:
            raise PackFormatError(f"{folder / CONFIG_FILE}: {error}") from error
        fit = Fit(tensors, tuple(config["modules"]), facts)
        method.validate(fit, settings, None)
        _check_unchanged(config, folder)
        base = {key: config[key] for key in _BASE_KEYS}
        return cls(config["method"], settings, fit, base, config["seed"], config["versions"], config["parent"])


def save_packs(packs: Mapping[Path, tuple[EditPack, str]]) -> None:
    """Write packs with their cards, each into its folder: all take effect in one step, or none does.

    Raises:
        PackFormatError, OSError: as of `EditPack.save_pretrained`.
    """
    for pack, _ in packs.values():
        check_values(pack.tensors, "the edit")
    with replacing(*packs) as stagings:
        for staging, (pack, readme) in zip(stagings, packs.values(), strict=True):
            pack._write(staging, readme)


def _below(folder: Path, pack_name: str) -> Path:
    """Where a pack of this name lies in a folder of packs."""
    check_name(pack_name)
    return folder if pack_name == "default" else folder / pack_name


def _in_repo(pack_name: str, file: str) -> str:
    """A file's path in a repo of packs."""
    return file if pack_name == "default" else f"{pack_name}/{file}"


def _check_there(at: Snapshot, pack_name: str) -> None:
    """Say what there is instead of a pack that is not there."""
    if pack_name != "default" and os.path.lexists(at.folder / pack_name):
        _check_subfolder(at.folder / pack_name)
    if located(_below(at.folder, pack_name), CONFIG_FILE).exists() or (at.repo_id is None and pack_name == "default"):
        return
    missing = f"{at.name} holds no edit pack" + ("" if pack_name == "default" else f" {pack_name!r}")
    if at.repo_id is not None:
        raise HubError(f"{missing}: there is no {_in_repo(pack_name, CONFIG_FILE)}")
    raise PackFormatError(f"{missing}; there are: {', '.join(pack_names(at.folder)) or 'none'}")


def pack_names(folder: Path) -> list[str]:
    """The names of the packs in a local folder: "default" for its own, then those of its subfolders."""
    return ["default"] * located(folder, CONFIG_FILE).exists() + [path.name for path in subpacks(folder)]


def subpacks(folder: Path) -> list[Path]:
    """The subfolders that hold a pack, by name; dot folders are none.

    Raises:
        PackFormatError: one has a name that no pack can have, or that of the folder's own pack, "default".
        PackSecurityError: one is a link.
    """
    below = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in below if located(path, CONFIG_FILE).exists()]
    for path in found:
        _check_subfolder(path)
    return found


def _check_subfolder(path: Path) -> None:
    if path.is_symlink():
        raise PackSecurityError(f"{path} is a link; a pack reads its own files only. Load what it points to by its own path")
    try:
        check_name(path.name)
    except ValueError as error:
        raise PackFormatError(f"{path}: {error}; rename the folder") from error
    if path.name == "default":
        raise PackFormatError(f"{path} has the name of the pack that lies in {path.parent} itself; rename the folder")


_BASE_KEYS = (
    "base_model_name_or_path",
    "base_model_revision",
    "base_model_type",
    "sizes",
    "base_fingerprint",
    "tokenizer_fingerprint",
)


def describe_base(base: Base, modules: Sequence[str], *, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a pack records of its base model; reads the clean model.

    Args:
        modules: the edited modules, which the fingerprint is taken of.
        known: name and revision, where they are known.

    Raises:
        BaseMismatchError: the model has no module of one of these names.
    """
    config = base.model.config.get_text_config(decoder=True)
    try:
        found = base.fingerprint_of(modules)
    except AttributeError as error:
        raise BaseMismatchError(f"the model has not the modules that the edits are for: {error}") from error
    except NotImplementedError as error:  # torch's word on reading a tensor without data
        raise BaseMismatchError(f"the weights of {', '.join(modules)[:200]} are not loaded: {error}") from error
    known = known or {}
    revision = known.get("base_model_revision")
    return {
        "base_model_name_or_path": known.get("base_model_name_or_path"),
        # a branch moves, only a full sha says which weights these were
        "base_model_revision": revision if _COMMIT.fullmatch(revision or "") else None,
        "base_model_type": str(config.model_type),
        "sizes": {key: int(getattr(config, key)) for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "base_fingerprint": found,
        "tokenizer_fingerprint": base.tokenizer_fingerprint,
    }


def versions() -> dict[str, str]:
    """Versions of this library and of those that an edit depends on."""
    from importlib.metadata import version

    return {"hf_edit": __version__, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}


def _read(folder: Path, name: str, limit: int) -> bytearray:
    """A pack's file; the configuration says whether there is a pack at all."""
    try:
        return read_bytes(folder, name, limit)
    except FileNotFoundError as error:
        if name != CONFIG_FILE:
            raise PackFormatError(f"{error}: the pack is incomplete") from error
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}") from error
        named = f"; there are packs in it: {', '.join(names)} (pack_name=...)" if (names := pack_names(folder)) else ""
        raise PackFormatError(f"{error}: it holds no edit pack, or an incomplete one{named}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    config = parse_config(_read(folder, CONFIG_FILE, _MAX_CONFIG_BYTES), path, FORMAT_VERSION, _KEYS)
    name = config["base_model_name_or_path"]
    if name is not None and not (name.strip() and name.isprintable()):
        raise PackSecurityError(f"{path}: the base model's name is empty or holds control characters: {name!r:.200}")
    revision = config["base_model_revision"]
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise PackSecurityError(f"{path}: the base model's revision {revision!r:.80} is no full sha of a commit")
    for key, good in _CHECKS.items():
        if not good(config[key]):
            raise PackFormatError(f"{path}: {key!r} is out of range or no such thing: {config[key]!r:.120}")
    return config


def _check_unchanged(config: Mapping[str, Any], folder: Path) -> None:
    if config["config_sha256"] != json_digest({k: v for k, v in config.items() if k != "config_sha256"}):
        raise PackFormatError(f"{folder / CONFIG_FILE} was changed since the pack was saved (its hash differs): get it again")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "sizes": lambda v: sorted(v) == sorted(_SIZES) and all(_is_count(n, 1 << 32) for n in v.values()),
    "base_fingerprint": lambda v: 0 < len(v) < 1 << 16,
    "tokenizer_fingerprint": lambda v: 0 < len(v) < 1 << 10,
    "modules": lambda v: (
        0 < len(v) <= _MAX_NAMES and all(isinstance(name, str) and 0 < len(name) < 512 for name in v) and len(set(v)) == len(v)
    ),
    "num_facts": lambda v: _is_count(v, _MAX_FACTS),
    "facts_sha256": lambda v: bool(_SHA256.fullmatch(v)),
    "tensors_sha256": lambda v: bool(_SHA256.fullmatch(v)),
    "versions": lambda v: len(v) <= _MAX_NAMES and all(isinstance(text, str) and len(text) < 512 for text in v.values()),
    "seed": lambda v: -(1 << 63) <= v < 1 << 64,
    "parent": lambda v: v is None or bool(_SHA256.fullmatch(v)),
}


def _read_facts(folder: Path, config: Mapping[str, Any]) -> tuple[Fact, ...]:
    path = folder / FACTS_FILE
    data = _read(folder, FACTS_FILE, _MAX_FACTS_BYTES)
    if hashlib.sha256(data).hexdigest() != config["facts_sha256"]:
        raise PackFormatError(
            f"{path} is not the file that the pack was saved with (its hash differs): get it again, or save it again"
        )
    if data.count(b"\n") > 2 * _MAX_FACTS:
        raise PackFormatError(f"{path} holds more lines than any edit pack")
    lines = [line for line in data.split(b"\n") if line.strip()]
    if len(lines) != config["num_facts"]:
        raise PackFormatError(f"{path} holds {len(lines)} facts, {CONFIG_FILE} says {config['num_facts']}")
    facts = []
    for number, line in enumerate(lines, start=1):
        if len(line) > _MAX_FACT_BYTES:
            raise PackFormatError(f"{path}, line {number} has {len(line)} bytes, more than any fact")
        record = parse_json(line, path)
        try:
            facts.append(Fact.from_dict(record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PackFormatError(f"{path}, line {number}: {error}"[:500]) from error
    for attribute, what in (("id", "the same id"), ("key", "the same subject and prompt")):
        if len({getattr(fact, attribute) for fact in facts}) < len(facts):
            raise PackFormatError(f"{path}: two facts have {what}")
    return tuple(facts)


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / TENSORS_FILE
    data = _read(folder, TENSORS_FILE, _MAX_TENSOR_BYTES)
    if hashlib.sha256(data).hexdigest() != config["tensors_sha256"]:
        raise PackFormatError(
            f"{path} is not the file that the pack was saved with (its hash differs): get it again, or save it again"
        )
    metadata, tensors = read_tensors(data, path)
    if metadata.get("hf_edit_format") != str(FORMAT_VERSION):
        raise PackFormatError(f"{path} is no tensor file of an edit pack (its header does not say so)")
    return tensors


def check_name(name: str) -> None:
    """Refuse a name for a pack that is no name of a folder, or that one of a pack's files has.

    Raises:
        ValueError: the name can't be one.
    """
    if not name or len(name) > 64 or name.startswith(".") or name in FILES or any(c in name for c in '/\\:*?"<>|\0\n\r'):
        raise ValueError(f'{name!r:.80} is no name for a pack: up to 64 characters, none of them / \\ : * ? " < > |')
