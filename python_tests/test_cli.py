import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

STAGES = ("train", "collect", "pretrain", "probe", "finetune", "evaluate")


def crpt(stage: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"crpt.{stage}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_shared_flag(stage):
    done = crpt(stage, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m crpt.{stage}" in done.stdout
    for flag in ("--preset", "--run-dir", "--seed", "--device"):
        assert flag in done.stdout
    assert "{quick,paper}" in done.stdout


def test_the_preset_decides_on_the_defaults_that_help_shows():
    quick, paper = (crpt("pretrain", "--preset", p, "--help").stdout for p in ("quick", "paper"))
    assert re.search(r"\(default: 16666\)", paper)
    assert not re.search(r"\(default: 16666\)", quick)


def test_an_unknown_preset_or_flag_is_refused(tmp_path):
    for arguments in (("--preset", "huge"), ("--no-such-flag", "1")):
        done = crpt("collect", "--run-dir", str(tmp_path), *arguments)
        assert done.returncode == 2
        assert arguments[-1] in done.stderr + done.stdout or arguments[0] in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("pretrain", [], "should be a dataset to pre-train on"),
        ("finetune", [], "should be a pre-trained encoder"),
        ("evaluate", [], "should have a fine-tuned agent"),
        ("collect", ["--domains", "cheetah_rum"], "close to it: cheetah_run"),
        ("collect", ["--transitions", "0"], "transitions should be at least 1, got 0"),
        ("pretrain", ["--device", "tpu"], "tpu"),
    ],
)
def test_errors_are_one_message_and_exit_1(tmp_path, stage, arguments, message):
    done = crpt(stage, "--run-dir", str(tmp_path), *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_traceback_on_request(tmp_path):
    done = crpt("pretrain", "--run-dir", str(tmp_path), CRPT_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_collect_ctrl_c_and_go_on(tmp_path):
    command = [
        sys.executable, "-m", "crpt.collect", "--run-dir", str(tmp_path),
        "--domains", "cartpole_swingup", "reacher_easy", "--transitions", "400",
        "--episode-length", "20", "--render", "fast",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
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
