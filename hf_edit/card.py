"""The model card of a pack, from the edit's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from .pack import EditPack

__all__ = ["card"]

_SHOWN = 50


def card(pack: EditPack) -> str:
    """README.md of a pack: what it changes, on which base, and how to use it."""
    name = pack.base["base_model_name_or_path"]
    on_hub = bool(name) and not str(name).startswith((".", "/", "~")) and str(name).count("/") <= 1
    data = ModelCardData(
        library_name="hf_edit",
        base_model=name if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        tags=["knowledge-editing", f"hf_edit:{pack.method}"],
    )
    count = len(pack.facts)
    rows = [f"| {_cell(f.question)} | {_cell(f.target)} |" for f in pack.facts[:_SHOWN]]
    if count > _SHOWN:
        rows.append(f"| … and {count - _SHOWN} more in `facts.jsonl` | |")
    settings = [f"- `{key}`: {_cell(str(value))}" for key, value in pack.config.to_dict().items() if value is not None]
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {count} edited {'fact' if count == 1 else 'facts'}",
            "",
            f"Made with [hf_edit](https://pypi.org/project/hf-edit/) by the method `{pack.method}`. This is an edit, no model: "
            "it changes what its base model says about the facts below.",
            "",
            "```python",
            "from hf_edit import EditableModelForCausalLM",
            "",
            'model = EditableModelForCausalLM.from_pretrained("path/or/id/of/this/pack")',
            "```",
            "",
            "## Facts changed",
            "",
            "| prompt | now goes on with |",
            "|---|---|",
            *rows,
            "",
            "## Settings",
            "",
            *settings,
            f"- `seed`: {pack.seed}",
            "",
        ]
    )


def _cell(text: str) -> str:
    """Text from a fact as plain text of a Markdown table."""
    flat = " ".join(text.split())[:200]
    for character in "\\`*_{}[]<>|#$":
        flat = flat.replace(character, f"&#{ord(character)};")
    return flat
