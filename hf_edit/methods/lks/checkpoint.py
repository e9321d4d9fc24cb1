"""A training that was stopped goes on where it was."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...cache import atomic_path

__all__ = ["Checkpoint"]

_EVERY = 10.0  # seconds; shorter epochs are not worth a file each


class Checkpoint:
    """The state of a training after an epoch, in a file of its own that is replaced whole.

    Args:
        path: the file; its name tells all that the training depends on.
        modules: what is trained.
        optimisers: theirs.
    """

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer]) -> None:
        self._path, self._modules, self._optimisers = path, modules, optimisers
        self._saved = time.monotonic()

    def resume(self) -> int:
        """Take up an earlier run's state.

        Returns:
            How many epochs it had finished; 0 where there is none, or none that can be read.
        """
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
                done = int(json.loads((file.metadata() or {})["epochs"]))
            for name, module in self._modules.items():
                module.load_state_dict(_below(f"{name}.", tensors))
            for n, optimiser in enumerate(self._optimisers):
                self._load(optimiser, _below(f"optimiser{n}.", tensors))
        except (SafetensorError, KeyError, ValueError, RuntimeError):
            self.remove()
            return 0
        return done

    def save(self, epochs: int) -> None:
        """Keep the state after so many epochs, unless the last one was kept a moment ago."""
        if time.monotonic() - self._saved < _EVERY:
            return
        tensors = {f"{name}.{key}": t for name, module in self._modules.items() for key, t in module.state_dict().items()}
        for n, optimiser in enumerate(self._optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser{n}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
        with atomic_path(self._path) as path:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"epochs": str(epochs)})
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The training is done."""
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _load(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor | int]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".")
            plain = key == "step" and isinstance(optimiser, torch.optim.SparseAdam)  # which counts in a plain number
            state.setdefault(int(index), {})[key] = int(tensor) if plain else tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
