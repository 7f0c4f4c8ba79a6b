"""Collecting is killed, again and again, and no byte changes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_env
from toy_collect import contents, toy_collect

from crpt.collect import collect
from crpt.config import CollectConfig
from crpt.replay import ReplayBuffer

HERE = Path(__file__).parent

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


@pytest.mark.parametrize(
    ("workers", "kill"),
    [
        (1, kill_all),
        (2, kill_parent),
        pytest.param(3, kill_all, marks=pytest.mark.slow),
        pytest.param(5, kill_parent, marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_any_moment_changes_no_byte(tmp_path, workers, kill):
    config = {"domains": ("slow_a", "slow_b"), "transitions": 200, "image_size": toy_env.SIZE}
    toy_collect(tmp_path / "whole", **config)
    path = tmp_path / "killed"
    kills = 0
    for more in (1, 57, 130):
        process = start_script(path, "toy_env", "make", workers=workers, **config)
        kills += run_and_kill(process, path, more, kill)
    assert kills == 3
    toy_collect(path, workers=4 - workers % 3, **config)
    assert contents(path) == contents(tmp_path / "whole")


def kill_one(workers: list[int], rng: random.Random) -> bool:
    try:
        os.kill(rng.choice(workers), signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return False  # it is all over
    return True


def workers_of(process: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for pid in listed:
        try:
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.parametrize("workers", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5))])
def test_kill_9_of_workers_changes_no_byte(tmp_path, workers):
    config = {"domains": ("slow_a", "slow_b"), "transitions": 600, "image_size": toy_env.SIZE}
    toy_collect(tmp_path / "whole", **config, workers=2)
    path = tmp_path / "killed"
    process = start_script(path, "toy_env", "make", workers=workers, **config)
    rng = random.Random(workers)
    kills, seen = 0, 0
    while process.poll() is None:
        done = transitions_on_disk(path)
        if done > seen:
            time.sleep(rng.uniform(0, 0.05))
            kills += kill_one(workers_of(process), rng)
            seen = done + rng.randrange(150, 300)  # so that a new one gets somewhere
        time.sleep(0.005)
    stderr = process.stderr.read()
    assert process.returncode == 0, stderr
    assert kills > 2
    assert stderr.count("died (SIGKILL), perhaps out of memory; starting another") >= 1
    assert contents(path) == contents(tmp_path / "whole")


def test_a_worker_that_dies_between_writing_and_saying_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "mark"))
    toy_collect(tmp_path / "data", toy_env.make_dying_when_written, workers=2)
    assert (tmp_path / "mark").exists()
    assert "died (SIGKILL)" in caplog.text
    toy_collect(tmp_path / "whole")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.mark.slow
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


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    config = {"domains": ("hangs_always", "slow_a"), "transitions": 5000, "image_size": 6}
    process = start_script(tmp_path / "data", "toy_env", "make_stuck", workers=2, **config)
    workers: list[int] = []
    while len(workers) < 2 or transitions_on_disk(tmp_path / "data") == 0:
        assert process.poll() is None
        workers = workers_of(process)
        time.sleep(0.02)
    kill_parent(process)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_quietly(tmp_path):
    config = {"domains": ("slow_a", "slow_b"), "transitions": 5000, "image_size": toy_env.SIZE}
    path = tmp_path / "data"
    process = start_script(path, "toy_env", "make", workers=2, **config)

    def ctrl_c(process):
        os.killpg(process.pid, signal.SIGINT)

    assert run_and_kill(process, path, 50, ctrl_c)
    _, stderr = process.communicate(timeout=10)
    assert stderr.count("Traceback") == 1, stderr  # the script's own, not its workers'
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert transitions_on_disk(path) >= 50
