"""Settings of LKS."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import EditConfig, require, setting

__all__ = ["LKSConfig"]


@dataclass(frozen=True)
class LKSConfig(EditConfig):
    """Settings of `method="lks"`; the defaults work for any model.

    Raises:
        ValueError: a setting is out of range.
    """

    structural = ("layer", "width")

    layer: int | None = setting(None, "block whose output is rewritten; by default the one at 55 % of the depth")
    width: float = setting(2.0, "hidden width of the generator, relative to the model's")
    epochs: int = setting(12, "passes over the facts; each shows a fact's prompt, a variation of it and a text that must stay")
    min_steps: int = setting(40, "steps at least, where few facts make short epochs")
    batch_size: int = setting(48, "texts a step")
    lr: float = setting(1e-3, "highest step size of AdamW; it falls along a cosine")
    warmup_steps: int = setting(10, "steps over which the step size rises")
    kl_weight: float = setting(1.0, "weight of KL(edited || clean) on texts that must stay as they are")
    contexts: int = setting(3, "sampled prefixes that the fact must also hold behind")
    context_length: int = setting(10, "tokens of such a prefix")
    locality_prompts: int = setting(4, "other questions about the subject, for each fact, whose answers are kept")
    tail_tokens: int = setting(6, "tokens behind the target that go on as the clean model would; 0 leaves them free")
    gate: bool = setting(
        True, "let the prompt as a whole decide which of a subject's facts is asked for; without it its newest always holds"
    )
    fuzzy: bool = setting(False, "also find names of eight letters or more with one typing mistake; costs some 0.2 ms a prompt")
    train_on_rephrases: bool = setting(
        False, "train on the facts' own rephrases and locality questions, which then can't measure the edit any more"
    )
    compute_dtype: str = setting("auto", "'auto' trains in bfloat16 where the hardware has it, 'model' in the model's dtype")

    def __post_init__(self) -> None:
        for name in ("epochs", "min_steps", "batch_size", "context_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("warmup_steps", "kl_weight", "contexts", "locality_prompts", "tail_tokens"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("lr", "width"):
            require(getattr(self, name) > 0, f"{name} must be positive")
        require(self.width <= 64, "width must be at most 64")
        require(self.compute_dtype in ("auto", "model"), "compute_dtype is 'auto' or 'model'")
