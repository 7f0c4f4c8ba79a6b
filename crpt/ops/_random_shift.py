from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, fake, gradient
from crpt.ops.layout import memory_format


def random_shift(
    images: Tensor,
    pad: int = 4,
    shifts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Replicate-pad by `pad`, then crop at one uniform offset per image.

    .. math::
        out_{b,c,y,x} = images_{b,\, c,\, \operatorname{clamp}(y + dy_b, 0, H-1),\,
        \operatorname{clamp}(x + dx_b, 0, W-1)}

    Args:
        images: [B, C, H, W], C, H, W >= 1, B may be 0; uint8 and other integers, bool, or float32,
            float16, bfloat16, float64; any strides. Copied only where they are channels-last with
            something between the channels of a pixel, and on CUDA where there is something between
            the pixels of a row.
        pad: in [0, 2**31), in pixels.
        shifts: int64 [B, 2] on the device of the images: (dy, dx) in [-pad, pad]. None: drawn
            uniformly.
        generator: what they are drawn from, on the device of the images; None: torch's default.
            Under torch.compile(fullgraph=True) only None: torch cannot trace a generator.

    Returns:
        The shape and dtype of the images; channels-last where they are, also if they are part of
        larger ones, and contiguous elsewhere. Floating images are differentiable (the operator is
        linear, so to any order); so do gradients keep their layout. On a CPU large results lie in
        memory that is kept for the next one: see `crpt.ops.cpu_memory`.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device, pad; a shift out of range. On CUDA, where reporting a value would
            wait for the device, a shift out of range stops the kernel with a device assertion
            instead.

    Source: DrQ-v2 (arXiv 2107.09645), without its interpolation; CRPTpro (arXiv 2302.05614),
        section 3.
    """
    arguments.tensor("images", images)
    pad = arguments.integer("pad", pad)
    if shifts is None:
        checks.random_shift_images(images, pad)
        shifts = _draw(images, pad, generator)
    else:
        if generator is not None:
            raise ValueError("generator should be None where shifts are given: nothing is drawn")
        arguments.tensor("shifts", shifts)
    return call("random_shift", images, shifts, pad)


def _draw(images: Tensor, pad: int, generator: torch.Generator | None) -> Tensor:
    low, high, size, device = -pad, pad + 1, (images.shape[0], 2), images.device
    if generator is None:  # naming it, even as None, picks an overload without symbolic sizes
        return torch.randint(low, high, size, device=device)
    arguments.generator(generator, device)
    return torch.randint(low, high, size, generator=generator, device=device)


@fake("random_shift")
def _(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift(images, shifts, pad)
    return torch.empty_like(images, memory_format=memory_format(images))


@fake("random_shift_backward")
def _(grad: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift_backward(grad, shifts, pad)
    return torch.empty_like(grad, memory_format=memory_format(grad))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, shifts, ctx.pad = inputs
    ctx.save_for_backward(shifts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return call("random_shift_backward", grad, *ctx.saved_tensors, ctx.pad), None, None


def _backward_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return call("random_shift", grad, *ctx.saved_tensors, ctx.pad), None, None


gradient("random_shift", _backward, _setup)
gradient("random_shift_backward", _backward_of_backward, _setup)
