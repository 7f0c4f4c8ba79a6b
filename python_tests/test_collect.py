"""Collecting: what is recorded, and the same bytes whatever stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import toy_env
from toy_collect import contents, toy_collect

from crpt import random_play
from crpt.collect import collect
from crpt.config import CollectConfig
from crpt.replay import ReplayBuffer

HERE = Path(__file__).parent
# What is recorded


def test_each_episode_is_a_function_of_seed_domain_and_number(tmp_path):
    buffer = toy_collect(tmp_path / "data")
    assert buffer.domains == ("fast_a", "fast_b")
    for domain in buffer.domains:
        arrays = buffer.arrays(domain)
        episodes = buffer.episodes(domain)
        assert buffer.num_transitions(domain) == 100
        assert len(arrays["is_first"]) == 100 + len(episodes)
        for e, slots in enumerate(episodes):
            env_source, action_source = random_play.episode_seed(5, domain, e).spawn(2)
            env = toy_env.ToyEnv(domain)
            rng = np.random.default_rng(action_source)
            frame, info = env.reset(seed=int(env_source.generate_state(1)[0]))
            expected = [(frame, np.zeros(2), 0.0, 1.0, True, False, info["state"])]
            ended = False
            while not ended and len(expected) < len(slots):
                action = rng.uniform(-1, 1, 2).astype(np.float32)
                frame, reward, terminated, truncated, info = env.step(action)
                ended = terminated or truncated
                expected.append(
                    (frame, action, reward, info["discount"], False, ended, info["state"])
                )
            assert ended or e == len(episodes) - 1
            expected[-1] = (*expected[-1][:5], True, expected[-1][6])
            names = ("frames", "actions", "rewards", "discounts", "is_first", "is_last", "states")
            for name, values in zip(names, zip(*expected, strict=True), strict=True):
                values = np.asarray(values, arrays[name].dtype)
                np.testing.assert_array_equal(arrays[name][slots], values)


def test_only_true_terminations_have_discount_zero(tmp_path):
    buffer = toy_collect(tmp_path / "data")
    arrays = buffer.arrays("fast_a")
    ends = [slots[-1] for slots in buffer.episodes("fast_a")]
    seeds = arrays["states"][ends, 0]
    whole = arrays["states"][ends, 1] == 3 + seeds % 13
    np.testing.assert_array_equal(arrays["discounts"][ends] == 0, (seeds % 2 == 0) & whole)
    assert (arrays["discounts"] == 0).any()
    assert arrays["is_last"].sum() == len(ends)


def test_domains_and_seeds_play_differently(tmp_path):
    buffer = toy_collect(tmp_path / "one")
    other = toy_collect(tmp_path / "two", seed=6)
    a, b = (buffer.arrays(domain)["actions"] for domain in buffer.domains)
    assert not np.array_equal(a[:20], b[:20])
    assert not np.array_equal(a[:20], other.arrays("fast_a")["actions"][:20])


def test_episode_length_cuts_episodes(tmp_path):
    buffer = toy_collect(tmp_path / "data", episode_length=4)
    lengths = {len(slots) - 1 for slots in buffer.episodes("fast_a")[:-1]}
    assert lengths == {3, 4}
    arrays = buffer.arrays("fast_a")
    cut = [s[-1] for s in buffer.episodes("fast_a") if arrays["states"][s[-1], 0] % 13 > 1]
    assert (arrays["discounts"][cut] == 1).all()
    assert arrays["is_last"][cut].all()


# The same bytes


def test_the_bytes_do_not_depend_on_how_it_was_collected(tmp_path):
    toy_collect(tmp_path / "reference")
    expected = contents(tmp_path / "reference")
    toy_collect(tmp_path / "again")
    toy_collect(tmp_path / "again")
    toy_collect(tmp_path / "processes", workers=2)
    for transitions in (1, 30, 31, 99, 100):
        toy_collect(tmp_path / "extended", transitions=transitions)
    toy_collect(tmp_path / "by domain", domains=("fast_b",))
    toy_collect(tmp_path / "by domain")
    for name in ("again", "processes", "extended", "by domain"):
        assert contents(tmp_path / name) == expected, name


def test_a_finished_dataset_is_left_alone(tmp_path):
    toy_collect(tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}

    def never(*_, **__):
        raise AssertionError("nothing is left to collect")

    toy_collect(tmp_path / "data", make_env=never)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import {module} as module
from crpt.collect import collect
from crpt.config import CollectConfig
config = CollectConfig({config})
collect(config, {path!r}, seed=5, make_env=module.{make}, progress=False)
"""


def start_script(path: Path, module: str, make: str, **config) -> subprocess.Popen:
    """Collects in another process, by a script without a guard around its main part."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.items())
    script = path.with_suffix(".py")
    script.write_text(
        SCRIPT.format(here=str(HERE), module=module, make=make, config=arguments, path=str(path))
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def transitions_on_disk(path: Path) -> int:
    if not path.exists():
        return 0
    buffer = ReplayBuffer.open(path)
    return sum(buffer.num_transitions(domain) for domain in buffer.domains)


def run_and_kill(process: subprocess.Popen, path: Path, more: int, kill) -> bool:
    """Calls `kill(process)` once `more` transitions were added; whether it came in time."""
    goal = transitions_on_disk(path) + more
    while process.poll() is None:
        if transitions_on_disk(path) >= goal:
            kill(process)
            return True
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()
    return False


def kill_all(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_parent(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(("workers", "kill"), [(1, kill_all), (2, kill_parent)])
def test_kill_9_at_any_moment_changes_no_byte(tmp_path, workers, kill):
    config = {"domains": ("slow_a", "slow_b"), "transitions": 200, "image_size": toy_env.SIZE}
    toy_collect(tmp_path / "whole", **config)
    path = tmp_path / "killed"
    kills = 0
    for more in (1, 57, 130):
        process = start_script(path, "toy_env", "make", workers=workers, **config)
        kills += run_and_kill(process, path, more, kill)
        wait_for_writers(path)
    assert kills == 3
    toy_collect(path, workers=workers, **config)
    assert contents(path) == contents(tmp_path / "whole")


def wait_for_writers(path: Path) -> None:
    """Workers end by themselves when their parent is gone; nobody else may write before."""
    deadline = time.monotonic() + 10
    for domain in ReplayBuffer.open(path).domains:
        while True:
            try:
                ReplayBuffer.open(path)._store(domain).writable().release()
                break
            except RuntimeError:
                assert time.monotonic() < deadline, f"{domain} is still being written"
                time.sleep(0.02)


def test_kill_9_with_dm_control(tmp_path):
    config = {
        "domains": ("cartpole_swingup",),
        "transitions": 150,
        "episode_length": 40,
        "render": "fast",
    }
    buffer = collect(CollectConfig(**config), tmp_path / "whole", seed=5, progress=False)
    assert buffer.spec("cartpole_swingup").camera == 0
    process = start_script(tmp_path / "killed", "crpt.envs", "make", **config)
    assert run_and_kill(process, tmp_path / "killed", 60, kill_all)
    assert 0 < transitions_on_disk(tmp_path / "killed") < 150
    collect(CollectConfig(**config), tmp_path / "killed", seed=5, progress=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_ctrl_c_ends_quickly_and_quietly(tmp_path):
    config = {"domains": ("slow_a", "slow_b"), "transitions": 5000, "image_size": toy_env.SIZE}
    path = tmp_path / "data"
    process = start_script(path, "toy_env", "make", workers=2, **config)
    interrupt = time.monotonic()

    def ctrl_c(process):
        nonlocal interrupt
        interrupt = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)

    assert run_and_kill(process, path, 50, ctrl_c)
    _, stderr = process.communicate(timeout=10)
    assert time.monotonic() - interrupt < 3
    assert stderr.count("Traceback") == 1, stderr  # the script's own, not its workers'
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    wait_for_writers(path)
    assert transitions_on_disk(path) >= 50


# What it costs and shows


def test_workers_do_not_wait_for_torch(tmp_path):
    toy_collect(tmp_path / "data", toy_env.make_where_torch_is_not, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_a_bar_per_domain(tmp_path, capsys, workers):
    toy_collect(tmp_path / "data", transitions=50)
    assert capsys.readouterr().err == ""
    toy_collect(tmp_path / "data", progress=True, workers=workers)
    shown = capsys.readouterr().err
    for domain in ("fast_a", "fast_b"):
        assert f"collect {domain}" in shown
    assert "100/100" in shown


def test_importing_collect_imports_neither_torch_nor_dm_control():
    code = """
        import sys, crpt.collect
        late = {"torch", "dm_control", "mujoco", "OpenGL"} & set(sys.modules)
        assert not late, late
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
