"""`conv_features` on a CPU: whole images through all layers in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from crpt.ops import cpu_memory
from crpt.ops.compiled import _cpu
from crpt.ops.cpu import _DTYPE

_CHANNELS = 32
# Bytes. All that lies between layers, and the projector's weight, comes and goes with each update.
_WORTH_KEEPING = 1 << 20


def available(device: torch.device, in_channels: int, image_size: int) -> bool:
    """Whether this CPU has units for bf16 that the kernels use."""
    return bool(_cpu.bf16_units)


def forward(images: Tensor, layers: list[tuple[Tensor, Tensor]], keep: bool) -> list[Tensor]:
    """What each layer gives; the last alone unless `keep`."""
    batch, _, height, width = images.shape
    last = len(layers) - 1
    sizes = [((height - 3) // 2 + 1 - 2 * i, (width - 3) // 2 + 1 - 2 * i) for i in range(last + 1)]
    outputs = [
        cpu_memory.new_empty(images, (batch, h, w, _CHANNELS), torch.bfloat16, least=_WORTH_KEEPING)
        if keep or i == last
        else None
        for i, (h, w) in enumerate(sizes)
    ]
    _cpu.conv_forward(
        images.data_ptr(), images.shape,
        [_layer(*layer, out) for layer, out in zip(layers, outputs, strict=True)],
        torch.get_num_threads(),
    )  # fmt: skip
    return [out for out in outputs if out is not None]


def backward(
    grad: Tensor, images: Tensor, weights: list[Tensor], outputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of each layer's weight and bias in turn."""
    counts = [n for w in weights for n in (w.numel(), _CHANNELS)]
    gradients = torch.empty(sum(counts), dtype=torch.float32)
    layers = [_layer(w, None, out) for w, out in zip(weights, outputs, strict=True)]
    _cpu.conv_backward(
        grad.data_ptr(), images.data_ptr(), images.shape, layers, gradients.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    first, bias, *others = gradients.split(counts)
    found = [first.view(-1, 3, 3, _CHANNELS).permute(3, 0, 1, 2), bias]
    for weight, bias in zip(others[::2], others[1::2], strict=True):
        found += [weight.view(_CHANNELS, 3, 3, _CHANNELS).permute(0, 3, 1, 2), bias]
    return found


def reorder(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[D, R * S] -> [D, S * R], in another dtype."""
    out = cpu_memory.new_empty(x, x.shape, dtype, least=_WORTH_KEEPING)
    _cpu.reorder(
        x.data_ptr(), out.data_ptr(), _DTYPE[x.dtype], _DTYPE[dtype], len(x), rows,
        x.shape[1] // rows, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _layer(weight: Tensor, bias: Tensor | None, out: Tensor | None) -> list[int]:
    return [
        weight.data_ptr(),
        *weight.stride(),
        0 if bias is None else bias.data_ptr(),
        0 if out is None else out.data_ptr(),
    ]
