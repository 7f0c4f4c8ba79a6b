"""Soft actor-critic on frozen features (Haarnoja et al., 2018; twin critics, learned
temperature)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crpt.agents.networks import Actor, Critic
from crpt.config import FinetuneConfig
from crpt.seeds import seeded


@dataclass(frozen=True)
class FeatureBatch:
    """Transitions as the agent sees them."""

    features: Tensor  # [B, F]
    action: Tensor  # [B, A]
    reward: Tensor  # [B]
    discount: Tensor  # [B], 0 after a true termination
    next_features: Tensor  # [B, F]


class SAC:
    """Actor, critics, temperature, and one update of them."""

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        config: FinetuneConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.updates = 0
        with seeded(seed):
            shape = (feature_dim, action_dim, config.trunk_dim, config.hidden_dim)
            self.actor = Actor(*shape).to(device)
            self.critic = Critic(*shape).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.tensor(
            math.log(config.initial_temperature), device=device, requires_grad=True
        )
        self.target_entropy = -float(action_dim)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.learning_rate)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=config.learning_rate)
        # On the CPU, so that a checkpoint of one kind of device goes on on another.
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(self, features: Tensor, *, explore: bool) -> Tensor:
        """features [F] -> action [A] in [-1, 1]: a sample, or the squashed mean."""
        if explore:
            return self.actor.sample(features[None], self.generator)[0][0]
        return self.actor.mean(features[None])[0]

    def update(self, batch: FeatureBatch) -> dict[str, Tensor]:
        """One critic update; actor, temperature and target at their own pace. Returns losses, still
        on the device."""
        metrics = self._update_critic(batch)
        if self.updates % self.config.actor_every == 0:
            metrics |= self._update_actor_and_temperature(batch.features)
        if self.updates % self.config.target_every == 0:
            self._update_target()
        self.updates += 1
        return metrics

    def _update_critic(self, batch: FeatureBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            next_action, log_prob = self.actor.sample(batch.next_features, self.generator)
            q1, q2 = self.target_critic(batch.next_features, next_action)
            value = torch.minimum(q1, q2) - self.log_alpha.exp() * log_prob
            target = batch.reward + self.config.discount * batch.discount * value
        q1, q2 = self.critic(batch.features, batch.action)
        loss = (q1 - target).square().mean() + (q2 - target).square().mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimizer.step()
        return {"critic_loss": loss.detach(), "q": q1.detach().mean()}

    def _update_actor_and_temperature(self, features: Tensor) -> dict[str, Tensor]:
        action, log_prob = self.actor.sample(features, self.generator)
        self.critic.requires_grad_(False)
        q = torch.minimum(*self.critic(features, action))
        self.critic.requires_grad_(True)
        actor_loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
        self.actor_optimizer.zero_grad(set_to_none=True)
        actor_loss.backward()
        self.actor_optimizer.step()

        entropy = -log_prob.detach().mean()
        alpha_loss = self.log_alpha.exp() * (entropy - self.target_entropy)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        alpha_loss.backward()
        self.alpha_optimizer.step()
        return {
            "actor_loss": actor_loss.detach(),
            "entropy": entropy,
            "temperature": self.log_alpha.detach().exp(),
        }

    @torch.no_grad()
    def _update_target(self) -> None:
        """target <- (1 - rate) target + rate critic."""
        pairs = zip(self.target_critic.parameters(), self.critic.parameters(), strict=True)
        for target, critic in pairs:
            target.lerp_(critic, self.config.target_rate)

    def weights(self) -> dict[str, Tensor]:
        """All that is learned, by name."""
        named = {"log_alpha": self.log_alpha}
        for module in ("actor", "critic", "target_critic"):
            parameters = getattr(self, module).named_parameters()
            named |= {f"{module}.{name}": parameter for name, parameter in parameters}
        return named

    def state(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.target_critic.state_dict(),
            "log_alpha": self.log_alpha.detach(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.target_critic.load_state_dict(state["target_critic"])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.generator.set_state(state["generator"])
