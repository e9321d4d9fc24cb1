"""How near the stream of an edited prompt comes to where the model itself stands when it is about to say the new object.

The measure that goes with semantic anchors (STEAM, arXiv 2510.10398): cosines to reference facts that share the edit's
object, which must be others than the anchors were made of. Streams share one large common direction, so that the raw cosine
is high for any object; the centred one is taken off the mean state before objects of all kinds, and says something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .answers import Score, score_targets
from .base import Base
from .facts import Fact
from .positions import Text, encode, fact_text, join
from .references import Reference, bank

__all__ = [
    "ReferenceCosines",
    "ReferenceStates",
    "general_references",
    "reference_cosines",
    "reference_states",
    "score_references",
]

_GENERAL = 96


@dataclass(frozen=True)
class ReferenceStates:
    """Where the clean model stands before facts' objects.

    Attributes:
        blocks: where it was read.
        means: [facts, blocks, hidden] in float32 on the CPU, the mean over a fact's references; NaN where it has none.
        centre: [blocks, hidden], the mean over references to objects of all kinds.
    """

    blocks: tuple[int, ...]
    means: torch.Tensor
    centre: torch.Tensor


@dataclass(frozen=True)
class ReferenceCosines:
    """Cosines of edited prompts' streams to their references, at each block.

    Attributes:
        blocks: where they were read.
        centred: [facts, blocks], between states less the centre; NaN where a fact has no reference.
        raw: [facts, blocks], between the states as they are.
    """

    blocks: tuple[int, ...]
    centred: torch.Tensor
    raw: torch.Tensor


def score_references(
    model: Any, references: Sequence[Reference], blocks: Sequence[int] = (), batch_size: int = 32, progress: bool = False
) -> list[Score]:
    """How the model, as it stands, takes each reference's own object behind its first wording: recalled word for word
    (`Score.right`), or nearly (`Score.rank` below ten); `Score.states` at the last token of the prompt.

    Args:
        model: an `EditableModelForCausalLM` or a `Base`.
        blocks: whose outputs are read.
    """
    base = _base(model)
    prompts = [r.prompts[0].replace("{}", r.subject) for r in references]
    wholes = [join(prompt, r.object) for prompt, r in zip(prompts, references, strict=True)]
    texts = [Text(whole, None, (len(prompt), len(whole))) for prompt, whole in zip(prompts, wholes, strict=True)]
    return score_targets(base, encode(base.tokenizer, texts), batch_size, blocks, progress)


def reference_states(
    model: Any,
    references: Sequence[Sequence[Reference]],
    *,
    general: Sequence[Reference] | None = None,
    blocks: Sequence[int] | None = None,
    batch_size: int = 32,
) -> ReferenceStates:
    """Read references on the clean model: call it before the edit, or with edits disabled.

    Args:
        model: an `EditableModelForCausalLM` or a `Base`.
        references: of each fact, those to compare with; none that an anchor was made of.
        general: references to objects of all kinds, for the centre; by default taken from the shipped bank.
        blocks: by default all.
    """
    base = _base(model)
    chosen = tuple(range(len(base.layout())) if blocks is None else (base.layout().block(b) for b in blocks))
    objects = {r.object for group in references for r in group}
    rest = general_references(objects) if general is None else list(general)
    if not rest:
        raise ValueError("the centre needs at least one reference to another object: general=[...]")
    asked = list(dict.fromkeys([*(r for group in references for r in group), *rest]))
    scores = score_references(base, asked, chosen, batch_size)
    states = {r: torch.stack([s.states[b] for b in chosen]) for r, s in zip(asked, scores, strict=True)}
    hidden = base.layout().hidden_size
    nothing = torch.full((len(chosen), hidden), torch.nan)
    means = [torch.stack([states[r] for r in group]).mean(0) if group else nothing for group in references]
    centre = torch.stack([states[r] for r in rest]).mean(0)
    return ReferenceStates(chosen, torch.stack(means) if means else torch.empty(0, len(chosen), hidden), centre)


def reference_cosines(model: Any, facts: Sequence[Fact], states: ReferenceStates, batch_size: int = 32) -> ReferenceCosines:
    """Cosines between the model's stream, as it stands, at the last token of each fact's prompt and the fact's references.

    Args:
        model: an `EditableModelForCausalLM` or a `Base`, with the edits in force.
        facts: those of `states`, in the same order.

    Raises:
        ValueError: another number of facts than `states` holds.
    """
    if len(facts) != len(states.means):
        raise ValueError(f"there are {len(facts)} facts and references of {len(states.means)}; they go together one by one")
    base = _base(model)
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    scores = score_targets(base, texts, batch_size, states.blocks)
    here = torch.stack([torch.stack([s.states[b] for b in states.blocks]) for s in scores])
    return ReferenceCosines(
        states.blocks,
        torch.cosine_similarity(here - states.centre, states.means - states.centre, dim=-1),
        torch.cosine_similarity(here, states.means, dim=-1),
    )


def general_references(without: Sequence[str] | set[str] = ()) -> list[Reference]:
    """References to objects of all kinds, one an object, evenly taken from the shipped bank; none to the objects given."""
    names = {name.casefold() for name in without}
    first = [group[0] for obj, group in bank().items() if obj not in names]
    return first[:: max(1, len(first) // _GENERAL)][:_GENERAL]


def _base(model: Any) -> Base:
    return model if isinstance(model, Base) else Base(model.get_base_model(), model.tokenizer)
