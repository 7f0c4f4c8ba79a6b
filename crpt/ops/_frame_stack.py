from __future__ import annotations

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, fake, not_differentiable


def frame_stack(
    frames: Tensor,
    index: Tensor,
    shifts: Tensor | None = None,
    pad: int = 4,
    dtype: torch.dtype = torch.uint8,
    out: Tensor | None = None,
) -> Tensor:
    r"""Gather, stack, shift and cast frames in one pass.

    .. math::
        out_{b, kC + c, y, x} =
        \operatorname{cast}(frames_{index_{bk}, c, \operatorname{clamp}(y + dy_b),
        \operatorname{clamp}(x + dx_b)})

    Args:
        frames: uint8 [N, C, H, W], C, H, W >= 1, any strides. On a CPU it may be a mapped file of
            any size, also read-only: it is never copied, and only frames that the index names are
            read.
        index: int64 [B, K] in [0, N), K >= 1; B may be 0.
        shifts: int64 [B, 2]: (dy, dx) in [-pad, pad], one per sample, shared by its frames. None:
            no shift.
        pad: in [0, 2**31), in pixels; the bound of the shifts.
        dtype: uint8: pixels as they are. float32, float16, bfloat16, float64: pixel / 255, rounded
            once (to float32 first for the two half types).
        out: what the result is written to, [B, K*C, H, W], contiguous, of that dtype, on the device
            of the frames, pinned or not; in memory of its own. None: fresh memory. Where an error
            is raised, nothing is written to it.

    Returns:
        [B, K*C, H, W], contiguous; `out` where that is given. No gradient. On a CPU large results
        lie in memory that is kept for the next one: see `crpt.ops.cpu_memory`.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device, pad; an index or shift out of range. On CUDA, where reporting a
            value would wait for the device, these stop the kernel with a device assertion instead.

    Source: CRPTpro (arXiv 2302.05614), section 3.
    """
    arguments.tensor("frames", frames)
    arguments.tensor("index", index)
    if shifts is not None:
        arguments.tensor("shifts", shifts)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype should be a torch.dtype, got {type(dtype).__name__}")
    pad = arguments.integer("pad", pad)
    if out is None:
        return call("frame_stack", frames, index, shifts, pad, dtype)
    arguments.tensor("out", out)
    if out.dtype != dtype:
        raise TypeError(f"out should be {dtype} like the argument dtype, got {out.dtype}")
    torch.ops.crpt.frame_stack_out(frames, index, shifts, pad, out)
    return out


@fake("frame_stack")
def _(frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype) -> Tensor:
    checks.frame_stack(frames, index, shifts, pad, dtype)
    batch, stack = index.shape
    _, channels, height, width = frames.shape
    return frames.new_empty((batch, stack * channels, height, width), dtype=dtype)


@fake("frame_stack_out")
def _(frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, out: Tensor) -> None:
    checks.frame_stack_out(frames, index, shifts, pad, out)


not_differentiable("frame_stack")
not_differentiable("frame_stack_out")
