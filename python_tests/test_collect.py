"""Collecting: what is recorded, and the same bytes whatever stops it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import toy_env
from toy_collect import contents, toy_collect

from crpt.collect import random_play, workers

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
    for count in (2, 3, 5):
        toy_collect(tmp_path / f"{count} workers", workers=count)
        toy_collect(tmp_path / f"{count} at one", domains=("fast_a",), workers=count)
        assert contents(tmp_path / f"{count} workers") == expected
        one = contents(tmp_path / f"{count} at one" / "fast_a")
        assert one == contents(tmp_path / "reference" / "fast_a")
    for transitions in (1, 30, 31, 99, 100):
        toy_collect(tmp_path / "extended", transitions=transitions, workers=1 + transitions % 2)
    toy_collect(tmp_path / "by domain", domains=("fast_b",))
    toy_collect(tmp_path / "by domain")
    for name in ("again", "extended", "by domain"):
        assert contents(tmp_path / name) == expected, name


def test_a_finished_dataset_is_left_alone(tmp_path):
    toy_collect(tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")}

    def never(*_, **__):
        raise AssertionError("nothing is left to collect")

    toy_collect(tmp_path / "data", make_env=never)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*")} == before


def test_the_bytes_do_not_depend_on_the_memory_for_what_waits(tmp_path, monkeypatch):
    toy_collect(tmp_path / "reference")
    monkeypatch.setattr(workers, "_BYTES_KEPT", 0)
    monkeypatch.setattr(workers, "_LEAST_BYTES_KEPT", 3 * toy_env.SIZE**2)  # one frame
    toy_collect(tmp_path / "data", workers=3)
    assert contents(tmp_path / "data") == contents(tmp_path / "reference")


def test_frames_drawn_into_the_same_array_are_kept_apart(tmp_path):
    toy_collect(tmp_path / "reference")
    toy_collect(tmp_path / "data", toy_env.make_reusing, workers=3)
    assert contents(tmp_path / "data") == contents(tmp_path / "reference")


# What it costs and shows


def test_workers_share_one_domain(tmp_path, monkeypatch):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    monkeypatch.setenv(toy_env.MEETING, str(meeting))
    # One process alone would wait in vain, and raise.
    toy_collect(
        tmp_path / "data", toy_env.make_meeting, domains=("one",), transitions=600, workers=2
    )
    assert len(list(meeting.iterdir())) == 2


def test_auto_starts_no_process_for_little(tmp_path, monkeypatch):
    def none(*_, **__):
        raise AssertionError("one process is enough")

    monkeypatch.setattr("crpt.collect.record_in_processes", none)
    toy_collect(tmp_path / "data", domains=("fast_a",), workers="auto")
    monkeypatch.setattr("crpt.collect.os.sched_getaffinity", lambda process: {0, 1, 2})
    with pytest.raises(AssertionError, match="one process is enough"):
        toy_collect(tmp_path / "more", transitions=101, workers="auto")


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
