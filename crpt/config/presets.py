"""The presets: small named differences from the defaults."""

from __future__ import annotations

from typing import Literal

from crpt.config.stages import (
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    Stages,
)

Preset = Literal["quick", "paper", "best"]

PRESETS: dict[Preset, Stages] = {
    "paper": Stages(),
    # The paper's data and sizes; of pre-training, what gave more in a shorter ablation on a GPU
    # (python -m crpt.ablate components) with one seed: how far seeds differ there is not known.
    # Fine-tuning standardises z by the task's own random steps, as quick does.
    "best": Stages(
        pretrain=PretrainConfig(
            learning_rate=9e-4,
            embedding_norm="batch",
        ),
        finetune=FinetuneConfig(embedding_statistics="task"),
    ),
    # Minutes on two cores without a GPU. What differs from the paper, differs for time (sizes, fast
    # rendering, an action repeat that plays as much with half the frames, stored embeddings) or to
    # learn within so few updates (embedding_norm, learning rates, updates of actor and target).
    "quick": Stages(
        collect=CollectConfig(
            domains=("cheetah_run", "walker_run", "hopper_hop"),
            transitions=3_000,
            episode_length=125,
            action_repeat=4,
            render="fast",
        ),
        pretrain=PretrainConfig(
            rounds=100,
            batch_size=128,
            learning_rate=1e-3,
            embedding_norm="batch",
            log_every=10,
            checkpoint_every=25,
        ),
        probe=ProbeConfig(unseen=("cartpole_swingup",), episode_length=40),
        finetune=FinetuneConfig(
            task="cheetah_run",
            agent_steps=6_000,
            action_repeat=4,
            batch_size=256,
            encode="stored",
            features="z",
            embedding_statistics="task",
            hidden_dim=256,
            learning_rate=1e-3,
            actor_every=1,
            target_every=1,
            target_rate=0.02,
            evaluate_every=3_000,
            evaluate_episodes=3,
            checkpoint_every=500,
        ),
        evaluate=EvaluateConfig(episodes=10),
    ),
}
