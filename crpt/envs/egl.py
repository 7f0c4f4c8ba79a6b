"""The devices that EGL can render on without a screen, asked of libEGL itself.

Their numbers are EGL's own: neither CUDA's nor those of /dev/dri. Asking for them and for what they
say of themselves opens none of them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_DEVICES = 10  # dm_control looks no further
_EXTENSIONS = 0x3055
_DRM_DEVICE_FILE = 0x3233
_PLATFORM_DEVICE = 0x313F
_POINTER, _INTEGER, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p


class EglError(RuntimeError):
    """What keeps EGL from working here."""


@dataclass(frozen=True)
class Device:
    """One of EGL's devices."""

    number: int
    """What MUJOCO_EGL_DEVICE_ID calls it."""
    handle: int
    is_software: bool
    node: str | None
    """The kernel's file of the graphics card, where the driver tells it."""


class Egl:
    """libEGL, as far as it is needed here; raises EglError where it is missing or too old."""

    def __init__(self) -> None:
        # As dm_control does, and first: NVIDIA's driver wants it loaded before libEGL.
        load_library("libOpenGL.so.0")
        library = load_library("libEGL.so.1", ctypes.util.find_library("EGL") or "libEGL.so")
        if library is None:
            raise EglError("libEGL.so.1 is missing")
        self._library = library
        library.eglGetProcAddress.restype = _POINTER
        library.eglInitialize.argtypes = [_POINTER, _POINTER, _POINTER]
        counts = ctypes.POINTER(_INTEGER)
        self._query = self._function(
            "eglQueryDevicesEXT", ctypes.c_uint, _INTEGER, ctypes.POINTER(_POINTER), counts
        )
        self._display = self._function(
            "eglGetPlatformDisplayEXT", _POINTER, ctypes.c_uint, _POINTER, counts
        )
        if self._query is None or self._display is None:
            raise EglError("libEGL has no device enumeration")
        self._describe = self._function("eglQueryDeviceStringEXT", _TEXT, _POINTER, _INTEGER)

    def devices(self) -> list[Device]:
        """All devices, those that cannot be used here included."""
        handles, count = (_POINTER * _MOST_DEVICES)(), _INTEGER(0)
        if not self._query(_MOST_DEVICES, handles, ctypes.byref(count)) or count.value == 0:
            raise EglError("EGL sees no device, not even a software one")
        return [self._device(n, handle or 0) for n, handle in enumerate(handles[: count.value])]

    def can_use(self, device: Device) -> bool:
        """Whether the device's display can be initialised.

        It stays so: dm_control initialises the same display again, which costs nothing.
        """
        display = self._display(_PLATFORM_DEVICE, device.handle, None)
        return bool(display and self._library.eglInitialize(display, None, None))

    def _device(self, number: int, handle: int) -> Device:
        extensions = self._string(handle, _EXTENSIONS).split()
        has_node = "EGL_EXT_device_drm" in extensions
        return Device(
            number,
            handle,
            is_software="EGL_MESA_device_software" in extensions,
            node=self._string(handle, _DRM_DEVICE_FILE) or None if has_node else None,
        )

    def _string(self, handle: int, name: int) -> str:
        text = self._describe(handle, name) if self._describe is not None else None
        return (text or b"").decode(errors="replace")

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        address = self._library.eglGetProcAddress(name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


def cards(devices: list[Device]) -> list[Device]:
    """The graphics cards among the devices, each once: two drivers may offer the same one."""
    first = {d.node or d.number: d for d in reversed(devices) if not d.is_software}
    return sorted(first.values(), key=lambda device: device.number)


def kernel_has_gpu() -> bool:
    """Whether there is a graphics card, whatever EGL can do with it."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/kfd").exists()


def load_library(*names: str) -> ctypes.CDLL | None:
    """The first of the libraries that is there."""
    for name in names:
        try:
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    return None
