"""Packs that lie in a folder, shared as they are."""

from __future__ import annotations

import os
from pathlib import Path

from .card import card, loading
from .errors import PackFormatError
from .hub import PushToHub
from .model import packs_in
from .pack import CARD_FILE, CONFIG_FILE, EditPack
from .storage import read_bytes

__all__ = ["PackFolder"]

_MAX_CARD_BYTES = 1 << 24


class PackFolder(PushToHub):
    """A folder of packs, to be shared with the cards that lie there, which someone may have written on.

    Args:
        folder: the packs' folder.

    Raises:
        FileNotFoundError: there is no such folder.
        PackFormatError: it holds no pack, or a pack is damaged.
        PackSecurityError: a pack or one of its files is a link to somewhere else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}")
        self.packs = packs_in(self.folder)
        if not self.packs:
            raise PackFormatError(f"{self.folder} holds no edit pack: there is no {CONFIG_FILE} in it or in its subfolders")

    def _write_for_hub(self, folder: Path, repo_id: str) -> str:
        packs = {name: pack.shareable() for name, pack in self.packs.items()}
        for name, pack in packs.items():
            below = "" if name == "default" else name
            text = self._card(self.folder / below, name, pack, repo_id)
            text = text.replace(loading(self.folder.resolve().name), loading(repo_id))
            pack.save_pretrained(folder / below, readme=text)
        if "default" not in packs:  # the repo's own card
            (folder / CARD_FILE).write_text(card(packs, repo_id), encoding="utf-8", newline="\n")
        return f"{sum(len(pack.facts) for pack in packs.values())} edited facts"

    def _card(self, folder: Path, name: str, pack: EditPack, repo_id: str) -> str:
        """The card that lies with a pack, read as strictly as the pack's other files; where there is none, a new one."""
        try:
            return read_bytes(folder, CARD_FILE, _MAX_CARD_BYTES).decode("utf-8")
        except FileNotFoundError:
            return card({name: pack}, repo_id)
        except UnicodeDecodeError as error:
            raise PackFormatError(f"{folder / CARD_FILE} is not UTF-8 ({error}): save it as UTF-8, or delete it") from error
