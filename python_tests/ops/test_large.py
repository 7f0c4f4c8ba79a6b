"""Sizes at which a product passes 2**31, on a CPU; test_cuda_device.py has those of a GPU.

Each test states the memory that it takes, and skips by name where less is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_common import assert_within_budget
from torch import Tensor

from crpt import ops
from crpt.ops import reference

pytestmark = pytest.mark.slow
PAST = 2**31


def gigabytes_free() -> float:
    with open("/proc/meminfo") as meminfo:
        line = next(line for line in meminfo if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 1e6


def takes(gigabytes: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    free = gigabytes_free() if os.path.exists("/proc/meminfo") else 0.0
    return pytest.mark.skipif(
        free < gigabytes + 1, reason=f"takes {gigabytes} GB of memory, and {free:.1f} GB are free"
    )


@pytest.fixture(autouse=True)
def _all_threads() -> None:
    torch.set_num_threads(os.cpu_count() or 1)


def tiled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random numbers in [0, 1), repeated along the first dimension: drawing them all takes long."""
    out = torch.empty(shape, dtype=dtype)
    tile = torch.rand(min(1021, shape[0]), *shape[1:]).to(dtype)
    for begin in range(0, shape[0], len(tile)):
        out[begin : begin + len(tile)] = tile[: shape[0] - begin]
    return out


@takes(9)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_sinkhorn_past_two_to_the_31_bytes(temperature: float) -> None:
    scores = tiled(torch.float16, 65_536, 16_400)
    assert scores.numel() * 2 > PAST
    codes = ops.sinkhorn(scores, temperature, 2)
    for rows in (codes[:8], codes[-8:]):
        torch.testing.assert_close(rows.float().sum(-1), torch.ones(8), rtol=1e-2, atol=0)
    share = codes[:, -64:].float().sum(0)  # of samples, which prototypes have in equal parts
    tolerance = 0.03 if temperature == 0.1 else 0.6  # after two iterations
    torch.testing.assert_close(
        share, torch.full_like(share, 65_536 / 16_400), rtol=tolerance, atol=0
    )
    # The tile repeats, and equal samples have equal codes.
    last = (65_535 // 1021) * 1021
    assert torch.equal(codes[last], codes[0])


@takes(9)
def test_prototype_loss_past_two_to_the_31_elements() -> None:
    scores = tiled(torch.float16, 4, 65_536, 8_200)
    assert scores.numel() > PAST
    scores.requires_grad_()
    codes = scores.detach()  # for want of memory; their rows sum to about 4,100
    loss = ops.prototype_loss(scores, codes)
    twins = [reference.prototype_loss(x, x) for x in codes[-1].float().split(4096)]
    torch.testing.assert_close(loss[-1].float(), torch.stack(twins).mean(), rtol=1e-3, atol=0)
    weight = 32_768.0  # half a sample's share
    (grad,) = torch.autograd.grad(loss[-1] * weight, scores)
    assert not grad[0, :2].any()
    rows = codes[-1, -64:].double().requires_grad_()
    twin = reference.prototype_loss(rows, codes[-1, -64:].double()) * 64 * weight / 65_536
    (exact,) = torch.autograd.grad(twin, rows)
    torch.testing.assert_close(grad[-1, -64:].double(), exact, rtol=2e-3, atol=2e-3)


@takes(10)
def test_prototype_similarity_past_two_to_the_31_elements() -> None:
    embeddings, prototypes = torch.randn(65_536, 4), torch.randn(32_800, 4)
    similarity = ops.prototype_similarity(embeddings, prototypes)
    assert similarity.numel() > PAST
    twin = reference.prototype_similarity(embeddings[-8:], prototypes)
    torch.testing.assert_close(similarity[-8:], twin)


@takes(11)
def test_intrinsic_loss_past_two_to_the_31_pairs() -> None:
    prototypes = torch.nn.functional.normalize(torch.randn(33, 8192, 4), dim=-1).requires_grad_()
    loss = ops.intrinsic_loss(prototypes)
    (grad,) = torch.autograd.grad(loss.sum(), prototypes)
    last = prototypes[-1].detach().requires_grad_()
    twin = reference.intrinsic_loss(last)
    torch.testing.assert_close(loss[-1], twin, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad[-1], torch.autograd.grad(twin, last)[0], rtol=1e-3, atol=1e-9)


@takes(11)
def test_prototype_objective_past_two_to_the_31_pairs() -> None:
    embeddings = torch.randn(33, 2, 4).requires_grad_()
    prototypes = torch.nn.functional.normalize(torch.randn(33, 8192, 4), dim=-1).requires_grad_()
    codes = torch.rand(33, 2, 8192).softmax(-1)
    loss, _, _ = ops.prototype_objective(embeddings, prototypes, codes, 0.1, 1.0)
    got = torch.autograd.grad(loss.sum(), (embeddings, prototypes))
    last = [x[-1].detach().requires_grad_() for x in (embeddings, prototypes)]
    twin, _, _ = reference.prototype_objective(*last, codes[-1], 0.1, 1.0)
    torch.testing.assert_close(loss[-1], twin, rtol=1e-4, atol=1e-6)
    for g, t in zip(got, torch.autograd.grad(twin, last), strict=True):
        torch.testing.assert_close(g[-1], t, rtol=1e-3, atol=1e-7)


@takes(6)
def test_images_past_two_to_the_31() -> None:
    frames = torch.empty(110_000, 3, 84, 84, dtype=torch.uint8)
    assert frames.numel() > PAST
    frames.flatten().view(110_000, -1)[:] = torch.arange(110_000).remainder(251)[:, None]
    frames[-8:] = torch.randint(0, 256, (8, 3, 84, 84))
    shifts = torch.randint(-4, 5, (110_000, 2))
    got = ops.random_shift(frames, 4, shifts)
    assert torch.equal(got[-8:], reference.random_shift(frames[-8:], 4, shifts[-8:]))
    assert torch.equal(got[:-8, 0, 40, 40], frames[:-8, 0, 40, 40])
    del got
    stacked = ops.frame_stack(frames, torch.arange(110_000).flip(0)[:, None], shifts)
    assert torch.equal(stacked[:8], reference.random_shift(frames[-8:].flip(0), 4, shifts[:8]))
    assert torch.equal(stacked[8:, 0, 40, 40], frames[:-8, 0, 40, 40].flip(0))


@takes(1)
def test_knn_distance_at_65536_by_65536() -> None:
    queries, keys = torch.randn(2, 65_536, 16).unbind()
    got = ops.knn_distance(queries, keys, 3)
    for rows in (slice(0, 16), slice(-16, None)):
        torch.testing.assert_close(got[rows], reference.knn_distance(queries[rows], keys, 3))


@takes(2)
@pytest.mark.parametrize("shape", [(65_536, 512), (512, 8192)], ids=str)
def test_the_largest_batches(shape: tuple[int, int]) -> None:
    """Within budget in float32, where sums are longest."""
    scores = torch.rand(shape) * 2 - 1
    codes = ops.sinkhorn(scores)
    exact = reference.sinkhorn(scores.double())
    twins_error = (reference.sinkhorn(scores) - exact).abs().max()
    assert (codes - exact).abs().max() <= 2 * twins_error
    loss = ops.prototype_loss(scores, codes).double()
    exact_loss = reference.prototype_loss(scores.double(), codes.double())
    twin = reference.prototype_loss(scores, codes).double()
    eps = torch.finfo(torch.float32).eps
    assert (loss - exact_loss).abs() <= 2 * (twin - exact_loss).abs() + eps * exact_loss.abs()


@takes(5)
@pytest.mark.parametrize("shape", [(65_536, 512), (512, 8192)], ids=str)
def test_prototype_objective_of_the_largest_batches(shape: tuple[int, int]) -> None:
    """Within budget in float32: at most three times the twin's error in sums as long as these."""
    b, m = shape
    args = torch.randn(b, 16), torch.nn.functional.normalize(torch.randn(m, 16), dim=-1)
    codes = torch.rand(shape).softmax(-1)

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in args]
        loss, _, _ = function(*inputs, codes.to(dtype))
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    exact = results(reference.prototype_objective, torch.float64)
    twin = results(reference.prototype_objective, torch.float32)
    got = results(ops.prototype_objective, torch.float32)
    for g, t, e in zip(got, twin, exact, strict=True):
        assert_within_budget(g, t, e, times=3)
