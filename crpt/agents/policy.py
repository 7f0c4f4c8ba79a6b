"""The agent as a function from observations to actions: all that evaluation needs of it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from crpt.agents.features import FeatureExtractor
from crpt.agents.networks import Actor
from crpt.config import FinetuneConfig
from crpt.encoder import Encoder
from crpt.evaluate import Policy


def mean_action(actor: Actor, extractor: FeatureExtractor) -> Policy:
    """The agent's policy without its noise."""

    @torch.no_grad()
    def act(obs: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = extractor.view(extractor(torch.from_numpy(obs)[None]))
        action: NDArray[np.float32] = actor.mean(features)[0].cpu().numpy()
        return action

    return act


def trained_policy(
    config: FinetuneConfig,
    encoder: Encoder,
    env: gymnasium.Env[Any, Any],
    checkpoint: dict[str, Any],
    *,
    device: str = "cpu",
) -> Policy:
    """The mean-action policy of a checkpoint, whatever device it was trained on."""
    extractor = FeatureExtractor(encoder, config.features, torch.device(device))
    extractor.load_state(checkpoint["extractor"])
    assert env.action_space.shape is not None
    shape = (extractor.dim, env.action_space.shape[0], config.trunk_dim, config.hidden_dim)
    with torch.random.fork_rng(devices=[]):  # initial weights, not to be kept
        actor = Actor(*shape)
    actor.load_state_dict(checkpoint["agent"]["actor"])
    return mean_action(actor.to(device), extractor)
