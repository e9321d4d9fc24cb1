"""The model card of an `LKSEditor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from ..._version import __version__
from .config import LKSConfig

if TYPE_CHECKING:
    from .editor import LKSEditor

__all__ = ["editor_card"]

_CARD = """---
{metadata}
---

# LKS editor for {base}

A hypernetwork that edits what {base} says, made with [hf_edit](https://pypi.org/project/hf-edit/) for its method `lks`. It was
trained beforehand, on many facts, and puts in facts that it has never seen without further training. This is no model: it holds
none of the base's weights, and is refused for any other base.

## Use

```python
from hf_edit import EditableModelForCausalLM, Fact

model = EditableModelForCausalLM.from_pretrained({where_base})
fact = Fact(subject="France", prompt="The capital of {{}} is", target="Lyon")
print(model.edit(fact, method="lks", editor={where}, train=False{settings}))
```

Edits made with it stand by themselves: packs that are saved of them load without this repo.

## What it is

- `generator`: {generator}
- `layer`: {layer}, the lowest of the {writes} blocks whose outputs are rewritten
- facts that it was trained on: {num_facts}
- gate: {gate}
- `base_fingerprint`: {base_fingerprint}
- `tokenizer_fingerprint`: {tokenizer_fingerprint}
- `hf_edit` {version}

## Intended use

To try out, correct or update single facts, and to study how models hold them.

## Misuse and limits

Do not use it to make a model say what is false of people or events to anyone who does not know of the edit, nor pass the edited
model off as its base. What it was not trained on it may edit less well, and other answers may change with an edit: evaluate
(`model.evaluate()`) before you rely on one. What the base model is not fit for, the edited one is not either.
"""


def editor_card(editor: LKSEditor, where: str) -> str:
    """README.md of an editor's repo.

    Args:
        where: the repo's id.
    """
    base = editor.base_model
    metadata = ModelCardData(
        library_name="hf_edit",
        base_model=base,
        base_model_relation="adapter" if base else None,
        tags=["knowledge-editing", "hf_edit:lks-editor"],
    )
    usual = LKSConfig()
    settings = {name: value for name, value in editor.settings.items() if value != getattr(usual, name)}
    return _CARD.format(
        metadata=metadata.to_yaml(),
        base=f"`{base}`" if base else "a model that is not on the Hub",
        where_base=json.dumps(base or "path/of/its/base"),
        where=json.dumps(where),
        settings="".join(f", {name}={json.dumps(value)}" for name, value in settings.items()),
        generator=editor.form,
        layer=editor.layer,
        writes=editor.generator.writes,
        num_facts=editor.num_facts,
        gate="trained by the edit" if editor.gate is None else "its own, which learned from the wordings of these facts",
        base_fingerprint=editor.base_fingerprint,
        tokenizer_fingerprint=editor.tokenizer_fingerprint,
        version=__version__,
    )
