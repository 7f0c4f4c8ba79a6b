"""That a GPU test cannot vanish: pytest in a process of its own, with the conftest.py of here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest, torch
from crpt.ops import cuda

@pytest.mark.cuda
def test_passes(): pass

@pytest.mark.cuda
def test_skips_in_its_body(): pytest.skip("not this GPU")

@pytest.mark.cuda
@pytest.mark.skipif(True, reason="not this torch")
def test_skips_by_its_mark(): pass

@pytest.mark.cuda
@pytest.mark.xfail(strict=True)
def test_is_expected_to_fail(): assert False

@pytest.mark.cuda(devices=2)
def test_needs_two(): pass

def test_has_nothing_to_do_with_gpus(): pytest.skip("for some reason")
"""
ONE_GPU = "torch.cuda.device_count = lambda: 1\ncuda.AVAILABLE = True\n"
NO_GPU = "torch.cuda.device_count = lambda: 0\n"


def outcomes(directory: Path, gpus: str, required: str) -> dict[str, str]:
    """Of each test, with its reason."""
    shutil.copy(Path(__file__).with_name("conftest.py"), directory)
    (directory / "test_it.py").write_text(TESTS + gpus)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", directory],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, "CRPT_REQUIRE_CUDA": required, "COLUMNS": "200"},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    failed = re.findall(r"^FAILED test_it.py::test_(\w+) - (.*)$", done.stdout, re.MULTILINE)
    errors = re.findall(r"^ERROR test_it.py::test_(\w+) - (.*)$", done.stdout, re.MULTILINE)
    assert (done.returncode == 1) is bool(failed or errors)
    return dict(failed + errors)


# Each takes seconds, to import torch and pytest once more.
@pytest.mark.slow
def test_without_the_variable_a_skip_is_a_skip(tmp_path: Path) -> None:
    assert outcomes(tmp_path, NO_GPU, "") == {}


def test_without_a_gpu_every_gpu_test_that_it_requires_fails(tmp_path: Path) -> None:
    because = "no GPU, and CRPT_REQUIRE_CUDA=1"
    assert outcomes(tmp_path, NO_GPU, "1") == {
        "passes": because,
        "skips_in_its_body": because,
        "skips_by_its_mark": "not this torch, and CRPT_REQUIRE_CUDA=1",
        "is_expected_to_fail": because,
    }


@pytest.mark.slow
@pytest.mark.parametrize("required", ["1", "2"])
def test_with_a_gpu_whatever_skips_fails(tmp_path: Path, required: str) -> None:
    expected = {
        "skips_in_its_body": f"not this GPU, and CRPT_REQUIRE_CUDA={required}",
        "skips_by_its_mark": f"not this torch, and CRPT_REQUIRE_CUDA={required}",
    }
    if required == "2":
        expected["needs_two"] = "needs 2 GPUs, and there are 1, and CRPT_REQUIRE_CUDA=2"
    assert outcomes(tmp_path, ONE_GPU, required) == expected


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CRPT_REQUIRE_CUDA should be a number of GPUs, got"):
        outcomes(tmp_path, NO_GPU, "yes")
