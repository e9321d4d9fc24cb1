"""The hypernetwork: from a fact's feature and the entity's own state to the state that takes its place."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Generator"]


class Generator(nn.Module):
    """h + scale * MLP(feature, h), with the last layer at zero to begin with: an untrained generator changes nothing.

    The paper's generator is a map of the feature alone, KB = W x + b, that overwrites h; seeing h lets one fact keep what
    the token had gathered from its context.

    Args:
        hidden: width of the model.
        width: of the MLP.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.feature_in = nn.Linear(hidden, width)
        self.state_in = nn.Linear(hidden, width, bias=False)
        self.out = nn.Linear(width, hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        for name in ("feature_mean", "state_mean"):
            self.register_buffer(name, torch.zeros(hidden))
        for name in ("feature_std", "state_std"):
            self.register_buffer(name, torch.ones(hidden))

    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    state_mean: torch.Tensor
    state_std: torch.Tensor

    def standardise(self, features: torch.Tensor, states: torch.Tensor) -> None:
        """Take means and deviations from samples, [n, hidden] each."""
        for name, sample in (("feature", features), ("state", states)):
            getattr(self, f"{name}_mean").copy_(sample.mean(0))
            getattr(self, f"{name}_std").copy_(sample.std(0).clamp(min=1e-3 * sample.std()))

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """What of the generator depends on the facts alone: [facts, hidden] to [facts, width]. Computed once a pack."""
        return self.feature_in((features - self.feature_mean) / self.feature_std)

    def forward(self, codes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """New states for mentions: codes [n, width] and the entities' own states [n, hidden] to [n, hidden]."""
        own = self.state_in((states - self.state_mean) / self.state_std)
        change = self.out(nn.functional.gelu(codes + own))
        return states + self.state_std.mean() * change
