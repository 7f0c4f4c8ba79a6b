"""`conv_features` on a GPU: layer by layer, for recorded updates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from crpt.ops import cuda

_CHANNELS = 32
_MOST_PIXEL_CHANNELS = 16
# Beyond it the shared memory of some GPUs does not hold the three rows of a tile, twice.
_LARGEST_IMAGE = 256


def available(device: torch.device, in_channels: int, image_size: int) -> bool:
    """Whether the device is of compute capability 8.0 or later; for images of at most 16 channels
    and 256 x 256 pixels."""
    return (
        cuda.AVAILABLE
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and image_size <= _LARGEST_IMAGE
        and in_channels <= _MOST_PIXEL_CHANNELS
    )


def forward(images: Tensor, layers: list[tuple[Tensor, Tensor]], keep: bool) -> list[Tensor]:
    """What each layer gives."""
    outputs = [_pixels(images, *layers[0])]
    for weight, bias in layers[1:]:
        outputs.append(_next(outputs[-1], weight, bias))
    return outputs


def backward(
    grad: Tensor, images: Tensor, weights: list[Tensor], outputs: list[Tensor]
) -> list[Tensor]:
    """Gradients of each layer's weight and bias in turn."""
    grad = torch.ops.aten.threshold_backward(grad, outputs[-1], 0)
    batches = [_partial(grad, len(weights) - 1, _CHANNELS)]
    for i in reversed(range(1, len(weights))):
        _weight_gradient(grad, outputs[i - 1], batches[0][:, i - 1])
        grad = _in_gradient(grad, outputs[i - 1], weights[i])
    batches.insert(0, _partial(grad, 1, _MOST_PIXEL_CHANNELS))
    _pixel_weight_gradient(grad, images, batches[0][:, 0])
    parts = [part for batch in batches for part in batch.sum(dim=0)]
    return [g for part, w in zip(parts, weights, strict=True) for g in _split(part, w)]


def reorder(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[D, R * S] -> [D, S * R], in another dtype."""
    out = torch.empty_like(x, dtype=dtype)
    device, _, stream = _start(x)
    cuda._cuda.reorder(
        device, cuda._DTYPE[x.dtype], cuda._DTYPE[dtype], x.data_ptr(), out.data_ptr(), len(x),
        rows, x.shape[1] // rows, stream,
    )  # fmt: skip
    return out


def _start(tensor: Tensor) -> tuple[int, int, int]:
    """The device's number, its multiprocessors, and its current stream."""
    device, stream = cuda._stream(tensor.device)
    return device, processors(tensor.device), stream


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pixels(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, channels, height, width = images.shape
    shape = (batch, (height - 3) // 2 + 1, (width - 3) // 2 + 1, _CHANNELS)
    out = images.new_empty(shape, dtype=torch.bfloat16)
    device, count, stream = _start(images)
    cuda._cuda.conv_pixels(
        device, images.data_ptr(), weight.data_ptr(), *weight.stride(), bias.data_ptr(),
        out.data_ptr(), batch, channels, height, width, 2 * count, stream,
    )  # fmt: skip
    return out


def _next(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, height, width, _ = x.shape
    out = x.new_empty((batch, height - 2, width - 2, _CHANNELS))
    device, count, stream = _start(x)
    cuda._cuda.conv(
        device, x.data_ptr(), weight.data_ptr(), *weight.stride(), bias.data_ptr(), out.data_ptr(),
        batch, height - 2, width - 2, 2 * count, stream,
    )  # fmt: skip
    return out


def _in_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(x)
    batch, height, width, _ = grad.shape
    device, count, stream = _start(x)
    cuda._cuda.conv_backward_in(
        device, grad.data_ptr(), x.data_ptr(), weight.data_ptr(), *weight.stride(),
        out.data_ptr(), batch, height, width, 2 * count, stream,
    )  # fmt: skip
    return out


def _weight_gradient(grad: Tensor, x: Tensor, partial: Tensor) -> None:
    """Parts whose sum is the gradients of weight and bias, [blocks, 32 * 9 * 32 + 32]."""
    batch, height, width, _ = grad.shape
    device, _, stream = _start(x)
    cuda._cuda.conv_backward_weight(
        device, grad.data_ptr(), x.data_ptr(), partial.data_ptr(), partial.stride(0), batch,
        height, width, len(partial), stream,
    )  # fmt: skip


def _pixel_weight_gradient(grad: Tensor, images: Tensor, partial: Tensor) -> None:
    """Those of the first layer, [blocks, 32 * 9 * 16 + 32]."""
    device, _, stream = _start(images)
    cuda._cuda.conv_pixels_backward_weight(
        device, grad.data_ptr(), images.data_ptr(), partial.data_ptr(), partial.stride(0),
        *images.shape, len(partial), stream,
    )  # fmt: skip


def _partial(grad: Tensor, layers: int, channels: int) -> Tensor:
    """[blocks, layers, size]: a block a multiprocessor where its tiles are large, or two."""
    blocks = processors(grad.device) * (1 if channels == _CHANNELS else 2)
    size = _CHANNELS * 9 * channels + _CHANNELS
    return grad.new_empty((blocks, layers, size), dtype=torch.float32)


def _split(gradients: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight [32, C, 3, 3], channels-last, and bias [32]."""
    of_weight = gradients[:-_CHANNELS].view(_CHANNELS, 3, 3, -1)[..., : weight.shape[1]]
    return of_weight.permute(0, 3, 1, 2), gradients[-_CHANNELS:]
