"""The encoder's convolutions in bf16 by the CPU's kernels, against the encoder in float32 that is
rounded where they round. Their sums are tested in cpp_tests/test_conv.cpp, at every level."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import rounded_encoder
import torch
from torch import Tensor

from crpt.byte_encoder import bytes_are_faster, project_bytes
from crpt.encoder import Encoder, EncoderConfig
from crpt.ops import conv_cpu
from crpt.ops.compiled import _cpu
from crpt.ops.conv_features import channels_last_columns, conv_features, usable

CPU = torch.device("cpu")


def make(in_channels: int = 9, size: int = 21, **changes: Any) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(
        replace(
            EncoderConfig(in_channels=in_channels, image_size=size, projection_dim=8), **changes
        )
    )
    for layer in encoder.convolutions[::2]:
        torch.nn.init.uniform_(layer.bias, -0.3, 0.3)
    return encoder


def pixels(batch: int, channels: int = 9, size: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("channels", "size"), [(3, 18), (9, 21), (18, 43), (1, 30)])
def test_it_follows_the_encoder(channels: int, size: int, norm: str) -> None:
    encoder, images = make(channels, size, embedding_norm=norm), pixels(6, channels, size)
    direction = torch.randn(6, 8)
    found = rounded_encoder.results(encoder, project_bytes(encoder, images), direction)
    rounded_encoder.assert_follows(encoder, found, images, direction)


def gradients(encoder: Encoder, images: Tensor) -> list[Tensor]:
    h = conv_features(images, encoder.convolutions)
    parameters = list(encoder.convolutions.parameters())
    return [h.detach(), *torch.autograd.grad(h.float().square().sum(), parameters)]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 70])
def test_threads_change_no_bit(batch: int) -> None:
    encoder, images = make(), pixels(batch)
    alone = gradients(encoder, images)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_equal(gradients(encoder, images), alone)


def test_without_gradient_it_is_the_same() -> None:
    encoder, images = make(), pixels(4)
    h = conv_features(images, encoder.convolutions)
    assert h.requires_grad
    with torch.no_grad():
        assert torch.equal(conv_features(images, encoder.convolutions), h)
    frozen = conv_features(images, encoder.requires_grad_(False).convolutions)
    assert torch.equal(frozen, h)
    assert not frozen.requires_grad


def test_how_weights_lie_does_not_matter() -> None:
    encoder, images = make(), pixels(4)
    expected = gradients(encoder, images)
    assert_equal(gradients(encoder.to(memory_format=torch.channels_last), images), expected)


def test_a_gradient_that_is_not_contiguous() -> None:
    encoder, images = make(), pixels(4)
    parameters = list(encoder.convolutions.parameters())
    h = conv_features(images, encoder.convolutions)
    grad = torch.randn(*h.shape[:3], 64).to(h.dtype)[..., ::2]
    expected = torch.autograd.grad(h, parameters, grad.contiguous(), retain_graph=True)
    assert_equal(list(torch.autograd.grad(h, parameters, grad)), list(expected))


def test_images_that_are_not_contiguous() -> None:
    encoder, images = make(), pixels(4)
    expected = gradients(encoder, images)
    for same in (
        images.to(memory_format=torch.channels_last),
        torch.cat([images, 255 - images], dim=3)[..., :21],
    ):
        assert not same.is_contiguous()
        assert_equal(gradients(encoder, same), expected)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (pixels(2).float(), TypeError, "images should be uint8, got torch.float32"),
        (pixels(2, 3), ValueError, r"images should be \[B, 9, H, W\] with H, W >= 15, got \[2, 3,"),
        (pixels(2, size=14), ValueError, r"H, W >= 15, got \[2, 9, 14, 14\]"),
        (pixels(2)[0], ValueError, r"got \[9, 21, 21\]"),
        (pixels(2).to("meta"), ValueError, "images should be on cpu, got meta"),
    ],
)
def test_other_images_are_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv_features(images, make().convolutions)


@pytest.mark.parametrize("of", ["conv_features", "channels_last_columns"])
def test_second_derivatives_are_refused(of: str) -> None:
    layers = make().convolutions
    weight = layers[0].weight
    if of == "conv_features":  # linear in h, and yet not in the weights
        total = conv_features(pixels(2), layers).float().sum()
    else:
        weight = torch.randn(4, 64, requires_grad=True)
        total = channels_last_columns(weight, 32).float().square().sum()
    (grad,) = torch.autograd.grad(total, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(grad.sum(), weight)


def test_no_images() -> None:
    h, *found = gradients(make(), pixels(0))
    assert h.shape == (0, 4, 4, 32)
    assert all(not g.any() for g in found)


@pytest.mark.parametrize("shape", [(3, 4, 5), (8, 32, 1225), (2, 17, 33)])
def test_columns_are_put_in_the_order_of_the_features(shape: tuple[int, int, int]) -> None:
    rows, channels, places = shape
    weight = torch.randn(rows, channels * places, requires_grad=True)
    out = channels_last_columns(weight, channels)
    expected = weight.detach().view(shape).transpose(1, 2).reshape(rows, -1).bfloat16()
    assert torch.equal(out, expected)
    direction = torch.randn(rows, channels * places).bfloat16()
    (grad,) = torch.autograd.grad(out, weight, direction)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, direction.view(rows, places, channels).mT.flatten(1).float())


def test_it_is_for_layers_that_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bytes_are_faster(make(), CPU) == _cpu.bf16_units
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: True)
    assert usable(make(18, 300).convolutions, 300, CPU)
    for other in ({"channels": 16}, {"strides": (2, 2, 1)}, {"strides": (1, 1)}):
        assert not usable(make(**other).convolutions, 21, CPU)
    assert not usable(make().double().convolutions, 21, CPU)
    assert not usable(torch.nn.Sequential(), 21, CPU)
    dilated = torch.nn.Conv2d(9, 32, 3, stride=2, dilation=2)
    grouped = torch.nn.Conv2d(8, 32, 3, stride=2, groups=2)
    for layer in (dilated, grouped):
        assert not usable(torch.nn.Sequential(layer, torch.nn.ReLU()), 21, CPU)
    assert not usable(make().convolutions, 21, torch.device("meta"))


def at_level(level: str, command: list[str]) -> None:
    """Runs Python in a process of that instruction-set level, or skips the test."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "CRPT_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if f"has no {level}" in done.stderr:
        with open("/proc/cpuinfo") as cpuinfo:  # where Linux knows tiles, it names them
            assert level != "amx" or "amx_bf16" not in cpuinfo.read()
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_the_units_are_not_used_below_their_level(level: str) -> None:
    at_level(level, ["-c", "from crpt import _cpu; assert not _cpu.bf16_units"])


@pytest.mark.parametrize("level", ["avx512", "amx"])
def test_every_level_with_units(level: str) -> None:
    at_level(level, [os.path.abspath(__file__), level])


def main(level: str) -> None:
    assert _cpu.isa == level
    assert _cpu.bf16_units or level == "avx512"
    for norm in ("none", "batch"):
        test_it_follows_the_encoder(9, 21, norm)


if __name__ == "__main__":
    main(sys.argv[1])
