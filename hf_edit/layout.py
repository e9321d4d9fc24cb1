"""Finding the parts of a causal language model by their structure, never by its name."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedArchitectureError

__all__ = ["Layout", "find_layout", "write_scale"]

# Children of a block that may hold a matrix of the right shape and are no plain MLP.
_NOT_MLP = re.compile(r"attn|attention|mixer|expert|gate(?!_up)|router|mamba|ssm|conv(?!1d)|cross|lora", re.IGNORECASE)

_FIRST_RECALL, _LAST_RECALL = 0.13, 0.265


@dataclass(frozen=True)
class Layout:
    """The blocks of a model and each block's MLP output projection.

    Attributes:
        blocks: the decoder blocks, in order.
        blocks_path: the name of their list in the model, e.g. ``model.layers``.
        decoder: the innermost module that runs all of them on token ids or embeddings.
        projections: each block's MLP output projection by its full module name, or None where the block has none.
        hidden_size: width of the residual stream.
    """

    blocks: tuple[nn.Module, ...]
    blocks_path: str
    decoder: nn.Module
    projections: tuple[str | None, ...]
    hidden_size: int

    def __len__(self) -> int:
        return len(self.blocks)

    def at_depth(self, depth: float) -> int:
        """The block at a relative depth: 0 is the first, 1 the last."""
        return min(max(round(depth * (len(self) - 1)), 0), len(self) - 1)

    def recall_blocks(self) -> range:
        """The blocks whose MLPs recall facts about a subject: from 13 to 26.5 % of the depth, 4 to 8 of 30 to 32.

        The range that MEMIT (arXiv 2210.07229) and its successors edit in models of that depth.
        """
        return range(self.at_depth(_FIRST_RECALL), self.at_depth(_LAST_RECALL) + 1)

    def block(self, index: int) -> int:
        """A block's index, checked.

        Raises:
            ValueError: there is no such block.
        """
        if not -len(self) <= index < len(self):
            raise ValueError(f"there is no block {index}: the model has blocks 0 to {len(self) - 1}")
        return index % len(self)

    def projection(self, index: int) -> str:
        """The full module name of a block's MLP output projection.

        Raises:
            UnsupportedArchitectureError: none was found by structure.
        """
        name = self.projections[self.block(index)]
        if name is None:
            children = ", ".join(n for n, _ in self.blocks[index].named_modules() if n) or "none"
            others = [i for i, projection in enumerate(self.projections) if projection is not None]
            elsewhere = f"These blocks have one: layers={others}. " if others else ""
            raise UnsupportedArchitectureError(
                f"block {index} ({type(self.blocks[index]).__name__}) has no MLP output projection that could be found by "
                f"structure (a 2-D weight from the MLP's width to the hidden size). {elsewhere}Name it yourself with "
                f"edit_module='{self.blocks_path}.{{}}.<child>', or use method='lks', which edits no weight. "
                f"The block's children: {children}."
            )
        return name


def find_layout(model: Any, edit_module: str | None = None) -> Layout:
    """Find a model's blocks and their MLP output projections.

    Args:
        model: a causal language model of transformers.
        edit_module: the projection's module name with ``{}`` for the block's index, e.g. ``model.layers.{}.mlp.down_proj``,
            where the structure does not tell.

    Raises:
        UnsupportedArchitectureError: no list of blocks, or `edit_module` names no module, or no matrix that writes to the
            hidden state.
    """
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    hidden = int(config.hidden_size)
    path, blocks = _find_blocks(model, int(getattr(config, "num_hidden_layers", 0)))
    names: list[str | None] = []
    for index, block in enumerate(blocks):
        if edit_module is not None:
            names.append(_named(model, edit_module.replace("{}", str(index)), hidden))
        else:
            child = _find_projection(block, hidden)
            names.append(f"{path}.{index}.{child}" if child else None)
    if edit_module is not None and not any(names):
        known = [f"{path}.{{}}.{name}" for name, _ in blocks[0].named_modules() if name]
        meant = difflib.get_close_matches(edit_module, known, 1)
        raise UnsupportedArchitectureError(
            f"no block has a module {edit_module!r}" + (f"; did you mean {meant[0]!r}?" if meant else f": it has {known}")
        )
    return Layout(tuple(blocks), path, _decoder_of(model, path), tuple(names), hidden)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map, whichever way round the module keeps its weight.

    Raises:
        UnsupportedArchitectureError: the module has no 2-D weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise UnsupportedArchitectureError(f"{type(module).__name__} has no 2-D weight")
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as [in, out] (GPT-2's Conv1D) rather than [out, in]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def write_scale(model: Any, layout: Layout, index: int) -> float | None:
    """How a change of the MLP output projection's output reaches the block's output.

    Returns:
        The factor by which it is added (1 for nearly all models), or None where a norm stands between
        (post-norm blocks: Gemma 2 and 3, OLMo 2).
    """
    projection = model.get_submodule(layout.projection(index))
    block = layout.blocks[index]
    ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    push: torch.Tensor | None = None
    seen: list[torch.Tensor] = []

    def shift(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output if push is None else output + push.to(output)

    def read(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().float())

    handles = [projection.register_forward_hook(shift), block.register_forward_hook(read)]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            # as large as the stream itself, so that the epsilon of a norm can't make it look linear
            noise = torch.randn(layout.hidden_size, generator=torch.Generator().manual_seed(0))
            push = noise / noise.norm() * seen[0].norm(dim=-1).mean().item()
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    change, pushed = (seen[1] - seen[0]).flatten(0, -2), push.to(seen[0].device)
    scale = float((change @ pushed).mean() / (pushed @ pushed))
    error = (change - scale * pushed).norm(dim=-1).max() / (abs(scale) * pushed.norm() + 1e-12)
    tolerance = 1e-3 if seen[0].dtype == model.dtype else 5e-2
    return scale if float(error) < tolerance else None


def _find_blocks(model: Any, count: int) -> tuple[str, Sequence[nn.Module]]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        lists = [
            (name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 0 and (len(module) == count or not count)
        ]
        if lists:
            found = min(lists, key=lambda pair: pair[0].count("."))[1]
            path = next(name for name, module in model.named_modules() if module is found)
            return path, list(found)
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} has no list of {count} blocks that could be found; hf_edit needs a decoder whose blocks "
        "stand in one nn.ModuleList"
    )


def _decoder_of(model: Any, blocks_path: str) -> nn.Module:
    name = blocks_path
    while name:
        name = name.rpartition(".")[0]
        module: nn.Module = model.get_submodule(name)
        if {"input_ids", "inputs_embeds"} & inspect.signature(module.forward).parameters.keys():
            return module
    raise UnsupportedArchitectureError(f"no part of {type(model).__name__} that holds {blocks_path} takes tokens")


def _find_projection(block: nn.Module, hidden: int) -> str | None:
    """The matrix that leads from the MLP's width back to the residual stream: of several that write there (adapters, inputs of
    single blocks, MLPs in norms), the one that reads most. Of equals the last."""
    found, widest = None, 0
    for name, module in block.named_modules():
        if not name or _NOT_MLP.search(name) or isinstance(module, nn.Embedding):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            out, width = weight_shape(module)
            if out == hidden and width != hidden and width >= widest:
                found, widest = name, width
    return found


def _named(model: Any, name: str, hidden: int) -> str | None:
    try:
        out, _ = weight_shape(model.get_submodule(name))
    except AttributeError:
        return None
    if out != hidden:
        raise UnsupportedArchitectureError(f"{name} writes {out} numbers, not the hidden state's {hidden}")
    return name
