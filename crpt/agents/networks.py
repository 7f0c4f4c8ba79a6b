"""The actor and the critic of SAC on frozen features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crpt.encoder import orthogonal_init

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


def trunk(feature_dim: int, trunk_dim: int) -> nn.Sequential:
    """Linear to a few dimensions, LayerNorm: what actor and critic each learn of the features."""
    return nn.Sequential(nn.Linear(feature_dim, trunk_dim), nn.LayerNorm(trunk_dim))


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, out_dim),
    )  # fmt: skip


class Actor(nn.Module):
    """a = tanh(mu + std * noise), log std in [-10, 2] (Haarnoja et al., 2018, appendix C)."""

    def __init__(self, feature_dim: int, action_dim: int, trunk_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = trunk(feature_dim, trunk_dim)
        self.policy = mlp(trunk_dim, hidden_dim, 2 * action_dim)
        self.apply(orthogonal_init)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log_std before the squashing, [B, F] -> two [B, A]."""
        mu, log_std = self.policy(self.trunk(features)).chunk(2, dim=-1)
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
        return mu, log_std

    def mean(self, features: Tensor) -> Tensor:
        """The action without noise, tanh(mu): [B, F] -> [B, A]."""
        return torch.tanh(self(features)[0])

    def sample(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """action [B, A] and its log probability [B], differentiable (reparametrised).

        The generator is one of the CPU, whatever the device.
        """
        mu, log_std = self(features)
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype).to(mu.device)
        pre_tanh = mu + log_std.exp() * noise
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)
        # log(1 - tanh(x)^2) in the form that does not cancel for large |x|.
        log_prob -= (2 * (math.log(2) - pre_tanh - nn.functional.softplus(-2 * pre_tanh))).sum(
            dim=-1
        )
        return torch.tanh(pre_tanh), log_prob


class Critic(nn.Module):
    """Twin action values that share the first layer."""

    def __init__(self, feature_dim: int, action_dim: int, trunk_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = trunk(feature_dim, trunk_dim)
        self.q1 = mlp(trunk_dim + action_dim, hidden_dim, 1)
        self.q2 = mlp(trunk_dim + action_dim, hidden_dim, 1)
        self.apply(orthogonal_init)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F], [B, A] -> two [B]."""
        x = torch.cat([self.trunk(features), action], dim=-1)
        return self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)
