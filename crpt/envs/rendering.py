"""Headless rendering: which OpenGL backend dm_control uses, chosen before dm_control is imported.

Left alone on a machine without a display, dm_control picks GLFW and aborts at the first frame. The
choice is made by the environment variables MUJOCO_GL and PYOPENGL_PLATFORM, which dm_control reads
once, when it is imported. A choice of the user's own is kept.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import sys

_DEBIAN_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}
_OFF = ("off", "disable", "disabled", "false", "0")
_MUJOCO_REMEDY = (
    "pip uninstall -y mujoco mujoco-core mujoco-studio && "
    "pip install 'dm_control==1.0.50' 'mujoco>=3.17,<3.18'"
)


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
                f"{name} is not installed; environments need it: {_MUJOCO_REMEDY}"
            )
    # mujoco 4 is three packages that write into one folder: any of them breaks an older mujoco.
    newer = {name: version for name, version in found.items() if name != "dm_control" and version}
    if any(int(version.split(".")[0]) >= 4 for version in newer.values()):
        listed = ", ".join(f"{name} {version}" for name, version in newer.items())
        raise IncompatibleVersionsError(
            f"dm_control {found['dm_control']} should be paired with mujoco >=3.17,<3.18, "
            f"got {listed}; they share files, so remove all of them first: {_MUJOCO_REMEDY}"
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend_of_imported_dm_control() -> str:
    backend = getattr(sys.modules["dm_control._render"], "BACKEND", None)
    if backend == "glfw" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
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


def _load(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    return None


def _probe_egl() -> str | None:
    """What keeps EGL from working here; none if a display without a screen could be initialised."""
    # As dm_control does, and first: NVIDIA's driver wants it loaded before libEGL.
    _load(("libOpenGL.so.0",))
    egl = _load(("libEGL.so.1", ctypes.util.find_library("EGL") or "libEGL.so"))
    if egl is None:
        return "libEGL.so.1 is missing"
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_devices_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    get_display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_devices_address or not get_display_address:
        return "libEGL has no device enumeration"
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, integer, ctypes.POINTER(pointer), ctypes.POINTER(integer)
    )(query_devices_address)
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, ctypes.POINTER(integer))(
        get_display_address
    )
    devices, count = (pointer * 16)(), integer(0)
    if not query_devices(16, devices, ctypes.byref(count)) or count.value == 0:
        return "EGL sees no device, not even a software one"
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl_platform_device = 0x313F
    for device in devices[: count.value]:
        display = get_display(egl_platform_device, device, None)
        # Left initialised: dm_control initialises the same display again, which costs nothing.
        if display and egl.eglInitialize(display, None, None):
            return None
    return f"none of the {count.value} EGL devices can be initialised"


def _probe_osmesa() -> str | None:
    """What keeps OSMesa from working here; none if its library loads."""
    names = (
        "libOSMesa.so.8",
        "libOSMesa.so.6",
        ctypes.util.find_library("OSMesa") or "libOSMesa.so",
    )
    return "libOSMesa.so is missing" if _load(names) is None else None


_PROBES = {"egl": _probe_egl, "osmesa": _probe_osmesa}
