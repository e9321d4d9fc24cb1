"""Packs to tamper with: made once, copied for each test, their hashes made right again, as an attacker would."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, same, snapshot, tiny_model
from safetensors.torch import load_file, save_file

from hf_edit import EditableModelForCausalLM

QUICKEST = {
    "steam": {**QUICK_STEAM, "steps": 1},
    "lks": {**QUICK_LKS, "epochs": 1, "min_steps": 1},
}
HEADER = {"format": "pt", "hf_edit_format": "1"}


class World:
    """A base in a folder, an untouched model of it, and a pack a method."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        base = tiny_model("llama")
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        self.folder = folder
        self.model = EditableModelForCausalLM.from_pretrained(folder / "base")
        for method, quick in QUICKEST.items():
            self.model.edit(FACTS, method, progress=False, verify=False, **quick)
            self.model.save_pretrained(folder / method)
            self.model.rollback()
        self.clean = snapshot(self.model.base_model)

    def copy(self, to: Path, method: str = "steam") -> Path:
        """A pack of one's own."""
        return Path(shutil.copytree(self.folder / method, to / "pack"))

    def refuses(self, pack: Path, error: type[BaseException], match: str, **load: Any) -> None:
        """The pack is refused with just this error, quickly, and the model is bit for bit as it was."""
        self.model.rollback()
        started = time.process_time()
        with pytest.raises(error, match=match) as raised:
            self.model.load_pack(pack, **load)
        assert time.process_time() - started < 2
        assert raised.type is error
        assert self.model.packs == {}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in self.model.base_model.modules())
        assert same(self.clean, self.model.base_model)

    def takes(self, pack: Path) -> None:
        """The pack is loaded and taken off without a trace."""
        self.model.rollback()
        self.model.load_pack(pack)
        self.model.rollback()
        assert same(self.clean, self.model.base_model)


def rewrite(
    pack: Path,
    config: Callable[[dict[str, Any]], Any] | None = None,
    facts: Callable[[list[dict[str, Any]]], Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
) -> Path:
    """Change a pack's contents in place and make all its hashes right again."""
    if facts is not None:
        records = [json.loads(line) for line in (pack / "facts.jsonl").read_text("utf-8").splitlines()]
        facts(records)
        (pack / "facts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    if tensors is not None:
        loaded = load_file(pack / "edits.safetensors")
        tensors(loaded)
        save_file(loaded, pack / "edits.safetensors", HEADER)
    return rehash(pack, config)


def rehash(pack: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """Make a pack's hashes those of its files."""
    path = pack / "edit_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["facts_sha256"] = hashlib.sha256((pack / "facts.jsonl").read_bytes()).hexdigest()
    config["tensors_sha256"] = hashlib.sha256((pack / "edits.safetensors").read_bytes()).hexdigest()
    if change is not None:
        change(config)
    config.pop("config_sha256", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    path.write_text(json.dumps({**config, "config_sha256": digest}), "utf-8")
    return pack


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
