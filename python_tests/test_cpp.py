"""Configures, builds (warnings are errors) and runs the C++ tests, as CTest would."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cmake import CMAKE_BIN_DIR

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "CMakeLists.txt").is_file(), reason="needs the sources, not only the package"
    ),
    pytest.mark.timeout(1800),
]


def cmake_tool(name: str) -> str:
    # The one from PyPI that the extra `test` installs, whether or not its environment is active.
    tool = shutil.which(name, path=CMAKE_BIN_DIR)
    assert tool
    return tool


def run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-20_000:]}"


def build_and_test(build: Path, *options: str) -> None:
    cmake, ctest = cmake_tool("cmake"), cmake_tool("ctest")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["-DCRPT_BUILD_TESTS=ON", "-DCRPT_BUILD_PYTHON=OFF", "-DCRPT_CUDA=OFF"]
    run(cmake, "-S", str(ROOT), "-B", str(build), *generator, *configure, *options)
    run(cmake, "--build", str(build), "--parallel")
    run(
        ctest, "--test-dir", str(build), "--parallel", "2", "--output-on-failure",
        "--no-tests=error",
    )  # fmt: skip


@pytest.mark.slow
def test_cpp(tmp_path: Path) -> None:
    build_and_test(tmp_path, "-DCRPT_WERROR=ON")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_cpp_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    build_and_test(tmp_path, f"-DCRPT_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")


def configure(build: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["-DCRPT_BUILD_PYTHON=OFF", f"-DCRPT_CUDA={cuda}"]
    return subprocess.run(
        [cmake_tool("cmake"), "-S", str(ROOT), "-B", str(build), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("value", ["OFF", "off", "False", "0"])
def test_cuda_switched_off_looks_for_no_compiler(tmp_path: Path, value: str) -> None:
    done = configure(tmp_path, value)
    assert done.returncode == 0, done.stdout
    assert "CUDA" not in done.stdout


def test_an_unknown_value_of_the_cuda_switch_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "bogus")
    assert done.returncode != 0
    assert "CRPT_CUDA should be AUTO, ON or OFF, got bogus" in done.stdout


def test_a_cuda_compiler_that_fails_is_named_or_left_out(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    wanted = configure(tmp_path / "on", "on", CUDACXX=str(nvcc))
    assert wanted.returncode != 0
    assert str(nvcc) in wanted.stdout
    left_out = configure(tmp_path / "auto", "AUTO", CUDACXX=str(nvcc))
    assert left_out.returncode == 0, left_out.stdout
    assert "No CUDA compiler that works: building the CPU operators only" in left_out.stdout
