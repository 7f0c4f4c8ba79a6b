"""Fine-tuning at a size that tests can afford."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import dot_env
import torch

from crpt.agents.policy import Policy
from crpt.config import FinetuneConfig
from crpt.encoder import Encoder, EncoderConfig
from crpt.envs import FrameStack
from crpt.finetune import finetune
from crpt.run_directory import RunDirectory


def make_env():
    return FrameStack(dot_env.make("dot_red"), 3)


def new_encoder(embedding_norm: Literal["none", "batch"]) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EncoderConfig(image_size=20, projection_dim=16, embedding_norm=embedding_norm)
        encoder = Encoder(config)
        encoder.attach_prototypes(torch.randn(32, 16))
    return encoder.freeze()


def run_all(config: FinetuneConfig, encoder: Encoder, path: Path) -> tuple[RunDirectory, Policy]:
    run = RunDirectory(path)
    policy = finetune(config, encoder, run, make_env, seed=0, progress=False)
    return run, policy
