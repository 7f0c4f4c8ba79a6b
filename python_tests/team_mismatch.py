"""Started by torchrun in tests: DATASET DIRECTORY

Two processes that differ in one thing at a time; DIRECTORY/told{rank}.json says what each was told.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import small
import torch

import crpt.pretrain.trainer
from crpt import distributed
from crpt.pretrain import pretrain
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.stages import Context, pretrain_stage


def main() -> None:
    dataset, directory = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    told = {}
    with distributed.join(torch.device("cpu")) as team:
        other = team.rank == 1

        def train(case, config=small.PRETRAIN, data=dataset, seed=0):
            run = RunDirectory(directory / "runs" / case)
            try:
                pretrain(config, ReplayBuffer.open(data), run, seed=seed, progress=False, team=team)
            except ValueError as error:
                told[case] = str(error)

        train("seed", seed=5 if other else 0)
        for name, value in {
            "learning_rate": 1e-2, "batches": "mixed", "batch_size": 32, "log_every": 3,
        }.items():  # fmt: skip
            train(name, replace(small.PRETRAIN, **{name: value}) if other else small.PRETRAIN)
        for name in ("seed", "render", "content"):
            train(f"dataset_{name}", data=directory / name if other else dataset)
        crpt.pretrain.trainer.precision_on = lambda *asked: "bf16" if other else "fp32"
        train("precision", replace(small.PRETRAIN, precision="auto"))
        run = RunDirectory(directory / "begun")
        try:
            pretrain_stage(Context(run, 0, dataset=dataset, team=team), small.PRETRAIN)
        except ValueError as error:
            told["begun"] = str(error)
        (directory / f"told{team.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
