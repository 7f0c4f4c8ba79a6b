"""What the doctor finds on machines that lack something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from crpt import doctor, ops
from crpt.envs.rendering import IncompatibleVersionsError, RenderingUnavailableError


def drawn() -> str:
    return "egl, a toy"


def not_drawn() -> str:
    raise RenderingUnavailableError("no OpenGL to render with; apt-get install it")


def aborted() -> str:
    os.abort()


def found(draw=drawn) -> list[doctor.Finding]:
    return list(doctor.findings(draw))


def of_level(level: str, findings: list[doctor.Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.level == level]


def test_a_machine_that_lacks_nothing():
    findings = found()
    assert not of_level("error", findings)
    said = "\n".join(of_level("ok", findings))
    for part in (
        f"torch {torch.__version__}", "operators on the CPU", "dm_control 1.0.50 with mujoco 3.17.",
        "rendering by egl, a toy",
    ):  # fmt: skip
        assert part in said


def test_an_operator_that_errs_is_named(monkeypatch):
    monkeypatch.setattr(ops, "sinkhorn", lambda scores: torch.zeros_like(scores))
    (error,) = of_level("error", found())
    assert error.startswith("operators on the CPU: sinkhorn is 0.")

    def refuse(scores):
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(ops, "sinkhorn", refuse)
    (error,) = of_level("error", found())
    assert error == "operators on the CPU: RuntimeError: no kernel image for this device"


def test_versions_that_do_not_match_come_with_the_remedy(monkeypatch):
    def refuse():
        raise IncompatibleVersionsError("got mujoco 4.0; pip uninstall it")

    monkeypatch.setattr("crpt.envs.rendering.check_versions", refuse)
    assert of_level("error", found()) == ["got mujoco 4.0; pip uninstall it"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [(not_drawn, "apt-get install it"), (aborted, "was killed or aborted; another backend")],
)
def test_what_keeps_frames_from_being_drawn_is_told(draw, message):
    (error,) = of_level("error", found(draw))
    assert error.startswith("rendering: ")
    assert message in error


@pytest.mark.parametrize(
    ("usable", "compiled", "level", "message"),
    [
        (False, True, "note", "no GPU: PyTorch's CUDA 13.0 finds none"),
        (True, False, "error", "crpt was built without them, for want of a CUDA compiler"),
    ],
)
def test_a_gpu_that_cannot_be_used(monkeypatch, usable, compiled, level, message):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr("crpt.ops.cuda.AVAILABLE", compiled)
    assert any(message in what for what in of_level(level, found()))


@pytest.mark.parametrize(
    ("capability", "difference", "level", "message"),
    [
        ((9, 0), 0.0, "ok", "operators on cuda:0, a GPU, sm_90; --precision auto is bf16"),
        ((7, 5), 0.0, "ok", "operators on cuda:0, a GPU, sm_75; --precision auto is fp32"),
        ((7, 5), 0.5, "error", "operators on cuda:0, a GPU, sm_75: sinkhorn is 0.5 off"),
    ],
)
def test_operators_are_tried_on_every_gpu(monkeypatch, capability, difference, level, message):
    """The GPU's part is played by the CPU."""
    wrong_on = doctor._wrong_on

    def tried(device):
        if device.type == "cpu":
            return None
        with monkeypatch.context() as patch:
            patch.setattr(
                ops, "sinkhorn", lambda scores: doctor.reference.sinkhorn(scores) + difference
            )
            return wrong_on(torch.device("cpu"))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("crpt.ops.cuda.AVAILABLE", True)
    monkeypatch.setattr(doctor, "_wrong_on", tried)
    assert any(what.startswith(message) for what in of_level(level, found()))


def test_what_an_extra_lacks_is_named(monkeypatch):
    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda n: None if n == "tensorboard" else find(n))
    notes = of_level("note", found())
    assert 'extra report: without tensorboard; pip install "crpt[report]"' in notes


def test_the_command_draws_and_says_whether_all_is_well():
    command = [sys.executable, "-m", "crpt.doctor"]
    well = subprocess.run(command, capture_output=True, text=True)
    assert well.returncode == 0, well.stdout + well.stderr
    assert "frames/s fast" in well.stdout
    off = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MUJOCO_GL": "off"}
    )
    assert off.returncode == 1
    assert "error rendering: rendering is turned off by MUJOCO_GL=off; unset it" in off.stdout
