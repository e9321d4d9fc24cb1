"""Settings of LKS."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from ...hub import is_repo_id
from ..base import EditConfig, gate_quiet_setting, require, setting
from .generator import FORMS

__all__ = ["RELEASED", "LKSConfig"]

RELEASED = ("linear", "mlp")  # overwrite the state by a map of the feature alone
_WORDS = ("none", "bank", "given")  # what `editor` may say beside the place of one
_VARIATIONS = 4
_MANY = 500  # facts; more of them take fewer passes each


@dataclass(frozen=True)
class LKSConfig(EditConfig):
    """Settings of `method="lks"`; the defaults work for any model.

    Raises:
        ValueError: a setting is out of range.
    """

    structural = ("layer", "generator", "width", "target_tokens", "writes", "carry", "gate_quiet")

    layer: int | None = setting(None, "lowest block whose output is rewritten; by default the one at 55 % of the depth")
    writes: int = setting(
        3, "blocks whose outputs 'context' and 'residual' rewrite, from `layer` on at even distances; 'linear' and 'mlp': one"
    )
    carry: bool = setting(
        True,
        "'context' and 'residual' also write at the tokens of a target that an answer is saying, each time what comes next: "
        "long targets are more than the state of a name can hold",
    )
    generator: str = setting(
        "context",
        "form of the hypernetwork: 'context' adds to the entity's state what it makes of fact and state, 'residual' of the "
        "fact alone; 'linear' and 'mlp' overwrite the state, as the paper's released forms do",
    )
    width: float = setting(2.0, "hidden width of 'context' and 'residual', relative to the model's")
    target_tokens: int = setting(
        2,
        "places for the target's tokens in what 'context' and 'residual' are shown, the last one for all that are left; a "
        "generator that is trained for the facts alone has no more than the longest of them needs",
    )
    editor: Any = setting(
        "none",
        "what training begins with: 'none', an untrained generator, as the released forms always do; 'bank', one that is "
        "trained on the shipped bank once a model and kept; an `LKSEditor`, or the folder of one, or its repo on the Hub",
    )
    train: bool = setting(True, "False edits without training, from the facts' features alone; see `LKSEditor`")
    epochs: int | None = setting(
        None, "passes over the facts; each shows a fact's prompt and a variation of it. By default 12, fewer for many facts"
    )
    min_steps: int = setting(80, "steps at least, where few facts make short epochs")
    batch_size: int = setting(48, "texts a step")
    lr: float = setting(1e-3, "highest step size of AdamW for the generator; it falls along a cosine")
    code_lr: float | None = setting(
        None, "the same for each fact's own code, beside what the generator makes of its feature; 0 trains the generator only"
    )
    warmup_steps: int = setting(10, "steps over which the step size rises")
    kl_weight: float = setting(1.0, "weight of KL(edited || clean) on texts that must stay as they are")
    tail_weight: float = setting(1.0, "weight of KL(edited || clean) behind the target")
    tail_tokens: int = setting(6, "tokens behind the target that go on as the clean model would; 0 leaves them free")
    variations: int | None = setting(
        None,
        "texts at most, beside its prompt, that a fact is trained on. By default 4, or fewer if they would be shown only once",
    )
    contexts: int = setting(3, "sampled prefixes that the fact must also hold behind")
    context_length: int = setting(10, "tokens of such a prefix")
    chats: int = setting(
        3,
        "chats in which a fact is asked for, each in another wording, and answered in a sentence, where the model has a chat "
        "template",
    )
    locality_prompts: int = setting(2, "other questions about the subject, for each fact, whose answers are kept")
    locality_share: float = setting(0.25, "share of the facts for which a pass shows such a question")
    gate: bool = setting(
        True, "let the prompt as a whole decide which of a subject's facts is asked for; without it its newest always holds"
    )
    gate_quiet: float = gate_quiet_setting()
    fuzzy: bool = setting(False, "also find names of eight letters or more with one typing mistake; costs some 0.2 ms a prompt")
    train_on_rephrases: bool = setting(
        False,
        "train on the facts' rephrases, each fact also on those of others that are asked in its words, and on their locality "
        "questions, none of which can then measure the edit any more; where 500 facts or more have both, the gate learns from "
        "them too, unless `editor` brings one",
    )
    compute_dtype: str = setting("auto", "'auto' trains in bfloat16 where the hardware has it, 'model' in the model's dtype")
    cache_bytes: int = setting(3 << 30, "memory that training may fill with what it computed once; the rest goes to disk")

    def __post_init__(self) -> None:
        for name in ("min_steps", "batch_size", "context_length", "writes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in (
            "warmup_steps", "kl_weight", "tail_weight", "contexts", "chats", "locality_prompts", "tail_tokens", "target_tokens",
            "cache_bytes",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("lr", "width"):
            require(getattr(self, name) > 0, f"{name} must be positive")
        require(self.epochs is None or self.epochs >= 1, "epochs must be at least 1")
        require(self.variations is None or self.variations >= 0, "variations must not be negative")
        require(self.code_lr is None or self.code_lr >= 0, "code_lr must not be negative")
        require(0 < self.gate_quiet < 1, "gate_quiet is a share between 0 and 1")
        require(0 <= self.locality_share <= 1, "locality_share is a share, from 0 to 1")
        require(self.width <= 64, "width must be at most 64")
        require(self.target_tokens <= 64, "target_tokens must be at most 64")
        require(self.generator in FORMS, f"generator is one of {', '.join(map(repr, FORMS))}, not {self.generator!r}")
        require(self.compute_dtype in ("auto", "model"), "compute_dtype is 'auto' or 'model'")
        require(bool(self.editor), "editor is 'bank', 'none', an LKSEditor, or the folder or repo of one")

    @property
    def released(self) -> bool:
        """Whether the generator is of a released form, trained as there: from scratch, and nothing but it."""
        return self.generator in RELEASED

    @property
    def slots(self) -> int:
        """Vectors of a fact's feature."""
        return 1 if self.released else 1 + self.target_tokens

    def passes(self, facts: int) -> int:
        """Epochs over so many facts."""
        if self.epochs is not None:
            return self.epochs
        return round(min(12.0, max(4.0, 12.0 * (_MANY / facts) ** 0.35)))

    def variety(self, facts: int) -> int:
        """Texts, beside its prompt, that each of so many facts is trained on: one that is shown once would cost more to read
        beforehand than it saves."""
        if self.variations is not None:
            return self.variations
        return min(_VARIATIONS, max(1, self.passes(facts) // 2))

    def shareable(self) -> LKSConfig:
        """See `EditConfig.shareable`: the folder of an editor becomes the word "given"."""
        known = self.editor in _WORDS or (is_repo_id(self.editor) and not os.path.exists(self.editor))
        return self if known else replace(self, editor="given")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; an editor that was given as an object becomes the word "given"."""
        editor = self.editor if isinstance(self.editor, str) else None
        if isinstance(self.editor, os.PathLike):
            editor = os.fspath(self.editor)
        values = {name: value for name, value in super().to_dict().items() if name != "editor"}
        return {**values, "editor": editor or "given"}
