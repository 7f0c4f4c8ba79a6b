from dataclasses import replace

import dot_env
import gymnasium
import numpy as np
import pytest
import small
import torch
from small_finetune import make_env, run_all

import crpt.agents.replay
import crpt.finetune.finetuner
from crpt.agents.policy import trained_policy
from crpt.agents.replay import AgentReplay
from crpt.encoder import Encoder, EncoderConfig
from crpt.envs import FrameStack
from crpt.evaluate import evaluate_policy, random_policy
from crpt.finetune import finetune
from crpt.finetune.finetuner import Finetuner
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory


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
    act = crpt.finetune.finetuner.SAC.act

    def recorded(self, features, *, explore):
        explored.append(explore)
        return act(self, features, explore=explore)

    monkeypatch.setattr(crpt.finetune.finetuner.SAC, "act", recorded)
    monkeypatch.setattr(Finetuner, "_evaluate", lambda self, check_stop: None)
    run_all(small.FINETUNE, encoder, tmp_path)
    assert explored == [True] * 90


def test_the_agent_gets_the_task_s_reward_and_the_weighted_bonus(encoder, tmp_path, monkeypatch):
    sampled, learned, embedded = [], [], []
    sample, update = AgentReplay.sample, crpt.finetune.finetuner.SAC.update

    def recorded_sample(self):
        sampled.append(sample(self))
        return sampled[-1]

    def bonus(self, z):
        embedded.append(z)
        return torch.arange(len(z), dtype=torch.float32)

    def recorded_update(self, batch):
        learned.append(batch)
        return update(self, batch)

    monkeypatch.setattr(AgentReplay, "sample", recorded_sample)
    monkeypatch.setattr(crpt.finetune.finetuner.IntrinsicReward, "__call__", bonus)
    monkeypatch.setattr(crpt.finetune.finetuner.SAC, "update", recorded_update)
    run_all(replace(small.FINETUNE, intrinsic_reward=0.7), encoder, tmp_path)
    assert len(learned) == len(sampled) == 91
    for before, after, z in zip(sampled, learned, embedded, strict=True):
        torch.testing.assert_close(after.reward, before.reward + 0.7 * torch.arange(16))
        assert after.discount is before.discount
        torch.testing.assert_close(z, unit(before.next_features))
        for learned_from, encoded in (
            (after.features, before.features),
            (after.next_features, before.next_features),
        ):
            torch.testing.assert_close(learned_from, 4 * unit(encoded))  # z of 16 dimensions


def test_from_the_end_of_random_steps_on_z_is_standardised_over_the_task(
    standardised, tmp_path, monkeypatch
):
    config = replace(small.FINETUNE, embedding_statistics="task", intrinsic_reward=0.0)
    learned = []
    update = crpt.finetune.finetuner.SAC.update

    def recorded(self, batch):
        learned.append(batch.next_features)
        return update(self, batch)

    monkeypatch.setattr(crpt.finetune.finetuner.SAC, "update", recorded)
    run, policy = run_all(config, standardised, tmp_path)
    ring = ReplayBuffer.open(tmp_path / "checkpoints" / "finetune_replay")
    random_play = ring.indices("dot_red")[: config.random_steps]
    with torch.no_grad():
        h = standardised(ring.observations("dot_red", random_play))
        projected = standardised.project(h)
    saved = run.load_checkpoint("finetune")
    statistics = saved["extractor"]
    torch.testing.assert_close(statistics["shift"], projected.mean(0), atol=1e-3, rtol=1e-3)
    deviation = (projected.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(statistics["deviation"], deviation, atol=1e-3, rtol=1e-3)

    # Those of pre-training leave all frames of a task in one corner.
    def concentration(z):
        return unit(z).mean(0).norm()

    assert concentration(projected) > 0.8
    assert concentration(learned[0]) < 0.5
    env = make_env()
    obs, _ = env.reset(seed=1)
    again = trained_policy(config, standardised, env, saved)
    assert np.array_equal(policy(obs), again(obs))
    apart = trained_policy(config, standardised, env, saved | {"extractor": untouched()})
    assert not np.array_equal(policy(obs), apart(obs))


def test_the_statistics_of_a_task_need_a_norm_and_random_play(encoder, tmp_path):
    config = replace(small.FINETUNE, embedding_statistics="task")
    with pytest.raises(ValueError, match="should be pretraining for an encoder without"):
        run_all(config, encoder, tmp_path)
    with pytest.raises(ValueError, match=r"random_steps should be at least 2 .* got 1"):
        replace(config, random_steps=1)


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def untouched():
    return {"shift": torch.zeros(16), "deviation": torch.ones(16)}


class Taciturn(gymnasium.Wrapper):
    """Tells neither state nor discount; every other episode terminates after five steps."""

    episodes = 0

    def reset(self, **kwargs):
        self.episodes += 1
        self.steps = 0
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        obs, reward, _, truncated, _ = self.env.step(action)
        self.steps += 1
        return obs, reward, self.episodes % 2 == 0 and self.steps == 5, truncated, {}


def test_environments_need_not_tell_state_and_discount(encoder, tmp_path):
    def taciturn():
        return FrameStack(Taciturn(dot_env.make("dot_red")), 3)

    run = RunDirectory(tmp_path)
    finetune(small.FINETUNE, encoder, run, taciturn, seed=0, progress=False)
    ring = ReplayBuffer.open(run.checkpoint_dir / "finetune_replay")
    arrays, episodes = ring.arrays("dot_red"), ring.episodes("dot_red")
    assert {len(episode) - 1 for episode in episodes[:-1]} == {5, 12}
    for episode in episodes:
        discounts = arrays["discounts"][episode]
        assert (discounts[:-1] == 1).all()
        assert discounts[-1] == (0 if len(episode) == 6 else 1)


def test_every_line_of_losses_has_the_actor_s(encoder, tmp_path):
    config = replace(small.FINETUNE, random_steps=61, log_every=10, actor_every=2)
    run, _ = run_all(config, encoder, tmp_path)
    lines = [line for line in run.metrics("finetune") if "critic_loss" in line]
    assert [line["step"] for line in lines] == list(range(70, 151, 10))
    assert all({"actor_loss", "entropy", "temperature"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("weight", "step", "message"),
    [
        ("target_critic.q1.0.weight", 108, r"weights .* in target_critic\.q1\.0\.weight"),
        ("actor.policy.0.bias", 80, "actions .* in the agent's action"),
    ],
)
def test_what_is_not_finite_is_neither_saved_nor_played(
    weight, step, message, encoder, tmp_path, monkeypatch
):
    update = Finetuner._update

    def poisoned(self):
        update(self)
        if self.counters.agent_steps == step:
            with torch.no_grad():
                self.agent.weights()[weight].fill_(float("nan"))

    monkeypatch.setattr(Finetuner, "_update", poisoned)
    with pytest.raises(FloatingPointError, match=message):
        run_all(replace(small.FINETUNE, log_every=1000), encoder, tmp_path)
    kept = RunDirectory(tmp_path).load_checkpoint("finetune")
    assert kept["counters"]["agent_steps"] == 72


def test_to_act_only_the_actor_is_loaded(encoder, tmp_path):
    run, policy = run_all(small.FINETUNE, encoder, tmp_path)
    saved = run.load_checkpoint("finetune")
    needed = {"agent": {"actor": saved["agent"]["actor"]}, "extractor": saved["extractor"]}
    env = make_env()
    again = trained_policy(small.FINETUNE, encoder, env, needed)
    obs, _ = env.reset(seed=1)
    assert np.array_equal(policy(obs), again(obs))


def test_the_caller_s_encoder_stays_as_it_is(tmp_path):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16))
    config = replace(small.FINETUNE, intrinsic_reward=0.0, agent_steps=70)
    run_all(config, encoder, tmp_path)
    assert not encoder.frozen
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


def test_environment_and_exploration_draw_from_streams_of_their_own(encoder, tmp_path, monkeypatch):
    seeds = []
    reset = dot_env.DotEnv.reset

    def recorded(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    generators = []
    default_rng = np.random.default_rng

    def recorded_rng(seed=None):
        generators.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(dot_env.DotEnv, "reset", recorded)
    with monkeypatch.context() as patch:
        patch.setattr(crpt.finetune.finetuner.np.random, "default_rng", recorded_rng)
        run_all(small.FINETUNE, encoder, tmp_path)
    exploration = [seed for seed in generators if isinstance(seed, int)]
    assert len(set(exploration)) >= 13
    assert not set(exploration) & set(seeds)


def test_a_finished_run_returns_at_once(encoder, tmp_path, monkeypatch):
    _, policy = run_all(small.FINETUNE, encoder, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Finetuner, "__init__", never)
    _, again = run_all(small.FINETUNE, encoder, tmp_path)
    obs, _ = make_env().reset(seed=1)
    assert np.array_equal(policy(obs), again(obs))


@pytest.mark.parametrize(
    ("checkpoint_every", "kept"),
    [(30, "the last checkpoint is kept"), (1000, "no checkpoint was written yet")],
)
def test_losses_that_are_not_finite_stop_the_run(
    encoder, tmp_path, monkeypatch, checkpoint_every, kept
):
    def poisoned(self, batch):
        return {"critic_loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(crpt.finetune.finetuner.SAC, "update", poisoned)
    config = replace(small.FINETUNE, checkpoint_every=checkpoint_every, replay_capacity=1000)
    with pytest.raises(FloatingPointError, match=f"losses should be finite, .*; {kept}. Try a"):
        run_all(config, encoder, tmp_path)


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
