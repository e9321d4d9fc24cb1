"""`read_facts`: facts from Python objects, files and datasets."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from .errors import SubjectNotFoundError
from .facts import Fact
from .records import FIELDS, STRUCTURED, check_columns, fact_fields

__all__ = ["read_facts"]

_JSON = re.compile(r"""\s*(\[|\{\s*["']|\{\s*\}\s*$)""")  # how a list or mapping begins, and no prompt does
_BLANK_QUOTE = re.compile(r'[ \t]+"')


def read_facts(facts: Any) -> list[Fact]:
    """Facts from a `Fact`, a mapping, an iterable of either, a path (.jsonl, .json, .csv) or a `datasets.Dataset`.

    Mappings are as for `Fact.from_dict`. A record with several rewrites (MQuAKE) gives one fact for each. Its multi-hop
    questions follow from all of them together, so they become portability questions of the last fact.

    Raises:
        ValueError: nothing to read, or a record that is no fact; the message says which one and why.
        FileNotFoundError: the path does not exist.
    """
    if isinstance(facts, Fact):
        return [facts]
    if isinstance(facts, Mapping):
        if _are_splits(facts):
            split = next(iter(facts))
            raise ValueError(f"this is a dataset with splits ({', '.join(map(str, facts))}). Pass one: facts[{split!r}].")
        return _facts(facts)
    origin = "facts"
    if isinstance(facts, (str, os.PathLike)):
        origin = os.fspath(facts)
        records = _read_file(Path(facts))
    elif isinstance(facts, Iterable):
        records = ((None, record) for record in facts)
    else:
        raise ValueError(f"facts are a Fact, a dict, a list of them, a path or a datasets.Dataset, not {type(facts).__name__}")
    read: list[Fact] = []
    for number, (line, record) in enumerate(records, start=1):
        try:
            read += [record] if isinstance(record, Fact) else _facts(record)
        except (ValueError, KeyError, TypeError) as error:
            kind = SubjectNotFoundError if isinstance(error, SubjectNotFoundError) else ValueError
            where = f"{origin}, record {number}" + (f" (line {line})" if line else "")
            raise kind(f"{where}: {error}") from error
    if not read:
        raise ValueError(f"{origin}: there is no fact in it. Give at least one Fact(subject=..., prompt=..., target=...).")
    return read


def _facts(record: Any) -> list[Fact]:
    return [Fact(**fields) for fields in fact_fields(record)]


def _are_splits(facts: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds rows by split, as a `datasets.DatasetDict` does, and not the fields of a fact."""
    if not facts or not FIELDS.isdisjoint(facts):
        return False
    if any(isinstance(split, (str, Mapping)) or not isinstance(split, Iterable) for split in facts.values()):
        return False
    rows = [row for split in facts.values() for row in islice(split, 1)]
    return bool(rows) and all(isinstance(row, (Mapping, Fact)) for row in rows)


def _read_file(path: Path) -> Iterator[tuple[int | None, Any]]:
    """The records of a file, each with the number of its line where it has one."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: facts are read from .jsonl, .json or .csv files")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not encoded in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if "\0" in text:  # UTF-16 without a byte order mark
        raise ValueError(f"{path} holds null characters, which text in UTF-8 does not. Save it as UTF-8.")
    return reader(path, text)


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parsed(line, path, number, hint=" Each line of a .jsonl file is a JSON object.")


def _read_json(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    data = _parsed(text, path)
    if not isinstance(data, (list, dict)):
        raise ValueError(f"{path}: a .json file of facts holds a list of objects, not {type(data).__name__}")
    for record in data if isinstance(data, list) else [data]:
        yield None, record


def _read_csv(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    rows = _rows(path, text)
    number, columns = next(rows, (1, []))
    try:
        _check_header(columns)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    for number, row in rows:
        quoted = next((cell for cell in row if _BLANK_QUOTE.match(cell)), None)
        if quoted is not None:
            raise ValueError(
                f"{path}, line {number}: there is a blank before the double quote in {quoted!r:.80}. Remove it: a quoted cell "
                "begins right after the comma."
            )
        cells = list(zip_longest(columns, row, fillvalue=""))
        stray = next((cell for column, cell in cells[1:] if cell and not column), None)  # pandas' index has no name
        if stray is not None:
            raise ValueError(
                f"{path}, line {number}: no column has a name for the cell {stray!r:.80}. Put a cell that holds a comma in "
                "double quotes."
            )
        record = {column: _value(path, number, column, cell) for column, cell in cells if cell and column}
        if record:
            yield number, record


def _value(path: Path, line: int, column: str, cell: str) -> Any:
    """What a cell holds: text, or a list or mapping written as JSON."""
    if column not in STRUCTURED or not _JSON.match(cell):
        return cell
    hint = ' Write a list as ["a", "b"] with double quotes, and a text that begins with a bracket as a list of one.'
    return _parsed(cell, path, line, f"the cell of {column!r} begins like JSON and is ", hint)


def _parsed(text: str, path: Path, line: int | None = None, what: str = "", hint: str = "") -> Any:
    """A JSON value; an error names its line in the file, which is counted where the text is the whole file."""
    try:
        return _load(text)
    except RecursionError as error:
        raise ValueError(f"{path}, line {line or _failing_line(text)}: the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        reason = f"{what}not valid JSON ({error.msg} at column {error.colno})."
        raise ValueError(f"{path}, line {line or error.lineno}: {reason}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {line or _failing_line(text)}: {error}") from error


def _load(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a JSON object gives the key {key!r:.80} twice. Rename or drop one.")
        found[key] = value
    return found


def _failing_line(text: str) -> int:
    """The first line that makes JSON unreadable, other than by breaking off: a text cut before it only breaks off."""
    lines = text.split("\n")

    def fails(count: int) -> bool:
        try:
            _load("\n".join(lines[:count]))
        except json.JSONDecodeError:
            return False
        except (ValueError, RecursionError):
            return True
        return False

    return bisect_left(range(1, len(lines)), True, key=fails) + 1


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {number}: not valid CSV ({error}). Close each double quote, and write one inside a cell twice."
            ) from error
        if row:
            yield number, row


def _check_header(columns: list[str]) -> None:
    if len(columns) == 1 and (sign := next((s for s in ";\t|" if s in columns[0]), None)):
        raise ValueError(f"columns are separated by commas, not by {sign!r}. Save the file with commas.")
    for number, column in enumerate(columns):
        if column and column in columns[:number]:
            raise ValueError(f"there are two columns {column!r}. Rename or drop one.")
    try:
        check_columns([column for column in columns if column])
    except ValueError as error:
        raise ValueError(f"{error} The first line of a .csv file names its columns.") from error
