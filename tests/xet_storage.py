"""Content-addressed storage as the Hub's client uploads large files to by default: the Xet protocol, as documented at
https://huggingface.co/docs/xet. Files are kept as sequences of compressed chunks (xorbs); a shard says how to put them
together again."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Term", "XetStorage"]

_ENTRY = 48
_HEADER = 48
_VERIFIED = 1 << 31
_WITH_SHA256 = 1 << 30


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb, and its bytes when unpacked."""

    xorb: str
    unpacked: int
    start: int
    end: int


class XetStorage:
    """What was uploaded.

    Attributes:
        xorbs: serialized xorbs by hash.
        files: terms by the file's hash.
        hash_of: the file's hash by its SHA-256.
    """

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hash_of: dict[str, str] = {}

    def add_shard(self, shard: bytes) -> list[str]:
        """Register the files of a shard.

        Returns:
            The SHA-256 of each.
        """
        added, at = [], _HEADER
        while shard[at : at + 32] != b"\xff" * 32:
            name, flags, count = _name(shard[at : at + 32]), *struct.unpack_from("<II", shard, at + 32)
            at += _ENTRY
            terms = []
            for _ in range(count):
                _, unpacked, start, end = struct.unpack_from("<IIII", shard, at + 32)
                terms.append(Term(_name(shard[at : at + 32]), unpacked, start, end))
                at += _ENTRY
            if flags & _VERIFIED:
                at += _ENTRY * count
            self.files[name] = terms
            if flags & _WITH_SHA256:
                added.append(_name(shard[at : at + 32]))
                self.hash_of[added[-1]] = name
                at += _ENTRY
        return added

    def content(self, name: str) -> bytes:
        """A file, put together."""
        whole = b""
        for term in self.files[name]:
            for start, end in self._chunks(term.xorb)[term.start : term.end]:
                whole += _unpacked(self.xorbs[term.xorb][start:end])
        return whole

    def byte_range(self, term: Term) -> tuple[int, int]:
        """Where a term's chunks lie in its xorb: first and last byte."""
        chunks = self._chunks(term.xorb)
        return chunks[term.start][0], chunks[term.end - 1][1] - 1

    def _chunks(self, xorb: str) -> list[tuple[int, int]]:
        return list(_chunk_bounds(self.xorbs[xorb]))


def _name(raw: bytes) -> str:
    """A hash as text: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<QQQQ", raw))


def _chunk_bounds(xorb: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at + 8 <= len(xorb) and xorb[at] == 0:  # the version; what follows the chunks begins with letters
        end = at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        yield at, end
        at = end


def _unpacked(chunk: bytes) -> bytes:
    scheme, size, data = chunk[4], int.from_bytes(chunk[5:8], "little"), chunk[8:]
    if scheme:
        data = _lz4_frame(data)
    if scheme == 2:  # every fourth byte together
        whole, at = bytearray(size), 0
        for first in range(4):
            count = len(range(first, size, 4))
            whole[first::4] = data[at : at + count]
            at += count
        data = bytes(whole)
    assert len(data) == size
    return data


def _lz4_frame(data: bytes) -> bytes:
    flags = data[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    out = bytearray()
    while (size := int.from_bytes(data[at : at + 4], "little")) != 0:
        plain, size = size >> 31, size & 0x7FFFFFFF
        block = data[at + 4 : at + 4 + size]
        if plain:
            out += block
        else:
            _lz4_block(block, out)
        at += 4 + size + (4 if flags & 16 else 0)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    at = 0

    def length(first: int) -> int:
        nonlocal at
        total = first
        while first == 15 or (total > 15 and block[at - 1] == 255):
            total += block[at]
            at += 1
            first = 0
        return total

    while at < len(block):
        token = block[at]
        at += 1
        count = length(token >> 4)
        out += block[at : at + count]
        at += count
        if at >= len(block):
            return
        distance = int.from_bytes(block[at : at + 2], "little")
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-distance])
