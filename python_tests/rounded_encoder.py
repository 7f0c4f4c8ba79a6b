"""What the kernels of crpt/byte_encoder.py compute, in plain PyTorch: bf16 where they round."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.encoder import Encoder


class Rounded(torch.autograd.Function):
    """bf16 on the way there; on the way back, too, of what lies between two layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: bool) -> Tensor:
        ctx.both = both
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.bfloat16().to(grad.dtype) if ctx.both else grad), None


def project(encoder: Encoder, images: Tensor) -> Tensor:
    """norm(g(f(images / 255))), with bf16 products whose sums are not rounded."""
    x = images.float()
    for i, layer in enumerate(list(encoder.convolutions)[::2]):
        weight = layer.weight / 255 if i == 0 else layer.weight
        x = F.conv2d(x, Rounded.apply(weight, False), layer.bias, layer.stride)
        x = Rounded.apply(F.relu(x), True)
    g = encoder.projector
    bias = None if g.bias is None else Rounded.apply(g.bias, False)
    return encoder.norm(
        Rounded.apply(F.linear(x.flatten(1), Rounded.apply(g.weight, False), bias), True)
    )


def results(encoder: Encoder, z: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """z, and the gradients of its product with the direction."""
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(z, parameters, direction)
    return {"z": z.detach(), **dict(zip(names, gradients, strict=True))}


def assert_follows(encoder: Encoder, found: dict[str, Tensor], images: Tensor, direction: Tensor):
    """Sums are in another order, so that here and there a number is rounded the other way."""
    expected = results(encoder, project(encoder, images), direction)
    for name, wanted in expected.items():
        got = found[name]
        assert (got.shape, got.dtype) == (wanted.shape, torch.float32)
        assert (got - wanted).norm() < 0.01 * wanted.norm(), name
