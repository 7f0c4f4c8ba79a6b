"""Environments against dm_control itself."""

from __future__ import annotations

import logging
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from toy_env import ToyEnv, identity, make_reusing

from crpt import envs

SOME = ("ball_in_cup_catch", "quadruped_run", "reach_site_vision")


def play(env: gymnasium.Env, seed: int, steps: int = 3) -> list[bytes]:
    """Everything that an episode gives, step by step."""
    actions = np.random.default_rng(seed)
    frame, info = env.reset(seed=seed)
    given = [frame.tobytes() + info["state"].tobytes()]
    for _ in range(steps):
        action = actions.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        frame, *outcome, info = env.step(action)
        given.append(frame.tobytes() + info["state"].tobytes() + repr(outcome).encode())
    return given


@pytest.mark.parametrize(
    ("domain", "actions"),
    [("ball_in_cup_catch", 2), ("quadruped_run", 12), ("reach_site_vision", 9), ("lqr_lqr_2_1", 1)],
)
def test_spaces_and_types(domain, actions):
    env = envs.make(domain, render="fast")
    assert env.observation_space == gymnasium.spaces.Box(0, 255, (3, 84, 84), np.uint8)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (actions,), np.float32)
    frame, info = env.reset(seed=1)
    assert env.observation_space.contains(frame)
    assert frame.flags.c_contiguous
    assert info["state"].dtype == np.float64
    next_frame, reward, terminated, truncated, info = env.step(np.ones(actions, np.float32))
    assert env.observation_space.contains(next_frame)
    assert next_frame is not frame
    assert type(reward) is float
    assert type(terminated) is type(truncated) is bool
    assert info["discount"] == 1.0
    np.testing.assert_array_equal(env.render(), next_frame.transpose(1, 2, 0))


# reassemble_5_bricks shuffles lists in place, lqr draws its model at random when it is made
@pytest.mark.parametrize(
    "domain",
    [
        *SOME,
        pytest.param("reassemble_5_bricks_random_order_vision", marks=pytest.mark.slow),
        "lqr_lqr_2_1",
    ],
)
def test_an_episode_is_a_function_of_its_seed_and_actions(domain):
    env = envs.make(domain, render="fast")
    first = play(env, 7)
    assert play(env, 8) != first
    env.reset()
    assert play(env, 7) == first
    assert play(envs.make(domain, render="fast"), 7) == first


def test_without_a_seed_episodes_differ():
    resets = [envs.make("reacher_easy", render="fast").reset()[1]["state"] for _ in range(2)]
    assert not np.array_equal(*resets)


def onto_range(action: np.ndarray, spec: Any) -> np.ndarray:
    return (spec.minimum + spec.maximum) / 2 + action * (spec.maximum - spec.minimum) / 2


@pytest.mark.parametrize(
    "domain", ["quadruped_walk", pytest.param("dog_stand", marks=pytest.mark.slow), "hopper_hop"]
)
def test_exact_frames_are_those_of_dm_control(domain):
    env = envs.make(domain, render="exact", action_repeat=1)
    envs.select_backend()
    from dm_control import suite

    name, task = domain.split("_")
    theirs = suite.load(name, task, task_kwargs={"random": 3})
    camera = 2 if name == "quadruped" else 0
    theirs.reset()
    frame, info = env.reset(seed=3)
    spec = theirs.action_spec()
    for n in range(3):
        expected = theirs.physics.render(84, 84, camera_id=camera).transpose(2, 0, 1)
        np.testing.assert_array_equal(frame, expected)
        np.testing.assert_array_equal(info["state"], theirs.physics.get_state())
        action = np.full(spec.shape, 0.3 * n - 0.5)
        frame, reward, *_, info = env.step(action)
        assert reward == theirs.step(onto_range(action, spec)).reward


def test_vision_frames_and_rewards_are_those_of_manipulation():
    env = envs.make("stack_2_bricks_vision", action_repeat=2)
    from dm_control import manipulation

    theirs = manipulation.load("stack_2_bricks_vision", seed=3)
    step = theirs.reset()
    frame, _ = env.reset(seed=3)
    spec = theirs.action_spec()
    for n in range(2):
        np.testing.assert_array_equal(frame, step.observation["front_close"][0].transpose(2, 0, 1))
        action = np.full(9, 0.8 * n - 0.4)
        control = onto_range(action, spec)
        frame, reward, *_ = env.step(action)
        expected = theirs.step(control).reward
        step = theirs.step(control)
        assert reward == pytest.approx(expected + step.reward, rel=1e-12)


def test_action_repeat_adds_rewards_and_multiplies_discounts():
    single = envs.make("cartpole_balance", render="fast", action_repeat=1)
    triple = envs.make("cartpole_balance", render="fast", action_repeat=3)
    single.reset(seed=0)
    triple.reset(seed=0)
    action = np.array([0.5])
    frame, reward, *_ = triple.step(action)
    steps = [single.step(action) for _ in range(3)]
    assert reward == pytest.approx(sum(step[1] for step in steps))
    np.testing.assert_array_equal(frame, steps[-1][0])
    assert triple.metadata["render_fps"] == pytest.approx(single.metadata["render_fps"] / 3)

    discounts = iter([0.5, 0.5, 0.5])
    triple.unwrapped._env.task.get_termination = lambda physics: None
    step = triple.unwrapped._env.step
    triple.unwrapped._env.step = lambda a: step(a)._replace(discount=next(discounts))
    assert triple.step(action)[-1]["discount"] == 0.125


def test_the_time_limit_truncates():
    env = envs.make("cartpole_balance", render="fast", action_repeat=300)  # 1,000 steps
    env.reset(seed=0)
    ends = [env.step(np.zeros(1))[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(False, True)]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(1))
    env.reset()
    env.step(np.zeros(1))


def test_a_termination_is_none_of_the_time_limits():
    env = envs.make("cartpole_balance", render="fast", action_repeat=5)
    env.reset(seed=0)
    env.unwrapped._env.task.get_termination = lambda physics: 0.0
    *_, terminated, truncated, info = env.step(np.zeros(1))
    assert (terminated, truncated, info["discount"]) == (True, False, 0.0)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(1))


def test_an_unstable_simulation_ends_at_its_last_sound_frame(caplog):
    env = envs.make("cartpole_balance", render="fast")
    env.reset(seed=0)
    frame, *_, before = env.step(np.ones(1))
    physics = env.unwrapped._env.physics
    physics.data.qvel[:] = np.nan
    with caplog.at_level(logging.WARNING):
        cut, _, terminated, truncated, info = env.step(np.ones(1))
    assert (terminated, truncated) == (False, True)
    assert "Physics state is invalid" in info["physics_error"]
    assert "episode was cut" in caplog.text
    np.testing.assert_array_equal(cut, frame)
    np.testing.assert_array_equal(info["state"], before["state"])
    frame, info = env.reset(seed=0)
    assert np.isfinite(info["state"]).all()
    env.step(np.ones(1))


def test_unbounded_actuators_get_actions_as_they_are():
    env = envs.make("lqr_lqr_2_1", render="fast")
    env.reset(seed=0)
    env.step(np.array([0.25]))
    assert env.unwrapped._env.physics.control() == 0.25


def contexts(env: gymnasium.Env) -> tuple[int, int]:
    context = env.unwrapped._env.physics.contexts.mujoco.ptr
    return context.shadowSize, context.offSamples


@pytest.mark.parametrize(
    "domain", ["cheetah_run", pytest.param("reach_site_vision", marks=pytest.mark.slow)]
)
def test_fast_has_neither_shadows_nor_samples_after_any_reset(domain):
    fast, exact = (envs.make(domain, render=render) for render in ("fast", "exact"))
    for seed in range(3):
        frame, _ = fast.reset(seed=seed)
        reference, _ = exact.reset(seed=seed)
        assert contexts(fast) == (0, 0)
        assert contexts(exact)[0] > 0
        difference = np.abs(frame.astype(int) - reference).mean()
        assert 0 < difference < 15


def test_fast_is_faster_in_software():
    seconds = {}
    for render in ("fast", "exact"):
        env = envs.make("walker_run", render=render)
        env.reset(seed=0)
        env.step(np.zeros(6))
        start = time.process_time()
        for _ in range(15):
            env.step(np.zeros(6))
        seconds[render] = time.process_time() - start
    gpu = seconds["exact"] < 15 * 0.002
    assert gpu or seconds["exact"] > 1.5 * seconds["fast"]


@pytest.mark.parametrize("size", [32, 600])
def test_image_size(size):
    env = envs.make("pendulum_swingup", render="fast", image_size=size)
    frame, _ = env.reset(seed=0)
    assert frame.shape == (3, size, size)
    assert frame.std() > 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"domain": "cheeta_run"}, ValueError, "got 'cheeta_run'; close to it: cheetah_run"),
        ({"domain": "stack_2_bricks"}, ValueError, "close to it: stack_2_bricks_vision"),
        ({"domain": "reach_site_features"}, ValueError, "reach_site_vision"),
        ({"domain": "zzz"}, ValueError, "known: acrobot_swingup, .*walker_run"),
        ({"domain": 3}, TypeError, "domain should be a str, got int"),
        ({"render": "nice"}, ValueError, "render should be exact or fast, got 'nice'"),
        ({"action_repeat": 0}, ValueError, "action_repeat should be at least 1, got 0"),
        ({"action_repeat": 2.0}, TypeError, "action_repeat should be an int, got float"),
        ({"image_size": -1}, ValueError, "image_size should be at least 1, got -1"),
    ],
)
def test_make_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        envs.make(**{"domain": "cheetah_run", **arguments})


def test_step_and_reset_say_what_is_wrong():
    env = envs.make("cheetah_run", render="fast")
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(6))
    with pytest.raises(RuntimeError, match="call reset"):
        env.render()
    with pytest.raises(ValueError, match=r"seed should be in \[0, 2\*\*32\), got 4294967296"):
        env.reset(seed=2**32)
    env.reset(seed=2**32 - 1)
    for action, message in [
        (np.zeros(5), r"action should be \(6,\), got \(5,\)"),
        (np.full(6, 1.1), r"action should be in \[-1, 1\], got \[1.1"),
        (np.full(6, np.nan), r"action should be in \[-1, 1\], got \[nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.step(action)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_nothing_wrong():
    check_env(envs.make("cartpole_swingup", render="fast"), skip_render_check=True)
    check_env(envs.FrameStack(envs.make("cartpole_swingup", render="fast")), skip_render_check=True)


@pytest.mark.parametrize("make", [ToyEnv, make_reusing])
def test_frame_stack_repeats_the_first_frame(make):
    env = envs.FrameStack(make("toy"))
    assert env.observation_space.shape == (9, 6, 6)

    def steps(stack: np.ndarray) -> list[int]:
        return [identity(frame)[2] for frame in stack.reshape(3, 3, 6, 6)]

    for _ in range(2):
        stack, _ = env.reset(seed=4)
        seen = [steps(stack)]
        seen += [steps(env.step(np.zeros(2))[0]) for _ in range(3)]
        assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_frame_stack_says_what_is_wrong():
    with pytest.raises(ValueError, match="n should be at least 1, got 0"):
        envs.FrameStack(ToyEnv("toy"), 0)
    with pytest.raises(ValueError, match=r"uint8 \[C, H, W\] observations"):
        envs.FrameStack(gymnasium.make("CartPole-v1"))


def test_two_environments_draw_side_by_side():
    one, two = envs.make("cheetah_run", render="fast"), envs.make("walker_run", render="fast")
    alone = [play(one, 1), play(two, 2)]
    one.reset(seed=1)
    two.reset(seed=2)
    one.step(np.zeros(6))
    two.step(np.zeros(6))
    assert [play(one, 1), play(two, 2)] == alone
    one.close()
    one.close()
    assert play(two, 2) == alone[1]
