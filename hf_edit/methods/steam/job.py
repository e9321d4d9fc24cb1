"""One edit's work on the model: values of facts that are edited together, and their insertion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from ...answers import Score, score_targets
from ...base import Base
from ...facts import Fact, fold
from ...gate import gate_block
from ...layout import Layout, weight_shape, write_scale
from ...positions import encode, fact_text
from ...statistics import KeyStatistics, open_statistics
from ...texts import sample_contexts
from ...weights.attach import Factors, WeightAttachment
from ...weights.editors import EDITORS, ONE_BY_ONE, Insertion
from ...weights.prompts import FactTexts, fact_texts
from ...weights.solve import Update
from ...weights.values import Objective, Values, ValueSettings, optimize_values
from .alignment import Alignment, Contrast
from .anchors import Anchors, build_anchors, informative_blocks
from .config import SteamConfig
from .parts import alone

__all__ = ["Job", "in_force"]

_GATED_CLAMP = 1.5  # for values behind a gate, where nothing else is at stake
_LANDED = 0.3  # nats; a value whose loss is above this may leave a token of its target to others

ObjectiveOf = Callable[[Sequence[int]], Objective | None]  # the alignment term of facts of a group, by their indices in it


@dataclass(frozen=True)
class Job:
    """What the groups of one fit share."""

    base: Base
    config: SteamConfig
    editor: str
    layout: Layout
    layers: tuple[int, ...]
    scale: float | None  # from what the last of them writes to its block's output, see `write_scale`
    statistics: KeyStatistics | None  # none behind a gate, where nothing is inserted
    contexts: list[str]
    progress: bool

    @classmethod
    def prepare(cls, base: Base, config: SteamConfig, editor: str, seed: int, progress: bool) -> Job:
        layout = base.layout(config.edit_module)
        layers = _layers(base, layout, config, editor)
        scale = write_scale(base.model, layout, layers[-1])
        modules = [layout.projection(block) for block in layers]
        statistics = None
        if not config.gate:
            statistics = open_statistics(
                base, modules, config.statistics, num_tokens=config.statistics_tokens, progress=progress
            )
        contexts = sample_contexts(base, config.contexts, config.context_length, seed)
        return cls(base, config, editor, layout, layers, scale, statistics, contexts, progress)

    def anchor_blocks(self) -> tuple[int, ...]:
        """The blocks to align at, all above the last edit layer; none where that is the model's last block."""
        chosen = self.config.anchor_blocks
        third = range(self.layout.at_depth(1 / 3), self.layout.at_depth(2 / 3) + 1)
        above = range(self.layers[-1] + 1, len(self.layout))
        if chosen is None or not above:
            return tuple(b for b in third if b in above) or tuple(above[:1])
        if isinstance(chosen, str):
            return informative_blocks(self.base, self.layers[-1], len(third))
        blocks = tuple(self.layout.block(b) for b in chosen)
        if min(blocks) <= self.layers[-1]:
            raise ValueError(
                f"anchor_blocks must all lie above the last edited block, {self.layers[-1]}; "
                f"block {min(blocks)} does not see the edit"
            )
        return blocks

    def anchors(self, facts: Sequence[Fact]) -> Anchors | None:
        """Anchors of the facts' targets; None where no block lies above the edit."""
        config = self.config
        blocks = self.anchor_blocks()
        contrast = config.negatives if config.alignment == "contrastive" else 0
        if not blocks:
            return None
        given = blocks if config.anchor_blocks is not None else self._last_third()
        return build_anchors(
            self.base,
            facts,
            blocks,
            config.anchor_settings,
            given_blocks=given if config.in_context else (),
            contrast=contrast,
            progress=self.progress,
        )

    def _last_third(self) -> tuple[int, ...]:
        """The blocks of the last third above the edit, without the model's last, which makes ready what the head reads."""
        third = range(self.layout.at_depth(2 / 3) + 1, len(self.layout) - 1)
        return tuple(b for b in third if b > self.layers[-1]) or (len(self.layout) - 1,)

    def objective(self, anchors: Anchors | None, group: Sequence[int], within: Sequence[int]) -> Alignment | None:
        """The alignment term of facts that are optimised together; None where none of them has an anchor.

        Args:
            group: the facts that are edited together, by their indices among all.
            within: those to optimise, by their indices in the group.
        """
        config, chosen = self.config, [group[i] for i in within]
        if anchors is None or not any(anchors.counts[i] for i in chosen):
            return None
        if config.alignment == "contrastive":
            return Contrast(anchors, chosen, config.anchor_weight, config.anchor_ratio, temperature=config.temperature)
        return Alignment(anchors, chosen, config.anchor_weight, config.anchor_ratio)

    @property
    def insertions(self) -> list[Job]:
        """The insertions that a group takes, each on top of the last: one into all layers.

        Where blocks normalise what an MLP writes, a residual can't be spread over several of them, and one of them can only do
        so much: its write has the length that the norm gives it. So each layer is edited by itself there, on top of those
        below, and its KL terms hold to the model as it stands then.
        """
        if len(self.layers) == 1 or self.scale is not None:
            return [self]
        return [replace(self, layers=(block,)) for block in self.layers]

    def fit(
        self, facts: Sequence[Fact], objective: ObjectiveOf, earlier: Sequence[Fact]
    ) -> tuple[dict[str, Update], torch.Tensor]:
        """Values and their insertion, for facts that are edited together on top of earlier ones.

        Returns:
            The updates by module, and the values, float32 [facts, insertions, hidden].
        """
        updates: dict[str, Update] = {}
        values = []
        with ExitStack() as stack:
            for step in self.insertions:
                found, deltas = step._fit(facts, objective, earlier)
                updates |= found
                values.append(deltas.cpu())
                stack.enter_context(step.in_force(found))
        return updates, torch.stack(values, dim=1)

    def alone(self, facts: Sequence[Fact], objective: ObjectiveOf) -> dict[str, Update]:
        """Values of facts behind a gate, each of which acts alone, by module."""
        config = self.config
        texts = self._texts(facts, config.tail_tokens if config.tail_factor else 0, config.kept_prompts)
        return {self.layout.projection(self.layers[-1]): alone(self._landed(texts, objective).T.float().cpu())}

    def insert(self, facts: Sequence[Fact], values: torch.Tensor, earlier: Sequence[Fact]) -> dict[str, Update]:
        """The insertion of values that `fit` gave, into the model as it stands now."""
        updates: dict[str, Update] = {}
        texts = self._texts(facts, tail_tokens=0, kept_prompts=1, keys_only=True)  # the rest is for the optimisation alone
        with ExitStack() as stack:
            for step, deltas in zip(self.insertions, values.unbind(1), strict=False):  # one more where others have more layers
                found = EDITORS[self.editor](step._problem(facts, texts, deltas, earlier))
                updates |= found
                stack.enter_context(step.in_force(found))
        return updates

    def _fit(
        self, facts: Sequence[Fact], objective: ObjectiveOf, earlier: Sequence[Fact]
    ) -> tuple[dict[str, Update], torch.Tensor]:
        """Values and their insertion; then values of facts that the insertion did not carry over are raised and all are
        inserted anew, up to `retries` times. The insertion in which most facts hold is kept, of two the likelier one.

        A change that is spread over blocks is not quite what was optimised at the last of them: the blocks in between see part
        of it. So facts are raised in the edited model, by shorter steps, where they fall short.
        """
        config = self.config
        texts = self._texts(facts, config.tail_tokens if config.tail_factor else 0, config.kept_prompts)
        every = range(len(facts))
        deltas = self._values(texts, objective(every)).deltas
        problem = self._problem(facts, texts, deltas, earlier)
        updates = EDITORS[self.editor](problem)
        best = updates, deltas
        lowest = (len(facts) + 1, 0.0)
        retries = config.most_retries
        for left in reversed(range(retries + 1)) if retries else ():
            with self.in_force(updates):
                bare, mean = self._standing(texts)
                wrong = [i for i, score in enumerate(bare) if not score.right]
                if (reached := (len(wrong), sum(mean))) < lowest:
                    best, lowest = (updates, deltas), reached
                short = sorted({*wrong, *(i for i, nll in enumerate(mean) if nll > _LANDED)})
                if not short or not left:
                    break
                further = self._values([texts[i] for i in short], objective(short), again=True).deltas
            # what was asked for and what is still missing there, since an insertion carries over a part only
            deltas = deltas.index_add(0, torch.tensor(short, device=deltas.device), further)
            updates = EDITORS[self.editor](replace(problem, deltas=deltas))
        return best

    def _standing(self, texts: Sequence[FactTexts]) -> tuple[list[Score], list[float]]:
        """How facts stand as the model is: the scores of their own prompts, and each fact's mean loss over its texts."""
        scores = iter(score_targets(self.base, [text for fact in texts for text in fact.rewrites]))
        bare, means = [], []
        for fact in texts:
            own = list(islice(scores, len(fact.rewrites)))
            tokens = len(fact.rewrites[0].labels)
            bare.append(own[0])
            means.append(sum(-score.log_prob / min(tokens, len(score.log_probs)) for score in own) / len(own))
        return bare, means

    def _landed(self, texts: Sequence[FactTexts], objective: ObjectiveOf) -> torch.Tensor:
        """Values that act alone. No insertion will show which of them fall short, so those that have not landed when the steps
        end are optimised further, up to `retries` times."""
        found = self._values(texts, objective(range(len(texts))))
        deltas, losses = found.deltas, found.losses[-1]
        for _ in range(self.config.most_retries):
            short = (losses > _LANDED).nonzero()[:, 0].tolist()
            if not short:
                break
            further = self._values([texts[i] for i in short], objective(short), deltas[short])
            now = further.losses[-1].to(losses)
            better = (now < losses[short]).nonzero()[:, 0]
            at = torch.tensor(short, device=losses.device)[better]
            deltas[at], losses[at] = further.deltas[better], now[better]
            if not len(better):
                break
        return deltas

    def _texts(self, facts: Sequence[Fact], tail_tokens: int, kept_prompts: int, keys_only: bool = False) -> list[FactTexts]:
        wordings = 2 * self.config.gate if self.config.wordings is None else self.config.wordings
        return fact_texts(self.base, facts, self.contexts, tail_tokens, kept_prompts, wordings, self.config.chats, keys_only)

    def _problem(
        self, facts: Sequence[Fact], texts: Sequence[FactTexts], deltas: torch.Tensor, earlier: Sequence[Fact]
    ) -> Insertion:
        config, statistics = self.config, self.statistics
        assert statistics is not None
        width = weight_shape(self.base.model.get_submodule(self.layout.projection(self.layers[-1])))[1]
        subjects = {fold(fact.subject) for fact in facts}
        # what stands about the same subject has the same key: to protect it would keep the new fact out
        protected = [fact_text(f) for f in earlier if fold(f.subject) not in subjects]
        return Insertion(
            self.base,
            self.layout,
            self.layers,
            texts,
            deltas,
            self.scale,
            statistics,
            encode(self.base.tokenizer, protected),
            covariance_weight=config.covariance_weight or width * min(max(0.2, 0.1 * (len(facts) / 100) ** 2), 1.0),
            null_space_threshold=config.null_space_threshold,
            ridge=config.ridge,
            bare_share=config.bare_share,
            bystanders=config.bystanders,
        )

    def _values(
        self,
        texts: Sequence[FactTexts],
        objective: Objective | None,
        start: torch.Tensor | None = None,
        again: bool = False,
    ) -> Values:
        config = self.config
        settings = ValueSettings(
            block=self.layers[-1],
            steps=-(-config.steps // 2) if again else config.steps,
            lr=config.lr,
            kl_factor=config.kl_factor,
            tail_factor=config.tail_factor,
            weight_decay=config.weight_decay,
            clamp=_GATED_CLAMP if config.gate and config.clamp is None and self.scale is not None else config.clamp,
            enough=config.enough,
            balance=config.balance,
            rotation=config.rotation,
            reach=0.5 if again else 1.0,
        )
        return optimize_values(
            self.base,
            texts,
            settings,
            objective=objective,
            layout=self.layout,
            batch_facts=config.batch_facts,
            progress=self.progress,
            start=start,
        )

    def in_force(self, updates: Mapping[str, Update]) -> AbstractContextManager[None]:
        """The model with updates of its weights."""
        return in_force(self.base, {name: update.factors for name, update in updates.items()})


@contextmanager
def in_force(base: Base, factors: Mapping[str, Factors]) -> Iterator[None]:
    """The model with changes of its weights."""
    attachment = WeightAttachment(base.model, factors)
    try:
        yield
    finally:
        attachment.detach()


def _layers(base: Base, layout: Layout, config: SteamConfig, editor: str) -> tuple[int, ...]:
    if config.layers is not None:
        layers = tuple(sorted({layout.block(b) for b in config.layers}))
    elif config.gate:
        layers = (min(gate_block(layout) + 1, len(layout) - 1),)
    else:
        layers = tuple(layout.recall_blocks())
    return layers[-1:] if editor in ONE_BY_ONE else layers
