"""The commands of `python -m crpt.dataset`: their flags, and what they print."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from crpt.cli import Commands
from crpt.dataset import describe, export_episodes, import_episodes, information, verify
from crpt.run_directory import dataset_in


@dataclass(frozen=True)
class InfoArguments:
    dir: Positional[Path]
    """A dataset directory, or a run directory that has one."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True)
class VerifyArguments:
    dir: Positional[Path]
    """A dataset directory, or a run directory that has one."""
    gaps: bool = False
    """Steps that are missing because a shared writer died in the middle of them are fine."""


@dataclass(frozen=True)
class ImportArguments:
    dir: Positional[Path]
    """The dataset directory; made if it is not there."""
    sources: Positional[tuple[Path, ...]]
    """Directories of episodes, STAMP_INDEX_LENGTH.npz."""
    domain: str
    """The task or environment that they were recorded in."""
    render: Literal["exact", "fast"] | None = None
    """How its frames were drawn, if that is known: dm_control's own pixels are exact."""
    action_repeat: int | None = None
    """Environment steps per agent step, if that is known; fine-tuning and probes ask for it."""


@dataclass(frozen=True)
class ExportArguments:
    dir: Positional[Path]
    """A dataset directory, or a run directory that has one."""
    target: Positional[Path]
    """A directory for the episodes; made, should not be there yet."""
    domain: str
    """Which of the dataset's domains."""
    frame_stack: int = 3
    """Frames of an observation: 3 is what DrQ-v2 reads, 1 makes the smallest files."""


def info_command(arguments: InfoArguments) -> int:
    """What a dataset holds: domains, sizes, how it was recorded."""
    described = describe(dataset_in(arguments.dir))
    if arguments.json:
        print(json.dumps(described, indent=2))
    else:
        print(information.text(described))
    return 0


def verify_command(arguments: VerifyArguments) -> int:
    """Check that every step that a dataset counts is there, whole and consistent."""
    reports = verify(dataset_in(arguments.dir), gaps=arguments.gaps)
    problems = 0
    for report in reports:
        problems += len(report.problems)
        state = f"{len(report.problems)} problems" if report.problems else "whole"
        print(
            f"{report.domain}: {state}; {report.transitions:,} transitions in "
            f"{report.episodes:,} whole episodes, {report.steps:,} steps"
        )
        for problem in report.problems:
            print(f"  PROBLEM: {problem}")
        for note in report.notes:
            print(f"  note: {note}")
    if problems:
        print(f"{arguments.dir} is damaged: restore it from a copy, or collect it again")
    return 1 if problems else 0


def import_command(arguments: ImportArguments) -> int:
    """Append episodes of DrQ-v2, URLB or ExORL (.npz) to a domain."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if arguments.action_repeat is not None and arguments.action_repeat < 1:
        raise ValueError(f"action_repeat should be at least 1, got {arguments.action_repeat}")
    done = import_episodes(
        arguments.dir,
        arguments.sources,
        domain=arguments.domain,
        metadata={"render": arguments.render, "action_repeat": arguments.action_repeat},
    )
    print(
        f"{arguments.domain}: {done.episodes:,} episodes, {done.transitions:,} transitions "
        f"imported into {arguments.dir}; {done.already_there:,} were there already"
    )
    return 0


def export_command(arguments: ExportArguments) -> int:
    """Write a domain's episodes as .npz files that DrQ-v2's loader reads."""
    done = export_episodes(
        dataset_in(arguments.dir),
        arguments.target,
        domain=arguments.domain,
        frame_stack=arguments.frame_stack,
    )
    left_out = f"; {done.left_out} without first or last step left out" if done.left_out else ""
    print(
        f"{arguments.domain}: {done.episodes:,} episodes, {done.transitions:,} transitions "
        f"in {arguments.target}{left_out}"
    )
    return 0


COMMANDS: Commands = {
    "info": (InfoArguments, info_command),
    "verify": (VerifyArguments, verify_command),
    "import": (ImportArguments, import_command),
    "export": (ExportArguments, export_command),
}
