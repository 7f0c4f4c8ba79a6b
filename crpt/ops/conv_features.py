"""The encoder's convolutions in bf16, by kernels of their own: for training, where they take most
of the time.

Not an operator of torch.ops.crpt: it has no twin but the encoder itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crpt.ops import conv_cpu, conv_cuda

Layer = tuple[Tensor, Tensor]
"""Weight [32, I, 3, 3] of any strides and bias [32], float32."""


class Kernels(Protocol):
    """What a device gives: `conv_cpu` or `conv_cuda`."""

    def available(self, device: torch.device, in_channels: int, image_size: int) -> bool:
        """Whether it has units for bf16, and kernels for such images."""

    def forward(self, images: Tensor, layers: list[Layer], keep: bool) -> list[Tensor]:
        """What each layer gives, bfloat16 [B, H, W, 32]; the last alone will do unless `keep`."""

    def backward(
        self, grad: Tensor, images: Tensor, weights: list[Tensor], outputs: list[Tensor]
    ) -> list[Tensor]:
        """float32 gradients of each layer's weight and bias in turn, from that of the last
        output."""

    def reorder(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """[D, R * S] -> [D, S * R], in another dtype."""


def _kernels(device: torch.device) -> Kernels:
    return conv_cpu if device.type == "cpu" else conv_cuda


def usable(convolutions: nn.Sequential, image_size: int, device: torch.device) -> bool:
    """Whether there are kernels for these layers, and faster ones than PyTorch's: 3x3 to 32
    channels, ReLU after each, the first of stride 2, the others of stride 1."""
    layers = [layer for layer in convolutions if isinstance(layer, nn.Conv2d)]
    return (
        0 < 2 * len(layers) == len(convolutions)
        and all(isinstance(layer, nn.ReLU) for layer in list(convolutions)[1::2])
        and all(
            layer.out_channels == 32
            and layer.kernel_size == (3, 3)
            and layer.stride == ((2, 2) if i == 0 else (1, 1))
            and layer.padding == (0, 0)
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.bias is not None
            and layer.weight.dtype == torch.float32
            for i, layer in enumerate(layers)
        )
        and device.type in ("cpu", "cuda")
        and _kernels(device).available(device, layers[0].in_channels, image_size)
    )


def conv_features(images: Tensor, convolutions: nn.Sequential) -> Tensor:
    r"""The features of pixels, with channels last.

    .. math::
        h = \operatorname{relu}(w_L * \dots \operatorname{relu}(w_1 * images / 255 + b_1) \dots
        + b_L)

    Products in bf16 with float32 sums; between layers bf16. Gradients of weights and biases are
    float32, and deterministic: on a CPU for any number of threads.

    Args:
        images: uint8 [B, C, H, W].
        convolutions: layers that are `usable`; on a CPU without units for bf16 slow, but the same.

    Returns:
        bfloat16 [B, H', W', 32]. Differentiable once.

    Raises:
        TypeError: dtype.
        ValueError: shape or device.
    """
    parameters: list[Any] = [
        p for layer in list(convolutions)[::2] for p in (layer.weight, layer.bias)
    ]
    _check(images, parameters[0], len(parameters) // 2)
    out: Tensor = _Features.apply(images.contiguous(), *parameters)  # type: ignore[no-untyped-call]
    return out


def _check(images: Tensor, weight: Tensor, layers: int) -> None:
    """The kernels take addresses and sizes as they come."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images should be uint8, got {images.dtype}")
    channels, least = weight.shape[1], 4 * layers - 1
    shape = list(images.shape)
    if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < least:
        raise ValueError(
            f"images should be [B, {channels}, H, W] with H, W >= {least}, got {shape}"
        )
    if images.device != weight.device:
        raise ValueError(f"images should be on {weight.device}, got {images.device}")


def channels_last_columns(weight: Tensor, channels: int) -> Tensor:
    """The weight of a product with features that lie [pixels, channels], in bf16, from that with
    features that lie [channels, pixels]: float32 [D, C * P] -> bfloat16 [D, P * C]."""
    out: Tensor = _Reordered.apply(weight, channels)  # type: ignore[no-untyped-call]
    return out


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, channels: int) -> Tensor:
        ctx.channels = channels
        return _kernels(weight.device).reorder(weight.contiguous(), channels, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.shape[1] // ctx.channels
        found = _kernels(grad.device).reorder(grad.contiguous(), rows, torch.float32)
        return _once([found], grad)[0], None


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, *parameters: Tensor) -> Tensor:
        layers = list(zip(parameters[::2], parameters[1::2], strict=True))
        keep = any(ctx.needs_input_grad)
        outputs = _kernels(images.device).forward(images, layers, keep)
        if keep:
            ctx.save_for_backward(images, *parameters[::2], *outputs)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, *saved = ctx.saved_tensors
        weights, outputs = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        found = _kernels(images.device).backward(grad.contiguous(), images, weights, outputs)
        return None, *_once(found, grad, *weights)


def _once(gradients: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients; their own, for what they were computed from, is an error and not left out."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    out: tuple[Tensor, ...] = _Once.apply(len(gradients), *gradients, *inputs)  # type: ignore[no-untyped-call]
    return out


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("conv_features: second derivatives are not supported")
