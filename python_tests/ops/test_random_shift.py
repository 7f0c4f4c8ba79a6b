from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from copies import copies
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crpt import ops

DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def pad_and_crop(images: Tensor, pad: int, shifts: Tensor) -> Tensor:
    """The augmentation as it is usually described: replicate-pad, then crop, image by image."""
    height, width = images.shape[-2:]
    padded = F.pad(images.double(), (pad,) * 4, mode="replicate").to(images.dtype)
    return torch.stack(
        [
            image[:, pad + dy : pad + dy + height, pad + dx : pad + dx + width]
            for image, (dy, dx) in zip(padded, shifts.tolist(), strict=True)
        ]
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12),
    st.integers(0, 9), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_is_pad_and_crop(
    seed: int, b: int, c: int, h: int, w: int, pad: int, dtype: torch.dtype, last: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 100, (b, c, h, w), generator=g).to(dtype)
    shifts = torch.randint(-pad, pad + 1, (b, 2), generator=g)
    if last:
        images = images.to(memory_format=torch.channels_last)
    assert torch.equal(ops.random_shift(images, pad, shifts), pad_and_crop(images, pad, shifts))


def test_the_widest_pad_leaves_one_pixel(device: str) -> None:
    images, pad = torch.randn(2, 1, 3, 4, device=device), 2**31 - 1
    out = ops.random_shift(images, pad, torch.tensor([[pad, -pad], [-pad, pad]], device=device))
    assert torch.equal(out[0, 0], images[0, 0, -1, 0].expand(3, 4))
    assert torch.equal(out[1, 0], images[1, 0, 0, -1].expand(3, 4))


def test_zero_shift_is_the_identity(device: str) -> None:
    images = torch.randn(3, 2, 7, 9, device=device)
    assert torch.equal(
        ops.random_shift(images, 4, torch.zeros(3, 2, dtype=torch.int64, device=device)), images
    )
    assert torch.equal(ops.random_shift(images, 0), images)


def test_opposite_shifts_restore_the_interior(device: str) -> None:
    images = torch.randn(4, 2, 12, 12, device=device)
    shifts = torch.tensor([[4, -4], [1, 2], [-3, 0], [-4, 4]], device=device)
    there_and_back = ops.random_shift(ops.random_shift(images, 4, shifts), 4, -shifts)
    assert torch.equal(there_and_back[..., 4:-4, 4:-4], images[..., 4:-4, 4:-4])


def test_channels_last_stays_channels_last(device: str) -> None:
    images = torch.randn(2, 3, 6, 5, device=device).to(memory_format=torch.channels_last)
    out = ops.random_shift(images, 2)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert ops.random_shift(images.contiguous(), 2).is_contiguous()


SHIFTS = torch.tensor([[1, -2], [0, 3], [-3, 0], [2, 2]])
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "images": lambda x: x[::2],
    "channels": lambda x: x[:, 1:4],
    "one channel": lambda x: x[:, 2:3],
    "every other row": lambda x: x[:, :, ::2],
    "a window": lambda x: x[:, :, 2:9, 1:7],
    "every other pixel": lambda x: x[..., 1::2],
    "one image for all": lambda x: x[:1].expand(4, -1, -1, -1),
    "one channel for all": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "turned": lambda x: x.mT,
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", FORMATS)
def test_parts_of_images_are_not_copied_and_keep_their_layout(
    layout: str, part: str, dtype: torch.dtype, device: str
) -> None:
    images = torch.randint(0, 100, (8 if part == "images" else 4, 5, 12, 11), device=device)
    images = PARTS[part](images.to(dtype).contiguous(memory_format=FORMATS[layout]))
    shifts = SHIFTS.to(device)
    out = ops.random_shift(images, 3, shifts)
    assert torch.equal(out, ops.random_shift(images.contiguous(), 3, shifts))
    # One channel lies in memory as in contiguous images.
    last = layout == "channels_last" and not part.startswith("one channel")
    assert out.is_contiguous(memory_format=FORMATS["channels_last" if last else "contiguous"])
    dense = images.stride(3) == (images.shape[1] if last else 1)
    if device == "cpu" or dense:
        assert copies(ops.random_shift, images, 3, shifts) == []
    if not dtype.is_floating_point:
        return
    back = torch.ops.crpt.random_shift_backward
    grad = back(images, shifts, 3)
    assert torch.equal(grad, back(images.contiguous(), shifts, 3))
    assert grad.stride() == out.stride()
    if device == "cpu" or dense:
        assert copies(back, images, shifts, 3) == []


@pytest.mark.parametrize("layout", FORMATS)
def test_fakes_promise_the_layout_of_parts(layout: str, device: str) -> None:
    images = torch.rand(4, 6, 12, 11, device=device).contiguous(memory_format=FORMATS[layout])
    shifts = SHIFTS.to(device)
    tests = ("test_schema", "test_faketensor")
    for part in (*PARTS.values(), lambda x: x[:, ::2], lambda x: x.permute(3, 2, 1, 0)[:4]):
        x = part(images)[:4]
        for function, args in (
            (torch.ops.crpt.random_shift, (x, shifts[: len(x)], 3)),
            (torch.ops.crpt.random_shift_backward, (x, shifts[: len(x)], 3)),
        ):
            torch.library.opcheck(function, args, test_utils=tests)


def test_channels_with_something_between_are_copied_and_stay_channels_last(device: str) -> None:
    images = torch.rand(4, 6, 7, 5, device=device).contiguous(memory_format=torch.channels_last)
    shifts = SHIFTS.to(device)
    out = ops.random_shift(images[:, ::2], 3, shifts)
    assert torch.equal(out, ops.random_shift(images[:, ::2].contiguous(), 3, shifts))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_channels_last_images_are_channels_last(device: str) -> None:
    images = torch.rand(4, 6, 7, 5, device=device).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    out = ops.random_shift(images, 3, SHIFTS.to(device))
    (grad,) = torch.autograd.grad(out, images, torch.rand_like(out))
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_draws_uniformly_from_the_generator(device: str) -> None:
    images = torch.arange(9.0, device=device).expand(2000, 1, 9, 9)  # the column's number
    g = torch.Generator(device=device).manual_seed(1)
    out = ops.random_shift(images, 2, generator=g)
    dx = (out[:, 0, 0, 4] - 4).long()
    counts = torch.bincount(dx + 2, minlength=5)
    assert len(counts) == 5
    assert ((counts - 400).abs() < 90).all()  # 5 standard deviations
    again = ops.random_shift(images, 2, generator=torch.Generator(device=device).manual_seed(1))
    assert torch.equal(out, again)
    assert not torch.equal(out, ops.random_shift(images, 2, generator=g))


def test_follows_torchs_seed(device: str) -> None:
    images = torch.rand(16, 1, 9, 9, device=device)
    torch.manual_seed(3)
    first = ops.random_shift(images)
    torch.manual_seed(3)
    assert torch.equal(ops.random_shift(images), first)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1,), {}, TypeError, "images should be a Tensor, got int"),
        ((torch.ones(2, 3, 4),), {}, ValueError, r"images should be \[B, C, H, W\] with C, H, W >= 1, got \[2, 3, 4\]"),
        ((torch.ones(2, 3, 0, 4),), {}, ValueError, r"got \[2, 3, 0, 4\]"),
        ((torch.ones(2, 3, 4, 4, dtype=torch.complex64),), {}, TypeError, "images should be float32, float16, bfloat16, float64, uint8, int8, int16, int32, int64, bool, got torch.complex64"),
        ((torch.ones(2, 3, 4, 4).to(torch.uint16),), {}, TypeError, "uint8, int8, int16, int32, int64, bool, got torch.uint16"),
        ((torch.nested.nested_tensor([torch.ones(3, 4, 4)]),), {}, ValueError, "images should be one dense tensor, got a nested one"),
        ((torch.ones(2, 3, 4, 4), -1), {}, ValueError, "pad should be >= 0, got -1"),
        ((torch.ones(2, 3, 4, 4), 1.5), {}, TypeError, "pad should be an int, got float"),
        ((torch.ones(2, 3, 4, 4), 2, [[0, 0], [0, 0]]), {}, TypeError, "shifts should be a Tensor, got list"),
        ((torch.ones(2, 3, 4, 4), 2, torch.zeros(2, 2)), {}, TypeError, "shifts should be torch.int64, got torch.float32"),
        ((torch.ones(2, 3, 4, 4), 2, torch.zeros(3, 2).long()), {}, ValueError, r"shifts should be \[2, 2\], got \[3, 2\]"),
        ((torch.ones(2, 3, 4, 4), 2, torch.tensor([[0, 0], [-3, 0]])), {}, ValueError, r"shifts should be in \[-2, 2\], got -3 at \[1, 0\]"),
        ((torch.ones(2, 3, 4, 4), 2, torch.tensor([[0, 3], [0, 0]])), {}, ValueError, r"shifts should be in \[-2, 2\], got 3 at \[0, 1\]"),
        ((torch.ones(1, 3, 4, 4), 2, torch.zeros(1, 2).long()), {"generator": torch.Generator()}, ValueError, "generator should be None where shifts are given"),
        ((torch.ones(1, 3, 4, 4),), {"generator": 3}, TypeError, "generator should be a torch.Generator, got int"),
        ((torch.ones(1, 3, 4, 4, device="meta"),), {"generator": torch.Generator()}, ValueError, "generator should be on meta, got cpu"),
        ((torch.ones(1, 3, 4, 4), 2**31), {}, ValueError, r"pad should be <= 2147483647, got 2147483648"),
        ((torch.ones(1, 3, 4, 4), 2**63), {}, ValueError, "pad should fit in 64 bits, got an int of 64 bits"),
        ((torch.ones(1, 3, 4, 4), -(10**5000)), {}, ValueError, "pad should fit in 64 bits"),
    ],
)  # fmt: skip
def test_errors(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.random_shift(*args, **kwargs)


def test_a_compiled_graph_checks_values_too() -> None:
    torch._dynamo.reset()
    shift = torch.compile(ops.random_shift, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"shifts should be in \[-2, 2\], got 9 at \[0, 0\]"):
        shift(torch.ones(1, 1, 4, 4), 2, torch.tensor([[9, 0]]))


def test_drawing_compiles_as_one_graph_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    shift = torch.compile(ops.random_shift, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((3, 6), (5, 9), (8, 7)):
        images = torch.arange(float(size), requires_grad=True).expand(batch, 1, size, size)
        out = shift(images, 2)
        assert out.shape == images.shape
        dx = (out[:, 0, 0, 3] - 3).long()
        columns = (torch.arange(size) + dx[:, None]).clamp(0, size - 1)
        assert torch.equal(out, columns[:, None, None, :].expand_as(out).float())
