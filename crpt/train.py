"""All stages in one command: `python -m crpt.train`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from crpt import cli
from crpt.config import PRESETS, Preset, Stages
from crpt.stages import (
    Context,
    collect_stage,
    evaluate_stage,
    finetune_stage,
    pretrain_stage,
    probe_stage,
)
from crpt.summary import render, summarise


@dataclass(frozen=True)
class TrainArguments(cli.Common):
    stages: Annotated[Stages, tyro.conf.arg(name="")] = Stages()


def train(context: Context, stages: Stages) -> str:
    """Collect, pre-train, probe, fine-tune, evaluate; the summary as text, also in
    `summary.json`."""
    context.run.claim(
        {
            "seed": context.seed,
            "collect": stages.collect,
            "pretrain": stages.pretrain,
            "probe": stages.probe,
            "finetune": stages.finetune,
            "evaluate": stages.evaluate,
        }
    )
    collect_stage(context, stages.collect)
    pretrain_stage(context, stages.pretrain)
    probe_stage(context, stages.probe)
    finetune_stage(context, stages.finetune)
    evaluate_stage(context, stages.evaluate, stages.finetune)
    summary = summarise(context.run)
    context.run.write_json("summary.json", summary)
    return render(summary)


def command(arguments: TrainArguments) -> None:
    """Random play, pre-training, probes, fine-tuning and evaluation in one run directory."""
    begun = time.monotonic()
    context = cli.context(arguments)
    print(f"preset {arguments.preset}, seed {context.seed}, {context.device}, {context.run.path}")
    print(train(context, arguments.stages))
    print(f"\nDone in {time.monotonic() - begun:.0f} s; everything is in {context.run.path}")


def _defaults(preset: Preset, run_dir: Path, device: str) -> TrainArguments:
    return TrainArguments(preset, run_dir, device, stages=PRESETS[preset])


if __name__ == "__main__":
    cli.main("train", _defaults, command)
