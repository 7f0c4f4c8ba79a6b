"""The pipeline at a size that tests can afford."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dot_env
import torch
from torch import Tensor

from crpt.collect import collect
from crpt.config import (
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    Stages,
)
from crpt.encoder import Encoder, EncoderConfig
from crpt.replay import ReplayBuffer

COLLECT = CollectConfig(
    domains=("dot_red", "dot_blue"), transitions=120, image_size=dot_env.SIZE, workers=1
)
PRETRAIN = PretrainConfig(
    rounds=6,
    batch_size=16,
    learning_rate=1e-3,
    shift_pad=1,
    projection_dim=16,
    predictor_hidden=32,
    prototypes=32,
    embedding_norm="batch",
    precision="fp32",  # auto is another one on another CPU
    log_every=2,
    checkpoint_every=2,
)
PROBE = ProbeConfig(unseen=("dot_green",), episodes=10, episode_length=12, folds=2)
FINETUNE = FinetuneConfig(
    task="dot_red",
    agent_steps=150,
    random_steps=60,
    batch_size=16,
    replay_capacity=100,
    encode="stored",
    features="z",
    hidden_dim=32,
    learning_rate=1e-3,
    queue_size=64,
    evaluate_every=75,
    evaluate_episodes=2,
    log_every=10,
    checkpoint_every=30,
)
STAGES = Stages(COLLECT, PRETRAIN, PROBE, FINETUNE, EvaluateConfig(episodes=3))


def dataset(path: Path, config: CollectConfig = COLLECT, seed: int = 0) -> ReplayBuffer:
    return collect(config, path, seed=seed, make_env=dot_env.make, progress=False)


def new_encoder(config: PretrainConfig) -> Encoder:
    """What pre-training with this config begins with."""
    torch.manual_seed(0)
    return Encoder(
        EncoderConfig(
            image_size=dot_env.SIZE,
            projection_dim=config.projection_dim,
            embedding_norm=config.embedding_norm,
        )
    )


def views(batch: int = 16) -> tuple[Tensor, Tensor]:
    """obs and next_obs of noise, [B, 9, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    size = dot_env.SIZE
    obs, next_obs = torch.rand(2, batch, 9, size, size, generator=generator)
    return obs, next_obs


def replace_domains(config: CollectConfig, domains: tuple[str, ...]) -> CollectConfig:
    return replace(config, domains=domains)
