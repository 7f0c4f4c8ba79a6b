"""Started by torchrun in tests: DATASET RUNS DTYPE RATE BATCHES NORM [--die] OBJECTIVE"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import small
import torch

from crpt import distributed
from crpt.pretrain import pretrain
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.trainer import Trainer


def die_in_round(number: int) -> None:
    update = Trainer.update

    def counted(self, domains):
        if self.round == number and self.team.rank == 1:
            os._exit(7)
        return update(self, domains)

    Trainer.update = counted


def main() -> None:
    dataset, runs, dtype, rate, batches, norm, *names = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    if names[0] == "--die":
        names.pop(0)
        die_in_round(5)
    with distributed.join(torch.device("cpu")) as team:
        config = replace(
            small.PRETRAIN, rounds=25, objective=names[0], batches=batches, embedding_norm=norm,
            learning_rate=float(rate), log_every=1,
        )  # fmt: skip
        # Where {rank} is in a path, each process has files of its own.
        data, directory = dataset.format(rank=team.rank), runs.format(rank=team.rank)
        run = RunDirectory(Path(directory) / names[0])
        pretrain(config, ReplayBuffer.open(data), run, seed=0, progress=False, team=team)


if __name__ == "__main__":
    main()
