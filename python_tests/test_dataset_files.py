"""Import and export of episodes: the layout of DrQ-v2, URLB and ExORL."""

import errno
import filecmp
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_episodes import directory, episode, imported, load, require_whole, same_files, save

from crpt.dataset import (
    episode_files,
    export_episodes,
    exporting,
    verify,
)
from crpt.interrupt import StopRequest
from crpt.replay import DatasetFullError, DomainSpec, ReplayBuffer
from crpt.replay import npy as storage


@pytest.mark.parametrize("stack", [1, 3])
def test_what_was_imported_is_what_the_files_say(tmp_path, stack):
    made = directory(tmp_path / "npz", stack=stack)
    done = imported(tmp_path / "ds", tmp_path / "npz", render="exact", action_repeat=2)
    assert (done.episodes, done.transitions, done.already_there, done.lost) == (4, 26, 0, {})
    buffer = ReplayBuffer.open(tmp_path / "ds")
    assert buffer.metadata == {"imported": True, "render": "exact", "action_repeat": 2}
    arrays, episodes = buffer.arrays("toy"), buffer.episodes("toy")
    assert buffer.capacity("toy") == buffer.cursor("toy") == 30
    for slots, source in zip(episodes, made, strict=True):
        newest = source["observation"][:, -3:]
        assert np.array_equal(arrays["frames"][slots], newest)
        assert np.array_equal(arrays["actions"][slots], source["action"])
        assert np.array_equal(arrays["rewards"][slots], source["reward"][:, 0])
        assert np.array_equal(arrays["discounts"][slots], source["discount"][:, 0])
        assert np.array_equal(arrays["states"][slots], source["physics"])
        batch = buffer.gather("toy", slots[1:], frame_stack=stack, pad=0)
        assert np.array_equal(batch.obs.numpy(), source["observation"][:-1])
        assert np.array_equal(batch.next_obs.numpy(), source["observation"][1:])
    require_whole(tmp_path / "ds", 4)


def test_export_gives_the_same_arrays_and_import_of_it_the_same_bytes(tmp_path):
    made = directory(tmp_path / "npz")
    imported(tmp_path / "a", tmp_path / "npz")
    done = export_episodes(tmp_path / "a", tmp_path / "out", domain="toy", progress=False)
    assert (done.episodes, done.transitions, done.left_out) == (4, 26, 0)
    files = sorted((tmp_path / "out").iterdir())
    for path, source in zip(files, made, strict=True):
        arrays = load(path)
        assert list(arrays) == ["observation", "action", "reward", "discount", "physics"]
        for key, array in arrays.items():
            assert array.dtype == source[key].dtype
            assert np.array_equal(array, source[key])
    imported(tmp_path / "b", tmp_path / "out")
    for name in DomainSpec(capacity=1, action_shape=()).fields():
        a, b = (tmp_path / x / "toy" / f"{name}.npy" for x in "ab")
        assert filecmp.cmp(a, b, shallow=False), name
    export_episodes(tmp_path / "b", tmp_path / "again", domain="toy", progress=False)
    assert same_files(tmp_path / "out", tmp_path / "again")


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    stack=st.integers(1, 4),
    state=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=15, deadline=None)
def test_round_trips(tmp_path_factory, lengths, stack, state):
    folder = tmp_path_factory.mktemp("round")
    made = [episode(n, i, stack=stack, state=state) for i, n in enumerate(lengths)]
    for i, arrays in enumerate(made):
        save(folder / "npz", i, arrays)
    imported(folder / "ds", folder / "npz")
    export_episodes(folder / "ds", folder / "out", domain="toy", frame_stack=stack, progress=False)
    for path, source in zip(sorted((folder / "out").iterdir()), made, strict=True):
        arrays = load(path)
        assert arrays.keys() == source.keys()
        assert all(np.array_equal(arrays[key], source[key]) for key in source)


def drqv2_batch(folder: Path, seed: int, nstep: int, discount: float):
    """One draw as DrQ-v2's loader makes it from such files: names, keys, rows and n steps."""
    rng = np.random.default_rng(seed)
    path = sorted(folder.glob("*.npz"))[rng.integers(len(list(folder.glob("*.npz"))))]
    index, length = (int(x) for x in path.stem.split("_")[1:])
    arrays = load(path)
    assert next(iter(arrays.values())).shape[0] - 1 == length
    row = rng.integers(0, length - nstep + 1) + 1
    reward, left = np.zeros_like(arrays["reward"][row]), np.ones_like(arrays["discount"][row])
    for i in range(nstep):
        reward += left * arrays["reward"][row + i]
        left *= arrays["discount"][row + i] * discount
    obs, next_obs = arrays["observation"][row - 1], arrays["observation"][row + nstep - 1]
    return index, row, obs, arrays["action"][row], reward, left, next_obs


def test_drqv2_reads_from_the_files_what_we_sample(tmp_path):
    directory(tmp_path / "npz", count=12)  # 10 and 11 sort behind 1 only by their stamps
    imported(tmp_path / "ds", tmp_path / "npz")
    export_episodes(tmp_path / "ds", tmp_path / "out", domain="toy", progress=False)
    names = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert [int(name.split("_")[1]) for name in names] == list(range(12))
    buffer = ReplayBuffer.open(tmp_path / "ds")
    episodes = buffer.episodes("toy")
    for seed in range(20):
        index, row, *theirs = drqv2_batch(tmp_path / "out", seed, 3, 0.9)
        end = episodes[index][row + 2 : row + 3]
        batch = buffer.gather("toy", end, n_step=3, gamma=0.9, pad=0)
        ours = (batch.obs, batch.action, batch.reward, batch.discount, batch.next_obs)
        for mine, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine[0].numpy(), their.squeeze(), rtol=1e-6, atol=1e-6)


def test_episodes_of_several_directories_and_those_added_later_come_once(tmp_path):
    for name, seeds in (("a", (0, 1)), ("b", (2, 3))):
        for seed in seeds:  # the same file names in both
            save(tmp_path / name, seed % 2, episode(5, seed))
    save(tmp_path / "b", 7, episode(5, 0))  # a copy of one of a's
    done = imported(tmp_path / "ds", tmp_path / "a", tmp_path / "b")
    assert (done.episodes, done.already_there) == (4, 1)
    save(tmp_path / "a", 2, episode(6, 9))
    done = imported(tmp_path / "ds", tmp_path / "a")
    assert (done.episodes, done.already_there) == (1, 2)
    buffer = ReplayBuffer.open(tmp_path / "ds")
    first_states = [buffer.arrays("toy")["states"][e[0], 0] for e in buffer.episodes("toy")]
    assert first_states == [
        episode(n, s)["physics"][0, 0] for n, s in ((5, 0), (5, 1), (5, 2), (5, 3), (6, 9))
    ]
    require_whole(tmp_path / "ds", 5)


def test_files_are_taken_in_the_order_of_recording(tmp_path):
    for index in (10, 9, 2):  # one second, as short episodes have it
        save(tmp_path / "npz", 0, episode(5, index), f"20260101T000000_{index}_5.npz")
    found = [path.name for path in episode_files.find([tmp_path / "npz"])]
    assert [int(name.split("_")[1]) for name in found] == [2, 9, 10]


def test_exorl_names_and_unknown_keys(tmp_path, caplog):
    arrays = {**episode(5, 1), "skill": np.zeros((6, 16), np.float32)}
    arrays["reward"] = arrays["reward"].astype(np.float64)[:, 0]
    save(tmp_path / "npz", 0, arrays, "episode_000000_5.npz")
    done = imported(tmp_path / "ds", tmp_path / "npz")
    assert done.lost == {"skill": 1}
    assert "skill of 1 files has no place in a dataset" in caplog.text


def test_values_in_the_row_that_says_nothing_are_told(tmp_path):
    arrays = episode(5, 1)
    arrays["reward"][0] = 3
    save(tmp_path / "npz", 0, arrays)
    done = imported(tmp_path / "ds", tmp_path / "npz")
    assert done.lost == {"row 0 of action, reward or discount": 1}
    assert ReplayBuffer.open(tmp_path / "ds").arrays("toy")["rewards"][0] == 0


def test_a_full_disk_leaves_whole_episodes(tmp_path, monkeypatch):
    directory(tmp_path / "npz", count=5)
    # Known ahead: nothing is written.
    needed = r"needs .* of disk"
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(DatasetFullError, match=needed):
            imported(tmp_path / "ds", tmp_path / "npz")
    # Filled by others meanwhile: the third of the files asks for room that is gone.
    calls = itertools.count()

    def full(file):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("crpt.dataset.importing.os.fsync", full)
        with pytest.raises(
            DatasetFullError,
            match=r"no room for .*imported\.jsonl; the episodes before .* whole: make",
        ):
            imported(tmp_path / "ds", tmp_path / "npz")
    require_whole(tmp_path / "ds", 2)
    assert imported(tmp_path / "ds", tmp_path / "npz").episodes == 3
    imported(tmp_path / "at_once", tmp_path / "npz")
    assert same_files(tmp_path / "ds" / "toy", tmp_path / "at_once" / "toy")


def test_an_error_within_an_episode_takes_it_back(tmp_path, monkeypatch):
    from crpt.replay import Writer

    directory(tmp_path / "npz", count=3)
    extend, calls = Writer.extend, itertools.count()

    def fail(self, frames, *rest, **more):
        if next(calls) == 1:
            extend(self, frames[:2], *(x[:2] for x in rest))
            raise OSError(errno.EIO, "Input/output error")
        extend(self, frames, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "extend", fail)
        with pytest.raises(OSError, match="Input/output"):
            imported(tmp_path / "ds", tmp_path / "npz")
    (report,) = verify(tmp_path / "ds")
    assert (report.episodes, report.steps, report.notes) == (1, 6, [])
    imported(tmp_path / "ds", tmp_path / "npz")
    require_whole(tmp_path / "ds", 3)


def test_a_kill_while_the_list_of_what_was_imported_is_put_in_order_loses_nothing(
    tmp_path, monkeypatch
):
    directory(tmp_path / "npz", count=3)
    imported(tmp_path / "ds", tmp_path / "npz")
    ledger = tmp_path / "ds" / "toy" / "imported.jsonl"
    lines = ledger.read_text()
    ledger.write_text(lines + '{"file": "killed before its episode.npz", "che')
    write = Path.write_text

    def killed(path, text, *rest, **more):
        if "imported" in path.name:
            write(path, text[: len(text) // 2])
            raise SystemExit("as if killed")
        return write(path, text, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(SystemExit):
            imported(tmp_path / "ds", tmp_path / "npz")
    assert imported(tmp_path / "ds", tmp_path / "npz").already_there == 3
    assert ledger.read_text() == lines


def test_import_survives_kill_9_at_any_moment(tmp_path):
    for i in range(60):
        save(tmp_path / "npz", i, episode(30, i))
    code = "import sys; from crpt.dataset import import_episodes as f; f(*sys.argv[1:2], "
    code += "sys.argv[2:], domain='toy', progress=False)"
    command = [sys.executable, "-c", code, str(tmp_path / "ds"), str(tmp_path / "npz")]
    cursor = tmp_path / "ds" / "toy" / "cursor"
    for kill in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = cursor.read_bytes() if cursor.exists() else bytes(8)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if cursor.exists() and cursor.read_bytes() > before:
                break
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for report in verify(tmp_path / "ds"):
            assert report.problems == []
            assert report.steps - 31 < 31 * report.episodes <= report.steps
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    imported(tmp_path / "at_once", tmp_path / "npz")
    (tmp_path / "ds" / "toy" / "epoch").write_bytes(bytes(8))  # counts what kills left
    assert same_files(tmp_path / "ds" / "toy", tmp_path / "at_once" / "toy")


def test_ctrl_c_ends_between_two_episodes(tmp_path, monkeypatch):
    from crpt.interrupt import Interrupted

    directory(tmp_path / "npz")
    asked = itertools.count()
    monkeypatch.setattr(
        StopRequest,
        "requested",
        property(lambda self: next(asked) >= 2, lambda self, value: None),
        raising=False,
    )
    with pytest.raises(Interrupted, match="2 more episodes of toy are in"):
        imported(tmp_path / "ds", tmp_path / "npz")
    require_whole(tmp_path / "ds", 2)


def test_export_leaves_out_what_is_not_whole(tmp_path):
    spec = DomainSpec(capacity=20, action_shape=(1,), frame_shape=(3, 4, 4))
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": spec})
    frame = np.zeros((3, 4, 4), np.uint8)
    with buffer.writer("toy") as writer:
        for last in (True, True, True, True, False):
            writer.begin(frame)
            for n in range(4):
                writer.append(frame + n, [n], n, 1, last=last and n == 3)
        done = export_episodes(tmp_path / "ds", tmp_path / "out", domain="toy", progress=False)
    assert (done.episodes, done.left_out) == (3, 1)
    assert "physics" not in load(sorted((tmp_path / "out").iterdir())[0])


def test_export_refuses_what_is_there_and_leaves_nothing_half(tmp_path, monkeypatch):
    directory(tmp_path / "npz")
    imported(tmp_path / "ds", tmp_path / "npz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    def export(domain="toy", **more):
        return export_episodes(
            tmp_path / "ds", tmp_path / "out", domain=domain, progress=False, **more
        )

    with pytest.raises(FileExistsError, match=r"out already exists"):
        export()
    (tmp_path / "out" / "mine").unlink()
    with pytest.raises(ValueError, match=r"domain should be one of \['toy'\], got 'joy'"):
        export("joy")
    with pytest.raises(ValueError, match="frame_stack should be at least 1, got 0"):
        export(frame_stack=0)
    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:

        def full(path, arrays):
            if "_2_" in path.name:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            episode_files.write(path, arrays)

        patch.setattr(exporting, "episode_files", type("files", (), {"write": staticmethod(full)}))
        with pytest.raises(DatasetFullError, match=r"no room for .*_2_7.npz; nothing was left"):
            export()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert export().episodes == 4
