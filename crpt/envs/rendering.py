"""Headless rendering: which OpenGL backend dm_control uses, chosen before dm_control is imported.

Left alone on a machine without a display, dm_control picks GLFW and aborts at the first frame. The
choice is made by the environment variables MUJOCO_GL and PYOPENGL_PLATFORM, which dm_control reads
once, when it is imported. A choice of the user's own is kept.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import logging
import os
import sys

from crpt.envs.egl import Device, Egl, EglError, cards, kernel_has_gpu, load_library

_log = logging.getLogger(__name__)
_DEVICE = "MUJOCO_EGL_DEVICE_ID"
_DEBIAN_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}
_OFF = ("off", "disable", "disabled", "false", "0")
MUJOCO_REMEDY = (
    "pip uninstall -y mujoco mujoco-core mujoco-studio && "
    "pip install 'dm_control==1.0.50' 'mujoco>=3.17,<3.18'"
)

warned = False
"""Whether this process, or one that speaks for it, has said that rendering is slow here."""


class RenderingUnavailableError(RuntimeError):
    """No OpenGL backend can draw a frame here; the message says what to install or to set."""


class IncompatibleVersionsError(RuntimeError):
    """The installed dm_control and mujoco do not work together; the message has the remedy."""


def select_backend() -> str:
    """Chooses EGL, else OSMesa, for dm_control, and returns the name of the backend in use.

    Call it before anything imports dm_control; `crpt.envs.make` does. A backend set in MUJOCO_GL is
    kept, and checked if it is EGL or OSMesa.

    Raises:
        RenderingUnavailableError: nothing can render here, or dm_control was imported too early.
        IncompatibleVersionsError: this dm_control crashes with this mujoco.
    """
    check_versions()
    if "dm_control._render" in sys.modules:
        return _backend_of_imported_dm_control()
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted in _OFF:
        raise RenderingUnavailableError(
            f"rendering is turned off by MUJOCO_GL={wanted}; unset it, or set it to egl or osmesa"
        )
    platform = os.environ.get("PYOPENGL_PLATFORM", "")
    if not wanted:
        wanted = platform if platform in _PROBES else ""
    elif wanted not in _PROBES:
        return wanted  # glfw: the user's own choice, and the user's own display
    if platform not in ("", wanted) and (wanted or platform not in _PROBES):
        raise RenderingUnavailableError(
            f"PYOPENGL_PLATFORM should be {wanted or 'egl or osmesa'} to render without a display, "
            f"got {platform}; unset it"
        )
    backend = _first_working([wanted] if wanted else list(_PROBES))
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
    return backend


def check_versions() -> None:
    """Raises IncompatibleVersionsError for a pair of dm_control and mujoco known to crash."""
    found = {
        name: _version(name) for name in ("dm_control", "mujoco", "mujoco-core", "mujoco-studio")
    }
    for name in ("dm_control", "mujoco"):
        if found[name] is None:
            raise IncompatibleVersionsError(
                f"{name} is not installed; environments need it: {MUJOCO_REMEDY}"
            )
    # mujoco 4 is three packages that write into one folder: any of them breaks an older mujoco.
    newer = {name: version for name, version in found.items() if name != "dm_control" and version}
    if any(int(version.split(".")[0]) >= 4 for version in newer.values()):
        listed = ", ".join(f"{name} {version}" for name, version in newer.items())
        raise IncompatibleVersionsError(
            f"dm_control {found['dm_control']} should be paired with mujoco >=3.17,<3.18, "
            f"got {listed}; they share files, so remove all of them first: {MUJOCO_REMEDY}"
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend_of_imported_dm_control() -> str:
    backend = getattr(sys.modules["dm_control._render"], "BACKEND", None)
    if backend == "glfw" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        if os.environ.get("MUJOCO_GL", "").lower() == "glfw":
            raise RenderingUnavailableError(
                "MUJOCO_GL is glfw, which needs a display, and there is none; unset it, or set it "
                "to egl"
            )
        raise RenderingUnavailableError(
            "dm_control was imported before crpt.envs and chose glfw, which needs a display; call "
            "crpt.envs.select_backend() before importing dm_control, or set MUJOCO_GL=egl"
        )
    if backend is None or backend in _OFF:
        raise RenderingUnavailableError(
            "dm_control was imported before crpt.envs, with rendering turned off; call "
            "crpt.envs.select_backend() before importing dm_control, or set MUJOCO_GL=egl"
        )
    return str(backend)


def _first_working(backends: list[str]) -> str:
    problems = {}
    for backend in backends:
        problem = _PROBES[backend]()
        if problem is None:
            return backend
        problems[backend] = problem
    packages = _DEBIAN_PACKAGES[backends[0]]
    alternative = ""
    if len(backends) > 1:
        alternative = f" (or {_DEBIAN_PACKAGES[backends[1]]})"
    found = "; ".join(f"{backend}: {problem}" for backend, problem in problems.items())
    raise RenderingUnavailableError(
        f"no OpenGL to render with ({found}). On Debian and Ubuntu: "
        f"apt-get install -y {packages}{alternative}"
    )


def share_devices(process: int) -> None:
    """Gives this process its share of the graphics cards, if EGL is what will render.

    Process n draws on card n modulo their number. A device set in MUJOCO_EGL_DEVICE_ID is kept.
    Call it before anything imports dm_control.
    """
    if os.environ.get("MUJOCO_GL", "egl").lower() != "egl" or _DEVICE in os.environ:
        return
    try:
        egl = Egl()
        devices = cards(egl.devices())
    except EglError:
        return  # select_backend will say so, or find OSMesa
    for n in range(len(devices)):
        device = devices[(process + n) % len(devices)]
        if egl.can_use(device):
            os.environ[_DEVICE] = str(device.number)
            return


def _probe_egl() -> str | None:
    """What keeps EGL from working here; none if a display without a screen could be initialised."""
    try:
        egl = Egl()
        devices = egl.devices()
    except EglError as error:
        return str(error)
    chosen = os.environ.get(_DEVICE)
    if chosen is not None:
        devices = [device for device in devices if str(device.number) == chosen]
    for device in devices:
        if egl.can_use(device):
            _warn_of_software(device)
            return None
    which = f"of number {_DEVICE}={chosen} " if chosen is not None else ""
    return f"none of the {len(devices)} EGL devices {which}can be initialised"


def _warn_of_software(device: Device) -> None:
    global warned
    if device.is_software and kernel_has_gpu() and not warned:
        warned = True
        _log.warning(
            "there is a GPU, but EGL renders in software, many times slower: the driver's OpenGL "
            "is missing (libnvidia-gl), or kept out of this container "
            "(NVIDIA_DRIVER_CAPABILITIES should be all, or have graphics)"
        )


def _probe_osmesa() -> str | None:
    """What keeps OSMesa from working here; none if its library loads."""
    library = load_library(
        "libOSMesa.so.8",
        "libOSMesa.so.6",
        ctypes.util.find_library("OSMesa") or "libOSMesa.so",
    )
    return "libOSMesa.so is missing" if library is None else None


_PROBES = {"egl": _probe_egl, "osmesa": _probe_osmesa}
