import fcntl
import json
import os
from dataclasses import dataclass, field, replace

import pytest
import torch

from crpt.config import RESUMABLE, CollectConfig
from crpt.files import DiskFullError, replace_file
from crpt.run_directory import (
    STAGE_LEAVES,
    CheckpointError,
    ConfigMismatchError,
    RunDirectory,
    RunDirectoryBusyError,
    RunFileError,
)


@dataclass(frozen=True)
class Config:
    domains: tuple[str, ...] = ("a", "b")
    rate: float = 0.1
    workers: int = field(default=1, metadata=RESUMABLE)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def leave(run, *stages):
    """What makes a stage's section binding."""
    for stage in stages:
        path = run.path / STAGE_LEAVES[stage].replace("*", "a")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_same_config_may_be_claimed_again(run):
    run.claim({"seed": 0, "collect": Config()})
    leave(run, "collect")
    run.claim({"seed": 0, "collect": Config()})
    assert run.read_config() == {
        "seed": 0,
        "collect": {"domains": ["a", "b"], "rate": 0.1, "workers": 1},
    }


def test_another_config_is_refused_with_every_field_that_differs(run):
    run.claim({"seed": 0, "collect": Config()})
    leave(run, "collect")
    before = run.config_file.read_bytes()
    with pytest.raises(ConfigMismatchError) as error:
        run.claim({"seed": 1, "collect": Config(domains=("a",), workers=7)})
    message = str(error.value)
    assert "collect.domains: ['a', 'b'] -> ['a']" in message
    assert "seed: 0 -> 1" in message
    assert "workers" not in message
    assert "rate" not in message
    assert run.config_file.read_bytes() == before


def test_a_stage_that_left_nothing_binds_nobody(run):
    run.claim({"seed": 0, "collect": Config(domains=("mistyped",))})
    run.claim({"seed": 1, "collect": Config()})
    assert run.read_config()["collect"]["domains"] == ["a", "b"]
    leave(run, "collect")
    run.claim({"seed": 1, "collect": Config(), "pretrain": Config(rate=0.3)})
    run.claim({"seed": 1, "pretrain": Config(rate=0.4)})  # nothing trained yet
    leave(run, "pretrain")
    with pytest.raises(ConfigMismatchError, match=r"pretrain\.rate: 0\.4 -> 0\.5"):
        run.claim({"seed": 1, "pretrain": Config(rate=0.5)})


def test_inputs_are_bound_with_their_stage(run):
    run.claim({"pretrain": Config(), "pretrain_input": {"dataset": {"a": 10}}})
    leave(run, "pretrain")
    with pytest.raises(ConfigMismatchError, match=r"pretrain_input\.dataset\.a: 10 -> None"):
        run.claim({"pretrain": Config(), "pretrain_input": {"dataset": {"b": 10}}})


def test_check_compares_and_writes_nothing(run):
    run.check({"collect": Config()})
    assert not run.config_file.exists()


def test_a_resumable_field_may_change(run):
    run.claim({"collect": Config()})
    leave(run, "collect")
    run.claim({"collect": replace(Config(), workers=4)})
    assert run.read_config()["collect"]["workers"] == 4


def test_more_play_may_be_asked_for_until_an_encoder_is_trained_on_it(run):
    config = CollectConfig(domains=("a", "b"), transitions=300)
    more = replace(config, domains=("b", "c", "a"), transitions=500)
    run.claim({"collect": config})
    leave(run, "collect")
    run.claim({"collect": more})
    assert run.read_config()["collect"]["transitions"] == 500
    with pytest.raises(ConfigMismatchError) as error:
        run.check({"collect": config})
    assert "collect.transitions: 500 -> 300" in str(error.value)
    assert "collect.domains: ['b', 'c', 'a'] -> ['a', 'b']" in str(error.value)
    leave(run, "pretrain")
    run.check({"collect": more})
    with pytest.raises(ConfigMismatchError, match=r"collect\.transitions: 500 -> 501"):
        run.check({"collect": replace(more, transitions=501)})


def test_a_field_that_one_version_lacks_differs(run):
    run.claim({"collect": Config()})
    leave(run, "collect")
    config = run.read_config()
    del config["collect"]["rate"]
    run.write_json("config.json", config)
    with pytest.raises(ConfigMismatchError, match=r"collect\.rate: None -> 0\.1"):
        run.claim({"collect": Config()})


def test_stages_claim_their_sections_one_by_one(run):
    run.claim({"seed": 0, "collect": Config()})
    run.claim({"seed": 0, "pretrain": Config(rate=0.5)})
    assert set(run.read_config()) == {"seed", "collect", "pretrain"}


def test_an_unreadable_config_is_an_error(run):
    run.claim({"seed": 0})
    run.config_file.write_text("{")
    with pytest.raises(ConfigMismatchError, match="is not readable JSON"):
        run.claim({"seed": 0})


def test_a_config_that_is_none_and_a_path_that_is_no_directory_are_named(run):
    run.claim({"seed": 0})
    run.config_file.write_text("[1]")
    with pytest.raises(ConfigMismatchError, match=r"should be an object of sections, got \[1\]"):
        run.claim({"seed": 0})
    file = RunDirectory(run.config_file)
    named = pytest.raises(RunFileError, match=r"run_dir should be a directory to write to, got .*c")
    with named, file.exclusive():
        pass


def test_metrics_survive_a_torn_line_and_are_rewound(run):
    for step in (1, 2, 3):
        run.log("pretrain", step, loss=float(step))
        run.log_speed("pretrain", step, updates_per_second=7.0)
    run.log("finetune", 9, q=1.0)
    with run.metrics_file.open("a") as file:
        file.write('{"stage": "pretrain", "st')
    with run.metrics_file.open("ab") as file:
        file.write(b"\xff\x00\xff")  # of a power cut
    assert [line["step"] for line in run.metrics("pretrain")] == [1, 2, 3]
    run.rewind_logs("pretrain", 2)
    run.log("pretrain", 3, loss=4.0)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("finetune", 9),
        ("pretrain", 3),
    ]
    assert lines[-1]["loss"] == 4.0
    speeds = [json.loads(line) for line in run.speed_file.read_text().splitlines()]
    assert [line["step"] for line in speeds] == [1, 2]


def test_checkpoints_round_trip_without_pickled_classes(run):
    state = {"step": 3, "model": {"w": torch.arange(4.0)}, "none": None}
    assert run.load_checkpoint("pretrain") is None
    run.save_checkpoint("pretrain", state)
    loaded = torch.load(run.checkpoint_dir / "pretrain.pt", weights_only=True)
    assert loaded["step"] == 3
    assert torch.equal(run.load_checkpoint("pretrain")["model"]["w"], state["model"]["w"])


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
def test_as_many_checkpoints_stay_as_were_asked_for(run, keep):
    for step in range(1, 10):
        run.save_checkpoint("pretrain", {"round": step}, step=step, keep=keep)
        numbered = sorted(run.checkpoint_dir.glob("pretrain-*.pt"))
        kept = [torch.load(path, weights_only=True)["round"] for path in numbered]
        assert kept == ([] if keep == 1 else list(range(max(1, step - keep + 1), step + 1)))
        assert run.load_checkpoint("pretrain")["round"] == step


def test_a_damaged_checkpoint_is_named_with_the_remedy(run):
    run.save_checkpoint("pretrain", {"w": torch.zeros(1000)})
    path = run.checkpoint_dir / "pretrain.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"pretrain\.pt cannot be read.*delete it to begin"):
        run.load_checkpoint("pretrain")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(target, fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_under_the_log_is_named_with_the_remedy(run):
    run.log("pretrain", 1, loss=1.0)
    run.metrics_file.unlink()
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"No space left.*/metrics\.jsonl could not.*make room"):
        run.log("pretrain", 2, loss=1.0)


def test_one_process_at_a_time(run):
    busy = pytest.raises(RunDirectoryBusyError, match="another process is running in")
    with run.exclusive(), busy, RunDirectory(run.path).exclusive():
        pass
    with run.exclusive():
        pass


def fail_within(run, *, recorded=()):
    def stage():
        with run.exclusive():
            run.claim({"seed": 0, "collect": Config()})
            leave(run, *recorded)
            raise KeyError("a mistyped name")

    with pytest.raises(KeyError):
        stage()


def test_what_fails_before_it_records_anything_leaves_no_directory(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a" / "b")
    fail_within(run)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    fail_within(run)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("stage", STAGE_LEAVES)
def test_what_fails_afterwards_leaves_what_was_recorded(run, stage):
    fail_within(run, recorded=[stage])
    assert run.read_config()["seed"] == 0
    fail_within(run)
    assert run.read_config()["seed"] == 0


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "config.json"])
def test_what_fails_leaves_the_files_of_others(run, name):
    run.path.mkdir()
    (run.path / name).write_text("{}")
    fail_within(run)
    assert (run.path / name).exists()


def test_who_waited_for_a_directory_that_was_removed_holds_the_next(run, monkeypatch):
    """Opens the lock file, and then the one who holds it removes it."""
    flock, removed = fcntl.flock, []

    def late(lock, operation):
        if not removed:
            removed.append(run.path / ".lock")
            removed[0].unlink()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    busy = pytest.raises(RunDirectoryBusyError)
    with run.exclusive(), busy, RunDirectory(run.path).exclusive():
        pass
    assert removed


@pytest.mark.parametrize("name", ["probe.json", "evaluation.json"])
def test_damaged_results_are_named(run, name):
    run.write_json(name, [1])
    (run.path / name).write_text("[1")
    with pytest.raises(RunFileError, match=f"{name} is not readable JSON.*delete it"):
        run.read_json(name)


def test_foreign_metrics_are_named(run):
    run.claim({})
    run.metrics_file.write_text("{}\n")
    with pytest.raises(RunFileError, match=r"a stage and a step in every line, got '\{\}'"):
        run.metrics()
