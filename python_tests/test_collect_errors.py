"""Collecting: what the user is told when something goes wrong, and what is kept."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_env
from gymnasium.spaces import Box
from toy_collect import contents, toy_collect

from crpt import envs
from crpt.collect import DatasetMismatchError, collect, random_play, watch
from crpt.config import CollectConfig
from crpt.replay import DatasetFullError, DatasetLockedError, ReplayBuffer

HERE = Path(__file__).parent


def test_other_settings_are_refused_field_by_field(tmp_path):
    toy_collect(tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(DatasetMismatchError, match=r"seed 5 there, 6 here.*into another directory"):
        toy_collect(tmp_path / "data", seed=6)
    with pytest.raises(DatasetMismatchError, match="render 'exact' there, 'fast' here"):
        toy_collect(tmp_path / "data", render="fast")
    with pytest.raises(DatasetMismatchError, match="action_repeat 2 there, 4 here; episode_length"):
        toy_collect(tmp_path / "data", action_repeat=4, episode_length=7)
    with pytest.raises(ValueError, match=r"at least the 100 .* got 99"):
        toy_collect(tmp_path / "data", transitions=99)
    assert contents(tmp_path / "data") == before


def test_other_packages_are_told(tmp_path, caplog):
    toy_collect(tmp_path / "data")
    manifest = tmp_path / "data" / "dataset.json"
    manifest.write_text(re.sub(r'"mujoco": ".*"', '"mujoco": "3.16.0"', manifest.read_text()))
    toy_collect(tmp_path / "data")
    assert caplog.text == ""  # nothing was added
    toy_collect(tmp_path / "data", transitions=101)
    assert "was begun with other packages (mujoco '3.16.0' there, '" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ()}, "domains should have at least one name, got none"),
        ({"domains": ("a", "a")}, r"domains should be different, got \['a', 'a'\]"),
        ({"transitions": 0}, "transitions should be at least 1, got 0"),
        ({"episode_length": 0}, "episode_length should be at least 1, got 0"),
        ({"workers": 0}, "workers should be auto or at least 1, got 0"),
        ({"seed": -1}, "seed should be at least 0, got -1"),
    ],
)
def test_a_config_out_of_range_makes_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        toy_collect(tmp_path / "data", **changes)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_environment_is_named_and_the_others_keep_their_data(tmp_path, workers):
    with pytest.raises(
        random_play.CollectError, match="collecting broken failed: KeyError: 'the arm fell off'"
    ):
        toy_collect(
            tmp_path / "data",
            toy_env.make_failing,
            domains=("fast_a", "broken", "fast_b"),
            workers=workers,
        )
    buffer = toy_collect(tmp_path / "data", domains=("fast_a", "fast_b"))
    toy_collect(tmp_path / "reference")
    for domain in ("fast_a", "fast_b"):
        assert buffer.num_transitions(domain) == 100
        assert contents(tmp_path / "data" / domain) == contents(tmp_path / "reference" / domain)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unknown_task_is_explained(tmp_path, workers):
    config = CollectConfig(domains=("cheeta_run", "walker_runs"), transitions=5, workers=workers)
    with pytest.raises(random_play.CollectError, match=r"cheetah_run|walker_run"):
        collect(config, tmp_path / "data", seed=0, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there_before(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(random_play.CollectError):
        toy_collect(tmp_path / "data", toy_env.make_failing, domains=("broken",))
    assert (tmp_path / "data").exists()
    toy_collect(tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(random_play.CollectError):
        toy_collect(tmp_path / "data", toy_env.make_failing, domains=("broken",))
    assert contents(tmp_path / "data") == before


def test_no_opengl_in_a_worker_is_the_one_clear_message(tmp_path):
    with pytest.raises(envs.RenderingUnavailableError, match="apt-get install -y libegl1") as error:
        toy_collect(tmp_path / "data", toy_env.make_without_gl, workers=2)
    assert "in a worker process" in error.value.__notes__[0]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_worker_that_ends_is_replaced_and_no_byte_changes(tmp_path, monkeypatch, how, caplog):
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(watch, "_PATIENCE", 1.5)
    domains = (f"{how}_once", "fast_b")
    buffer = toy_collect(tmp_path / "data", toy_env.make_ending, domains=domains, workers=2)
    assert (tmp_path / "mark").exists()
    expected = "SIGKILL" if how == "dies" else "no progress for 2 s"
    assert f"recording {how}_once" in caplog.text
    assert expected in caplog.text
    toy_collect(tmp_path / "whole", domains=domains)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert buffer.num_transitions(f"{how}_once") == 100


def test_workers_that_die_often_but_get_further_are_carried_through(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "mark"))
    changes = {"domains": ("dies_often", "fast_b"), "transitions": 70}
    toy_collect(tmp_path / "data", toy_env.make_ending, workers=2, **changes)
    toy_collect(tmp_path / "whole", **changes)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_worker_that_always_dies_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "mark"))
    with pytest.raises(
        random_play.CollectError, match=r"dies_always died \(SIGKILL\).*3 times.*fewer workers"
    ):
        toy_collect(
            tmp_path / "data", toy_env.make_ending, domains=("dies_always", "fast_b"), workers=2
        )


def test_a_full_disk_is_told_before_anything_is_collected(tmp_path):
    with pytest.raises(DatasetFullError, match="make room, or choose another directory"):
        toy_collect(tmp_path / "data", transitions=10**13)


def test_an_environment_without_bounded_actions_is_refused(tmp_path):
    def make(domain, **_):
        env = toy_env.ToyEnv(domain)
        env.action_space = Box(-np.inf, np.inf, (2,), np.float32)
        return env

    with pytest.raises(random_play.CollectError, match="bounded Box of actions"):
        toy_collect(tmp_path / "data", make)


def test_a_make_env_that_cannot_be_sent_to_workers(tmp_path):
    with pytest.raises(TypeError, match=r"function of a module.*or workers should be 1"):
        toy_collect(tmp_path / "data", lambda domain, **_: toy_env.ToyEnv(domain), workers=2)
    toy_collect(tmp_path / "data", lambda domain, **_: toy_env.ToyEnv(domain), workers=1)


def test_a_make_env_of_the_main_script_reaches_the_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import functools, sys
sys.path.insert(0, {str(HERE)!r})
import toy_env
from crpt.collect import collect
from crpt.config import CollectConfig

def make(scale, domain, **settings):
    return toy_env.make(domain, **settings)

if __name__ == "__main__":
    config = CollectConfig(domains=("fast_a", "fast_b"), transitions=100, image_size=6, workers=2)
    make_env = functools.partial(make, 1.0)
    collect(config, {str(tmp_path / "data")!r}, seed=5, make_env=make_env, progress=False)
""")
    subprocess.run([sys.executable, str(script)], check=True)
    toy_collect(tmp_path / "reference")
    assert contents(tmp_path / "data") == contents(tmp_path / "reference")


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path):
    config = {"transitions": 1500, "workers": 2}
    with pytest.raises(DatasetFullError, match=r"what was committed is whole.*the same command"):
        toy_collect(tmp_path / "data", toy_env.make_on_a_full_disk, **config)
    kept = ReplayBuffer.open(tmp_path / "data")
    assert max(kept.num_transitions(domain) for domain in kept.domains) > 500
    toy_collect(tmp_path / "data", **config)
    toy_collect(tmp_path / "whole", **config)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_two_collections_into_one_dataset_are_kept_apart(tmp_path):
    toy_collect(tmp_path / "data")
    with (tmp_path / "data" / ".collecting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DatasetLockedError, match="being collected by another process"):
            toy_collect(tmp_path / "data", transitions=101)
    toy_collect(tmp_path / "data", transitions=101)


def test_an_error_in_an_episode_that_is_not_needed_is_none(tmp_path):
    """Three processes play ahead; the first episode has all that is asked for."""
    toy_collect(
        tmp_path / "data",
        toy_env.make_failing_later,
        domains=("slow_a",),
        transitions=3,
        workers=3,
    )
    toy_collect(tmp_path / "whole", domains=("slow_a",), transitions=3)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
