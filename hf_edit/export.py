"""Weight edits as LoRA adapters: a change of rank r is one, so that whatever serves LoRA can serve an edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from .errors import MergeError
from .methods import get_method
from .storage import replacing

if TYPE_CHECKING:
    from .pack import EditPack

__all__ = ["export_peft"]


def export_peft(pack: EditPack, folder: Path) -> None:
    """See `EditPack.export_peft`."""
    method = get_method(pack.method)
    factors = getattr(method, "factors", None)
    if not pack.in_weights or factors is None:
        raise MergeError(
            f"this edit by {pack.method!r} acts beside the weights and is no LoRA; share the pack itself "
            "(pack.save_pretrained), or make the edit with method='steam' and without a gate"
        )
    tensors, ranks = {}, set()
    for module, change in factors(pack.fit).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = change.right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = change.left.contiguous()
        ranks.add(change.right.shape[0])
    (rank,) = ranks  # a column a fact in each module
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": pack.base["base_model_name_or_path"],
        "revision": pack.base["base_model_revision"],
        "r": rank,
        "lora_alpha": rank,  # a scale of one
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pack.fit.modules),
        "inference_mode": True,
    }
    with replacing(folder) as (staging,):
        save_file(tensors, staging / "adapter_model.safetensors", {"format": "pt"})
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
