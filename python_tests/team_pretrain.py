"""Started by torchrun in tests: DATASET RUNS DTYPE CONFIG [--die | --slow-save | --stream]

CONFIG: in JSON, how small.PRETRAIN differs. Where {rank} is in a path, each process has files of
its own.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import small
import torch

import crpt.pretrain.trainer
from crpt import distributed
from crpt.interrupt import Interrupted
from crpt.pretrain import pretrain
from crpt.pretrain.streamed_feed import StreamedFeed
from crpt.pretrain.trainer import Trainer
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory


def die_in_round(number: int) -> None:
    update = Trainer.update

    def counted(self, domains):
        if self.round == number and self.team.rank == 1:
            os._exit(7)
        return update(self, domains)

    Trainer.update = counted


def save_slowly() -> None:
    save = torch.save

    def slow(*args):
        time.sleep(3)
        save(*args)

    torch.save = slow


def stream() -> None:
    """Batches come as they do to a GPU that the frames do not fit on."""
    make, sample = Trainer.__init__, Trainer.sample
    crpt.pretrain.trainer.fits = lambda *_: False

    def with_feed(self, *args, **options):
        make(self, *args, **options)
        self.feed = self._feed()

    def by_feed(self, domains):
        assert isinstance(self.feed, StreamedFeed)
        return sample(self, domains)

    Trainer.__init__, Trainer.sample = with_feed, by_feed


def main() -> None:
    dataset, runs, dtype, differences, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    if flags == ["--die"]:
        die_in_round(5)
    if flags == ["--slow-save"]:
        save_slowly()
    if flags == ["--stream"]:
        stream()
    with distributed.join(torch.device("cpu")) as team:
        # JSON has no tuples.
        changed = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(differences).items()
        }
        config = replace(small.PRETRAIN, **changed)
        data, directory = dataset.format(rank=team.rank), runs.format(rank=team.rank)
        run = RunDirectory(Path(directory) / "team")
        try:
            pretrain(config, ReplayBuffer.open(data), run, seed=0, progress=False, team=team)
        except Interrupted:
            print("stopped, saved:", run.has_checkpoint("pretrain"), file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
