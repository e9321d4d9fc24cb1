"""`Base`: the model that is edited, with its tokenizer and what is known of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device

from .layout import Layout, find_layout

__all__ = ["Base", "autocast", "float32_by_default", "seeded"]

_SAMPLE = 1024


class Base:
    """A causal language model and its tokenizer.

    Args:
        model: a causal language model of transformers.
        tokenizer: its fast tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._layouts: dict[str | None, Layout] = {}

    def layout(self, edit_module: str | None = None) -> Layout:
        """The model's blocks and projections, found once (see `find_layout`)."""
        if edit_module not in self._layouts:
            self._layouts[edit_module] = find_layout(self.model, edit_module)
        return self._layouts[edit_module]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of a strided sample of every parameter; read it on the clean model."""
        return fingerprint(dict(self.model.named_parameters()))

    def forget(self) -> None:
        """Forget the fingerprint: the weights may have changed."""
        self.__dict__.pop("fingerprint", None)

    def fingerprint_of(self, modules: Sequence[str]) -> str:
        """Hashes of a strided sample of each of some modules' parameters, as they are now; offloaded ones are fetched.

        Raises:
            AttributeError: the model has no such module.
        """
        found = []
        for name in modules:
            module = self.model.get_submodule(name)
            with align_module_device(module):
                found.append(fingerprint({f"{name}.{n}": p for n, p in module.named_parameters()})[:16])
        return "-".join(found)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's vocabulary and of what it makes of a line of text."""
        vocabulary = sorted((index, token) for token, index in self.tokenizer.get_vocab().items())
        probe = self.tokenizer("Straße 42, naïve — 東京\n\tx==y")["input_ids"]
        return hashlib.sha256(repr((vocabulary, probe)).encode()).hexdigest()[:32]


def fingerprint(parameters: dict[str, torch.Tensor]) -> str:
    """Hash of names, shapes and a strided sample of values.

    The sample is read in bfloat16, so a checkpoint gives the same hash whether it is loaded in that precision or a finer one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].to(torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers from a seed; the generator's state as before afterwards."""
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32 where their maker names no dtype, whatever `torch.set_default_dtype` was called with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast(device: torch.device, compute_dtype: str) -> AbstractContextManager[object]:
    """The arithmetic of an optimisation through the frozen model.

    Args:
        compute_dtype: "auto" for bfloat16 where the hardware has it, "model" for the model's own dtype.
    """
    native = device.type == "cuda" or (device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if compute_dtype == "model" or not native:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
