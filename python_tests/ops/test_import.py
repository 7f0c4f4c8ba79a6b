"""What importing the operators asks for, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys


def test_an_unknown_level_is_refused_at_import() -> None:
    check = subprocess.run(
        [sys.executable, "-c", "import crpt.ops"],
        env={**os.environ, "CRPT_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode != 0
    assert "CRPT_ISA should be baseline, avx2, avx512 or amx, got sse9" in check.stderr


def test_without_the_compiled_module_the_error_says_how_to_build_it() -> None:
    code = "import sys; sys.modules['crpt._cpu'] = None; import crpt.ops"
    check = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert check.returncode != 0
    assert "ImportError: crpt's compiled operators could not be imported" in check.stderr
    assert "`pip install .` in a checkout of crpt" in check.stderr


def test_importing_the_operators_brings_no_simulator() -> None:
    code = (
        "import crpt.ops, sys; "
        "bad = {'dm_control', 'mujoco', 'tensorboard', 'gymnasium'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
