"""The folder where things that took time to compute are kept: under the Hugging Face cache, or at HF_EDIT_CACHE."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "cache_folder", "sort_header"]


def cache_folder(*parts: str) -> Path:
    """A folder in the cache, made if need be.

    Args:
        parts: names below the cache's root.
    """
    from huggingface_hub.constants import HF_HOME

    root = os.environ.get("HF_EDIT_CACHE") or os.path.join(HF_HOME, "hf_edit")
    folder = Path(root).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when all is well, with the permissions of an ordinary file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # safetensors writes 0600 whatever the umask
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sort_header(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which the library writes in a random one: what is the same is then
    the same file, and is neither uploaded nor stored again."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(written) == size
        file.seek(8)
        file.write(written)
