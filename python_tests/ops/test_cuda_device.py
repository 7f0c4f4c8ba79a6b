"""What only a GPU can show: streams, CUDA graphs, two devices, device assertions, huge sizes.

The values themselves are compared with the twins in test_common.py, for every device.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_samples import SAMPLES, Sample
from torch import Tensor

from crpt import ops
from crpt.ops import cuda

pytestmark = pytest.mark.cuda

samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
LONG = 100_000_000  # cycles: tens of milliseconds, so that whoever does not wait is seen


@pytest.fixture
def _sync_debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(sample: Sample, args: Any, kwargs: Any) -> list[Tensor]:
    out = sample.function(*args, **kwargs)
    if not sample.differentiable:
        return [out]
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def arguments(sample: Sample, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return sample.arguments(dtype, "cuda", requires_grad=sample.differentiable)


@samples
@pytest.mark.usefixtures("_sync_debug_mode")
def test_nothing_waits_for_the_device(sample: Sample) -> None:
    args, kwargs = arguments(sample)
    forward_and_backward(sample, args, kwargs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    forward_and_backward(sample, args, kwargs)
    assert not busy.query()


@samples
def test_runs_on_the_current_stream(sample: Sample) -> None:
    args, kwargs = arguments(sample)
    expected = forward_and_backward(sample, args, kwargs)
    late = [torch.zeros_like(x) if isinstance(x, Tensor) else x for x in args]
    late = [
        x.requires_grad_(y.requires_grad) if isinstance(x, Tensor) else x
        for x, y in zip(late, args, strict=True)
    ]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        with torch.no_grad():
            for x, y in zip(late, args, strict=True):
                if isinstance(x, Tensor):
                    x.copy_(y)
        got = forward_and_backward(sample, late, kwargs)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@samples
def test_captured_in_a_cuda_graph(sample: Sample) -> None:
    args, kwargs = arguments(sample)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = forward_and_backward(sample, args, kwargs)  # also loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_and_backward(sample, args, kwargs)
    for x in got:
        x.zero_()
    for _ in range(2):  # a replay leaves nothing behind that the next one would meet
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def objective(online: Tensor, target: Tensor, prototypes: Tensor) -> list[Tensor]:
    """The loss, the codes and all gradients, from embeddings [B, D] and prototypes [M, D]."""
    with torch.no_grad():
        codes = ops.sinkhorn(ops.prototype_similarity(target, prototypes))
    scores = ops.prototype_similarity(online, prototypes)
    loss = ops.prototype_loss(scores, codes) + 0.005 * ops.intrinsic_loss(prototypes)
    return [loss.detach(), codes, *torch.autograd.grad(loss, [online, prototypes])]


def objective_by_one_operator(online: Tensor, target: Tensor, prototypes: Tensor) -> list[Tensor]:
    """The same of prototypes that are unit rows, by the operator that has it all."""
    with torch.no_grad():
        codes = ops.sinkhorn(ops.prototype_similarity(target, prototypes))
    loss, _, _ = ops.prototype_objective(online, prototypes, codes)
    return [loss.detach(), codes, *torch.autograd.grad(loss, [online, prototypes])]


@pytest.mark.parametrize("objective", [objective, objective_by_one_operator])
def test_the_whole_objective_in_one_cuda_graph(
    objective: Callable[[Tensor, Tensor, Tensor], list[Tensor]],
) -> None:
    """Captured once, replayed with new data: what eager gives, and the same bits every time."""
    batches = [F.normalize(torch.randn(3, 512, 128, device="cuda"), dim=-1) for _ in range(3)]
    inputs = [x.clone().requires_grad_(i != 1) for i, x in enumerate(batches[0])]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        objective(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = objective(*inputs)
    for batch in batches:
        with torch.no_grad():
            for x, y in zip(inputs, batch, strict=True):
                x.copy_(y)
        graph.replay()
        first = [x.clone() for x in captured]
        graph.replay()
        for a, b, expected in zip(captured, first, objective(*inputs), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005], ids=["exp_space", "log_space"])
@pytest.mark.parametrize(
    "shape", [(100, 60), (512, 512), (8, 512, 512), (1000, 511), (3000, 2050)], ids=str
)
def test_sinkhorn_on_the_chip_and_through_memory(
    shape: tuple[int, ...], temperature: float, dtype: torch.dtype
) -> None:
    """By one block, by clusters of blocks, and by a grid: whatever the device chooses."""
    scores = (torch.rand(shape, device="cuda") * 2 - 1).to(dtype)
    got = ops.sinkhorn(scores, temperature).double()
    exact = ops.reference.sinkhorn(scores.double(), temperature)
    twin = ops.reference.sinkhorn(scores, temperature).double()
    assert (got - exact).abs().max() <= 2 * (twin - exact).abs().max() + 1e-7


def test_sinkhorn_stays_on_the_chip_of_a_gpu_with_clusters() -> None:
    cluster, scratch = cuda._sinkhorn_plan(cuda._cuda, 0, 0, 1, 512, 512)
    if torch.cuda.get_device_capability() < (9, 0):  # without: a block alone cannot hold it
        assert cluster == 0
        assert scratch > 0
    else:
        assert cluster > 1
        assert scratch == 0


@samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(sample: Sample, dtype: torch.dtype) -> None:
    args, kwargs = arguments(sample, dtype)
    expected = forward_and_backward(sample, args, kwargs)
    for _ in range(5):
        for a, b in zip(forward_and_backward(sample, args, kwargs), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda(devices=2)
@samples
def test_another_device_than_the_current_one(sample: Sample) -> None:
    args, kwargs = arguments(sample)
    expected = forward_and_backward(sample, args, kwargs)
    other, other_kwargs = sample.arguments(
        torch.float32, "cuda:1", requires_grad=sample.differentiable
    )
    got = forward_and_backward(sample, other, other_kwargs)
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.to("cuda:0"), b)


def test_tensors_on_two_devices_are_refused() -> None:
    frames = torch.zeros(4, 3, 5, 5, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="index should be on cuda:0, got cpu"):
        ops.frame_stack(frames, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("ops.frame_stack(frames, torch.full((1, 2), 4, device='cuda'))", "index should be in"),
        ("ops.frame_stack(frames, torch.full((1, 2), -1, device='cuda'))", "index should be in"),
        ("ops.random_shift(frames, 1, torch.full((4, 2), 2, device='cuda'))", "shifts should be"),
    ],
)
def test_a_bad_value_stops_the_kernel(call: str, text: str) -> None:
    """In a process of its own: after a device assertion its CUDA context is lost."""
    program = f"""
import torch
from crpt import ops
frames = torch.zeros(4, 3, 5, 5, dtype=torch.uint8, device="cuda")
{call}
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert text in done.stdout + done.stderr
    assert "device-side assert triggered" in done.stderr


@pytest.mark.slow
def test_sinkhorn_beyond_two_to_the_31() -> None:
    scores = torch.rand(65_536, 33_000, device="cuda", dtype=torch.float16)
    codes = ops.sinkhorn(scores, 0.1, 2)
    for rows in (codes[:64], codes[-64:]):
        torch.testing.assert_close(
            rows.float().sum(-1), torch.ones(64, device="cuda"), rtol=1e-2, atol=0
        )
    share = codes[:, -64:].float().sum(0)  # of samples, which prototypes have in equal parts
    torch.testing.assert_close(share, torch.full_like(share, 65_536 / 33_000), rtol=2e-2, atol=0)


@pytest.mark.slow
def test_images_beyond_two_to_the_31() -> None:
    frames = torch.randint(0, 256, (110_000, 3, 84, 84), device="cuda", dtype=torch.uint8)
    shifts = torch.randint(-4, 5, (110_000, 2), device="cuda")
    got = ops.random_shift(frames, 4, shifts)
    assert torch.equal(got[-8:], ops.random_shift(frames[-8:].clone(), 4, shifts[-8:]))
    del got
    index = torch.arange(110_000, device="cuda").flip(0)[:, None]
    stacked = ops.frame_stack(frames, index, shifts)
    assert torch.equal(stacked[:8], ops.random_shift(frames[-8:].flip(0), 4, shifts[:8]))
    assert torch.equal(stacked[-8:], ops.random_shift(frames[:8].flip(0), 4, shifts[-8:]))


@pytest.mark.slow
def test_knn_distance_at_65536_by_65536() -> None:
    queries, keys = torch.randn(2, 65_536, 64, device="cuda").unbind()
    got = ops.knn_distance(queries, keys, 3)
    for rows in (slice(0, 16), slice(-16, None)):
        twin = ops.reference.knn_distance(queries[rows], keys, 3)
        torch.testing.assert_close(got[rows], twin)
