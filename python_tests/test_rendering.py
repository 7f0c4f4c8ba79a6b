"""Which OpenGL backend is chosen, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from crpt.envs import IncompatibleVersionsError, rendering

LOOK = """
import sys
import crpt.envs
assert not {"dm_control", "mujoco", "OpenGL", "torch"} & set(sys.modules)
"""
SELECT = f"""{LOOK}
import os
backend = crpt.envs.select_backend()
assert backend == crpt.envs.select_backend()
print(backend, os.environ["MUJOCO_GL"], os.environ.get("PYOPENGL_PLATFORM"))
"""
NO_LIBRARY = """
from crpt.envs import egl, rendering
egl.load_library = rendering.load_library = lambda *names: None
"""
CATCH = """
import crpt.envs
try:
    crpt.envs.make("cheetah_run")
except crpt.envs.RenderingUnavailableError as error:
    print(error)
"""


def run(code: str, **environment: str) -> str:
    """What the code prints in a fresh process without a display and with these variables alone."""
    hidden = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def has(backend: str) -> bool:
    return rendering._PROBES[backend]() is None


needs_egl = pytest.mark.skipif(not has("egl"), reason="needs EGL")
needs_no_osmesa = pytest.mark.skipif(has("osmesa"), reason="needs a machine without OSMesa")


@needs_egl
def test_egl_is_chosen_without_a_display():
    assert run(SELECT) == "egl egl egl"


@needs_egl
def test_the_users_choice_is_kept():
    assert run(SELECT, MUJOCO_GL="egl") == "egl egl egl"
    assert run(SELECT, PYOPENGL_PLATFORM="egl") == "egl egl egl"
    assert run(SELECT, MUJOCO_GL="glfw") == "glfw glfw None"


@needs_egl
def test_a_frame_is_drawn_without_a_display():
    code = """
import crpt.envs
env = crpt.envs.make("cartpole_swingup")
frame, _ = env.reset(seed=0)
print(frame.shape, frame.std() > 10)
"""
    assert run(code) == "(3, 84, 84) True"


@needs_no_osmesa
def test_an_osmesa_that_was_asked_for_and_is_not_there():
    message = run(CATCH, MUJOCO_GL="osmesa")
    assert message.endswith("apt-get install -y libosmesa6")


def test_no_library_at_all_names_the_packages():
    message = run(NO_LIBRARY + CATCH)
    assert "egl: libEGL.so.1 is missing; osmesa: libOSMesa.so is missing" in message
    assert "apt-get install -y libegl1 libgl1-mesa-dri (or libosmesa6)" in message


def test_egl_is_checked_down_to_its_devices():
    code = """
import ctypes
from crpt.envs import egl, rendering
find = ctypes.CFUNCTYPE
def no_devices(*signature):
    kind = find(*signature)
    return lambda address: lambda *arguments: 0
egl.ctypes.CFUNCTYPE = no_devices
rendering._probe_osmesa = rendering._PROBES["osmesa"] = lambda: "none"
"""
    if not has("egl"):
        pytest.skip("needs libEGL")
    assert "egl: EGL sees no device, not even a software one" in run(code + CATCH)


def test_a_conflict_of_the_two_variables_is_named():
    message = run(CATCH, MUJOCO_GL="egl", PYOPENGL_PLATFORM="osmesa")
    assert message == (
        "PYOPENGL_PLATFORM should be egl to render without a display, got osmesa; unset it"
    )
    message = run(CATCH, PYOPENGL_PLATFORM="glx")
    assert "should be egl or osmesa" in message


def test_rendering_turned_off_by_the_user():
    assert "turned off by MUJOCO_GL=disabled; unset it" in run(CATCH, MUJOCO_GL="disabled")


def test_dm_control_imported_too_early():
    early = "from dm_control import suite\n"
    message = run(early + CATCH)
    assert "imported before crpt.envs and chose glfw, which needs a display" in message
    assert "set MUJOCO_GL=egl" in message
    message = run(early + CATCH, MUJOCO_GL="off")
    assert "imported before crpt.envs, with rendering turned off" in message


@needs_egl
def test_dm_control_imported_early_with_a_backend_that_works():
    assert run("from dm_control import suite\n" + CATCH, MUJOCO_GL="egl") == ""


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"mujoco": "4.0.0"}, "should be paired with mujoco >=3.17,<3.18, got mujoco 4.0.0"),
        ({"mujoco": "3.17.0", "mujoco-core": "4.0.0"}, "got mujoco 3.17.0, mujoco-core 4.0.0"),
        ({"mujoco": None}, "mujoco is not installed"),
        ({"dm_control": None}, "dm_control is not installed"),
    ],
)
def test_packages_that_do_not_fit_are_named_with_the_remedy(monkeypatch, installed, message):
    found = {"dm_control": "1.0.50", "mujoco": "3.17.0", **installed}
    monkeypatch.setattr(rendering, "_version", found.get)
    with pytest.raises(IncompatibleVersionsError, match=message) as error:
        rendering.select_backend()
    assert "pip install 'dm_control==1.0.50' 'mujoco>=3.17,<3.18'" in str(error.value)


def test_the_pair_that_is_installed_fits():
    rendering.check_versions()
