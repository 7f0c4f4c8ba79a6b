"""Configures, builds (warnings are errors) and runs the C++ tests, as CTest would."""

from __future__ import annotations

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


def run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-20_000:]}"


def build_and_test(build: Path, *options: str) -> None:
    # The one from PyPI that the extra `test` installs, whether or not its environment is active.
    cmake = shutil.which("cmake", path=CMAKE_BIN_DIR)
    ctest = shutil.which("ctest", path=CMAKE_BIN_DIR)
    assert cmake
    assert ctest
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["-DCRPT_BUILD_TESTS=ON", "-DCRPT_BUILD_PYTHON=OFF", "-DCRPT_CUDA=OFF"]
    run(cmake, "-S", str(ROOT), "-B", str(build), *generator, *configure, *options)
    run(cmake, "--build", str(build), "--parallel")
    run(ctest, "--test-dir", str(build), "--output-on-failure", "--no-tests=error")


def test_cpp(tmp_path: Path) -> None:
    build_and_test(tmp_path, "-DCRPT_WERROR=ON")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_cpp_under_sanitizers(tmp_path: Path, sanitizers: str) -> None:
    build_and_test(tmp_path, f"-DCRPT_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
