"""The stages on a run directory: what each needs of the one before, and where its results go.

Every stage may be run again: it goes on where it stopped, and returns at once when it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium

from crpt import envs
from crpt.collect import collect
from crpt.config import (
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
)
from crpt.encoder import Encoder, has_encoder, initial_encoder
from crpt.evaluate import episode_seed, evaluate_policy, random_policy, summary
from crpt.finetune import STAGE as FINETUNE
from crpt.finetune import finetune, trained_policy
from crpt.pretrain import pretrain
from crpt.probe import probe, to_json
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory

# Streams of a run's seed for what is measured, apart from what is trained on.
PROBE_STREAM, EVALUATE_STREAM, FINETUNE_STREAM = 1, 2, 3

MakeEnv = Callable[..., gymnasium.Env[Any, Any]]
"""Like `crpt.envs.make`; tests put a toy in its place."""


class StageOrderError(RuntimeError):
    """A stage was asked for before the one that it needs."""


@dataclass(frozen=True)
class Context:
    """What all stages of a run share."""

    run: RunDirectory
    seed: int
    device: str = "cpu"
    progress: bool = True
    make_env: MakeEnv = envs.make
    dataset: Path | None = None
    """Where the random play is; none: in the run directory."""
    encoder: Path | None = None
    """The frozen encoder to use; none: the run directory's own."""

    @property
    def dataset_dir(self) -> Path:
        return self.dataset or self.run.path / "dataset"

    @property
    def encoder_dir(self) -> Path:
        return self.encoder or self.run.path / "encoder"


def collect_stage(context: Context, config: CollectConfig) -> ReplayBuffer:
    """Random play, into `dataset/`."""
    return collect(
        config,
        context.dataset_dir,
        seed=context.seed,
        make_env=context.make_env,
        progress=context.progress,
    )


def pretrain_stage(context: Context, config: PretrainConfig) -> Encoder:
    """The encoder, into `encoder/`."""
    if not (context.dataset_dir / "dataset.json").exists():
        raise StageOrderError(
            f"{context.dataset_dir} should be a dataset to pre-train on; record one first: "
            f"python -m crpt.collect --run-dir {context.run.path}"
        )
    return pretrain(
        config,
        ReplayBuffer.open(context.dataset_dir),
        context.run,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
    )


def probe_stage(context: Context, config: ProbeConfig) -> list[dict[str, Any]]:
    """Ridge probes on random play of their own, into `probe.json`."""
    done: list[dict[str, Any]] | None = context.run.read_json("probe.json")
    if done is not None:
        return done
    encoder = _load_encoder(context)
    seen = tuple(encoder.metadata["domains"])
    play = CollectConfig(
        domains=tuple(dict.fromkeys(seen + config.unseen)),
        transitions=config.episodes * config.episode_length,
        episode_length=config.episode_length,
        action_repeat=encoder.metadata["action_repeat"],
        image_size=encoder.config.image_size,
        render=encoder.metadata["render"],
    )
    dataset = collect(
        play,
        context.run.path / "probe_dataset",
        seed=episode_seed(context.seed, PROBE_STREAM),
        make_env=context.make_env,
        progress=context.progress,
    )
    results = probe(
        config,
        dataset,
        encoder,
        initial_encoder(encoder.config, encoder.metadata["seed"]),
        seen=seen,
        device=context.device,
        progress=context.progress,
    )
    context.run.write_json("probe.json", to_json(results))
    return to_json(results)


def finetune_stage(context: Context, config: FinetuneConfig) -> None:
    """The agent, into `checkpoints/finetune.pt`."""
    encoder = _load_encoder(context)
    finetune(
        config,
        encoder,
        context.run,
        lambda: _task_env(context, encoder, config),
        seed=episode_seed(context.seed, FINETUNE_STREAM),
        device=context.device,
        progress=context.progress,
    )


def evaluate_stage(
    context: Context, config: EvaluateConfig, finetune_config: FinetuneConfig
) -> dict[str, Any]:
    """The agent's mean action beside uniform random actions, into `evaluation.json`."""
    done: dict[str, Any] | None = context.run.read_json("evaluation.json")
    if done is not None:
        return done
    checkpoint = context.run.load_checkpoint(FINETUNE)
    if checkpoint is None:
        raise StageOrderError(
            f"{context.run.path} should have a fine-tuned agent to evaluate; train one first: "
            f"python -m crpt.finetune --run-dir {context.run.path}"
        )
    encoder = _load_encoder(context)
    env = _task_env(context, encoder, finetune_config)
    policy = trained_policy(finetune_config, encoder, env, checkpoint, device=context.device)
    seed = episode_seed(context.seed, EVALUATE_STREAM)
    results: dict[str, Any] = {
        "task": finetune_config.task,
        "agent_steps": checkpoint["counters"]["agent_steps"],
    }
    for name, acting in (("policy", policy), ("random", random_policy(env, seed=seed))):
        returns = evaluate_policy(
            acting,
            env,
            config.episodes,
            seed=seed,
            name=f"evaluate {name}",
            progress=context.progress,
        )
        results[name] = summary(returns) | {"returns": [round(float(r), 3) for r in returns]}
    env.close()
    context.run.write_json("evaluation.json", results)
    return results


def _load_encoder(context: Context) -> Encoder:
    if not has_encoder(context.encoder_dir):
        raise StageOrderError(
            f"{context.encoder_dir} should be a pre-trained encoder; train one first: "
            f"python -m crpt.pretrain --run-dir {context.run.path}"
        )
    return Encoder.from_pretrained(context.encoder_dir)


def _task_env(
    context: Context, encoder: Encoder, config: FinetuneConfig
) -> gymnasium.Env[Any, Any]:
    """The task, drawn as the encoder knows it, its frames stacked."""
    env = context.make_env(
        config.task,
        render=encoder.metadata["render"],
        action_repeat=config.action_repeat,
        image_size=encoder.config.image_size,
    )
    return envs.FrameStack(env, encoder.config.in_channels // 3)
