"""Which OpenGL backend is chosen, and what is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from crpt.envs import IncompatibleVersionsError, egl, rendering

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
    message = run(early + CATCH, MUJOCO_GL="glfw")
    assert message.startswith("MUJOCO_GL is glfw, which needs a display, and there is none; unset")
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


class FakeEgl:
    """EGL with these devices: `nvidia`, `dri` (of the same cards, by another driver), `software`.

    A `-` before the name: it cannot be initialised.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[int] = []

    def devices(self) -> list[egl.Device]:
        found = []
        cards = {"nvidia": 0, "dri": 0}
        for number, name in enumerate(self.names):
            kind = name.lstrip("-")
            node = None
            if kind in cards:
                node, cards[kind] = f"/dev/dri/card{cards[kind]}", cards[kind] + 1
            found.append(egl.Device(number, number, kind == "software", node))
        return found

    def can_use(self, device: egl.Device) -> bool:
        self.asked.append(device.number)
        return not self.names[device.number].startswith("-")


@pytest.fixture
def fake_egl(monkeypatch):
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(rendering, "warned", False)

    def install(*names: str) -> FakeEgl:
        fake = FakeEgl(*names)
        monkeypatch.setattr(rendering, "Egl", lambda: fake)
        return fake

    return install


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["nvidia", "nvidia", "software"], ["0", "1", "0", "1"]),
        (["software", "nvidia", "nvidia"], ["1", "2", "1", "2"]),
        (["nvidia", "nvidia", "dri", "dri", "software"], ["0", "1", "0", "1"]),
        (["-nvidia", "nvidia", "nvidia"], ["1", "1", "2", "1"]),
        (["-nvidia", "software"], [None] * 4),
        (["software"], [None] * 4),
    ],
)
def test_processes_are_spread_over_the_graphics_cards(fake_egl, monkeypatch, names, expected):
    fake_egl(*names)
    chosen = []
    for process in range(4):
        monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
        rendering.share_devices(process)
        chosen.append(os.environ.get("MUJOCO_EGL_DEVICE_ID"))
    assert chosen == expected


def test_only_the_card_that_is_used_is_opened(fake_egl):
    fake = fake_egl("nvidia", "nvidia", "nvidia")
    rendering.share_devices(1)
    assert fake.asked == [1]
    assert rendering._probe_egl() is None
    assert fake.asked == [1, 1]


def test_a_device_that_the_user_chose_is_kept(fake_egl, monkeypatch):
    fake = fake_egl("nvidia", "-nvidia")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "1")
    rendering.share_devices(0)
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "1"
    assert fake.asked == []
    problem = rendering._probe_egl()
    assert (
        problem == "none of the 1 EGL devices of number MUJOCO_EGL_DEVICE_ID=1 can be initialised"
    )


def test_another_backend_needs_no_card(fake_egl, monkeypatch):
    fake = fake_egl("nvidia")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    rendering.share_devices(0)
    assert fake.asked == []
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ


@pytest.mark.parametrize(
    ("names", "gpu", "told"),
    [
        (["software"], True, 1),
        (["-nvidia", "software"], True, 1),
        (["nvidia", "software"], True, 0),
        (["software"], False, 0),
    ],
)
def test_software_beside_a_gpu_is_told_once(fake_egl, monkeypatch, caplog, names, gpu, told):
    fake_egl(*names)
    monkeypatch.setattr(rendering, "kernel_has_gpu", lambda: gpu)
    for _ in range(2):
        assert rendering._probe_egl() is None
    assert caplog.text.count("there is a GPU, but EGL renders in software") == told
    assert caplog.text.count("NVIDIA_DRIVER_CAPABILITIES") == told


@needs_egl
def test_what_egl_itself_says():
    found = egl.Egl().devices()
    assert [device.number for device in found] == list(range(len(found)))
    assert len(egl.cards(found)) == len({d.node or d.number for d in found if not d.is_software})
