"""Memory for batches, which is used again once nobody holds the batch.

A fresh array of this size is mapped anew, and costs more in page faults than a batch in all.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque
from math import prod

import numpy as np
import torch
from torch import Tensor

_LEAST = 1 << 20  # smaller ones come from malloc, which keeps them
_MOST_IDLE = 1 << 30


class Pool:
    """Any thread may ask; what is given back by the garbage collector may come from any other."""

    def __init__(self) -> None:
        self._idle: deque[mmap.mmap] = deque()  # its operations are atomic: there is no lock

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < _LEAST:
            return torch.empty(shape, dtype=dtype)
        memory = self._take(nbytes)
        array = np.frombuffer(memory, np.uint8, nbytes)
        # The tensor holds the array, and whatever shares the tensor's memory holds that.
        weakref.finalize(array, self._give_back, memory).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def _take(self, nbytes: int) -> mmap.mmap:
        for _ in range(len(self._idle)):
            with contextlib.suppress(IndexError):  # another thread took it
                memory = self._idle.popleft()
                if nbytes <= len(memory) <= nbytes + nbytes // 4:
                    return memory
                self._idle.append(memory)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _give_back(self, memory: mmap.mmap) -> None:
        self._idle.append(memory)
        with contextlib.suppress(IndexError):
            while sum(map(len, list(self._idle))) > _MOST_IDLE:
                self._idle.popleft()
