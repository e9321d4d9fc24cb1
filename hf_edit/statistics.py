"""Second moments of MLP keys: what a weight edit must not disturb.

C = E[k k^T], uncentred, k the input of a block's MLP output projection (ROME, arXiv 2202.05262, sec. 3.1). The originals
take it from 100,000 documents of Wikipedia; here the model samples its own text, so nothing is downloaded: text of its whole
distribution, continued openings of English sentences, and chats of which it writes both turns.

What was computed is kept in the cache folder as sums, in float64: a run that was cut short goes on where it stopped, and
more tokens of the same text only add to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ._version import __version__
from .base import Base
from .cache import atomic_path, cache_folder, sort_header
from .errors import BaseMismatchError, HubError, PackFormatError
from .hub import PushToHub, fetch
from .layout import weight_shape
from .lm.chat import chat_frame
from .moments import Moment, folded
from .progress import bar
from .storage import own_file
from .suffix import frozen, read_keys_and_states
from .texts import STARTERS, sample_chats, sample_freely, sample_ids

__all__ = ["KeyStatistics", "Moment", "cached_statistics", "default_tokens", "open_statistics"]

_FORMAT_VERSION = 1
_TENSORS_FILE = "key_statistics.safetensors"
_CONFIG_FILE = "key_statistics.json"
_SAMPLE_LENGTH = 64
_SAMPLE_ROWS = 64  # sampled and kept together
_TURN_LENGTH = 40  # tokens of a turn in a chat at most
_RECIPE = "varied"  # what `_Samples` consists of: another one needs another name, or kept sums of both would be mixed
_TEXT_LENGTH = 512
_GROUP = 32  # rows whose products are summed before they join the total
_CHECKPOINT_SECONDS = 60.0
_CARD = """---
library_name: hf_edit
tags:
- knowledge-editing
- hf_edit:key-statistics
---

# Key statistics

Second moments of MLP keys, which weight edits with [hf_edit](https://pypi.org/project/hf-edit/) must not disturb. They belong
to the one model with the fingerprint `{fingerprint}`, and are refused for any other.

```python
model.edit(facts, statistics="{repo_id}")
```

| module | key width | tokens |
|---|---|---|
{modules}
"""


class KeyStatistics(PushToHub):
    """Second moments of MLP keys, by module name, for one model.

    Attributes:
        fingerprint: of the model they belong to (`Base.fingerprint`).
        moments: by module name.
        sources: what text they were taken from.
    """

    def __init__(
        self, fingerprint: str, moments: Mapping[str, Moment] | None = None, sources: Sequence[str] = ("unknown text",)
    ) -> None:
        self.fingerprint = fingerprint
        self.moments = dict(moments or {})
        self.sources = tuple(sources)

    def __repr__(self) -> str:
        tokens = sorted({m.tokens for m in self.moments.values()})
        return f"KeyStatistics({len(self.moments)} modules, tokens {tokens}, from {', '.join(self.sources)})"

    @classmethod
    def compute(
        cls,
        model: Any,
        tokenizer: Any = None,
        texts: Any = None,
        num_tokens: int | None = None,
        modules: Sequence[str | int] | None = None,
        *,
        resume: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> KeyStatistics:
        """Second moments of some modules' keys.

        Args:
            model: a causal language model; the edits of an `EditableModelForCausalLM` are off meanwhile.
            tokenizer: its tokenizer; an `EditableModelForCausalLM` brings its own.
            texts: the text to read: an iterable of strings or of rows with "text" (a `datasets.Dataset`), or the path of a
                .txt file (a text a line) or of a .jsonl file of such rows; None: the model samples its own.
            num_tokens: how many tokens; whole rows of up to 512 tokens are read, so it may be some more. By default eight
                for each key dimension, at least 16,384.
            modules: blocks, or names of MLP output projections; by default those of the blocks from 13 to 27 % of the depth
                (4 to 8 of 30), which weight edits change by default.
            resume: start from what the cache folder has of the same model and text, and keep the sums there while they
                grow. False neither reads nor writes them.
            seed: of the sampling.
            progress: show progress bars.

        Raises:
            ValueError: `texts` holds no text, or there is no such block.
            UnsupportedArchitectureError: a block has no MLP output projection that could be found.
        """
        with _clean(model, tokenizer) as base:
            names = _module_names(base, modules)
            count = default_tokens(base, names) if num_tokens is None else num_tokens
            if count < 1:
                raise ValueError(f"num_tokens must be at least 1, not {count}")
            source = _Samples(base, count, seed, resume, progress) if texts is None else _Texts(base, texts, count)
            return cls(base.fingerprint, _moments(base, names, source, resume, progress), [source.description])

    def __add__(self, other: KeyStatistics) -> KeyStatistics:
        """Statistics over both sets of text, so that several machines can share the work; a module that only one of them
        has is taken over.

        Raises:
            BaseMismatchError: they are of different models.
            ValueError: a module was taken from the same text in both, which would count it twice.
        """
        if not isinstance(other, KeyStatistics):
            return NotImplemented
        if self.fingerprint != other.fingerprint:
            raise BaseMismatchError(
                f"these are statistics of two models (fingerprints {self.fingerprint} and {other.fingerprint})"
            )
        shared = sorted(set(self.moments) & set(other.moments))
        twice = sorted(set(self.sources) & set(other.sources) - {"unknown text"})
        if shared and twice:
            raise ValueError(
                f"both have {shared[0]} from the same text ({', '.join(twice)}); give each machine another seed or other texts"
            )
        moments = {**self.moments, **other.moments, **{name: self.moments[name] + other.moments[name] for name in shared}}
        return KeyStatistics(self.fingerprint, moments, dict.fromkeys((*self.sources, *other.sources)))  # type: ignore[arg-type]

    def check(self, base: Base, modules: Sequence[str]) -> None:
        """Refuse a model that they are not for, and modules that they lack; reads the clean model.

        Raises:
            BaseMismatchError: they belong to another model.
            ValueError: modules are missing.
        """
        if self.fingerprint != base.fingerprint:
            raise BaseMismatchError(
                f"these are the statistics of another model (fingerprint {self.fingerprint}, not {base.fingerprint}). "
                "Compute them for this one: KeyStatistics.compute(model, tokenizer)."
            )
        if missing := [name for name in modules if name not in self.moments]:
            raise ValueError(
                f"the statistics have no {', '.join(missing)}; compute them: "
                f"KeyStatistics.compute(model, tokenizer, modules={missing}), and add the two with +"
            )
        for name in modules:
            width = weight_shape(base.model.get_submodule(name))[1]
            if self.moments[name].width != width:
                raise BaseMismatchError(f"the statistics of {name} are for keys of {self.moments[name].width}, not {width}")

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub_kwargs: Any,
    ) -> Path:
        """Write `key_statistics.safetensors` (the sums, float64 triangles folded to half a square) and
        `key_statistics.json` into a folder; each file is replaced whole, the JSON last.

        Args:
            push_to_hub: push them as well.
            repo_id: where to; by default a repo of the folder's name.
            **hub_kwargs: for `push_to_hub`.

        Returns:
            The folder.
        """
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; give a folder to save the statistics in")
        folder.mkdir(parents=True, exist_ok=True)
        modules = {n: {"tokens": m.tokens, "width": m.width, "digest": m.digest} for n, m in sorted(self.moments.items())}
        config = {
            "format_version": _FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "modules": modules,
            "sources": list(self.sources),
            "versions": _versions(),
        }
        with atomic_path(folder / _CONFIG_FILE) as config_path, atomic_path(folder / _TENSORS_FILE) as tensors_path:
            tensors = {name: folded(m.total) for name, m in self.moments.items()}
            save_file(tensors, tensors_path, {"format": "pt", "modules": json.dumps(modules, sort_keys=True)})
            sort_header(tensors_path)
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **hub_kwargs)
        return folder

    def _write_for_hub(self, folder: Path, repo_id: str) -> str:
        self.save_pretrained(folder)
        modules = "\n".join(f"| `{name}` | {m.width} | {m.tokens} |" for name, m in sorted(self.moments.items()))
        (folder / "README.md").write_text(_CARD.format(repo_id=repo_id, fingerprint=self.fingerprint, modules=modules), "utf-8")
        return f"Key statistics of {len(self.moments)} modules"

    @classmethod
    def from_pretrained(
        cls,
        directory_or_id: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> KeyStatistics:
        """Read what `save_pretrained` or `push_to_hub` wrote. Sums are read when they are needed, and checked then.

        Args:
            directory_or_id: a folder, or the id of a repo on the Hub.
            fingerprint: of the model they are meant for; checked where given.
            revision: branch, tag, pull request or sha of the repo; by default the main branch.
            cache_dir, token, force_download, local_files_only: as everywhere with the Hub.

        Raises:
            FileNotFoundError: the folder holds no statistics.
            HubError: the repo is missing, gated, out of reach, or holds none.
            PackFormatError: they are damaged, or of a newer format.
            PackSecurityError: a file of them is a link to somewhere else.
            BaseMismatchError: they belong to another model.
        """
        at = fetch(
            directory_or_id,
            [_CONFIG_FILE, _TENSORS_FILE],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        folder = at.folder
        if at.repo_id is not None and not (folder / _CONFIG_FILE).exists():
            raise HubError(f"{at.name} holds no key statistics: there is no {_CONFIG_FILE}")
        config = _read_config(folder / _CONFIG_FILE)
        try:
            path = own_file(folder / _TENSORS_FILE, folder)
            with safe_open(path, "pt") as file:
                written, names = (file.metadata() or {}).get("modules"), set(file.keys())
        except (SafetensorError, OSError) as error:
            raise PackFormatError(f"{folder / _TENSORS_FILE} can't be read: {error}") from error
        if written != json.dumps(config["modules"], sort_keys=True) or names != set(config["modules"]):
            raise PackFormatError(f"{folder / _CONFIG_FILE} and {_TENSORS_FILE} were not written together: get both again")
        if fingerprint is not None and config["fingerprint"] != fingerprint:
            raise BaseMismatchError(
                f"{folder} holds the statistics of another model (fingerprint {config['fingerprint']}, not "
                f"{fingerprint}). Compute them for this one: KeyStatistics.compute(model, tokenizer)."
            )
        moments = {}
        for name, entry in config["modules"].items():
            moments[name] = Moment.stored(path, name, entry["tokens"], entry["digest"])
            if moments[name].width != entry["width"]:
                raise PackFormatError(f"{path}: {name} is not as wide as {_CONFIG_FILE} says")
        return cls(config["fingerprint"], moments, config["sources"])


def cached_statistics(
    base: Base, modules: Sequence[str], *, num_tokens: int | None = None, progress: bool = True
) -> KeyStatistics:
    """Statistics of a clean model's own text from the cache folder; what is missing there is computed and added."""
    count = default_tokens(base, modules) if num_tokens is None else num_tokens
    source = _Samples(base, count, 0, True, progress)
    return KeyStatistics(base.fingerprint, _moments(base, modules, source, True, progress), [source.description])


def open_statistics(
    base: Base, modules: Sequence[str], given: Any, *, num_tokens: int | None = None, progress: bool = True
) -> KeyStatistics:
    """The statistics that a method works with.

    Args:
        given: `KeyStatistics`, the folder or the repo of saved ones, or None for those of the model's own text
            (`cached_statistics`).

    Raises:
        BaseMismatchError: the given ones belong to another model.
        ValueError: they lack a module, or `given` is nothing of this kind.
    """
    if given is None:
        return cached_statistics(base, modules, num_tokens=num_tokens, progress=progress)
    if given == "given":
        raise ValueError("these settings were saved without their statistics, which were an object; give them again")
    if isinstance(given, (str, os.PathLike)):
        given = KeyStatistics.from_pretrained(given)
    if not isinstance(given, KeyStatistics):
        raise ValueError(f"statistics are KeyStatistics or the folder of saved ones, not {type(given).__name__}")
    given.check(base, modules)
    return given


def default_tokens(base: Base, modules: Sequence[str]) -> int:
    """Eight tokens for each key dimension, at least 16,384: efficacy needs less, sparing other text gains from more."""
    return max(16_384, 8 * max(weight_shape(base.model.get_submodule(name))[1] for name in modules))


# --- text to read -------------------------------------------------------------------------------------------------------


class _Source(Protocol):
    """Rows of token ids; the first n rows are the same whatever the budget."""

    name: str  # of the folder that its sums are kept in
    description: str
    count: int  # rows

    def digest(self, count: int) -> str:
        """What identifies the first `count` rows among sources of one name."""
        ...

    def rows(self) -> Sequence[Sequence[int]]:
        """All rows."""
        ...


class _Samples:
    """Text that the model samples itself, in pieces that are kept in the cache folder: whatever is computed of it later, and
    however often the work is cut short, each piece is sampled once.

    Of four rows two are sampled from nothing out of the whole distribution, one goes on from an opening of `STARTERS`, and one
    is a chat of which the model writes both turns (without a chat template, another opening).
    """

    def __init__(self, base: Base, num_tokens: int, seed: int, keep: bool, progress: bool) -> None:
        written = f"{base.tokenizer_fingerprint} {chat_frame(base.tokenizer)}"  # what a sample depends on beside the weights
        self.name = f"own-{_RECIPE}-{hashlib.sha256(written.encode()).hexdigest()[:8]}-{seed}"
        self.description = f"the model's own {_RECIPE} samples, seed {seed}"
        self.count = -(-num_tokens // _SAMPLE_LENGTH)
        self._base, self._seed, self._keep, self._progress = base, seed, keep, progress

    def digest(self, count: int) -> str:
        return self.name

    def rows(self) -> list[list[int]]:
        rows: list[list[int]] = []
        pieces = -(-self.count // _SAMPLE_ROWS)
        tokens = pieces * _SAMPLE_ROWS * _SAMPLE_LENGTH
        with bar(tokens, "sampling text for key statistics", "token", self._progress) as shown:
            for piece in range(pieces):
                rows += self._piece(piece, shown.update)
        return rows[: self.count]

    def _piece(self, piece: int, listener: Callable[[int], None]) -> list[list[int]]:
        if not self._keep:
            return self._sampled(piece, listener)
        path = cache_folder("own_samples", self._base.fingerprint) / f"{self.name}-{piece}.safetensors"
        try:
            stored = load_file(path)
            rows = [ids.tolist() for ids in stored["ids"].split(stored["lengths"].tolist())]
            listener(_SAMPLE_ROWS * _SAMPLE_LENGTH)
        except (FileNotFoundError, SafetensorError, KeyError):
            rows = self._sampled(piece, listener)
            lengths = torch.tensor([len(row) for row in rows])
            with atomic_path(path) as temporary:
                save_file({"ids": torch.tensor([i for row in rows for i in row]), "lengths": lengths}, temporary)
        return rows

    def _sampled(self, piece: int, listener: Callable[[int], None]) -> list[list[int]]:
        # a CPU's generator keeps 32 bits of its seed
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {piece}".encode()).digest()[:4], "big")
        quarter = _SAMPLE_ROWS // 4
        chats = sample_chats(self._base, quarter, _TURN_LENGTH, seed, quarter, listener)
        count = _SAMPLE_ROWS // 2 - len(chats)
        free = sample_freely(self._base, 2 * quarter, _SAMPLE_LENGTH, seed, 2 * quarter, listener)
        first = piece * count % len(STARTERS)
        starters = STARTERS[first:] + STARTERS[:first]
        opened = sample_ids(self._base, count, _SAMPLE_LENGTH, seed, starters, count, listener)
        others = [row[:_SAMPLE_LENGTH] for row in opened]
        last = chats or others[quarter:]
        return [row for four in zip(free[:quarter], others[:quarter], free[quarter:], last, strict=True) for row in four]


class _Texts:
    """The user's texts as token rows, up to the budget; the row that reaches it is kept whole."""

    def __init__(self, base: Base, texts: Any, num_tokens: int) -> None:
        self._rows: list[list[int]] = []
        left = num_tokens
        for text in _strings(texts):
            ids = base.tokenizer(text, verbose=False)["input_ids"]
            for first in range(0, len(ids), _TEXT_LENGTH):
                if left > 0:
                    self._rows.append(ids[first : first + _TEXT_LENGTH])
                    left -= len(self._rows[-1])
            if left <= 0:
                break
        if not self._rows:
            raise ValueError("texts holds no token; give text, or texts=None to let the model sample its own")
        self.count = len(self._rows)
        self.name = f"texts-{_hash(self._rows[:1])}"
        self.description = f"texts {_hash(self._rows)}"

    def digest(self, count: int) -> str:
        return _hash(self._rows[:count])

    def rows(self) -> list[list[int]]:
        return self._rows


def _strings(texts: Any) -> Iterator[str]:
    """Texts one by one.

    Raises:
        ValueError: an item is neither a string nor a row with "text"; the message says which.
    """
    if isinstance(texts, (str, os.PathLike)):
        yield from _strings(_lines(Path(texts)))
        return
    if not isinstance(texts, Iterable):
        raise ValueError(f"texts are strings, rows with 'text', or a path, not {type(texts).__name__}")
    for number, item in enumerate(texts, start=1):
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise ValueError(f"texts, item {number}: neither a string nor a row with 'text': {item!r:.80}")
        if text.strip():
            yield text


def _lines(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: texts are read from .txt files (a text a line) and .jsonl files (rows with 'text')")
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line) if suffix == ".jsonl" else line.rstrip("\n")
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error


def _hash(rows: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


# --- the sums -----------------------------------------------------------------------------------------------------------


class _Sum:
    """A module's sum of k k^T over the first rows of a source, kept in a file where there is a folder."""

    def __init__(self, folder: Path | None, module: str, source: _Source) -> None:
        self.folder, self.module, self.source = folder, module, source
        self.rows = 0
        self.moment: Moment | None = None
        self._partial: Path | None = None  # of a run that has not come to its end
        for rows, path in self._files():
            if self._open(rows, path):
                break

    def _files(self) -> list[tuple[int, Path]]:
        """What the folder has, the most rows first."""
        if self.folder is None:
            return []
        found = [(path.stem.rpartition("-")[2], path) for path in self.folder.glob(f"{self.module}-*.safetensors")]
        numbered = [(int(rows), path) for rows, path in found if rows.isdecimal() and path.stem == f"{self.module}-{rows}"]
        return sorted((pair for pair in numbered if pair[0] <= self.source.count), reverse=True)

    def _open(self, rows: int, path: Path) -> bool:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("text") != self.source.digest(rows):
                return False
            moment = Moment.stored(path, "total", int(metadata["tokens"]), metadata["digest"])
            if rows < self.source.count:
                _ = moment.total  # checked here, so that nothing is built on a damaged sum
        except (SafetensorError, OSError, KeyError, ValueError):
            return False
        self.rows, self.moment = rows, moment
        self._partial = path if metadata.get("final") != "1" else None
        return True

    def put(self, total: torch.Tensor, tokens: int, rows: int) -> None:
        """The sum over the first `rows` rows, written where sums are kept."""
        self.rows, self.moment = rows, Moment.of_total(total, tokens)
        if self.folder is None:
            return
        final = rows == self.source.count
        metadata = {
            "format": "pt",
            "tokens": str(tokens),
            "digest": self.moment.digest,
            "text": self.source.digest(rows),
            "final": str(int(final)),
        }
        path = self.folder / f"{self.module}-{rows}.safetensors"
        with atomic_path(path) as temporary:
            save_file({"total": folded(total)}, temporary, metadata)
        if self._partial is not None and self._partial != path:
            self._partial.unlink(missing_ok=True)
        self._partial = None if final else path
        if final:
            self.moment = Moment.stored(path, "total", tokens, self.moment.digest)


def _moments(base: Base, modules: Sequence[str], source: _Source, keep: bool, progress: bool) -> dict[str, Moment]:
    """Second moments of modules over a source: what is kept of them, extended by what is missing."""
    folder = cache_folder("key_statistics", base.fingerprint, source.name) if keep else None
    sums = {name: _Sum(folder, name, source) for name in modules}
    missing = [s for s in sums.values() if s.rows < source.count]
    if missing:
        with frozen(base.model):
            rows = source.rows()
            for start in sorted({s.rows for s in missing}):
                _extend(base, [s for s in missing if s.rows == start], rows, start, progress)
    return {name: s.moment for name, s in sums.items() if s.moment is not None}


def _extend(base: Base, sums: Sequence[_Sum], rows: Sequence[Sequence[int]], start: int, progress: bool) -> None:
    """Add the rows from `start` on to sums that all stand there."""
    layout = base.layout()
    names = [s.module for s in sums]
    last = max(_block_of(layout.blocks_path, name) for name in names)
    totals = {s.module: s.moment.total for s in sums if s.moment is not None}
    tokens = [0 if s.moment is None else s.moment.tokens for s in sums]
    saved = time.monotonic()
    with bar(len(rows) - start, "key statistics", "text", progress) as shown:
        for first in range(start, len(rows), _GROUP):
            group = rows[first : first + _GROUP]
            points = [(i, j) for i, row in enumerate(group) for j in range(len(row))]
            keys, _ = read_keys_and_states(base.model, layout, group, points, modules=names, last=last)
            for name, found in keys.items():
                product = (found.float().T @ found.float()).cpu().double()
                totals[name] = totals[name] + product if name in totals else product
            tokens = [count + len(points) for count in tokens]
            done = first + len(group)
            if done == len(rows) or time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                for each, count in zip(sums, tokens, strict=True):
                    each.put(totals[each.module], count, done)
                saved = time.monotonic()
            shown.update(len(group))


@contextmanager
def _clean(model: Any, tokenizer: Any) -> Iterator[Base]:
    """The model without its edits."""
    if hasattr(model, "disable_edits"):
        with model.disable_edits():
            yield Base(model.get_base_model(), tokenizer if tokenizer is not None else model.tokenizer)
        return
    if tokenizer is None:
        raise ValueError("give the model's tokenizer: KeyStatistics.compute(model, tokenizer)")
    yield Base(model, tokenizer)


def _module_names(base: Base, modules: Sequence[str | int] | None) -> list[str]:
    layout = base.layout()
    chosen = layout.recall_blocks() if modules is None else modules
    if isinstance(chosen, (str, int)):
        chosen = [chosen]
    names = [layout.projection(module) if isinstance(module, int) else module for module in chosen]
    if not names:
        raise ValueError("modules is empty; give blocks or names of MLP output projections, or None for the default")
    for name in names:
        prefix = f"{layout.blocks_path}."
        if not name.startswith(prefix) or name not in dict(base.model.named_modules()):
            raise ValueError(f"{name!r} is no module of the model's blocks; give names such as {layout.projections[0]!r}")
    return list(dict.fromkeys(names))


def _block_of(blocks_path: str, module: str) -> int:
    return int(module.removeprefix(f"{blocks_path}.").split(".")[0])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"hf_edit": __version__, **{name: version(name) for name in ("torch", "transformers", "safetensors")}}


def _read_config(path: Path) -> dict[str, Any]:
    """The checked contents of a `key_statistics.json`."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no key statistics (there is no {path.name}), or incomplete ones")
    own = own_file(path, path.parent)
    try:
        config = json.loads(own.read_text("utf-8"))
    except ValueError as error:
        raise PackFormatError(f"{path} is not valid JSON: {error}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise PackFormatError(
            f"{path} has format {version}, this version of hf_edit reads {_FORMAT_VERSION}: pip install --upgrade hf-edit"
        )
    entry = {"tokens": int, "width": int, "digest": str}
    whole = {"format_version": int, "fingerprint": str, "modules": dict, "sources": list, "versions": dict}
    if not _matches(config, whole) or not all(_matches(e, entry) for e in config["modules"].values()):
        raise PackFormatError(f"{path} is no description of key statistics: its keys or their types are wrong")
    if not all(isinstance(s, str) for s in config["sources"]):
        raise PackFormatError(f"{path}: 'sources' holds something that is no text")
    return config


def _matches(value: Any, kinds: Mapping[str, type]) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(isinstance(value[k], kind) and not isinstance(value[k], bool) for k, kind in kinds.items())
    )
