"""`python -m crpt.ablate STUDY`: the flags of the command, and what it prints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from crpt import cli, figures
from crpt.ablate import pictures, report
from crpt.ablate.checks import asked_of
from crpt.ablate.report import Rows
from crpt.ablate.running import RunsFailedError, run_study
from crpt.ablate.studies import STUDIES
from crpt.config import PRESETS, EncoderStages, Preset
from crpt.files import replace_file
from crpt.replay import ReplayBuffer
from crpt.run_directory import ConfigMismatchError, dataset_in
from crpt.stages import Context, StageOrderError, require_known_names


@dataclass(frozen=True)
class AblateArguments(cli.Common):
    config: Annotated[EncoderStages, tyro.conf.arg(name="")] = EncoderStages()
    """What the variants are variants of."""
    seeds: int = 1
    """Trainings of every variant: seed, seed + 1, ... The random play is that of the first."""
    jobs: int = 1
    """Trainings at a time, each a process of its own."""
    dataset: Path | None = None
    """Random play as collect asks for, to train on, or a run that has some; none: recorded into
    RUN_DIR/dataset. Not for transitions."""
    only: tuple[str, ...] = ()
    """Of the study's variants; none: all. The table is of these and of what was measured before."""


def ablate(study: str, arguments: AblateArguments) -> str:
    """The study's table, also in RUN_DIR/STUDY.md, beside STUDY.json and figures/STUDY.png.

    Where runs have failed these are of the others, before RunsFailedError is raised.
    """
    if arguments.seeds < 1:
        raise ValueError(f"seeds should be at least 1, got {arguments.seeds}")
    if arguments.dataset is not None and study == "transitions":
        raise ValueError(
            f"dataset should be none for transitions, which records play of every length, got "
            f"{arguments.dataset}"
        )
    dataset = arguments.dataset and dataset_in(arguments.dataset)
    context = cli.context(arguments, dataset=dataset)
    require_known_names(context, *arguments.config.collect.domains, *arguments.config.probe.unseen)
    if dataset and not (dataset / "dataset.json").exists():
        raise StageOrderError(f"dataset should be one that was recorded, got {dataset}")
    stages = asked_of(arguments.config, ReplayBuffer.open(dataset)) if dataset else arguments.config
    variants = STUDIES[study].variants(stages)
    names = [variant.name for variant in variants]
    unknown = [name for name in arguments.only if name not in names]
    if unknown:
        raise ValueError(f"only should name some of {', '.join(names)}, got {', '.join(unknown)}")
    _check_told(context, study, names)
    seeds = tuple(range(arguments.seed, arguments.seed + arguments.seeds))
    try:
        rows = run_study(
            variants, stages, context, seeds=seeds, jobs=arguments.jobs, only=arguments.only
        )
    except RunsFailedError as failure:
        if failure.rows:
            _tell(context, study, failure.rows)
        raise
    return _tell(context, study, rows)


def _check_told(context: Context, study: str, names: list[str]) -> None:
    """What was found of variants that are none now would be lost from the table."""
    told = context.run.read_json(f"{study}.json") or {"runs": []}
    gone = dict.fromkeys(r["variant"] for r in told["runs"] if r["variant"] not in names)
    if gone:
        raise ConfigMismatchError(
            f"{context.run.path} holds {study} of another config, with {', '.join(gone)}; ask for "
            "the same, or choose another --run-dir"
        )


def _tell(context: Context, study: str, rows: Rows) -> str:
    asked = STUDIES[study]
    text = f"{report.table(rows)}\n\n{report.LEGEND}"
    context.run.write_json(f"{study}.json", {"study": study, "asks": asked.asks, "runs": rows})
    replace_file(context.run.path / f"{study}.md", lambda path: path.write_text(text + "\n"))
    picture = context.run.path / "figures" / f"{study}.png"
    if figures.available(picture):
        pictures.save(asked.draw, rows, picture)
    return text


def main() -> None:
    study = cli.chosen("crpt.ablate", "study", {name: s.asks for name, s in STUDIES.items()})

    def defaults(preset: Preset, run_dir: Path, device: str) -> AblateArguments:
        run_dir = Path("runs") / f"ablate-{preset}"
        stages = PRESETS[preset]
        config = EncoderStages(stages.collect, stages.pretrain, stages.probe)
        return AblateArguments(preset, run_dir, device, config=config)

    def command(arguments: AblateArguments) -> None:
        print(ablate(study, arguments))

    command.__doc__ = (
        f"Train and probe variants of a preset: {STUDIES[study].asks}. Leaves the table, its JSON "
        "and a figure in RUN_DIR, and in RUN_DIR/runs an encoder for every variant and seed: 20 MB "
        "with the presets' sizes."
    )
    cli.main(f"ablate {study}", defaults, command, arguments=sys.argv[2:])


if __name__ == "__main__":
    main()
