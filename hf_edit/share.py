"""Packs that lie in a folder, shared as they are."""

from __future__ import annotations

import os
from pathlib import Path

from .card import card, loading
from .hub import PushToHub
from .model import packs_in

__all__ = ["PackFolder"]


class PackFolder(PushToHub):
    """A folder of packs, to be shared with the cards that lie there, which someone may have written on.

    Args:
        folder: the packs' folder.

    Raises:
        FileNotFoundError: it holds no pack.
        PackFormatError: a pack is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}")
        self.packs = packs_in(self.folder)
        if not self.packs:
            raise FileNotFoundError(f"{self.folder} holds no edit pack")

    def _write_for_hub(self, folder: Path, repo_id: str) -> str:
        packs = {name: pack.shareable() for name, pack in self.packs.items()}
        for name, pack in packs.items():
            below = "" if name == "default" else name
            written = self.folder / below / "README.md"
            text = written.read_text("utf-8") if written.is_file() else card({name: pack}, repo_id)
            text = text.replace(loading(self.folder.resolve().name), loading(repo_id))
            pack.save_pretrained(folder / below, readme=text)
        if "default" not in packs:  # the repo's own card
            (folder / "README.md").write_text(card(packs, repo_id), encoding="utf-8", newline="\n")
        return f"{sum(len(pack.facts) for pack in packs.values())} edited facts"
