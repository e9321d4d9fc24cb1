"""Entity swap: the knowledge of one entity in the place of another's, without any training.

The motivating study of the Latent Knowledge Scalpel (arXiv 2508.03741): the state of an entity in a middle block stands for
what the model knows of it, so putting another entity's state there changes the answers as another name in the prompt would.
Also the shortest diagnosis of which block to edit: where the answers follow, the entity's knowledge has been gathered and has
not been handed on yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...base import Base
from ...positions import Text, encode
from ...restore import uninterrupted
from ...scope import Entities, Scope
from ...suffix import frozen, read_keys_and_states
from ..scope.attachment import MentionAttachment
from .attach import Rewriting
from .config import LKSConfig
from .editor import block_of
from .generator import OverwriteGenerator

__all__ = ["swap_entity"]


@contextmanager
def swap_entity(
    model: Any, entity: str, other: str, *, layer: int | None = None, context: str = "This text is about {}"
) -> Iterator[None]:
    """While the context lasts, every mention of an entity carries another entity's state from a block on.

    Args:
        model: an `EditableModelForCausalLM`; edits in force stay in force.
        entity: whose knowledge is replaced, at the last token of each mention.
        other: whose knowledge takes its place.
        layer: the block after which the state is replaced; by default the one at 55 % of the depth.
        context: a text with ``{}`` in which the other's state is read. With the prompt that will be asked, the state is just
            what another name in the prompt would have left there.

    Raises:
        ValueError: a name is empty, `context` does not hold just one ``{}``, or there is no such block.
    """
    if not (entity.strip() and other.strip()):
        raise ValueError("an entity to swap needs a name")
    if context.count("{}") != 1:
        raise ValueError(f"the context needs one {{}} where the other entity stands: {context!r:.120}")
    base = Base(model.get_base_model(), model.tokenizer)
    block = block_of(base, LKSConfig(layer=layer))
    start = context.index("{}")
    text = Text(context.replace("{}", other), (start, start + len(other)))
    (found,) = encode(base.tokenizer, [text])
    with frozen(base.model):
        points = [(0, found.subject)]
        _, states = read_keys_and_states(base.model, base.layout(), [found.ids], points, blocks=(block,), last=block)
    # a code of the overwriting form is the state itself
    code = states[block].detach().float()
    with torch.device(base.device):
        generator = OverwriteGenerator(code.shape[1])
    effects = {base.layout().blocks[block]: Rewriting(generator.requires_grad_(False), code)}
    attached: list[MentionAttachment] = []
    try:
        try:
            with model._turn(), uninterrupted():
                attached.append(MentionAttachment(base, Entities(Scope([[entity]]), ((0,),)), effects))
            yield
        finally:
            with model._turns.change():
                _detach(attached)
    except BaseException:  # also an interrupt on the way out
        _detach(attached)
        raise


def _detach(attached: Sequence[MentionAttachment]) -> None:
    with uninterrupted():
        for attachment in attached:
            attachment.detach()
