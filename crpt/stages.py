"""The stages on a run directory: what each needs of the one before, and where its results go.

Every stage may be run again: it goes on where it stopped, and returns at once when it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch

from crpt import envs, figures
from crpt.agents.policy import trained_policy
from crpt.collect import collect
from crpt.config import (
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
)
from crpt.distributed import ALONE, Team
from crpt.encoder import Encoder, EncoderFileError, has_encoder, initial_encoder
from crpt.evaluate import evaluate_policy, random_policy, summary
from crpt.finetune import STAGE as FINETUNE
from crpt.finetune import finetune
from crpt.model_card import write_card
from crpt.pretrain import STAGE as PRETRAIN
from crpt.pretrain import check_checkpoint, pretrain
from crpt.pretrain.inputs import dataset_identity
from crpt.probe import probe, to_json
from crpt.replay import ReplayBuffer, open_together
from crpt.run_directory import ConfigMismatchError, RunDirectory
from crpt.seeds import stream_seed

# Streams of a run's seed for what is measured, apart from what is trained on.
PROBE_STREAM, EVALUATE_STREAM, FINETUNE_STREAM = 1, 2, 3

_log = logging.getLogger(__name__)

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
    more_datasets: tuple[Path, ...] = ()
    """Others, to pre-train on as well."""
    team: Team = ALONE
    """The processes that pre-train together."""
    encoder: Path | None = None
    """An encoder to adopt into the run directory; none: it is there, or is about to be trained."""

    @property
    def dataset_dir(self) -> Path:
        return self.dataset or self.run.path / "dataset"

    def claim(self, stage: str, config: object, **inputs: object) -> None:
        """Refuse another config, seed or input than those the stage was begun with."""
        self.run.claim(self.sections(stage, config, **inputs))

    def sections(self, stage: str, config: object, **inputs: object) -> dict[str, Any]:
        """What a stage is begun with."""
        sections = {"seed": self.seed, stage: config}
        return sections | {f"{stage}_input": inputs} if inputs else sections


def require_known_names(context: Context, *names: str) -> None:
    """A mistyped task is told before hours are spent on the stages ahead of it."""
    if context.make_env is envs.make:
        for name in names:
            envs.require_known(name)


def warn_of_another_action_repeat(config: FinetuneConfig, learned: int | None) -> None:
    """learned: that of the frames which the encoder was trained on; None: nobody knows."""
    if learned is not None and config.action_repeat != learned:
        _log.warning(
            "fine-tuning's action_repeat is %d, and the encoder was trained on frames of "
            "action_repeat %d: what it sees moves otherwise; the same would be action_repeat %d",
            config.action_repeat,
            learned,
            learned,
        )


def collect_stage(context: Context, config: CollectConfig) -> ReplayBuffer:
    """Random play, into `dataset/`."""
    require_known_names(context, *config.domains)
    context.claim("collect", config)
    return collect(
        config,
        context.dataset_dir,
        seed=context.seed,
        make_env=context.make_env,
        progress=context.progress,
    )


def pretrain_stage(context: Context, config: PretrainConfig) -> Encoder:
    """The encoder, into `encoder/`."""
    datasets = (context.dataset_dir, *context.more_datasets)
    missing = [path for path in datasets if not (path / "dataset.json").exists()]
    if missing:
        raise StageOrderError(
            f"{missing[0]} should be a dataset to pre-train on; record one first: "
            f"python -m crpt.collect --run-dir {context.run.path}, or name one: --dataset"
        )
    if has_encoder(context.run.encoder_dir) and not context.run.has_checkpoint(PRETRAIN):
        raise ConfigMismatchError(
            f"{context.run.encoder_dir} holds an encoder that was trained elsewhere; pre-train in "
            "another --run-dir"
        )
    buffer = open_together(datasets)
    identity = dataset_identity(buffer)

    def claim() -> None:
        # First: what a checkpoint refuses must not bind the run.
        check_checkpoint(context.run, context.sections(PRETRAIN, config, **identity))
        context.claim(PRETRAIN, config, **identity)

    context.team.lead(claim)
    return pretrain(
        config,
        buffer,
        context.run,
        seed=context.seed,
        device=context.device,
        progress=context.progress,
        team=context.team,
    )


def probe_stage(context: Context, config: ProbeConfig) -> dict[str, Any]:
    """Ridge probes on random play of their own, into `probe.json`, `figures/probe.png` and the
    model card of the run's own copy of the encoder."""
    require_known_names(context, *config.domains, *config.unseen)
    encoder = _load_encoder(context, "domains", "seed", "render", "action_repeat")
    context.claim("probe", config)
    seen = tuple(encoder.metadata["domains"])
    names = tuple(dict.fromkeys(config.domains or seen + config.unseen))
    done: dict[str, Any] | None = context.run.read_json("probe.json")
    if done is not None and {row["domain"] for row in done["domains"]} != set(names):
        done = None
    picture = context.run.path / "figures" / "probe.png"
    if done is not None and (picture.exists() or not figures.available(picture)):
        return done
    result = probe(
        config,
        _play_to_probe(context, config, encoder, names),
        encoder,
        initial_encoder(encoder.config, encoder.metadata["seed"]),
        seen=seen,
        domains=names,
        device=context.device,
        progress=context.progress,
    )
    picture.unlink(missing_ok=True)  # of other domains
    if figures.available(picture):
        figures.domain_map(result.z, result.prototypes, picture)
    if done is not None:  # without matplotlib; its figures stay
        return done
    figures_of_it = to_json(result)
    write_card(encoder, context.run.encoder_dir, figures_of_it)
    context.run.write_json("probe.json", figures_of_it)
    return figures_of_it


def _play_to_probe(
    context: Context, config: ProbeConfig, encoder: Encoder, domains: tuple[str, ...]
) -> ReplayBuffer:
    """Random play apart from that of pre-training, drawn and repeated as there."""
    play = CollectConfig(
        domains=domains,
        transitions=config.episodes * config.episode_length,
        episode_length=config.episode_length,
        action_repeat=encoder.metadata["action_repeat"],
        image_size=encoder.config.image_size,
        render=encoder.metadata["render"],
    )
    return collect(
        play,
        context.run.path / "probe_dataset",
        seed=stream_seed(context.seed, PROBE_STREAM),
        make_env=context.make_env,
        progress=context.progress,
    )


def finetune_stage(context: Context, config: FinetuneConfig) -> None:
    """The agent, into `checkpoints/finetune.pt`."""
    require_known_names(context, config.task)
    encoder = _load_encoder(context, "render")
    context.claim(FINETUNE, config)
    warn_of_another_action_repeat(config, encoder.metadata.get("action_repeat"))
    finetune(
        config,
        encoder,
        context.run,
        lambda: _task_env(context, encoder, config),
        seed=stream_seed(context.seed, FINETUNE_STREAM),
        device=context.device,
        progress=context.progress,
    )


def evaluate_stage(
    context: Context, config: EvaluateConfig, finetune_config: FinetuneConfig
) -> dict[str, Any]:
    """The agent's mean action beside uniform random actions, into `evaluation.json`."""
    checkpoint = context.run.load_checkpoint(FINETUNE)
    if checkpoint is None:
        raise StageOrderError(
            f"{context.run.path} should have a fine-tuned agent to evaluate; train one first: "
            f"python -m crpt.finetune --run-dir {context.run.path}"
        )
    context.claim("evaluate", config)
    agent_steps = checkpoint["counters"]["agent_steps"]
    done: dict[str, Any] | None = context.run.read_json("evaluation.json")
    if done and (done["agent_steps"], done["policy"]["episodes"]) == (agent_steps, config.episodes):
        return done
    encoder = _load_encoder(context, "render")
    env = _task_env(context, encoder, finetune_config)
    policy = trained_policy(finetune_config, encoder, env, checkpoint, device=context.device)
    seed = stream_seed(context.seed, EVALUATE_STREAM)
    results: dict[str, Any] = {"task": finetune_config.task, "agent_steps": agent_steps}
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


def _load_encoder(context: Context, *needed: str) -> Encoder:
    """The run directory's encoder, adopted from elsewhere where the context says so."""
    own = context.run.encoder_dir
    if context.encoder is not None:
        given = Encoder.from_pretrained(context.encoder)
        if not has_encoder(own):
            write_card(given, own)
            given.save_pretrained(own)
        elif not _same_weights(given, Encoder.from_pretrained(own)):
            raise ConfigMismatchError(
                f"{own} holds another encoder than {context.encoder}; choose another --run-dir"
            )
    if not has_encoder(own):
        raise StageOrderError(
            f"{own} should be a pre-trained encoder; train one first: "
            f"python -m crpt.pretrain --run-dir {context.run.path}, or name one: --encoder"
        )
    encoder = Encoder.from_pretrained(own)
    missing = [name for name in needed if encoder.metadata.get(name) is None]
    if missing:
        raise EncoderFileError(
            f"{own} should say how it was trained in its config.json's metadata, but "
            f"{', '.join(missing)} is missing there"
        )
    if encoder.frame_channels != 3:
        size = encoder.config.image_size
        raise EncoderFileError(
            f"{own} should have been trained on RGB frames, [3, {size}, {size}], which is what "
            f"environments draw, got [{encoder.frame_channels}, {size}, {size}]"
        )
    return encoder


def _same_weights(a: Encoder, b: Encoder) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
    return envs.FrameStack(env, encoder.frame_stack)
