"""`python -m crpt.dataset info` and `verify`."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_replay import filled, frame, write_episode

from crpt.dataset import describe, verify
from crpt.replay import (
    DatasetCorruptError,
    DatasetLockedError,
    DatasetVersionError,
    DomainSpec,
    ReplayBuffer,
)

STEPS = 28  # four episodes of six transitions


@pytest.fixture
def dataset(tmp_path) -> Path:
    filled(tmp_path / "ds")
    return tmp_path / "ds"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python -m crpt.dataset` in this process: exit code, output, errors."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crpt.dataset", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("crpt.dataset", run_name="__main__")
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def change(dataset: Path, name: str, slot, value) -> None:
    np.load(dataset / "toy" / f"{name}.npy", mmap_mode="r+")[slot] = value


def test_a_whole_dataset(dataset):
    (report,) = verify(dataset)
    assert (report.domain, report.steps, report.transitions, report.episodes) == ("toy", 28, 24, 4)
    assert report.problems == []
    # The first frame of toy_replay's first episode is all zeros.
    assert report.notes == ["1 frames are all black: so they were drawn, or a power cut took them"]


@pytest.mark.parametrize(
    ("name", "slot", "value", "message"),
    [
        ("stamps", 9, 0, "1 steps were counted, but are not there: 9 (slot 9)"),
        ("stamps", 9, 5, "1 steps were counted, but are not there: 9 (slot 9)"),
        ("stamps", 9, (1 << 63) + 10, "1 steps were counted, but are not there: 9 (slot 9)"),
        ("stamps", slice(7, 14), 0, "7 steps were counted, but are not there: 7 (slot 7), 8"),
        ("stamps", 27, 0, "1 steps were counted, but are not there: 27 (slot 27)"),
        ("stamps", 40, 41, "1 steps are there that the cursor does not count"),
        ("previous", 9, 10, "1 steps follow no older step of the ring: 9 (slot 9)"),
        ("previous", 9, 9, "1 steps follow no older step of the ring: 9 (slot 9)"),
        ("previous", 9, 7, "1 steps are followed by more than one step: 7 (slot 7)"),
        ("previous", 7, 6, "1 steps are first ones, but follow a step: 7 (slot 7)"),
        ("is_first", 7, 0, "1 steps follow no older step of the ring: 7 (slot 7)"),
        ("is_first", 9, 1, "1 steps are first ones, but follow a step: 9 (slot 9)"),
        ("is_last", 9, 1, "1 steps follow the last step of an episode: 10 (slot 10)"),
        ("is_last", 7, 1, "1 steps are both the first and the last of an episode: 7 (slot 7)"),
        ("rewards", 9, np.nan, "1 steps have a reward that is not finite: 9 (slot 9)"),
        ("rewards", 7, 1, "1 steps are first ones, but have an action, reward or discount: 7"),
        ("discounts", 9, np.nan, "1 steps have a discount outside [0, 1]: 9 (slot 9)"),
        ("discounts", 9, 1.5, "1 steps have a discount outside [0, 1]: 9 (slot 9)"),
        ("actions", 9, np.inf, "1 steps have an action that is not finite: 9 (slot 9)"),
    ],
)
def test_every_kind_of_damage_is_found_and_located(dataset, name, slot, value, message):
    change(dataset, name, slot, value)
    (report,) = verify(dataset)
    assert any(problem.startswith(message) for problem in report.problems), report.problems


def test_a_flag_that_is_no_truth_value(dataset):
    flags = np.load(dataset / "toy" / "is_last.npy", mmap_mode="r+")
    flags.view(np.uint8)[9] = 7
    (report,) = verify(dataset)
    assert "1 steps have an is_last that is neither 0 nor 1: 9 (slot 9)" in report.problems


def test_many_are_counted_and_some_named(dataset):
    change(dataset, "rewards", slice(1, 7), np.inf)
    (report,) = verify(dataset)
    assert report.problems == [
        "6 steps have a reward that is not finite: 1 (slot 1), 2 (slot 2), 3 (slot 3), "
        "4 (slot 4), 5 (slot 5), ..."
    ]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("frames.npy", cut, "frames.npy is cut short: it should have"),
        ("rewards.npy", Path.unlink, "rewards.npy is missing"),
        ("is_last.npy", lambda p: p.write_bytes(bytes(500)), "is_last.npy is not a .npy file"),
        ("states.npy", lambda p: shutil.copy(p.with_name("frames.npy"), p), "states.npy should ho"),
        ("cursor", cut, "cursor should have 8 bytes, got 7"),
        ("epoch", lambda p: p.write_bytes(bytes(9)), "epoch should have 8 bytes, got 9"),
        ("cursor", Path.unlink, "cursor is missing"),
        ("cursor", lambda p: p.write_bytes(b"\xff" * 8), "cursor should count the steps, got 1844"),
        ("cursor", lambda p: p.write_bytes((50).to_bytes(8, "little")), "22 steps were counted"),
        ("cursor", lambda p: p.write_bytes((9).to_bytes(8, "little")), "18 steps are there that"),
    ],
)
def test_damaged_files_are_listed_rather_than_raised(dataset, name, spoil, message):
    spoil(dataset / "toy" / name)
    (report,) = verify(dataset)
    assert any(message in problem for problem in report.problems), report.problems


def test_several_damages_and_domains_are_all_listed(dataset):
    buffer = ReplayBuffer.open(dataset)
    buffer.add_domain("other", DomainSpec(capacity=3, action_shape=(), frame_shape=(1, 2, 2)))
    buffer.add_domain("gone", DomainSpec(capacity=3, action_shape=(), frame_shape=(1, 2, 2)))
    shutil.rmtree(dataset / "gone")
    cut(dataset / "toy" / "frames.npy")
    cut(dataset / "toy" / "rewards.npy")
    gone, other, toy = verify(dataset)
    assert (other.domain, other.problems) == ("other", [])
    assert "gone is missing" in gone.problems[0]
    assert len(toy.problems) == 2


def test_what_is_as_it_may_be_is_noted(dataset):
    with ReplayBuffer.open(dataset).writer("toy") as writer:
        writer.begin(frame(1))
        writer.append(frame(2), [0, 0], 0, 1, [np.nan])
    with (dataset / "toy" / "frames.npy").open("ab") as file:
        file.write(bytes(16))
    (dataset / "toy" / "mine.txt").touch()
    change(dataset, "stamps", 30, 31)  # whole, but its writer was killed before it counted it
    (report,) = verify(dataset)
    assert report.problems == []
    assert (report.steps, report.transitions, report.episodes) == (30, 25, 4)
    notes = "\n".join(report.notes)
    for text in (
        "mine.txt is no file of a dataset",
        "frames.npy is 16 bytes longer than needed: a resize was cut short",
        "1 slots hold the beginning of a step that was not committed",
        "1 episodes have no last step: still open, or cut",
        "1 steps have a simulator state that is not finite",
    ):
        assert text in notes


def test_a_roll_back_that_was_killed_is_no_damage(dataset):
    with ReplayBuffer.open(dataset).writer("toy") as writer:
        writer.begin(frame(1))
        for n in range(4):
            writer.append(frame(n), [0, 0], 0, 1)
    (dataset / "toy" / "epoch").write_bytes((1).to_bytes(8, "little"))
    change(dataset, "stamps", slice(30, 33), 0)
    (report,) = verify(dataset)
    assert report.problems == []
    assert "3 steps of a cut episode are being dropped; the next writer goes on" in report.notes
    ReplayBuffer.open(dataset).writer("toy").close()
    (report,) = verify(dataset)
    assert (report.problems, report.steps) == ([], STEPS)


@pytest.mark.parametrize("capacity", [9, 13, 28])
def test_a_ring_that_has_wrapped(tmp_path, capacity):
    filled(tmp_path / "ds", capacity=capacity)
    (report,) = verify(tmp_path / "ds")
    assert report.problems == []
    assert report.steps == capacity
    buffer = ReplayBuffer.open(tmp_path / "ds")
    assert report.transitions == buffer.num_transitions("toy", frame_stack=1)
    assert report.episodes == sum(len(e) == 7 for e in buffer.episodes("toy", frame_stack=1))
    change(tmp_path / "ds", "stamps", 3, 4 if capacity < 28 else 0)
    (report,) = verify(tmp_path / "ds")
    assert any("are not there" in problem for problem in report.problems)


def test_shared_writers_episodes_lie_between_each_other_and_leave_gaps(tmp_path):
    spec = DomainSpec(capacity=40, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": spec})
    with buffer.writer("toy", shared=True) as a, buffer.writer("toy", shared=True) as b:
        for writer, n in ((a, 10), (b, 50)):
            writer.begin(frame(n))
        for n in range(5):
            for writer in (a, b):
                writer.append(frame(n), [n, n], n, 1, last=n == 4)
        write_episode(a, 60, 3)
    (report,) = verify(tmp_path / "ds")
    assert report.problems == []
    assert (report.steps, report.transitions, report.episodes) == (16, 13, 3)
    # A third one took a ticket and died.
    (tmp_path / "ds" / "toy" / "cursor").write_bytes((18).to_bytes(8, "little"))
    change(tmp_path / "ds", "stamps", 16, (1 << 63) + 17)
    (report,) = verify(tmp_path / "ds")
    assert report.problems == [
        "2 steps were counted, but are not there: 16 (slot 16), 17 (slot 17)"
    ]
    (report,) = verify(tmp_path / "ds", gaps=True)
    assert report.problems == []
    assert report.notes[0].startswith("2 steps were never finished, 1 of them begun")


def test_tickets_that_shared_writers_gave_up_are_no_gaps(tmp_path):
    spec = DomainSpec(capacity=1000, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": spec})
    with buffer.writer("toy", shared=True) as a, buffer.writer("toy", shared=True) as b:
        for writer in (a, b):
            writer.begin(frame(1))
        for n in range(100):
            for writer in (a, b):
                writer.append(frame(n + 1), [n, n], n, 1, last=n == 99)
    taken = buffer.cursor("toy")
    assert taken > 202  # some in advance
    (report,) = verify(tmp_path / "ds")
    assert (report.problems, report.notes) == ([], [])
    assert (report.steps, report.transitions, report.episodes) == (202, 200, 2)
    # Not one that was written and lost.
    change(tmp_path / "ds", "stamps", 5, 0)
    (report,) = verify(tmp_path / "ds")
    assert report.problems[0].startswith("1 steps were counted, but are not there: 5 (slot 5)")


def test_it_does_not_judge_what_is_being_written_nor_what_it_cannot_read(dataset):
    buffer = ReplayBuffer.open(dataset)
    with buffer.writer("toy"), pytest.raises(DatasetLockedError, match="is being written"):
        verify(dataset)
    with pytest.raises(DatasetCorruptError, match="is not a dataset"):
        verify(dataset.parent)
    manifest = json.loads((dataset / "dataset.json").read_text())
    manifest["format_version"] += 1
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetVersionError, match="upgrade crpt"):
        verify(dataset)


def test_verify_says_it_in_its_exit_code(dataset, command):
    code, out, _ = command("verify", dataset)
    assert code == 0
    assert "toy: whole; 24 transitions in 4 whole episodes, 28 steps" in out
    change(dataset, "rewards", 9, np.nan)
    code, out, _ = command("verify", dataset)
    assert code == 1
    assert "toy: 1 problems" in out
    assert "PROBLEM: 1 steps have a reward that is not finite: 9 (slot 9)" in out
    assert "restore it from a copy" in out
    code, _, err = command("verify", dataset.parent)
    assert code == 1
    assert "is not a dataset: it has no dataset.json" in err


def test_info_of_every_domain(dataset, command):
    described = describe(dataset)
    toy = described["domains"]["toy"]
    expected = {
        "transitions": 24, "episodes": 4, "open_or_cut_episodes": 0, "terminated_episodes": 2,
        "frame_shape": [1, 4, 4], "action_shape": [2], "state_shape": [1], "capacity": 100,
        "overwritten_steps": 0, "camera": None,
    }  # fmt: skip
    assert {key: toy[key] for key in expected} == expected
    # Rewards count up by one from the episode's number times ten.
    assert toy["mean_return"] == np.mean([sum(range(10 * e + 1, 10 * e + 7)) for e in range(4)])
    files = list((dataset / "toy").iterdir())
    assert toy["bytes_on_disk"] == sum(path.stat().st_blocks * 512 for path in files)
    code, out, _ = command("info", dataset, "--json")
    assert code == 0
    assert json.loads(out) == described


def test_info_as_a_table(tmp_path, command):
    spec = DomainSpec(capacity=9, action_shape=(2,), frame_shape=(1, 4, 4), camera="side")
    metadata = {"seed": 3, "render": "fast", "versions": {"mujoco": "3.17", "numpy": "2"}}
    buffer = ReplayBuffer.create(tmp_path / "ds", {"Pong-v5": spec, "empty": spec}, metadata)
    with buffer.writer("Pong-v5") as writer:
        for _ in range(3):
            writer.begin(frame(1))
            for n in range(4):
                writer.append(frame(1), [0, 0], 1.5, 1, last=n == 3)
    code, out, _ = command("info", tmp_path / "ds")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["domain", "transitions", "episodes"]
    assert lines[2][:7] == ["Pong-v5", "7", "1", "6.0", "1×4×4", "2", "-"]
    assert lines[3][:4] == ["empty", "0", "0", "-"]
    for text in (
        "seed: 3", "render: fast", "versions: mujoco 3.17, numpy 2", "Pong-v5: camera side",
        "Pong-v5: 6 older steps were overwritten", "format version 2",
    ):  # fmt: skip
        assert text in out


def test_a_run_directory_stands_for_its_dataset(dataset, command):
    run = dataset.parent / "run"
    run.mkdir()
    dataset.rename(run / "dataset")
    assert "toy" in command("info", run)[1]
    assert command("verify", run)[:2] == command("verify", run / "dataset")[:2]
    code, out, _ = command("export", run, run / "episodes", "--domain", "toy")
    assert (code, len(list((run / "episodes").glob("*.npz")))) == (0, 4), out
    filled(run.parent / "own")
    filled(run.parent / "own" / "dataset", episodes=1)
    assert "24" in command("info", run.parent / "own")[1]  # a dataset is itself
    code, _, err = command("info", run.parent)
    assert code == 1
    assert "is not a dataset: it has no dataset.json" in err


def test_help_and_wrong_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("info", "verify", "import", "export"):
        assert f"\n  {name} " in out
        assert command(name, "--help")[0] == 0
    assert command()[0] == 2
    code, _, err = command("inform", "ds")
    assert code == 2
    assert "command should be info | verify | import | export, got inform" in err


def test_import_and_export_by_command(tmp_path, dataset, command):
    code, out, _ = command("export", dataset, tmp_path / "out", "--domain", "toy")
    assert (code, out.strip()) == (0, f"toy: 4 episodes, 24 transitions in {tmp_path / 'out'}")
    code, _, err = command("export", dataset, tmp_path / "out", "--domain", "toy")
    assert code == 1
    assert "already exists; export into another directory" in err
    again = tmp_path / "again"
    flags = ("--domain", "toy", "--action-repeat", "2")
    code, out, _ = command("import", again, tmp_path / "out", *flags)
    assert code == 0
    assert "toy: 4 episodes, 24 transitions imported" in out
    code, out, _ = command("import", again, tmp_path / "out", *flags)
    assert "toy: 0 episodes, 0 transitions imported" in out
    assert "4 were there already" in out
    assert ReplayBuffer.open(again).metadata["action_repeat"] == 2
    assert command("verify", again)[0] == 0
    for arguments, message in (
        (("--domain", "a b"), "domain should be letters, digits"),
        (("--domain", "a", "--action-repeat", "0"), "action_repeat should be at least 1, got 0"),
        (("--domain", "a", "--action-repeat", "4"), "with action_repeat 2, got 4"),
    ):
        code, _, err = command("import", again, tmp_path / "out", *arguments)
        assert code == 1
        assert message in err
