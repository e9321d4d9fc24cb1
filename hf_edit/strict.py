"""JSON and safetensors from strangers, without what the usual readers let through."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import PackFormatError

__all__ = ["TensorFile", "check_values", "json_digest", "parse_config", "parse_json", "read_tensors"]

_MAX_TENSORS = 1 << 12
_MAX_HEADER_BYTES = 1 << 22
_MAX_DIMENSION = 1 << 24
_LARGEST = 1e12  # far above any activation or factor, far below what overflows when it is multiplied
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def parse_json(data: bytes | bytearray, path: Path) -> Any:
    """JSON without repeated keys, byte-order marks, NaN, and numbers that are no numbers here.

    Raises:
        PackFormatError: it is not that.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) < len(items):
            raise ValueError("a key stands twice in one object")
        return dict(items)

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is too large a number")
        return value

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_float=number, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise PackFormatError(f"{path} is not valid JSON: {error}"[:500]) from error


def parse_config(
    data: bytes | bytearray, path: Path, format_version: int, kinds: Mapping[str, type | tuple[type, ...]]
) -> dict[str, Any]:
    """A JSON object with just the keys that are known, each of its type.

    Args:
        format_version: the newest `format_version` that is read.
        kinds: type or types by key.

    Raises:
        PackFormatError: it is not that, or of another format.
    """
    config = parse_json(data, path)
    if not isinstance(config, dict):
        raise PackFormatError(f"{path} holds no JSON object")
    version = config.get("format_version")
    if isinstance(version, int) and version < 1:
        raise PackFormatError(f"{path} has format {version}, and there is none before 1")
    if isinstance(version, int) and version > format_version:
        raise PackFormatError(
            f"{path} has format {version}, this version of hf_edit reads {format_version}: pip install --upgrade hf-edit"
        )
    for key, kind in kinds.items():
        if key not in config:
            raise PackFormatError(f"{path} has no {key!r}")
        if not isinstance(config[key], kind) or (kind is int and isinstance(config[key], bool)):
            raise PackFormatError(f"{path}: {key!r} is of the wrong type ({type(config[key]).__name__})")
    if unknown := sorted(set(config) - set(kinds)):
        raise PackFormatError(f"{path} has unknown keys: {', '.join(unknown)[:200]}")
    return config


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors file, checked to describe all of its data and nothing else.

    Attributes:
        metadata: the file's own strings.
        tensors: (type, shape, begin, end) by name; bytes count from the end of the header.
        data: where the header ends.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    data: int

    @classmethod
    def of(cls, start: bytes | bytearray, size: int, path: Path) -> TensorFile:
        """Read a header.

        Args:
            start: the file's bytes, at least those of the header.
            size: of the whole file.

        Raises:
            PackFormatError: it is damaged, or holds what no edit pack does.
        """
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise PackFormatError(f"{path} is no valid safetensors file: its header would go past its end")
        if length > _MAX_HEADER_BYTES:
            raise PackFormatError(f"{path} has a header of {length} bytes, more than any edit pack's")
        header = parse_json(start[8 : 8 + length], path)
        if not isinstance(header, dict):
            raise PackFormatError(f"{path} is no valid safetensors file: its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise PackFormatError(f"{path} is no valid safetensors file: its metadata are no strings")
        if len(header) > _MAX_TENSORS:
            raise PackFormatError(f"{path} holds {len(header)} tensors, more than any edit pack")
        tensors = {name: _entry(name, entry, path) for name, entry in header.items()}
        end = 0
        for name, (_, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise PackFormatError(f"{path} is no valid safetensors file: a hole or an overlap before {name[:80]!r}")
            end = stop
        if 8 + length + end != size:
            raise PackFormatError(
                f"{path} is no valid safetensors file: it has {size} bytes, its header describes {8 + length + end}"
            )
        return cls(metadata, tensors, 8 + length)


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    def check(condition: bool, what: str) -> None:
        if not condition:
            raise PackFormatError(f"{path}: tensor {name[:80]!r} {what}")

    check(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}, "is not described as safetensors does")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    check(isinstance(dtype, str) and dtype in _DTYPES, f"is of type {str(dtype)[:40]!r}, which no edit pack holds")
    check(isinstance(shape, list) and 0 < len(shape) <= 4 and all(map(_is_int, shape)), "has no proper shape")
    check(all(1 <= n <= _MAX_DIMENSION for n in shape), f"has the shape {str(shape)[:80]}, empty or huge")
    check(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_int, offsets)), "does not say where it stands")
    begin, end = offsets
    check(end - begin == math.prod(shape) * _DTYPES[dtype].itemsize, "has another size than its shape")
    check(begin >= 0 and begin % _DTYPES[dtype].itemsize == 0, "stands at an uneven place")
    return dtype, tuple(shape), begin, end


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tensors(data: bytearray, path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file; the tensors stand in `data` itself, nothing is copied.

    Raises:
        PackFormatError: the file is damaged, or a value is no number or out of any scale.
    """
    file = TensorFile.of(data, len(data), path)
    tensors = {
        name: torch.frombuffer(data, dtype=_DTYPES[dtype], count=math.prod(shape), offset=file.data + begin).reshape(shape)
        for name, (dtype, shape, begin, _) in file.tensors.items()
    }
    check_values(tensors, str(path))
    return file.metadata, tensors


def check_values(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse NaN, infinity, and numbers out of any scale.

    Raises:
        PackFormatError: there are such.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))  # NaN goes through to both
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PackFormatError(f"{where}: tensor {name!r} holds NaN or infinity")
        if max(-low, high) > _LARGEST:
            raise PackFormatError(f"{where}: tensor {name!r} holds numbers up to {max(-low, high):.1e}, far out of any scale")
