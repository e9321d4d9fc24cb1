"""Settings of STEAM and its base editors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...hub import is_repo_id
from ...weights.editors import EDITORS, ONE_BY_ONE
from ...weights.prompts import GENERIC_PROMPTS
from ..base import EditConfig, gate_quiet_setting, require, setting
from .anchors import AnchorSettings

__all__ = ["BaselineConfig", "SteamConfig"]


_SOURCES = ("bank", "wikidata", "facts", "given")
_FRAMES = ("raw", "centred", "object")
_ALIGNMENTS = ("cosine", "contrastive")
_AT_LEAST_ONE = (
    "steps", "max_references", "max_per_relation", "min_references", "batch_facts", "context_length", "kept_prompts",
    "rotation", "negatives",
)  # fmt: skip
_NOT_NEGATIVE = ("weight_decay", "kl_factor", "tail_factor", "tail_tokens", "anchor_weight", "contexts", "chats", "retries",
    "bystanders",
)  # fmt: skip
_POSITIVE = (
    "lr", "clamp", "covariance_weight", "statistics_tokens", "enough", "null_space_threshold", "ridge", "temperature",
    "anchor_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class SteamConfig(EditConfig):
    """Settings of `method="steam"`; the defaults work for any model, layers go by relative depth.

    `tail_factor`, on 48 CounterFact facts in one batch on SmolLM2-135M, 20 greedy tokens: at 0, 0.25 and 1 the target is said
    three times or more in 27, 15 and 19 % of continuations, and 98, 98 and 94 % of the facts are answered. `covariance_weight`
    of 150, 500 and 1500 made no difference on six facts.

    Raises:
        ValueError: a setting is out of range.
    """

    structural = ("edit_module", "gate", "gate_quiet")

    base_editor: str | None = setting(
        None, "'rome', 'r_rome', 'memit' or 'alphaedit'; by default MEMIT for several facts, ROME for one, and behind a gate"
    )
    layers: tuple[int, ...] | None = setting(
        None,
        "blocks to edit, ascending; ROME edits the last of them. By default those from 13 to 27 % of the depth, with a gate "
        "the one after the block that the gate reads, at 45 %",
    )
    steps: int = setting(14, "steps of gradient descent for each value; half as many where it is raised again")
    lr: float = setting(0.25, "length of a step, relative to the longest delta that `clamp` allows")
    weight_decay: float = setting(0.5, "weight of |delta| / |v|^2")
    kl_factor: float = setting(0.0625, "weight of KL(edited || clean) after prompts about the subject")
    kept_prompts: int = setting(1, "how many such prompts, of a pool of 24; with 1 it is '{subject} is a'")
    enough: float | None = setting(0.9, "stop pushing a token of the target whose probability is above this; None never stops")
    balance: bool = setting(False, "let facts that are short of `enough` weigh fit over KL, and the others KL over fit")
    rotation: int = setting(3, "each step uses one `rotation`-th of the contexts, kept prompts and tails (mini-batching)")
    tail_factor: float = setting(0.25, "weight of KL(edited || clean) behind the target, which keeps it from being said again")
    tail_tokens: int = setting(6, "tokens behind the target that this term reads")
    clamp: float | None = setting(
        None,
        "|delta| at most, relative to the norm of the stream (0.75, with a gate 1.5), or of the MLP's output behind a norm (2)",
    )
    contexts: int = setting(5, "sampled prefixes that the fact must also hold behind")
    wordings: int | None = setting(
        None,
        "how many of these give way to the prompt in other words, where the package knows such; by default 2 behind a gate, "
        "else none: more paraphrases follow then, and more of the subject's other answers",
    )
    context_length: int = setting(10, "tokens of such a prefix")
    chats: int = setting(
        3,
        "how many of these give way to chats in which the fact is asked for and answered as the model itself would answer it, "
        "where it has a chat template",
    )
    bare_share: float | None = setting(
        0.5, "the bare prompt's share in a fact's key; None counts it as one context among the others, as MEMIT does"
    )
    bystanders: float = setting(
        0.2, "weight of the keys of the prompts' other tokens, at which an insertion must change nothing; 0 leaves them out"
    )
    gate: bool = setting(
        False,
        "keep the edit beside the weights: each fact by itself, on for prompts that ask for it. Other answers about its "
        "subject and all other text stay the clean model's, but the edit can't be merged or exported",
    )
    gate_quiet: float = gate_quiet_setting()
    retries: int | None = setting(
        None,
        "how often the values of facts that fall short are raised in the edited model, by steps of half the length, and all "
        "inserted anew (1); with a gate, optimised further (2)",
    )
    covariance_weight: float | None = setting(
        None, "MEMIT's lambda; by default a fifth of the key's width, from 142 facts on growing as their square up to the width"
    )
    null_space_threshold: float = setting(
        0.02, "AlphaEdit: eigenvalues of the key statistics below this share of their mean count as null"
    )
    ridge: float = setting(0.1, "AlphaEdit's L2, relative to the mean squared length of the facts' projected keys")
    statistics_tokens: int | None = setting(
        None, "tokens of the model's own text behind the key statistics; by default eight for each key dimension"
    )
    statistics: Any = setting(
        None, "the folder of saved `KeyStatistics`, or the object; by default those of the model's own text"
    )
    anchor_weight: float = setting(4.0, "weight of the alignment with the semantic anchors; 0 is the base editor alone")
    anchor_ratio: float | None = setting(
        None,
        "takes the weight's place: the size of the alignment's gradient relative to the rest's, at the first step",
    )
    anchor_blocks: tuple[int, ...] | str | None = setting(
        None,
        "blocks where the stream is aligned, above the edited ones, or 'found' from the data; by default the middle third",
    )
    anchor_frame: str = setting(
        "centred", "'raw'; 'centred' takes off the mean state of all objects, which every state shares; 'object' the relation's"
    )
    alignment: str = setting("cosine", "'cosine', or 'contrastive': InfoNCE against the old object's anchor and other objects'")
    temperature: float = setting(0.1, "of the contrastive form")
    negatives: int = setting(12, "other objects of the contrastive form")
    references: Any = setting(
        "bank",
        "known facts of the same object: 'bank', 'wikidata', 'datasets:NAME', 'facts' (only the facts' own), a path, facts, a "
        "function of the object, or a list of several of these",
    )
    in_context: bool = setting(
        False,
        "where an object has too few references, take the state of the clean model that is given the fact for its anchor, by "
        "default in the last third of the blocks; every fact has an anchor then, and values land more slowly",
    )
    min_references: int = setting(3, "fewer recalled references than this make no anchor")
    max_references: int = setting(50, "references behind an anchor at most")
    max_per_relation: int = setting(10, "references of one relation at most")
    batch_facts: int = setting(64, "facts whose values are optimised together")
    edit_module: str | None = setting(
        None, "name of the MLP output projections with {} for the block, where they can't be found by structure"
    )

    def __post_init__(self) -> None:
        known = ", ".join(EDITORS)
        require(
            self.base_editor is None or self.base_editor in EDITORS, f"base_editor is one of {known}, not {self.base_editor!r}"
        )
        require(self.layers is None or len(self.layers) > 0, "layers is empty")
        require(self.anchor_blocks is None or len(self.anchor_blocks) > 0, "anchor_blocks is empty")
        require(self.layers is None or list(self.layers) == sorted(set(self.layers)), "layers must ascend")
        for name, choices in (("anchor_frame", _FRAMES), ("alignment", _ALIGNMENTS)):
            require(getattr(self, name) in choices, f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        require(not isinstance(self.anchor_blocks, str) or self.anchor_blocks == "found", "anchor_blocks: blocks, or 'found'")
        for name in _AT_LEAST_ONE:
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in _NOT_NEGATIVE:
            require(getattr(self, name) is None or getattr(self, name) >= 0, f"{name} must not be negative")
        for name in _POSITIVE:
            require(getattr(self, name) is None or getattr(self, name) > 0, f"{name} must be positive")
        require(self.wordings is None or self.wordings >= 0, "wordings must not be negative")
        require(self.enough is None or self.enough < 1, "enough is a probability below 1")
        require(self.bare_share is None or 0 < self.bare_share <= 1, "bare_share is a share of 1, above 0")
        require(self.kept_prompts <= len(GENERIC_PROMPTS), f"kept_prompts is at most {len(GENERIC_PROMPTS)}")

        require(0 < self.gate_quiet < 1, "gate_quiet is a share between 0 and 1")
        require(
            not self.gate or self.base_editor in (None, *ONE_BY_ONE),
            f"with a gate each fact is inserted by itself: base_editor is one of {', '.join(sorted(ONE_BY_ONE))}, not "
            f"{self.base_editor!r}",
        )
        require(
            self.statistics is None or self.statistics_tokens is None,
            "statistics_tokens is for the model's own text; leave it out where statistics are given",
        )

    @classmethod
    def sparing(cls, **settings: Any) -> SteamConfig:
        """Settings that spare the same subject's other facts, at a price in paraphrases and, in large batches, in facts that
        hold; single settings over them. `examples/benchmarks/README.md` has the frontier."""
        return cls(**{"kept_prompts": 9, "kl_factor": 4.0, "enough": 0.9, "balance": True, **settings})

    @property
    def most_retries(self) -> int:
        """What `retries` comes to."""
        return 1 + self.gate if self.retries is None else self.retries

    @property
    def conditional(self) -> bool:
        """Whether the prompt decides if the edit is on."""
        return self.gate

    @property
    def anchor_settings(self) -> AnchorSettings:
        """What concerns the anchors alone."""
        return AnchorSettings(
            self.references, self.anchor_frame, self.min_references, self.max_references, self.max_per_relation
        )

    def shareable(self) -> SteamConfig:
        """See `EditConfig.shareable`: paths of references and statistics become the word "given"."""
        named = self.to_dict()
        references = _public(named["references"], lambda name: name in _SOURCES or name.startswith("datasets:"))
        statistics = _public(named["statistics"], lambda name: is_repo_id(name) and not os.path.exists(name))
        if (references, statistics) == (named["references"], named["statistics"]):
            return self
        return replace(self, references=references, statistics=statistics)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; references and statistics that were given as objects become the word "given"."""
        return {**super().to_dict(), "references": _named(self.references), "statistics": _named(self.statistics)}


@dataclass(frozen=True)
class BaselineConfig(SteamConfig):
    """Settings of the base editors by themselves (`"rome"`, `"memit"`, `"alphaedit"`): by default their papers' losses and
    keys, with all texts at each step, no chats, no term for what follows the target and no second try; steps and clamp go by
    the model's own scale."""

    rotation: int = setting(1, "each step uses one `rotation`-th of the contexts, kept prompts and tails (mini-batching)")
    tail_factor: float = setting(0.0, "weight of KL(edited || clean) behind the target, which keeps it from being said again")
    anchor_weight: float = setting(0.0, "unused: a base editor has no anchors")
    bare_share: float | None = setting(None, "the bare prompt's share in a fact's key; None counts it as one context")
    bystanders: float = setting(0.0, "weight of the keys of the prompts' other tokens, at which an insertion changes nothing")
    enough: float | None = setting(None, "stop pushing a token of the target whose probability is above this; None never stops")
    chats: int = setting(0, "how many of the contexts give way to chats in which the fact is asked for and answered")
    steps: int = setting(20, "steps of gradient descent for each value; half as many where it is raised again")
    retries: int = setting(0, "how often the values of facts that fall short are raised in the edited model")


def _public(value: Any, known: Callable[[str], bool]) -> Any:
    """What `_named` wrote down, without what is known on this machine only."""
    if isinstance(value, list):
        return [_public(part, known) for part in value]
    return value if value is None or known(value) else "given"


def _named(value: Any) -> Any:
    """What can be written down of a source: words and paths; "given" for an object."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)) and any(isinstance(part, (str, os.PathLike)) for part in value):
        return [_named(part) for part in value]
    return "given"
