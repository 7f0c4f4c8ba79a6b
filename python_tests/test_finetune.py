from dataclasses import replace

import dot_env
import numpy as np
import pytest
import small
import torch

import crpt.agents.replay
import crpt.finetune
from crpt.encoder import Encoder, EncoderConfig
from crpt.envs import FrameStack
from crpt.evaluate import evaluate_policy, random_policy
from crpt.finetune import Finetuner, finetune, trained_policy
from crpt.interrupt import Interrupted
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory


def make_env():
    return FrameStack(dot_env.make("dot_red"), 3)


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16))
        encoder.attach_prototypes(torch.randn(32, 16))
    return encoder.freeze()


def run_all(config, encoder, path):
    run = RunDirectory(path)
    policy = finetune(config, encoder, run, make_env, seed=0, progress=False)
    return run, policy


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
}


@pytest.mark.parametrize(
    ("config", "checkpoint_every"),
    [(config, 30) for config in CONFIGS.values()]
    + [(CONFIGS["stored z"], 1), (CONFIGS["sampled h"], 1000)],
    ids=[*CONFIGS, "a checkpoint each episode", "a checkpoint only where the ring needs one"],
)
def test_killed_and_resumed_equals_never_killed(
    config, checkpoint_every, encoder, tmp_path, monkeypatch
):
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


def test_counts_and_metrics(encoder, tmp_path):
    run, _ = run_all(small.FINETUNE, encoder, tmp_path)
    saved = run.load_checkpoint("finetune")
    # 12 full episodes of 12 and one cut at step 150.
    assert saved["counters"] == {"agent_steps": 150, "episodes": 13, "replay_steps": 163}
    assert saved["agent"]["updates"] == 150 - 60 + 1
    lines = run.metrics("finetune")
    assert [line["step"] for line in lines if "return_mean" in line] == [75, 150]
    assert len([line for line in lines if "train_return" in line]) == 12
    assert all("critic_loss" in line for line in lines if "actor_loss" in line)


def test_random_steps_are_random_and_later_ones_are_not(encoder, tmp_path, monkeypatch):
    explored = []
    act = crpt.finetune.SAC.act

    def recorded(self, features, *, explore):
        explored.append(explore)
        return act(self, features, explore=explore)

    monkeypatch.setattr(crpt.finetune.SAC, "act", recorded)
    monkeypatch.setattr(Finetuner, "_evaluate", lambda self, check_stop: None)
    run_all(small.FINETUNE, encoder, tmp_path)
    assert explored == [True] * 90


def test_ctrl_c_stops_between_steps_and_says_where_it_goes_on(encoder, tmp_path, monkeypatch):
    update = Finetuner._update

    def interrupted(self):
        update(self)
        if self.counters.agent_steps == 100:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Finetuner, "_update", interrupted)
    with pytest.raises(Interrupted, match="at agent step 100 of 150; it goes on from step 72"):
        run_all(small.FINETUNE, encoder, tmp_path)


def test_a_finished_run_returns_at_once(encoder, tmp_path, monkeypatch):
    _, policy = run_all(small.FINETUNE, encoder, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Finetuner, "__init__", never)
    _, again = run_all(small.FINETUNE, encoder, tmp_path)
    obs, _ = make_env().reset(seed=1)
    assert np.array_equal(policy(obs), again(obs))


def test_losses_that_are_not_finite_stop_the_run(encoder, tmp_path, monkeypatch):
    def poisoned(self, batch):
        return {"critic_loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(crpt.finetune.SAC, "update", poisoned)
    with pytest.raises(FloatingPointError, match="losses should be finite"):
        run_all(small.FINETUNE, encoder, tmp_path)


def test_the_intrinsic_reward_needs_prototypes(tmp_path):
    bare = Encoder(EncoderConfig(image_size=20, projection_dim=16))
    with pytest.raises(ValueError, match="intrinsic_reward should be 0"):
        run_all(small.FINETUNE, bare, tmp_path)


def test_it_learns_to_stay_in_the_middle(encoder, tmp_path):
    config = replace(
        small.FINETUNE,
        agent_steps=1500,
        random_steps=200,
        replay_capacity=1500,
        batch_size=64,
        learning_rate=3e-3,
        actor_every=1,
        target_every=1,
        target_rate=0.05,
        intrinsic_reward=0.0,
        evaluate_every=10_000,
        checkpoint_every=10_000,
    )
    run, policy = run_all(config, encoder, tmp_path)
    env = make_env()
    learned = evaluate_policy(policy, env, 10, seed=5).mean()
    uniform = evaluate_policy(random_policy(env, seed=0), env, 10, seed=5).mean()
    assert learned > uniform + 2.0  # of 12 steps of at most 1
    saved = run.load_checkpoint("finetune")
    same = trained_policy(config, encoder, env, saved)
    assert evaluate_policy(same, env, 10, seed=5).mean() == pytest.approx(learned)
