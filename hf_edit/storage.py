"""A pack's files on disk: opened so that nothing outside the pack is read, replaced so that a folder holds one pack, whole.

A save writes all files into a folder beside the old ones (`.saving-...`) and takes effect in one step: that folder is
renamed to `.incoming-...`. From then on its files count before those of the same name in the pack's own folder, and they are
moved there one by one. A reader finds the old pack before that step and the new one after it, wherever the save was cut off.
The next save finishes what a cut-off one left, whichever of several writers it is. Several packs of a folder take effect in
the same step: the renamed folder holds one subfolder for each.

Writers of one folder take turns from that renaming on, where the system can lock a folder.

The name after `.incoming-` is a keyed hash of the folder's path, of the configuration that the save replaces and of the time at
which that was written; the key never leaves the user's cache. So a folder that came from elsewhere can't contain files that
count before the ones in plain sight, nothing but our own saves is ever moved, and a save that was cut off is forgotten once
something else was saved there. No two saves share a name: a writer that stops halfway and goes on later finds nothing to move,
even where the same pack has come back into place meanwhile. To anyone without the key (another user, another cache, a copy of
the folder) a save that was cut off while its files were moved is a pack whose hashes don't match: it is refused, never half
read, and has to be saved again.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .cache import cache_folder, sort_header
from .errors import PackFormatError, PackSecurityError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["file_digest", "located", "own_file", "read_bytes", "read_start", "read_whole", "replacing", "write_tensors"]

T = TypeVar("T")

_INCOMING = ".incoming-"
_SAVING = ".saving-"
_LAST = ("edit_config.json", "editor_config.json")  # what a save puts in place last
_MAX_LAST = 1 << 20
_KEY_BYTES = 32
_MAX_HEADER = 1 << 24
_ABANDONED = 3600.0  # seconds after which what a killed save left behind is swept away
_ATTEMPTS = 50  # at reading what another process saves again and again
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)  # what renaming onto a folder with files in it says, by system


def located(folder: Path, name: str) -> Path:
    """Where a pack's file stands, whether or not it exists: a finished save's before the folder's own, be it a save of this
    pack or of several in the folder above."""
    for incoming in (_incoming(folder) / name, _from_above(folder) / name):
        if os.path.lexists(incoming):
            return incoming
    return folder / name


def _incoming(folder: Path) -> Path:
    """Where a finished save has a folder's files, until they are put in place."""
    said = hashlib.sha256(os.fsencode(os.path.realpath(folder)))
    for name in _LAST:
        path, what = folder / name, b""
        with suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= _MAX_LAST:
                with path.open("rb") as file:  # once opened, it is one version, whatever takes its place
                    what = b"%d " % os.fstat(file.fileno()).st_mtime_ns + file.read()
        said.update(hashlib.sha256(what).digest())
    return folder / (_INCOMING + hmac.digest(_key(_key_file()), said.digest(), "sha256").hex()[:32])


def _key_file() -> Path | None:
    try:
        return cache_folder() / "save_key"
    except OSError:
        return None


@lru_cache
def _key(path: Path | None) -> bytes:
    """This user's key, made where there is none. Without a cache to keep it in, it lives as long as the process."""
    made = secrets.token_bytes(_KEY_BYTES)
    if path is None:
        return made
    try:
        if not _is_key(path):
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                new = Path(folder) / path.name
                new.touch(0o600)
                new.write_bytes(made)
                with suppress(FileExistsError):
                    os.link(new, path)  # of several processes that make one, the first wins
                if not _is_key(path):
                    os.replace(new, path)
        return path.read_bytes()
    except OSError:
        return made


def _is_key(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == _KEY_BYTES


def _from_above(folder: Path) -> Path:
    """Where a finished save of several packs has a folder's files, until they are put in place."""
    folder = Path(os.path.abspath(folder))  # the link to a folder stands where its name does
    return _incoming(folder.parent) / folder.name


def read_whole(folder: Path, config: str, read: Callable[[], T]) -> T:
    """What `read` makes of a folder's files, read again where another process has saved meanwhile.

    Args:
        config: the file that a save puts in place last.

    Raises:
        PackFormatError: it is saved over and over; or what `read` raises of files that nobody touched.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(located(folder, config))
        try:
            return read()
        except (PackFormatError, FileNotFoundError):
            if _identity(located(folder, config)) == before:
                raise
    raise PackFormatError(f"{folder} is saved over and over while it is read; try again")


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from one that has been put in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_bytes(folder: Path, name: str, limit: int) -> bytearray:
    """A pack's file, read once and whole.

    Raises:
        FileNotFoundError: there is none.
        PackFormatError: it is no regular file, or larger than `limit` bytes.
        PackSecurityError: it is a link out of the pack.
    """
    with _opened(folder, name) as (file, size):
        if size > limit:
            raise PackFormatError(f"{folder / name} has {size} bytes, more than the {limit} that it may have")
        return _take(file, size, folder / name)


def read_start(folder: Path, name: str) -> tuple[bytearray, int]:
    """A safetensors file's header, with the eight bytes of its length, and the whole file's size; errors as in `read_bytes`."""
    with _opened(folder, name) as (file, size):
        start = _take(file, min(size, 8), folder / name)
        length = int.from_bytes(start, "little")
        return start + _take(file, min(length, size - len(start), _MAX_HEADER), folder / name), size


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[io.FileIO, int]]:
    """A pack's file and its size."""
    path = located(folder, name)
    try:
        descriptor = _open(path, _home(path, folder))
    except (FileNotFoundError, PackFormatError):
        if (moved := located(folder, name)) == path:
            raise
        descriptor = _open(moved, _home(moved, folder))  # a save put it in place in between
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise PackFormatError(f"{path} is no regular file")
    with open(descriptor, "rb", buffering=0) as file:
        yield file, found.st_size


def _home(path: Path, folder: Path) -> Path:
    """The folder that a pack's file may not leave."""
    return folder if path.is_relative_to(folder) else path.parent


def _take(file: io.FileIO, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count and (read := file.readinto(view[done:])):
        done += read
    if done < count:
        raise PackFormatError(f"{path} became shorter while it was read: get it again")
    return data


def own_file(path: Path, folder: Path) -> Path:
    """The file that a path in a folder stands for, which is one of the folder's own.

    Raises:
        FileNotFoundError: there is none.
        PackFormatError: it is a link to nothing.
        PackSecurityError: it is a link out of the folder.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{folder} has no {path.name}")
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise PackFormatError(f"{path} is a link to nothing: {error}") from error
    if not (real.is_relative_to(home) or _is_blob(real, home)):
        raise PackSecurityError(f"{path} is a link out of the pack, to {real}; a pack reads its own files only")
    return real


def _open(path: Path, folder: Path) -> int:
    """A descriptor of a file of the pack; never waits, as opening a FIFO would."""
    real = own_file(path, folder)
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return os.open(real, flags)


def _is_blob(real: Path, home: Path) -> bool:
    """Whether a file lies where the Hub's cache keeps the contents of this very repository's snapshots: with the repository,
    or, since huggingface_hub 2, with those of all repositories, by hash."""
    for parent in (home, *home.parents):
        if parent.parent.name == "snapshots":
            repository = parent.parent.parent
            shared = repository.parent / "blobs"
            return real.is_relative_to(repository / "blobs") or (
                real.is_relative_to(shared) and re.fullmatch(r"[0-9a-f]{64}", real.name) is not None
            )
    return False


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file, the same bytes for the same contents.

    Raises:
        OSError: the disk is full, the folder can't be written to.
    """
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    try:
        save_file(ordered, path, {"format": "pt", **metadata})
        sort_header(path)
    except SafetensorError as error:  # which is no OSError, also where the disk is full
        raise OSError(f"{path} can't be written: {error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def replacing(*folders: Path) -> Iterator[list[Path]]:
    """For each of some folders one to write files to, which take the place of those in it all at once when the context ends
    well: by one renaming, also of several folders, which are a folder and such in it.

    Raises:
        NotADirectoryError: there is a file in a folder's place.
        IsADirectoryError: there is a folder in a file's place.
        OSError: the disk is full, a folder can't be written to; all are as they were then.
    """
    root = Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
    within = {folder: Path(os.path.relpath(os.path.abspath(folder), root)) for folder in folders}
    for folder in folders:
        _make(folder)
    staging = _staging(root)
    try:
        for at in within.values():
            (staging / at).mkdir(exist_ok=True)
        yield [staging / at for at in within.values()]
        for folder, at in within.items():
            _settle(staging / at, folder)
        with _alone_in(root.parent, root, *folders):
            for folder in folders:
                if within[folder] != Path():
                    _put_in_place(folder)  # what a killed save left would come after these files otherwise
            _commit(staging, root)
            for folder in folders:
                _flush(folder)
            _put_in_place(root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _alone_in(*folders: Path) -> Iterator[None]:
    """Writers of the same folders take turns, where the system has locks for folders; they end with the process."""
    with ExitStack() as stack:
        if fcntl is not None:
            real = {os.path.realpath(folder) for folder in folders}
            for folder in sorted(real):  # in one order, so that no two wait for each other
                with suppress(OSError):  # a file system without locks, a folder that may not be read
                    descriptor = os.open(folder, os.O_RDONLY)
                    stack.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder to save the pack in")
    folder.mkdir(parents=True, exist_ok=True)


def _staging(folder: Path) -> Path:
    _make(folder)
    _sweep(folder)
    return Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder))


def _sweep(folder: Path) -> None:
    """Remove what killed saves left behind; not what another writer is at."""
    for path in folder.glob(f"{_SAVING}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_INCOMING}*"):
        with suppress(OSError):
            path.rmdir()  # where it is empty: all had been moved


def _settle(staging: Path, folder: Path) -> None:
    """Ordinary permissions, contents on the disk, and nothing in the way of the files."""
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    for path in (path for path in staging.iterdir() if not path.is_dir()):  # packs within have their own turn
        if (folder / path.name).is_dir():
            raise IsADirectoryError(f"{folder / path.name} is a folder, where a file of the pack would go; move it away")
        path.chmod(0o666 & ~umask)  # safetensors writes 0600 whatever the umask
        now = time.time_ns()
        os.utime(path, ns=(now, now))  # the system's own clock gives all files of some milliseconds the same time
        _flush(path)
    _flush(staging)


def _commit(staging: Path, folder: Path) -> None:
    """The renaming from which on the new files count."""
    if _from_above(folder).is_dir():
        _put_in_place(folder.parent)  # an earlier save of several packs, which would come after this one otherwise
    while True:
        incoming = _incoming(folder)
        try:
            os.rename(staging, incoming)
        except OSError as error:
            if error.errno not in _OCCUPIED or not incoming.is_dir():
                raise
            if not _put_in_place(folder):
                raise PermissionError(f"{incoming} is left from another save and can't be moved away") from error
            continue
        if _incoming(folder) == incoming:
            return
        staging = incoming  # another writer's configuration came into place meanwhile


def _put_in_place(folder: Path) -> bool:
    """Move a finished save's files to where they belong; another writer may be doing the same. Whether something moved."""
    return _move(_incoming(folder), folder)


def _move(incoming: Path, folder: Path) -> bool:
    moved = False
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(incoming.iterdir(), key=lambda path: path.name in _LAST):
            if path.is_dir() and not path.is_symlink():
                _make(folder / path.name)
                moved |= _move(path, folder / path.name)
                continue
            with suppress(FileNotFoundError):
                path.replace(folder / path.name)
                moved = True
    try:
        incoming.rmdir()
        moved = True
    except FileNotFoundError:
        moved = True
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
    return moved


def _flush(path: Path) -> None:
    """Have the system write a file or folder out, where it can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
