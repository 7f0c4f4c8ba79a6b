"""What the doctor finds on machines that lack something."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import toy_drawing

from crpt import ops
from crpt.doctor import examination as doctor
from crpt.doctor.__main__ import doctor as doctor_command
from crpt.doctor.finding import Finding
from crpt.envs.rendering import IncompatibleVersionsError


def found(draw=toy_drawing.drawn, patience=60.0) -> list[Finding]:
    return list(doctor.findings(draw, patience))


def of_level(level: str, findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.level == level]


def test_a_machine_that_lacks_nothing():
    findings = found()
    assert not of_level("error", findings)
    said = "\n".join(of_level("ok", findings))
    for part in (
        f"torch {torch.__version__}", "dm_control 1.0.50 with mujoco 3.17.", "rendering by a toy",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(("units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_precision_of_the_cpu_is_told(monkeypatch, units, precision):
    monkeypatch.setattr(doctor, "_cpu", SimpleNamespace(bf16_units=units, isa="avx2"))
    (line,) = [what for what in of_level("ok", found()) if "on the CPU" in what]
    assert line.startswith("operators on the CPU: avx2 kernels, ")
    assert line.endswith(f"; --precision auto is {precision}")


def test_an_operator_that_errs_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: iter(()))  # on which it would err, too
    monkeypatch.setattr(ops, "sinkhorn", lambda scores: torch.zeros_like(scores))
    (error,) = of_level("error", found())
    assert re.match(r"operators on the CPU: they are [\d.]+ off their twins", error)

    def refuse(scores):
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(ops, "sinkhorn", refuse)
    (error,) = of_level("error", found())
    assert error == "operators on the CPU: RuntimeError: no kernel image for this device"


def test_versions_that_do_not_match_come_with_the_remedy(monkeypatch):
    def refuse():
        raise IncompatibleVersionsError("got mujoco 4.0; pip uninstall it")

    monkeypatch.setattr("crpt.envs.rendering.check_versions", refuse)
    findings = found()
    assert of_level("error", findings) == ["got mujoco 4.0; pip uninstall it"]
    assert not any("rendering" in finding.what for finding in findings)  # it would say so, too


def test_versions_that_were_not_tested_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: {"mujoco": "3.18.1"}.get(name, "1.0.50"))
    note = "dm_control 1.0.50 with mujoco 3.18.1; tested are dm_control 1.0.50 with mujoco 3.17"
    assert note in of_level("note", found())


def test_the_process_that_draws_need_not_wait_for_torch():
    assert Finding("ok", "drawn") in found(toy_drawing.drawn_without_torch)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (toy_drawing.not_drawn, "apt-get install it"),
        (toy_drawing.not_installed, "No module named 'mujoco'; pip uninstall -y mujoco"),
        (toy_drawing.aborted, "drawing ended its process, by -6; another backend"),
        (toy_drawing.hanging, "no frames within 1 s; another backend"),
    ],
)
def test_what_keeps_frames_from_being_drawn_is_told(draw, message):
    (error,) = of_level("error", found(draw, patience=1 if draw is toy_drawing.hanging else 60))
    assert error.startswith("rendering: ")
    assert message in error


@pytest.mark.parametrize(
    ("there", "told"), [(True, "the machine's GPU is not used"), (False, "no GPU")]
)
def test_a_build_without_cuda_says_so(monkeypatch, there, told):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "kernel_has_gpu", lambda: there)
    assert f"{told}: torch {torch.__version__} was built without CUDA" in of_level("note", found())


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


def test_every_gpu_is_tried(monkeypatch):
    capabilities = [(9, 0), (7, 5), (8, 6), None]

    def capability(device):
        if capabilities[device.index] is None:
            raise RuntimeError("device is busy")
        return capabilities[device.index]

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr("crpt.ops.cuda.AVAILABLE", True)
    monkeypatch.setattr(
        doctor, "_wrong_on", lambda device: "no kernel" if device.index == 2 else None
    )
    findings = found()
    assert [what for what in of_level("ok", findings) if "cuda" in what] == [
        "operators on cuda:0, a GPU, sm_90; --precision auto is bf16",
        "operators on cuda:1, a GPU, sm_75; --precision auto is fp32",
    ]
    assert of_level("error", findings) == [
        "operators on cuda:2, a GPU, sm_86: no kernel",
        "operators on cuda:3: RuntimeError: device is busy",
    ]


def test_what_an_extra_lacks_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "tensorboard" else name)
    findings = found()
    assert 'extra report: without tensorboard; pip install "crpt[report]"' in of_level(
        "note", findings
    )
    assert {"extra hub", "extra gymnasium"} <= set(of_level("ok", findings))


def test_the_command_draws_and_says_whether_all_is_well(monkeypatch, capsys):
    command = [sys.executable, "-m", "crpt.doctor"]
    well = subprocess.run(command, capture_output=True, text=True)
    assert well.returncode == 0, well.stdout + well.stderr
    assert "frames/s fast" in well.stdout
    monkeypatch.setenv("MUJOCO_GL", "off")
    assert doctor_command() == 1
    told = capsys.readouterr().out
    assert "error rendering: rendering is turned off by MUJOCO_GL=off; unset it" in told


def test_without_compiled_kernels_it_says_how_to_build_them():
    script = (
        "import runpy, sys; sys.modules['crpt._cpu'] = None; sys.argv = ['doctor'];"
        "runpy.run_module('crpt.doctor', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error crpt's compiled operators could not be imported")
    assert "Traceback" not in done.stderr
