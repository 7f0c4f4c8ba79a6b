"""Memory for large results on the CPU: kept when a result dies, for the next of that size.

torch's allocator has results of 32 MiB and more mapped afresh each time, page by page as they are
written: for a batch of float32 images that takes several times as long as computing it. So results
of 4 MiB and more of random_shift, frame_stack, sinkhorn and prototype_loss's gradient lie in huge
pages that are used again. Nobody needs to
know, but for two things: up to `cache_limit` bytes stay with the process while no tensor uses them,
and the storage of such a result cannot be resized (as that of torch.from_numpy cannot).

CRPT_CPU_CACHE_MIB in the environment is the limit at the start, in MiB; 256 where it is not set; 0
leaves all memory to torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from crpt.ops.compiled import _cpu

# Bytes. glibc maps all afresh from 32 MiB on, and gives smaller blocks back to the system now and
# then.
_WORTH_KEEPING = 4 << 20


def cache_limit() -> int:
    """Most bytes that are kept while no tensor uses them."""
    return int(_cpu.pool_limit())


def set_cache_limit(limit: int) -> None:
    """Sets `cache_limit`, in bytes, and returns to the system what is beyond it. 0: keep nothing,
    and let torch allocate."""
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit should be an int, got {type(limit).__name__}")
    if not 0 <= limit < 2**63:
        raise ValueError(f"limit should be in [0, 2**63), got {limit}")
    _cpu.set_pool_limit(limit)


def cached_bytes() -> int:
    """Bytes kept now while no tensor uses them."""
    return int(_cpu.pooled_bytes())


def empty_cache() -> None:
    """Returns to the system what no tensor uses. The limit stays."""
    _cpu.empty_pool()


def new_empty(
    like: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    least: int = _WORTH_KEEPING,
) -> Tensor:
    """like.new_empty(shape, dtype=dtype), in kept memory where it has `least` bytes or more."""
    dtype = like.dtype if dtype is None else dtype
    if not _worth_keeping(math.prod(shape) * dtype.itemsize, least):
        return like.new_empty(shape, dtype=dtype)
    return _kept(like.new_empty(shape, dtype=dtype, device="meta"), like)


def empty_like(like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """torch.empty_like(like, memory_format=memory_format), in kept memory where it is large."""
    if not _worth_keeping(like.numel() * like.element_size()):
        return torch.empty_like(like, memory_format=memory_format)
    return _kept(torch.empty_like(like, memory_format=memory_format, device="meta"), like)


def _worth_keeping(size: int, least: int = _WORTH_KEEPING) -> bool:
    # Where torch fills fresh memory, to show who reads it, it is to do so here too.
    return size >= least and not torch.are_deterministic_algorithms_enabled()


def _kept(meta: Tensor, like: Tensor) -> Tensor:
    pages = _cpu.take_pages(meta.numel() * meta.element_size())
    if pages is None:  # switched off, or no memory: then the error is torch's
        return torch.empty_like(meta, device=like.device)
    storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    out = like.new_empty(0, dtype=meta.dtype)
    return out.set_(storage, 0, meta.shape, meta.stride())


def _limit_at_the_start() -> None:
    text = os.environ.get("CRPT_CPU_CACHE_MIB", "")
    if text == "":
        return
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise ValueError(f"CRPT_CPU_CACHE_MIB should be a number of MiB, 0 or more, got {text!r}")
    set_cache_limit(int(text) << 20)


_limit_at_the_start()
