"""What a figure depends on: processor, GPU, versions, threads, the command and the day."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import crpt
from crpt import _cpu

# Where the last level cannot be read.
USUAL_CACHE = 32 << 20
_SETTINGS = re.compile("(OMP|GOMP|KMP|MKL|DNNL|ONEDNN|TORCH|CRPT|CUDA)_")


def describe(device: torch.device, name: str) -> dict[str, Any]:
    """Everything beside the figures, as plain values; `name` is the bench's."""
    cpu = _cpuinfo()
    return {
        "command": shlex.join(["python", "-m", "crpt.bench", name, *sys.argv[2:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": {
            "model": cpu.get("model name", platform.processor() or platform.machine()),
            "flags": cpu.get("flags", "").split(),
            "kernels": _cpu.isa,
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "last_level_cache": last_level_cache(torch.device("cpu")),
        },
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "versions": {
            "crpt": crpt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "system": platform.platform(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if _SETTINGS.match(k)},
        "load_average": list(os.getloadavg()),
    }


def header(machine: dict[str, Any]) -> list[str]:
    """The lines above a table of figures."""
    cpu, gpu, versions = machine["cpu"], machine["gpu"], machine["versions"]
    lines = [
        machine["command"],
        f"crpt {versions['crpt']}, torch {versions['torch']}, Python {versions['python']}, "
        f"{machine['date'][:10]}",
        f"{cpu['model']}, {cpu['kernels']} kernels, {_count(cpu['cores'], 'core')}, "
        f"{_count(cpu['threads'], 'thread')}, last-level cache "
        f"{cpu['last_level_cache'] / 2**20:.0f} MiB",
    ]
    if gpu:
        lines.append(f"{gpu['model']}, driver {gpu['driver']}, CUDA {versions['cuda']}")
    load = ", ".join(f"{x:.2f}" for x in machine["load_average"])
    return [*lines, f"load average before: {load}"]


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if size:
            sizes.append(int(size[1]) << (10 if size[2] == "K" else 20))
    return max(sizes, default=USUAL_CACHE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "model": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "last_level_cache": last_level_cache(device),
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()
