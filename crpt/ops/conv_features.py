"""The encoder's convolutions on a GPU in bf16, by kernels of their own: for training, where they
take most of the time.

Not an operator of torch.ops.crpt: it is called from recorded updates alone, and has no twin but the
encoder itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from crpt.ops import cuda

_CHANNELS = 32
_MOST_PIXEL_CHANNELS = 16
# Beyond it the shared memory of some GPUs does not hold the three rows of a tile, twice.
_LARGEST_IMAGE = 256


def usable(convolutions: nn.Sequential, image_size: int, device: torch.device) -> bool:
    """Whether there are kernels for these layers: 3x3 to 32 channels, ReLU after each, the first of
    stride 2 from at most 16 channels, the others of stride 1; on images of at most 256 x 256."""
    layers = [layer for layer in convolutions if isinstance(layer, nn.Conv2d)]
    return (
        cuda.AVAILABLE
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and image_size <= _LARGEST_IMAGE
        and len(convolutions) == 2 * len(layers)
        and all(isinstance(layer, nn.ReLU) for layer in list(convolutions)[1::2])
        and all(
            layer.out_channels == _CHANNELS
            and layer.kernel_size == (3, 3)
            and layer.stride == ((2, 2) if i == 0 else (1, 1))
            and layer.padding == (0, 0)
            and layer.bias is not None
            for i, layer in enumerate(layers)
        )
        and layers[0].in_channels <= _MOST_PIXEL_CHANNELS
    )


def conv_features(images: Tensor, convolutions: nn.Sequential) -> Tensor:
    r"""The features of pixels, with channels last.

    .. math::
        h = \operatorname{relu}(w_L * \dots \operatorname{relu}(w_1 * images / 255 + b_1) \dots
        + b_L)

    Products in bf16 with float32 sums; between layers bf16. Gradients of weights and biases are
    float32, and deterministic.

    Args:
        images: uint8 [B, C, H, W], contiguous.
        convolutions: layers that are `usable`.

    Returns:
        bfloat16 [B, H', W', 32].
    """
    parameters = [p for layer in list(convolutions)[::2] for p in (layer.weight, layer.bias)]
    out: Tensor = _Features.apply(images, *parameters)  # type: ignore[no-untyped-call]
    return out


def channels_last_columns(weight: Tensor, channels: int) -> Tensor:
    """The weight of a product with features that lie [pixels, channels], in bf16, from that with
    features that lie [channels, pixels]: float32 [D, C * P] -> bfloat16 [D, P * C]."""
    out: Tensor = _Reordered.apply(weight, channels)  # type: ignore[no-untyped-call]
    return out


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, channels: int) -> Tensor:
        ctx.channels = channels
        return _reorder(weight, channels, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reorder(grad, grad.shape[1] // ctx.channels, torch.float32), None


def _reorder(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[D, R * S] -> [D, S * R], in another dtype."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    device, _, stream = _start(x)
    cuda._cuda.reorder(
        device, cuda._DTYPE[x.dtype], cuda._DTYPE[dtype], x.data_ptr(), out.data_ptr(), len(x),
        rows, x.shape[1] // rows, stream,
    )  # fmt: skip
    return out


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, *parameters: Tensor) -> Tensor:
        layers = list(zip(parameters[::2], parameters[1::2], strict=True))
        outputs = [_pixels(images, *layers[0])]
        for weight, bias in layers[1:]:
            outputs.append(_next(outputs[-1], weight, bias))
        ctx.save_for_backward(images, *parameters[::2], *outputs)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, *saved = ctx.saved_tensors
        weights, outputs = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        grad = torch.ops.aten.threshold_backward(grad.contiguous(), outputs[-1], 0)
        batches = [_partial(grad, len(weights) - 1, _CHANNELS)]
        for i in reversed(range(1, len(weights))):
            _weight_gradient(grad, outputs[i - 1], batches[0][:, i - 1])
            grad = _in_gradient(grad, outputs[i - 1], weights[i])
        batches.insert(0, _partial(grad, 1, _MOST_PIXEL_CHANNELS))
        _pixel_weight_gradient(grad, images, batches[0][:, 0])
        parts = [part for batch in batches for part in batch.sum(dim=0)]
        gradients = [g for part, w in zip(parts, weights, strict=True) for g in _split(part, w)]
        return (None, *gradients)


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
