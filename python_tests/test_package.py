import os
import subprocess
import sys

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PROBE = "import os, sys; print(os.environ.get('GOMP_SPINCOUNT'), sorted(sys.modules))"


def python(*arguments: str, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k not in OPENMP} | environment
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


def test_commands_let_waiting_threads_spin_only_briefly_unless_told_otherwise(tmp_path):
    show = "lambda: print(os.environ.get('GOMP_SPINCOUNT'))"
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, os; atexit.register({show})")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = ("-m", "crpt.files")  # a module that does nothing when run
    assert python(*command, PYTHONPATH=path).split() == ["10000"]
    assert python(*command, PYTHONPATH=path, GOMP_SPINCOUNT="7").split() == ["7"]
    assert python(*command, PYTHONPATH=path, OMP_WAIT_POLICY="ACTIVE").split() == ["None"]


def test_an_unknown_attribute_is_an_attribute_error():
    out = python("-c", "import crpt; print(hasattr(crpt, 'Encoder'), hasattr(crpt, 'Decoder'))")
    assert out.split() == ["True", "False"]


def test_submodules_that_users_import_come_with_the_package():
    out = python(
        "-c", "import crpt; print(crpt.replay.ReplayBuffer, crpt.ops.sinkhorn, crpt.envs.make)"
    )
    assert all(name in out for name in ("ReplayBuffer", "sinkhorn", "make"))
