import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import crpt as crpt_package
from crpt import cli
from crpt.stages import StageOrderError

STAGES = ("train", "collect", "pretrain", "probe", "finetune", "evaluate")


@pytest.fixture
def crpt(monkeypatch, capsys):
    """Run a command in this process: exit code, output, errors."""

    def run(stage: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"crpt.{stage}", *arguments])
        code = 0
        with warnings.catch_warnings():
            # That other tests have imported the module before.
            warnings.filterwarnings("ignore", "'crpt.*' found in sys.modules", RuntimeWarning)
            try:
                runpy.run_module(f"crpt.{stage}", run_name="__main__")
            except SystemExit as exit:
                code = int(exit.code or 0)
        captured = capsys.readouterr()
        # Help is wrapped to the width of the terminal.
        return code, re.sub(r"[\s│]+", " ", captured.out), captured.err

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_shared_flag(crpt, stage):
    code, out, _ = crpt(stage, "--help")
    assert code == 0
    assert f"python -m crpt.{stage}" in out
    for flag in ("--preset {quick,paper,best}", "--run-dir PATH", "--seed INT", "--device STR"):
        assert flag in out


def test_help_tells_which_card_gets_the_table_of_the_probes(crpt):
    told = "The model card in RUN_DIR/encoder gets the table; nothing is written to the directory"
    assert told in crpt("probe", "--help")[1]


def test_the_preset_decides_on_the_defaults_that_help_shows(crpt):
    quick, paper = (crpt("pretrain", "--preset", p, "--help")[1] for p in ("quick", "paper"))
    assert "(default: 16666)" in paper
    assert "(default: 16666)" not in quick


@pytest.mark.parametrize("arguments", [("--preset", "huge"), ("--no-such-flag", "1")])
def test_an_unknown_preset_or_flag_is_refused(crpt, tmp_path, arguments):
    code, out, err = crpt("collect", "--run-dir", str(tmp_path), *arguments)
    assert code == 2
    assert arguments[0].strip("-") in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (
            "pretrain",
            [],
            "should be a dataset to pre-train on; record one first: python -m crpt.co",
        ),
        ("pretrain", [], ", or name one: --dataset"),
        ("finetune", [], "should be a pre-trained encoder"),
        ("evaluate", [], "should have a fine-tuned agent"),
        ("collect", ["--domains", "cheetah_rum"], "close to it: cheetah_run"),
        ("pretrain", ["--device", "tpu"], "device should be cpu, or a cuda device"),
        ("pretrain", ["--device", "meta"], "that torch finds here, got meta"),
        ("pretrain", ["--seed", "-1"], "seed should be at least 0, got -1"),
        ("train", ["--probe.unseen", "hopper_hopp"], "close to it: hopper_hop"),
        ("train", ["--finetune.task", "walker_rum"], "close to it: walker_run"),
    ],
)
def test_errors_are_one_message_and_exit_1(crpt, tmp_path, stage, arguments, message):
    code, _, err = crpt(stage, "--run-dir", str(tmp_path / "runs" / "a"), *arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_values_out_of_range_are_refused_like_unknown_flags(crpt, tmp_path):
    code, out, err = crpt("collect", "--run-dir", str(tmp_path), "--transitions", "0")
    assert code == 2
    assert "transitions should be at least 1, got 0" in " ".join((out + err).split())


def test_a_mistyped_first_attempt_binds_nobody(crpt, tmp_path):
    flags = ("--run-dir", str(tmp_path), "--transitions", "20", "--render", "fast")
    code, _, err = crpt("collect", *flags, "--domains", "cartpole_swingupp", "--workers", "1")
    assert code == 1
    assert "close to it: cartpole_swingup" in err
    code, out, err = crpt("collect", *flags, "--domains", "cartpole_swingup", "--workers", "1")
    assert code == 0, err
    assert "cartpole_swingup: 20 transitions" in out
    code, _, err = crpt("collect", *flags, "--domains", "reacher_easy", "--workers", "1")
    assert code == 1
    assert "collect.domains: ['cartpole_swingup'] -> ['reacher_easy']" in err


def test_an_agent_of_another_release_is_named(crpt, tmp_path):
    (tmp_path / "config.json").write_text('{"finetune": {"no_such_field": 1}}')
    code, _, err = crpt("evaluate", "--run-dir", str(tmp_path))
    assert code == 1
    assert "should have the fields of this crpt" in err
    assert "no_such_field" in err


def test_crpt_alone_names_all_commands():
    listing = subprocess.run([sys.executable, "-m", "crpt"], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    named = {line.split()[0] for line in listing.stdout.splitlines()[1:]}
    mains = Path(crpt_package.__path__[0]).glob("*/__main__.py")
    assert named == {path.parent.name for path in mains}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--seed", "1"], "is a module of its own: python -m crpt.train --seed 1\n"),
        (["sinkhorn"], "COMMAND should be one of those below, got sinkhorn\n"),
    ],
)
def test_crpt_does_not_pass_over_what_it_cannot_do(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "crpt", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def unread(*command: str, lines: int = 0) -> tuple[int, str]:
    """Exit code and errors of a Python whose output is closed when so many lines have been read."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors


PRINTS = "from crpt import cli\nwith cli.without_traceback(''):\n    "


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        pytest.param(["-c", PRINTS + "print('one line')"], 0, marks=pytest.mark.slow),
        (["-c", PRINTS + "print('one line'); raise SystemExit(0)"], 0),
        (["-c", PRINTS + "[print('line', i) for i in range(100_000)]"], 1),
        pytest.param(["-m", "crpt.dataset", "--help"], 0, marks=pytest.mark.slow),
    ],
)
def test_that_nobody_reads_is_no_error(command, lines):
    assert unread(*command, lines=lines) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("code", "ends"),
    [pytest.param("print('done')", 0, marks=pytest.mark.slow), ("raise SystemExit(3)", 3)],
)
def test_a_closed_output_is_no_error(code, ends):
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", PRINTS + code],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (ends, "")


def test_a_failure_is_told_also_where_nobody_reads():
    code, errors = unread("-c", PRINTS + "print('one line'); raise SystemExit('what is wrong')")
    assert "what is wrong" in errors
    assert code != 128 + signal.SIGPIPE


def test_the_list_of_commands_need_not_be_read():
    assert unread("-m", "crpt") == (-signal.SIGPIPE, "")


def test_another_broken_pipe_is_an_error():
    script = PRINTS + "raise BrokenPipeError('the worker has gone')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: the worker has gone" in done.stderr


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_of_a_team_one_process_says_that_it_was_interrupted(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ending, cli.without_traceback("Go on."):
        raise KeyboardInterrupt
    assert ending.value.code == 130
    assert capsys.readouterr().err.count("interrupted. Go on.") == said


def test_a_process_of_a_team_touches_no_gpu_but_its_own(monkeypatch, tmp_path):
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    touched = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda n, device: touched.append(str(device)))
    assert cli.context(cli.Common("quick", tmp_path, "cuda")).device == "cuda:1"
    assert touched == ["cuda:1"]


def test_more_processes_than_gpus_are_refused_before_one_is_touched(monkeypatch, tmp_path):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(ValueError, match=r"--nproc-per-node .* at most 1, .* got 2 processes"):
        cli.context(cli.Common("quick", tmp_path, "cuda"))


def test_a_traceback_on_request(crpt, tmp_path, monkeypatch):
    monkeypatch.setenv("CRPT_TRACEBACK", "1")
    with pytest.raises(StageOrderError):
        crpt("pretrain", "--run-dir", str(tmp_path))


def test_collect_ctrl_c_and_go_on(tmp_path):
    command = [
        sys.executable, "-m", "crpt.collect", "--run-dir", str(tmp_path),
        "--domains", "cartpole_swingup", "reacher_easy", "--transitions", "400",
        "--episode-length", "20", "--render", "fast",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    cursors = [tmp_path / "dataset" / d / "cursor" for d in ("cartpole_swingup", "reacher_easy")]
    while time.monotonic() < deadline and not any(c.exists() for c in cursors):
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "The same command goes on" in stderr
    assert "Traceback" not in stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cartpole_swingup: 400 transitions" in done.stdout
    assert "reacher_easy: 400 transitions" in done.stdout
    manifest = json.loads((tmp_path / "dataset" / "dataset.json").read_text())
    assert set(manifest["domains"]) == {"cartpole_swingup", "reacher_easy"}
