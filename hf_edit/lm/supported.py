"""What can't be edited whatever the method, said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedArchitectureError

__all__ = ["check_language_model", "check_tokenizer"]


def check_language_model(model: Any) -> None:
    """Refuse what is no causal language model of transformers, ready to be edited.

    Raises:
        TypeError: it is no model at all.
        UnsupportedArchitectureError: it is a model of another kind.
        ValueError: it was made in `torch.inference_mode`, or returns tuples.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        loading = f"EditableModelForCausalLM.from_pretrained({model!r})" if isinstance(model, str) else "from_pretrained"
        raise TypeError(f"EditableModelForCausalLM takes a loaded model, not a {kind}; to load one: {loading}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedArchitectureError(
            f"{kind} runs copies of a model; edit the model inside it (model.module), and wrap it again afterwards"
        )
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedArchitectureError(f"{kind} is no model of transformers: it has no config")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitectureError(f"{kind} is a sequence-to-sequence model; only causal language models can be edited")
    if not _predicts_tokens(model):
        raise UnsupportedArchitectureError(
            f"{kind} has no language-model head that predicts the next token; load the checkpoint with AutoModelForCausalLM"
        )
    if getattr(config, "return_dict", True) is False:
        raise ValueError("models can't generate with config.return_dict=False: set model.config.return_dict = True")
    if any(torch.is_inference(parameter) for parameter in model.parameters()):
        raise ValueError("the model was made in torch.inference_mode(), so it can't be trained: load it outside")


def _predicts_tokens(model: Any) -> bool:
    return hasattr(model, "can_generate") and model.can_generate() and model.get_output_embeddings() is not None


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not say which characters a token stands for.

    Raises:
        ValueError: it is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which editing needs to find a fact's subject in its prompt; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
