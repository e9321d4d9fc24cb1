"""One edit that acts at mentions, attached to a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...base import Base
from ...routing import Routing
from ...scope import Entities
from .decider import Decider
from .points import Effect
from .runner import Edit, Runner
from .tracker import Spellings, Tracker

__all__ = ["MentionAttachment"]


class MentionAttachment:
    """An edit that acts on a model at the mentions of its entities, until `detach`.

    The model is one function of the prefix then: the logits after a token depend on the tokens up to there alone, in whatever
    way it is run. See `hf_edit.methods.scope.tracker` for when a fact is active, `hf_edit.methods.scope.runner` for the cost.

    Args:
        base: model and tokenizer.
        entities: that are looked for, and their facts.
        effects: what is done, by module.
        routing: how a fact is chosen; without it the entity's newest fact is always active.
        spellings: with it the edit also acts on the tokens of a target that is being said, all but the last.
        finishes: in an answer in the chat, a fact whose target has been said stays active until that sentence is over, for
            edits that know how to end it. Names that the rest of the sentence mentions are left alone.
    """

    def __init__(
        self,
        base: Base,
        entities: Entities,
        effects: Mapping[nn.Module, Effect],
        routing: Routing | None = None,
        spellings: Spellings | None = None,
        finishes: bool = False,
    ) -> None:
        tracker = Tracker(base.tokenizer, entities, routing is not None, spellings, finishes)
        decider = None if routing is None else Decider(base.tokenizer, tracker, routing)
        self.edit = Edit(tracker, decider, effects)
        self._runner = Runner.of(base)
        self._runner.add(self.edit)

    @property
    def active(self) -> list[set[int]]:
        """The facts that were active at the end of each row of the last call."""
        return self.edit.last

    def detach(self) -> None:
        """Leave the model as it was; may be called again."""
        if self.edit in self._runner.edits:
            self._runner.remove(self.edit)
