"""`python -m crpt.dataset info | verify | import | export DIR`."""

from __future__ import annotations

import sys

import tyro

from crpt import cli
from crpt.dataset.commands import COMMANDS


def main() -> None:
    names = " | ".join(COMMANDS)
    usage = f"usage: python -m crpt.dataset {{{names}}} [--help]"
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        lines = (f"  {name:10} {command.__doc__}" for name, (_, command) in COMMANDS.items())
        print(usage, *lines, sep="\n")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv[1]
    if name not in COMMANDS:
        print(f"command should be {names}, got {name}\n{usage}", file=sys.stderr)
        sys.exit(2)
    flags, command = COMMANDS[name]
    with cli.without_traceback("The same command goes on, or begins again."):
        arguments = tyro.cli(
            flags,
            args=sys.argv[2:],
            prog=f"python -m crpt.dataset {name}",
            description=command.__doc__,
        )
        sys.exit(command(arguments))


if __name__ == "__main__":
    main()
