"""Gymnasium's environments by id: frames, actions, endings, and what is said where it fails."""

from __future__ import annotations

import builtins
import dataclasses
import re
from typing import Any

import gymnasium
import numpy as np
import pytest
import small
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.utils.env_checker import check_env
from toy_collect import contents

from crpt import envs
from crpt.collect import collect
from crpt.config import CollectConfig, ProbeConfig
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.stages import Context
from crpt.train import train


class Painted(gymnasium.Env):
    """A picture of its step; observation, actions and endings are set."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(
        self,
        render_mode=None,
        actions=None,
        size=(40, 60),
        terminates=10**9,
        observation=None,
        noise=False,
    ):
        self.render_mode = render_mode
        self.action_space = actions or Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = observation or Box(-np.inf, np.inf, (2,), np.float64)
        self.size, self.terminates, self.noise = size, terminates, noise
        self.taken: list[Any] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.taken.append(action)
        self.steps += 1
        return self._observation(), 0.5, self.steps == self.terminates, False, {}

    def render(self):
        height, width = self.size
        picture = np.zeros((height, width, 3), np.uint8)
        picture[: height // 2, :, 0] = 200
        picture[:, : width // 2, 1] = self.steps
        if self.noise:
            picture[..., 2] = np.random.default_rng().integers(256)
        return picture

    def _observation(self):
        if isinstance(self.observation_space, Box):
            return np.full(self.observation_space.shape, self.steps, np.float64)
        return self.observation_space.sample()


@pytest.fixture(autouse=True)
def _painted():
    gymnasium.register("tests/Painted-v0", Painted, max_episode_steps=20)
    yield
    del gymnasium.registry["tests/Painted-v0"]


def painted(**settings: Any) -> envs.GymnasiumEnv:
    """The toy with these settings, as crpt makes it."""
    ours = {k: settings.pop(k) for k in ("action_repeat", "image_size") if k in settings}
    gymnasium.registry["tests/Painted-v0"].kwargs = settings
    env = envs.make("tests/Painted-v0", **ours)
    assert isinstance(env, envs.GymnasiumEnv)
    return env


@pytest.mark.parametrize(
    ("domain", "actions", "state"), [("Pendulum-v1", 1, 3), ("CartPole-v1", 2, 4)]
)
def test_classic_control(domain, actions, state):
    env = envs.make(domain, image_size=32)
    assert env.action_space == Box(-1, 1, (actions,), np.float32)
    frame, info = env.reset(seed=3)
    assert env.observation_space.contains(frame)
    assert frame.flags.c_contiguous
    assert frame.std() > 5
    assert info["state"].shape == (state,)
    next_frame, reward, terminated, truncated, info = env.step(np.ones(actions, np.float32))
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert info["discount"] == 1.0
    np.testing.assert_array_equal(env.render(), next_frame.transpose(1, 2, 0))
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(again, frame)
    env.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_nothing_wrong():
    check_env(envs.make("Pendulum-v1", image_size=16), skip_render_check=True)


def test_each_pixel_is_the_mean_of_those_it_covers():
    env = painted(size=(40, 60), image_size=20)
    frame, _ = env.reset(seed=0)
    picture = env._env.render().reshape(20, 2, 20, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_array_equal(frame, picture)
    assert painted(size=(7, 7), image_size=7).reset(seed=0)[0].shape == (3, 7, 7)


def test_actions_are_mapped_onto_the_range():
    low, high = np.array([0.0, -np.inf, 5.0], np.float32), np.array([2.0, np.inf, 5.5], np.float32)
    env = painted(actions=Box(low, high), action_repeat=1)
    env.reset(seed=0)
    for action in ([-1, -1, -1], [1, 1, 1], [0, 0.25, 0.5]):
        env.step(np.array(action, np.float32))
    expected = [[0, -1, 5], [2, 1, 5.5], [1, 0.25, 5.375]]
    np.testing.assert_allclose(env.unwrapped._env.unwrapped.taken, expected)


@pytest.mark.parametrize("actions", [Box(0.0, 2.0, (2,), np.float32), Discrete(2)])
def test_wrong_actions_are_named_and_not_clamped(actions):
    env = painted(actions=actions)
    env.reset(seed=0)
    for action, message in [
        (np.zeros(3), r"action should be \(2,\), got \(3,\)"),
        (np.array([0.0, 1.1]), r"action should be in \[-1, 1\], got \[0\. +1\.1"),
        (np.array([np.nan, 0.0]), r"action should be in \[-1, 1\], got \[nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.step(action)
    assert env._env.unwrapped.taken == []


def test_discrete_actions_are_the_largest_of_as_many():
    env = painted(actions=Discrete(3, start=4), action_repeat=1)
    assert env.action_space == Box(-1, 1, (3,), np.float32)
    env.reset(seed=0)
    for action in ([0.1, 0.9, -1], [-0.5, -0.6, -0.4], [1, 1, 1]):
        env.step(np.array(action, np.float32))
    assert env._env.unwrapped.taken == [5, 6, 4]


def test_action_repeat_adds_rewards_and_stops_at_the_end():
    env = painted(action_repeat=3, terminates=5)
    assert env.metadata["render_fps"] == 10
    env.reset(seed=0)
    action = np.zeros(1, np.float32)
    frame, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["discount"]) == (1.5, False, False, 1.0)
    np.testing.assert_array_equal(info["state"], [3, 3])
    assert frame[1, 0, 0] == 3
    frame, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated, info["discount"]) == (1.0, True, False, 0.0)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(action)


def test_the_time_limit_truncates_and_a_termination_at_it_terminates():
    for terminates, expected in ((10**9, (False, True, 1.0)), (20, (True, False, 0.0))):
        env = painted(action_repeat=20, terminates=terminates)
        env.reset(seed=0)
        *_, terminated, truncated, info = env.step(np.zeros(1, np.float32))
        assert (terminated, truncated, info["discount"]) == expected


def test_an_observation_that_is_no_vector_is_no_state():
    space = Dict({"a": Discrete(2)})
    assert painted(observation=space).reset(seed=0)[1]["state"].shape == (0,)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("Pendulm-v1", "got 'Pendulm-v1' .*close to it: Pendulum-v1"),
        ("CartPole-v7", "versioned environments.*close to it: CartPole-v1"),
        ("Pendulum", "close to it: Pendulum-v1"),
        ("NoSuch/Thing-v5", "Namespace NoSuch not found.*install the package that has it"),
        ("no_such_module:Thing-v0", "No module named 'no_such_module'.*MODULE:ID"),
    ],
)
def test_an_unknown_id_is_explained(domain, message):
    for ask in (envs.make, envs.require_known):
        with pytest.raises(ValueError, match=message):
            ask(domain)


def test_known_ids_are_known_without_being_made():
    gymnasium.registry["tests/Painted-v0"].kwargs = {"no_such_argument": 1}
    envs.require_known("tests/Painted-v0")
    envs.require_known("test_gymnasium_env:tests/Painted-v0")


@pytest.mark.parametrize("actions", [MultiBinary(3), Box(0, 9, (1,), np.int64)])
def test_actions_of_another_kind_are_refused(actions):
    with pytest.raises(ValueError, match="actions of a float Box or Discrete, got "):
        painted(actions=actions)


@pytest.mark.filterwarnings("ignore:.*render_mode:UserWarning")
def test_an_environment_that_does_not_render_is_refused(monkeypatch):
    monkeypatch.setattr(Painted, "metadata", {"render_modes": ["human"]})
    with pytest.raises(ValueError, match=r"renders with render_mode rgb_array.*\['human'\]"):
        painted()


def test_pictures_of_another_kind_are_refused(monkeypatch):
    monkeypatch.setattr(Painted, "render", lambda self: np.zeros((4, 4), np.float32))
    with pytest.raises(TypeError, match=r"should render uint8 \[H, W, 3\], got float32"):
        painted().reset(seed=0)


@pytest.mark.parametrize(
    ("missing", "domain"), [("PIL", "tests/Painted-v0"), ("pygame", "Acrobot-v1")]
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, missing, domain):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        envs.RenderingUnavailableError, match=re.escape("pip install 'crpt[gymnasium]'")
    ):
        envs.make(domain).reset(seed=0)


def test_an_environment_that_does_not_repeat_itself_is_told_once(tmp_path, caplog):
    config = CollectConfig(
        domains=("tests/Painted-v0",), transitions=45, image_size=8, action_repeat=1, workers=1
    )
    gymnasium.registry["tests/Painted-v0"].kwargs = {"noise": True}
    collect(config, tmp_path / "data", seed=0, progress=False)
    assert caplog.text.count("tests/Painted-v0 plays differently from the same seed") == 1
    caplog.clear()
    gymnasium.registry["tests/Painted-v0"].kwargs = {}
    collect(config, tmp_path / "sound", seed=0, progress=False)
    assert caplog.text == ""


def test_a_name_with_a_slash_is_a_domain(tmp_path):
    config = CollectConfig(
        domains=("tests/Painted-v0",), transitions=45, image_size=8, action_repeat=1, workers=1
    )
    collect(config, tmp_path / "data", seed=0, progress=False)
    buffer = ReplayBuffer.open(tmp_path / "data")
    assert buffer.domains == ("tests/Painted-v0",)
    assert (tmp_path / "data" / "tests%2FPainted-v0" / "frames.npy").is_file()
    assert [len(slots) - 1 for slots in buffer.episodes("tests/Painted-v0")] == [20, 20, 5]
    assert (buffer.arrays("tests/Painted-v0")["discounts"] == 1).all()


def test_processes_record_gymnasium_beside_dm_control(tmp_path):
    config = {"transitions": 60, "image_size": 16, "render": "fast", "episode_length": 25}
    domains = ("CartPole-v1", "cartpole_balance", "Pendulum-v1")
    for name, workers in (("one", 1), ("three", 3)):
        asked = CollectConfig(domains=domains, workers=workers, **config)
        collect(asked, tmp_path / name, seed=3, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    arrays = ReplayBuffer.open(tmp_path / "one").arrays("CartPole-v1")
    assert (arrays["discounts"] == 0).sum() >= 2  # the pole falls


def test_gymnasium_environments_go_through_all_stages(tmp_path):
    stages = dataclasses.replace(
        small.STAGES,
        collect=CollectConfig(
            domains=("Pendulum-v1", "CartPole-v1"), transitions=60, image_size=20, workers=1
        ),
        probe=ProbeConfig(unseen=(), episodes=5, episode_length=10),
        finetune=dataclasses.replace(small.FINETUNE, task="CartPole-v1", agent_steps=90),
    )
    summary = train(Context(RunDirectory(tmp_path), 0, progress=False), stages)
    assert "Return on CartPole-v1 after 90 agent steps" in summary
    assert "Pendulum-v1  seen" in summary
