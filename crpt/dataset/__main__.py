"""`python -m crpt.dataset info | verify | import | export DIR`."""

from __future__ import annotations

from crpt import cli
from crpt.dataset.commands import COMMANDS


def main() -> None:
    cli.main_of("crpt.dataset", "command", COMMANDS, "The same command goes on, or begins again.")


if __name__ == "__main__":
    main()
