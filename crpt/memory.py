"""Keeping freed memory instead of returning it to the system."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Has this process's malloc keep what is freed; whether it could be told (glibc's can).

    The activations of a convolution at batch 512 are hundreds of megabytes. glibc takes blocks of
    that size from the system each time and gives them back at once, and the faults on their first
    touch, page by page, take as long as the arithmetic: an update of pre-training on two cores
    takes half the time without them. The price: the process keeps the memory of its largest moment.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
