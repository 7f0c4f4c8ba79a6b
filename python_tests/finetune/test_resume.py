"""Fine-tuning that is killed or stopped, and goes on."""

import os
import shutil
import signal
import sys
from dataclasses import replace

import dot_env
import pytest
import small
import torch
from small_finetune import run_all

import crpt.agents.replay
import crpt.finetune.finetuner
from crpt.envs import FrameStack
from crpt.finetune.finetuner import Finetuner
from crpt.interrupt import Interrupted
from crpt.replay import ReplayBuffer
from crpt.run_directory import CheckpointError, RunDirectory


def interrupt_at(monkeypatch, steps: int, error: type[BaseException]) -> None:
    update = Finetuner._update

    def stopped(self):
        if self.counters.agent_steps == steps:
            raise error("now")
        update(self)

    monkeypatch.setattr(Finetuner, "_update", stopped)


def same_state(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


CONFIGS = {
    "stored z": small.FINETUNE,
    "stored h": replace(small.FINETUNE, features="h"),
    "sampled h": replace(small.FINETUNE, encode="sampled", features="h", shift_pad=1),
    "no intrinsic reward": replace(small.FINETUNE, intrinsic_reward=0.0),
    "stored z of the task": replace(small.FINETUNE, embedding_statistics="task"),
    "sampled h, z of the task": replace(
        small.FINETUNE, encode="sampled", features="h", embedding_statistics="task"
    ),
}


# The rest of them for CI.
QUICK = {"sampled h", "stored z of the task"}


@pytest.mark.parametrize(
    ("config", "checkpoint_every"),
    [
        pytest.param(config, 30, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ]
    + [
        pytest.param(CONFIGS["stored z"], 1, id="a checkpoint each episode"),
        pytest.param(CONFIGS["sampled h"], 1000, id="a checkpoint only where the ring needs one"),
    ],
)
def test_killed_and_resumed_equals_never_killed(
    config, checkpoint_every, encoder, standardised, tmp_path, monkeypatch
):
    encoder = standardised if config.embedding_statistics == "task" else encoder
    # The ring goes round: 163 steps into 69 slots, of which 20 transitions are learned from.
    monkeypatch.setattr(crpt.agents.replay, "LONGEST_EPISODE", dot_env.EPISODE)
    config = replace(config, replay_capacity=20, checkpoint_every=checkpoint_every)
    whole, _ = run_all(config, encoder, tmp_path / "whole")
    ring = ReplayBuffer.open(tmp_path / "whole" / "checkpoints" / "finetune_replay")
    assert ring.cursor("dot_red") == 163 > ring.capacity("dot_red") == 69
    for steps in (70, 133):
        with monkeypatch.context() as patch:
            interrupt_at(patch, steps, SystemExit)
            with pytest.raises(SystemExit):
                run_all(config, encoder, tmp_path / "cut")
    resumed, _ = run_all(config, encoder, tmp_path / "cut")
    assert same_state(whole.load_checkpoint("finetune"), resumed.load_checkpoint("finetune"))
    assert whole.metrics_file.read_text() == resumed.metrics_file.read_text()


def ctrl_c_when(monkeypatch, owner, method: str, condition) -> None:
    """Ctrl-C right after a call of the method; the condition gets what the method got."""
    original = getattr(owner, method)

    def wrapped(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if condition(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, method, wrapped)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (70, "at agent step 70 of 150; it goes on from step 60"),  # before the first checkpoint
        (100, "at agent step 100 of 150; it goes on from step 96"),  # after the checkpoint of 84
        (108, "at agent step 108 of 150; it goes on from step 108"),  # the last of an episode
        (150, "at agent step 150 of 150; it goes on from step 150"),  # and of the run
    ],
)
def test_ctrl_c_stops_between_steps_and_says_where_it_goes_on(
    step, message, encoder, tmp_path, monkeypatch
):
    # In a ring that goes round.
    monkeypatch.setattr(crpt.agents.replay, "LONGEST_EPISODE", dot_env.EPISODE)
    config = replace(small.FINETUNE, evaluate_every=1000, checkpoint_every=75, replay_capacity=20)
    whole, _ = run_all(config, encoder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "_evaluate", lambda self, check_stop: None)
        ctrl_c_when(patch, Finetuner, "_update", lambda self: self.counters.agent_steps == step)
        with pytest.raises(Interrupted, match=message):
            run_all(config, encoder, tmp_path / "cut")
    resumed, _ = run_all(config, encoder, tmp_path / "cut")
    assert same_state(whole.load_checkpoint("finetune"), resumed.load_checkpoint("finetune"))


def test_ctrl_c_while_the_last_checkpoint_is_written_neither_loses_it_nor_goes_unheard(
    encoder, tmp_path, monkeypatch
):
    def last(run, name, state):
        return state["counters"]["agent_steps"] == 150

    with monkeypatch.context() as patch:
        ctrl_c_when(patch, RunDirectory, "save_checkpoint", last)
        with pytest.raises(Interrupted, match="at agent step 150 of 150"):
            run_all(small.FINETUNE, encoder, tmp_path)
    monkeypatch.setattr(Finetuner, "__init__", None)
    run_all(small.FINETUNE, encoder, tmp_path)


def test_ctrl_c_stops_an_evaluation_after_the_step(encoder, tmp_path, monkeypatch):
    steps = 0

    def first_of_many(env, action):
        nonlocal steps
        evaluating = sys._getframe(2).f_code.co_name == "evaluate_policy"
        steps += evaluating
        return evaluating and steps == 1

    ctrl_c_when(monkeypatch, FrameStack, "step", first_of_many)
    with pytest.raises(Interrupted, match="at agent step 75 of 150; it goes on from step 72"):
        run_all(small.FINETUNE, encoder, tmp_path)
    assert steps == 1


def test_a_checkpoint_without_its_replay_says_what_to_do(encoder, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 100, SystemExit)
    with pytest.raises(SystemExit):
        run_all(small.FINETUNE, encoder, tmp_path)
    monkeypatch.undo()
    checkpoints = RunDirectory(tmp_path).checkpoint_dir
    shutil.rmtree(checkpoints / "finetune_replay")
    with pytest.raises(CheckpointError, match="delete the checkpoint to begin the stage again"):
        run_all(small.FINETUNE, encoder, tmp_path)
    (checkpoints / "finetune.pt").unlink()
    run, _ = run_all(small.FINETUNE, encoder, tmp_path)
    assert run.load_checkpoint("finetune")["counters"]["agent_steps"] == 150
