"""`python -m crpt.bench NAME`: one bench is one file and one line below."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import tyro

from crpt import cli
from crpt.bench import collect, ops, pretrain, replay

# Name: (its flags, what it runs; the exit code comes back).
BENCHES: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "ops": (ops.OpsArguments, ops.ops_command),
    "collect": (collect.CollectArguments, collect.collect_command),
    "replay": (replay.ReplayArguments, replay.replay_command),
    "pretrain": (pretrain.PretrainArguments, pretrain.pretrain_command),
}


def main() -> None:
    names = " | ".join(BENCHES)
    usage = f"usage: python -m crpt.bench {{{names}}} [--help]"
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        lines = (f"  {name:10} {command.__doc__}" for name, (_, command) in BENCHES.items())
        print(usage, *lines, sep="\n")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv[1]
    if name not in BENCHES:
        print(f"bench should be {names}, got {name}\n{usage}", file=sys.stderr)
        sys.exit(2)
    flags, command = BENCHES[name]
    with cli.without_traceback("Nothing was saved."):
        arguments = tyro.cli(
            flags,
            args=sys.argv[2:],
            prog=f"python -m crpt.bench {name}",
            description=command.__doc__,
        )
        sys.exit(command(arguments))


if __name__ == "__main__":
    main()
