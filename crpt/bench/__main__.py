"""`python -m crpt.bench NAME`: one bench is one file and one line below."""

from __future__ import annotations

from crpt import cli
from crpt.bench import collect, ops, pretrain, replay

BENCHES: cli.Commands = {
    "ops": (ops.OpsArguments, ops.ops_command),
    "collect": (collect.CollectArguments, collect.collect_command),
    "replay": (replay.ReplayArguments, replay.replay_command),
    "pretrain": (pretrain.PretrainArguments, pretrain.pretrain_command),
}


def main() -> None:
    cli.main_of("crpt.bench", "bench", BENCHES, "Nothing was saved.")


if __name__ == "__main__":
    main()
