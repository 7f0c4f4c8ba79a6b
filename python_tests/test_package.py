import os
import subprocess
import sys

PROBE = "import os, sys; print(os.environ.get('OMP_WAIT_POLICY'), sorted(sys.modules))"


def python(*arguments: str, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=variables, check=True
    )
    return done.stdout


def test_importing_crpt_is_light_and_changes_nothing():
    out = python("-c", f"import crpt; {PROBE}")
    assert out.startswith("None")
    for module in ("torch", "dm_control", "mujoco", "gymnasium"):
        assert f"'{module}'" not in out


def test_importing_the_operators_or_the_encoder_imports_no_simulator():
    out = python("-c", f"import crpt.ops; crpt.ops.sinkhorn; import crpt; crpt.Encoder; {PROBE}")
    for module in ("dm_control", "mujoco", "tensorboard", "gymnasium", "tyro"):
        assert f"'{module}'" not in out


def test_commands_let_waiting_threads_sleep_unless_told_otherwise(tmp_path):
    at_exit = "import atexit, os; atexit.register(lambda: print(os.environ.get('OMP_WAIT_POLICY')))"
    (tmp_path / "sitecustomize.py").write_text(at_exit)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = ("-m", "crpt.config")  # a module that does nothing when run
    assert python(*command, PYTHONPATH=path).split() == ["PASSIVE"]
    chosen = python(*command, PYTHONPATH=path, OMP_WAIT_POLICY="ACTIVE")
    assert chosen.split() == ["ACTIVE"]


def test_an_unknown_attribute_is_an_attribute_error():
    out = python("-c", "import crpt; print(hasattr(crpt, 'Encoder'), hasattr(crpt, 'Decoder'))")
    assert out.split() == ["True", "False"]
