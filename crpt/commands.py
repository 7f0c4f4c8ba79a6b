"""The commands: `python -m crpt.train | collect | pretrain | probe | finetune | evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from crpt import cli, distributed
from crpt.config import (
    PRESETS,
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    Preset,
    PretrainConfig,
    ProbeConfig,
    Stages,
)
from crpt.run_directory import ConfigMismatchError, dataset_in
from crpt.stages import (
    StageOrderError,
    collect_stage,
    evaluate_stage,
    finetune_stage,
    pretrain_stage,
    probe_stage,
)
from crpt.summary import evaluation_text, probe_text
from crpt.train import train

StageName = Literal["train", "collect", "pretrain", "probe", "finetune", "evaluate"]


@dataclass(frozen=True)
class TrainArguments(cli.Common):
    config: Annotated[Stages, tyro.conf.arg(name="")] = Stages()


@dataclass(frozen=True)
class CollectArguments(cli.Common):
    config: OmitArgPrefixes[CollectConfig] = CollectConfig()
    dataset: Path | None = None
    """Directory of the dataset; none: RUN_DIR/dataset."""


@dataclass(frozen=True)
class PretrainArguments(cli.Common):
    config: OmitArgPrefixes[PretrainConfig] = PretrainConfig()
    dataset: tuple[Path, ...] = ()
    """Directories of datasets, or of runs that have one, to train on together, of several hosts for
    example; none: RUN_DIR/dataset. A domain that an earlier one has, too, is NAME#2, also for
    --domains."""


@dataclass(frozen=True)
class ProbeArguments(cli.Common):
    config: OmitArgPrefixes[ProbeConfig] = ProbeConfig()
    encoder: tyro.conf.Positional[Path | None] = None
    """Directory of an encoder, copied to RUN_DIR/encoder; none: the one that is there. The model
    card in RUN_DIR/encoder gets the table; nothing is written to the directory named here."""


@dataclass(frozen=True)
class FinetuneArguments(cli.Common):
    config: OmitArgPrefixes[FinetuneConfig] = FinetuneConfig()
    encoder: Path | None = None
    """Directory of an encoder, copied to RUN_DIR/encoder; none: the one that is there."""


@dataclass(frozen=True)
class EvaluateArguments(cli.Common):
    config: OmitArgPrefixes[EvaluateConfig] = EvaluateConfig()


def train_command(arguments: TrainArguments) -> None:
    """Random play, pre-training, probes, fine-tuning and evaluation in one run directory."""
    begun = time.monotonic()
    context = cli.context(arguments)
    print(f"preset {arguments.preset}, seed {context.seed}, {context.device}, {context.run.path}")
    print(train(context, arguments.config))
    print(f"\nThis call took {time.monotonic() - begun:.0f} s; everything is in {context.run.path}")


def collect_command(arguments: CollectArguments) -> None:
    """Record uniform random play in every domain into one dataset."""
    context = cli.context(arguments, dataset=arguments.dataset)
    buffer = collect_stage(context, arguments.config)
    for domain in buffer.domains:
        print(f"{domain}: {buffer.num_transitions(domain)} transitions in {context.dataset_dir}")


def pretrain_command(arguments: PretrainArguments) -> None:
    """Pre-train the encoder on a dataset of random play; on several processes by torchrun
    --nproc-per-node N -m crpt.pretrain."""
    datasets = [dataset_in(path) for path in arguments.dataset]
    context = cli.context(arguments, dataset=datasets[0] if datasets else None)
    context = replace(context, more_datasets=tuple(datasets[1:]))
    with distributed.join(torch.device(context.device)) as team:
        pretrain_stage(replace(context, team=team), arguments.config)
    if team.leads:
        print(f"encoder in {context.run.encoder_dir}")


def probe_command(arguments: ProbeArguments) -> None:
    """Measure what the frozen encoder knows of the simulator's state, beside the same encoder at
    init."""
    context = cli.context(arguments, encoder=arguments.encoder)
    print(probe_text(probe_stage(context, arguments.config)))


def finetune_command(arguments: FinetuneArguments) -> None:
    """Train SAC on the frozen encoder's features of one task."""
    context = cli.context(arguments, encoder=arguments.encoder)
    finetune_stage(context, arguments.config)
    print(
        f"agent in {context.run.checkpoint_dir}; "
        f"compare it with random actions: python -m crpt.evaluate --run-dir {context.run.path}"
    )


def evaluate_command(arguments: EvaluateArguments) -> None:
    """Compare the fine-tuned policy with uniform random actions."""
    context = cli.context(arguments)
    finetuned = context.run.read_config().get("finetune")
    if finetuned is None:
        raise StageOrderError(
            f"{context.run.path} should have a fine-tuned agent to evaluate; train one first: "
            f"python -m crpt.finetune --run-dir {context.run.path}"
        )
    try:
        agent = FinetuneConfig(**finetuned)
    except TypeError as error:
        raise ConfigMismatchError(
            f"finetune in {context.run.config_file} should have the fields of this crpt ({error}); "
            "evaluate with the release that wrote it"
        ) from error
    print(evaluation_text(evaluate_stage(context, arguments.config, agent)))


_COMMANDS: dict[StageName, tuple[type[Any], Callable[[Any], None]]] = {
    "train": (TrainArguments, train_command),
    "collect": (CollectArguments, collect_command),
    "pretrain": (PretrainArguments, pretrain_command),
    "probe": (ProbeArguments, probe_command),
    "finetune": (FinetuneArguments, finetune_command),
    "evaluate": (EvaluateArguments, evaluate_command),
}


def run(stage: StageName) -> None:
    """Parse the stage's command line and run it."""
    arguments, command = _COMMANDS[stage]

    def defaults(preset: Preset, run_dir: Path, device: str) -> cli.Common:
        stages = PRESETS[preset]
        config = stages if stage == "train" else getattr(stages, stage)
        made: cli.Common = arguments(preset, run_dir, device, config=config)
        return made

    cli.main(stage, defaults, command)
