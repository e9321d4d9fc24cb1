"""Where training keeps what it computed once: in memory up to a budget, beyond it in files that are mapped into memory."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch

__all__ = ["TensorStore"]

_CHUNK = 64 << 20  # bytes a file
_ALIGN = 8


class TensorStore:
    """Puts tensors away, in memory as long as the budget lasts and in temporary files afterwards.

    The files have no name, so that nothing of them stays behind, however the process ends.

    Args:
        budget: bytes to hold in memory at most.
        folder: where the files lie; on a disk, not in memory.

    Attributes:
        in_memory, on_disk: bytes kept so far.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self._budget, self._folder = budget, folder
        self._files: list[mmap.mmap] = []
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self.in_memory = self.on_disk = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor to read from later, of the same shape and on the CPU wherever it goes to a file."""
        size = tensor.numel() * tensor.element_size()
        if self.in_memory + size <= self._budget:
            self.in_memory += size
            return tensor.detach().clone()
        return self._to_file(tensor.detach(), size)

    def release(self) -> None:
        """Give back the memory that writing and reading files took; what is read again comes from the system's own cache, or
        from the disk where that needed the room."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)

    def _to_file(self, tensor: torch.Tensor, size: int) -> torch.Tensor:
        room = -(-size // _ALIGN) * _ALIGN
        if self._used + room > len(self._chunk):
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.truncate(max(_CHUNK, room))
                self._files.append(mmap.mmap(file.fileno(), 0))  # outlives the file's name and handle
            self._chunk, self._used = torch.frombuffer(self._files[-1], dtype=torch.uint8), 0
        place = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        self._used += room
        self.on_disk += size
        return place
