"""The hypernetwork: from a fact's feature, and the entity's own state, to the state that takes its place.

All forms work in two steps, so that what depends on the fact alone is computed once: `encode` makes a code of a fact's
feature, `forward` a new state of that code and the state that stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = [
    "FORMS",
    "ContextGenerator",
    "Generator",
    "MlpGenerator",
    "OverwriteGenerator",
    "ResidualGenerator",
    "generator_of",
    "make_generator",
    "packed",
]

_MLP = 4  # hidden width of the paper's MLP, relative to the model's


class Generator(nn.Module):
    """Base of the forms.

    Attributes:
        slots: how many vectors of a feature the generator reads: the state at the target's last token, then the target's
            tokens (see `hf_edit.methods.lks.features`).
        code_size: numbers in a code.
        code_dtype: how codes are kept: in half precision like the matrices that read them, but where they are states of the
            model themselves, which may be too large for that.
        hidden: width of the model.
        writes: at how many blocks it rewrites an entity's state.
        carries: whether it also writes at the tokens of a target that is being said, see `carry`.
    """

    slots: int
    code_size: int
    code_dtype: torch.dtype = torch.float16
    hidden: int
    writes: int = 1
    carries: bool = False

    def standardise(self, features: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """Take means and deviations from samples: features [n, 1 + tokens, hidden], states [n, hidden] for each write."""

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Codes of facts: [facts, slots, hidden] to [facts, code_size]."""
        raise NotImplementedError

    def carry(self, tokens: torch.Tensor) -> torch.Tensor:
        """Codes for the tokens of a target that is being said: what comes next, [n, hidden] (see
        `hf_edit.methods.lks.features.token_vectors`), to [n, code_size]."""
        raise NotImplementedError

    def forward(self, codes: torch.Tensor, states: torch.Tensor, write: int = 0) -> torch.Tensor:
        """New states for mentions: codes [n, code_size] and the entities' own states [n, hidden] to [n, hidden].

        Args:
            write: which of the blocks that are rewritten the states come from, counted from the lowest.
        """
        raise NotImplementedError


class OverwriteGenerator(Generator):
    """``generator="linear"``, as released: KB = W x + b takes the state's place, whatever stood there.

    Latent Knowledge Scalpel (arXiv 2508.03741): x is the state at the last token of the text that states the fact.

    Args:
        hidden: width of the model.
    """

    slots = 1
    code_dtype = torch.float32

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.code_size = self.hidden = hidden
        self.map: nn.Module = nn.Linear(hidden, hidden)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return self.map(features[:, 0])

    def forward(self, codes: torch.Tensor, states: torch.Tensor, write: int = 0) -> torch.Tensor:
        return codes


class MlpGenerator(OverwriteGenerator):
    """``generator="mlp"``, as released: KB = W2 gelu(W1 x + b1) + b2, four times as wide inside, takes the state's place."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.map = nn.Sequential(nn.Linear(hidden, _MLP * hidden), nn.GELU(), nn.Linear(_MLP * hidden, hidden))


class _Writer(nn.Module):
    """What a generator has for one block: the way out of the code, and how the states there are scaled.

    What it adds is scaled by the deviation of the states that are rewritten, so that one step size serves any model; `out` is
    zero to begin with: untrained, it changes nothing.
    """

    def __init__(self, hidden: int, width: int, context: bool) -> None:
        super().__init__()
        self.out = nn.Linear(width, hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.state_in = nn.Linear(hidden, width, bias=False) if context else None
        self.register_buffer("state_mean", torch.zeros(hidden))
        self.register_buffer("state_std", torch.ones(hidden))

    state_mean: torch.Tensor
    state_std: torch.Tensor

    def forward(self, codes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        if self.state_in is not None:
            codes = codes + self.state_in((states - self.state_mean) / self.state_std)
        return states + self.state_std.mean() * self.out(nn.functional.gelu(codes))


class ResidualGenerator(Generator):
    """``generator="residual"``: h + scale * W2 gelu(W1 feature), with a W2 for each block that is rewritten.

    Features are standardised by samples.

    Args:
        hidden: width of the model.
        width: of the code.
        slots: vectors of a feature.
        writes: at how many blocks states are rewritten. What each of them tells the blocks above adds up.
        carries: whether a target of several tokens is carried on where it is being said: a mention's state can tell the blocks
            above how it begins, but hardly a date digit by digit.
    """

    context = False  # whether it sees the states that it rewrites

    def __init__(self, hidden: int, width: int, slots: int, writes: int = 1, carries: bool = True) -> None:
        super().__init__()
        self.carries = carries
        self.token_in = nn.Linear(hidden, width) if carries else None
        self.slots, self.code_size, self.hidden, self.writes = slots, width, hidden, writes
        self.feature_in = nn.Linear(slots * hidden, width)
        nn.init.normal_(self.feature_in.weight, std=(3 * hidden) ** -0.5)  # empty slots are zero: few of them count
        self.writers = nn.ModuleList(_Writer(hidden, width, self.context) for _ in range(writes))
        for name in ("feature", "token"):
            self.register_buffer(f"{name}_mean", torch.zeros(hidden))
            self.register_buffer(f"{name}_std", torch.ones(hidden))

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    token_mean: torch.Tensor
    token_std: torch.Tensor

    def standardise(self, features: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        tokens = features[:, 1:].flatten(0, 1)
        _standard(self, "feature", features[:, 0])
        _standard(self, "token", tokens[_filled(tokens)])
        for writer, sample in zip(self.writers, states, strict=True):
            _standard(writer, "state", sample)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        last = (features[:, :1] - self.feature_mean) / self.feature_std
        tokens = (features[:, 1:] - self.token_mean) / self.token_std * _filled(features[:, 1:])[..., None]
        return self.feature_in(torch.cat([last, tokens], dim=1).flatten(1))

    def carry(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.token_in is not None
        return self.token_in((tokens - self.token_mean) / self.token_std)

    def forward(self, codes: torch.Tensor, states: torch.Tensor, write: int = 0) -> torch.Tensor:
        return self.writers[write](codes, states)


class ContextGenerator(ResidualGenerator):
    """``generator="context"``, the default: h + scale * W2 gelu(W1 feature + V h), V and W2 at work on the standardised h, one
    of each for each block that is rewritten.

    It sees the state that stands there, so one fact can fit in with what the token had gathered from its context.
    """

    context = True


FORMS = ("context", "residual", "linear", "mlp")


def make_generator(form: str, hidden: int, width: int, slots: int, writes: int, carries: bool = True) -> Generator:
    """An untrained generator.

    Args:
        form: one of `FORMS`.
        hidden: width of the model.
        width: of the code, where the form leaves a choice.
        slots: vectors of a feature, where the form leaves a choice.
        writes: at how many blocks states are rewritten, where the form leaves a choice.
        carries: whether targets are carried on at their own tokens, where the form leaves a choice.
    """
    if form == "linear":
        return OverwriteGenerator(hidden)
    if form == "mlp":
        return MlpGenerator(hidden)
    return (ContextGenerator if form == "context" else ResidualGenerator)(hidden, width, slots, writes, carries)


def generator_of(form: str, state: Mapping[str, torch.Tensor]) -> Generator:
    """A trained generator from its tensors, which are copied: memory of their own gives equal bits, wherever they were read.

    Raises:
        KeyError, ValueError, RuntimeError: they are not those of the form; nothing large is allocated before that is clear.
    """
    first = state["map.weight" if form == "linear" else "map.0.weight" if form == "mlp" else "feature_in.weight"]
    hidden = len(state["feature_mean"]) if form in ("context", "residual") else first.shape[1]
    writes = len({name.split(".")[1] for name in state if name.startswith("writers.")})
    with torch.device("meta"):
        generator = make_generator(form, hidden, len(first), first.shape[1] // hidden, writes, "token_in.weight" in state)
    copies = {name: torch.empty_like(t, dtype=torch.float32).copy_(t.detach()) for name, t in state.items()}
    generator.load_state_dict(copies, assign=True)
    return generator.requires_grad_(False)


def packed(generator: Generator) -> dict[str, torch.Tensor]:
    """A generator's tensors as they are kept, on the CPU: matrices in half precision. Means and deviations may be too large
    for that, and are few."""
    state = {name: t.detach().cpu() for name, t in generator.state_dict().items()}
    return {name: t.to(torch.float16 if t.dim() == 2 else torch.float32, copy=True) for name, t in state.items()}


def _standard(module: nn.Module, name: str, sample: torch.Tensor) -> None:
    """Take a mean and a deviation from a sample [n, hidden]."""
    if len(sample) > 1:
        module.get_buffer(f"{name}_mean").copy_(sample.mean(0))
        module.get_buffer(f"{name}_std").copy_(sample.std(0).clamp(min=1e-3 * sample.std()))


def _filled(tokens: torch.Tensor) -> torch.Tensor:
    """Which of the token vectors stand for a token: [..., hidden] to [...]. The others are zero."""
    return tokens.abs().amax(-1) > 0
