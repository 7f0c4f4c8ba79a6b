"""What the command lines share: the preset, the run directory, and endings without a traceback."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import torch
import tyro

from crpt import distributed
from crpt.config import Preset
from crpt.interrupt import Interrupted
from crpt.memory import keep_freed_memory
from crpt.run_directory import RunDirectory
from crpt.stages import Context

A = TypeVar("A", bound="Common")


@dataclass(frozen=True)
class Common:
    """What every command takes."""

    preset: Preset
    """quick: minutes on a laptop. paper: arXiv 2302.05614 to the letter, for a GPU. best: the same,
    with what was found to give more."""
    run_dir: Path
    """Config, metrics, encoder and checkpoints; the same command on the same directory goes on
    where it stopped."""
    device: str
    """cpu, cuda, cuda:1, ..."""
    seed: int = 0
    """Of everything random: same seed, same machine, same figures."""


def main(
    name: str,
    make_arguments: Callable[[Preset, Path, str], A],
    command: Callable[[A], None],
    *,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse the command line, or these arguments, over the preset's defaults, then run the
    command."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset, seed = _scan(given, "paper" if device == "cuda" else "quick")
    defaults = make_arguments(preset, Path("runs") / f"{preset}-seed{seed}", device)
    with without_traceback("The same command goes on from what is on disk."):
        parsed = tyro.cli(
            type(defaults),
            prog=f"python -m crpt.{name}",
            args=given,
            default=defaults,
            description=command.__doc__,
        )
        if distributed.launched_by_torchrun() and name != "pretrain":
            raise ValueError(f"torchrun is for crpt.pretrain alone; start python -m crpt.{name}")
        with RunDirectory(parsed.run_dir).exclusive() if distributed.leads() else nullcontext():
            command(parsed)


Commands = Mapping[str, tuple[type[Any], Callable[[Any], int]]]
"""Name: (its flags, what it runs; the exit code comes back)."""


def main_of(module: str, what: str, commands: Commands, when_interrupted: str) -> NoReturn:
    """`python -m MODULE NAME FLAGS`: run the command of that name, and end with its exit code.

    Args:
        what: how an error calls NAME.
        when_interrupted: what becomes of the work then.
    """
    told = {name: command.__doc__ or "" for name, (_, command) in commands.items()}
    name = chosen(module, what, told)
    flags, command = commands[name]
    with without_traceback(when_interrupted):
        arguments = tyro.cli(
            flags,
            args=sys.argv[2:],
            prog=f"python -m {module} {name}",
            description=command.__doc__,
        )
        sys.exit(command(arguments))


def chosen(module: str, what: str, told: Mapping[str, str]) -> str:
    """The name that follows `python -m MODULE`, one of those that are told of.

    Where there is none, or another, the process ends with what there is: 0 for --help, else 2.
    """
    names = " | ".join(told)
    usage = f"usage: python -m {module} {{{names}}} [--help]"
    with without_traceback(""):
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            width = max(map(len, told))
            print(usage, *(f"  {name:{width}}  {text}" for name, text in told.items()), sep="\n")
            sys.exit(0 if len(sys.argv) > 1 else 2)
        if sys.argv[1] not in told:
            sys.exit(_say(f"{what} should be {names}, got {sys.argv[1]}\n{usage}", code=2))
    return sys.argv[1]


@contextmanager
def without_traceback(when_interrupted: str) -> Iterator[None]:
    """End the process with a message and an exit code where a command is interrupted or fails."""
    try:
        try:
            yield
        except SystemExit as ending:
            if not ending.code:
                _flush()
            raise
        _flush()  # here, where it is no error that nobody reads
    except (Interrupted, KeyboardInterrupt) as error:
        detail = f": {error}" if str(error) else ""
        if distributed.leads():
            _say(f"interrupted{detail}. {when_interrupted}", code=130)
        sys.exit(130)
    except (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        if os.environ.get("CRPT_TRACEBACK") == "1":
            raise
        sys.exit(_say(f"error: {error}\n(CRPT_TRACEBACK=1 shows where)", code=1))


def context(
    arguments: Common, *, dataset: Path | None = None, encoder: Path | None = None
) -> Context:
    """The stages' view of the arguments."""
    device = usable_device(arguments.device)
    if arguments.seed < 0:
        raise ValueError(f"seed should be at least 0, got {arguments.seed}")
    return Context(
        RunDirectory(arguments.run_dir),
        arguments.seed,
        str(device),
        dataset=dataset,
        encoder=encoder,
    )


def usable_device(name: str) -> torch.device:
    """The device of that name, under torchrun this process's own; ValueError unless torch finds it
    here."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not one of them")
        # Before anything lies on a GPU: what is another's should not.
        device = distributed.own_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's, for names and missing devices
        raise ValueError(
            f"device should be cpu, or a cuda device that torch finds here, got {name}"
        ) from error
    return device


def _scan(argv: list[str], default: Preset) -> tuple[Preset, str]:
    """The preset and the seed, which decide on the other defaults, ahead of the real parsing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=default)
    parser.add_argument("--seed", default="0")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    return (known.preset if known.preset in get_args(Preset) else default), known.seed


def _flush() -> None:
    if sys.stdout is not None:  # closed by who started this
        sys.stdout.flush()


def _nobody_reads() -> bool:
    """Whether who read the standard output has gone, as head does; what is left is dropped then."""
    try:
        out = sys.stdout.fileno()
    except (AttributeError, OSError):  # no file
        return False
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone


def _say(message: str, *, code: int) -> int:
    print(message, file=sys.stderr)
    return code
