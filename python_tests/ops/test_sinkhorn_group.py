"""sinkhorn over a batch that is spread over processes: the same as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_samples import FLOATS
from ranks import Ranks
from torch import Tensor

from crpt import ops
from crpt.ops import reference
from crpt.ops._sinkhorn_group import _BITS, _in_order, sinkhorn_group

relaxed = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _sinkhorn(group: Any, scores: Tensor, *args: Any) -> Tensor:
    return ops.sinkhorn(scores, *args, group=group)


def _twin(group: Any, scores: Tensor, *args: Any) -> Tensor:
    return reference.sinkhorn(scores, *args, group=group)


def spread(
    ranks: Ranks, scores: Tensor, sizes: tuple[int, ...], *args: Any, function: Any = _sinkhorn
) -> Tensor:
    """The codes of all processes, of which the n-th holds sizes[n] samples, side by side."""
    parts = ranks.run(function, *((part.clone(), *args) for part in scores.split(sizes, dim=-2)))
    assert [part.shape[-2] for part in parts] == list(sizes)
    assert all(part.is_contiguous() for part in parts)
    return torch.cat(parts, dim=-2)


def cosines(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


SIZES = [(20, 20), (1, 39), (37, 3), (0, 40), (40, 0), (13, 14, 13), (38, 1, 1), (0, 40, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-5])
def test_equals_one_process(ranks: Ranks, sizes: tuple[int, ...], temperature: float) -> None:
    scores = cosines(0, 40, 23)
    codes = spread(ranks, scores, sizes, temperature)
    torch.testing.assert_close(codes, ops.sinkhorn(scores, temperature))


@relaxed
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 30), min_size=2, max_size=3).filter(any),
    st.integers(1, 30),
    st.sampled_from([0.001, 0.049, 0.1, 1.0]),
    st.integers(0, 6),
)
def test_equals_one_process_for_any_split(
    ranks: Ranks, seed: int, sizes: list[int], m: int, temperature: float, iterations: int
) -> None:
    scores = cosines(seed, sum(sizes), m)
    codes = spread(ranks, scores, tuple(sizes), temperature, iterations)
    torch.testing.assert_close(codes, reference.sinkhorn(scores, temperature, iterations))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_no_further_from_the_exact_codes_than_twice_the_twin(
    ranks: Ranks, dtype: torch.dtype, temperature: float
) -> None:
    scores = cosines(1, 3, 50, 37).to(dtype)
    got = spread(ranks, scores, (24, 26), temperature)
    assert got.dtype == dtype
    exact = reference.sinkhorn(scores.double(), temperature)
    error = (got.double() - exact).abs().max()
    twins_error = (reference.sinkhorn(scores, temperature).double() - exact).abs().max()
    assert error <= 2 * twins_error + 2e-15


@pytest.mark.parametrize("sizes", [(20, 20), (1, 39), (13, 14, 13)], ids=str)
def test_the_twin_works_over_a_group_too(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    scores = cosines(2, 2, 40, 23)
    for args in ((0.1,), (0.01, 4), (0.1, 0)):
        codes = spread(ranks, scores, sizes, *args, function=_twin)
        torch.testing.assert_close(codes, reference.sinkhorn(scores, *args))


def test_many_iterations_balance_the_prototypes_over_all_processes(ranks: Ranks) -> None:
    codes = spread(ranks, cosines(3, 24, 8), (5, 19), 0.5, 300)
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 3.0, dtype=torch.float64))
    assert (codes[:5].sum(0) - 5 / 8).abs().max() > 0.01  # of one process alone they are not


def test_differs_from_every_process_on_its_own(ranks: Ranks) -> None:
    scores = cosines(4, 40, 23)
    alone = torch.cat([ops.sinkhorn(part) for part in scores.split(20)])
    assert (spread(ranks, scores, (20, 20)) - alone).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "extreme",
    ["wide", "widest", "equal", "one_sample", "one_prototype", "massless", "minus_infinity"],
)
@pytest.mark.parametrize("iterations", [0, 3, 50])
def test_extremes_stay_finite(
    ranks: Ranks, dtype: torch.dtype, extreme: str, iterations: int
) -> None:
    scores, sizes = cosines(0, 24, 16), (10, 14)
    if extreme == "wide":
        scores = scores * 1e4
    elif extreme == "widest":
        scores = scores * torch.finfo(dtype).max
    elif extreme == "equal":
        scores = torch.full_like(scores, 0.7)
    elif extreme == "one_sample":
        scores, sizes = scores[:1] * 1e4, (0, 1)
    elif extreme == "one_prototype":
        scores = scores[:, :1] * 1e4
    elif extreme == "massless":
        scores[:, 3] = -6e4
    else:
        scores[:, 3] = scores[5] = scores[:10, 4] = -torch.inf
    scores = scores.to(dtype)
    codes = spread(ranks, scores, sizes, 0.1, iterations)
    assert codes.isfinite().all()
    assert (codes >= 0).all()
    one = torch.ones(len(codes), dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(codes.double().sum(-1), one, atol=8 * eps, rtol=0)
    expected = ops.sinkhorn(scores, 0.1, iterations)
    torch.testing.assert_close(codes.float(), expected.float(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_nan_and_infinity_reach_every_process_but_no_other_problem(
    ranks: Ranks, value: float, iterations: int
) -> None:
    scores = cosines(5, 3, 12, 6)
    scores[1, 9, 2] = value  # of the last process
    codes = spread(ranks, scores, (5, 4, 3), 0.1, iterations)
    expected = ops.sinkhorn(scores, 0.1, iterations)
    torch.testing.assert_close(codes, expected, equal_nan=True)
    assert not codes[[0, 2]].isnan().any()
    assert codes[1, 9].isnan().all()
    # Without an iteration infinity stays in its row.
    assert codes[1].isnan().all() == (iterations > 0 or value != torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_in_order_are_integers_in_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    ascending = torch.tensor(
        [-torch.inf, info.min, -1.5, -1.0, -info.tiny, -info.smallest_normal / 4, 0.0,
         info.smallest_normal / 4, info.tiny, 1.0, 1.5, info.max, torch.inf, torch.nan],
        dtype=dtype,
    )  # fmt: skip
    keys = _in_order(ascending.view(_BITS[dtype]))
    assert (keys.diff() > 0).all()
    back = _in_order(keys).view(dtype)
    torch.testing.assert_close(back, ascending, rtol=0, atol=0, equal_nan=True)


def test_leading_dimensions_are_separate_problems(ranks: Ranks) -> None:
    scores = cosines(6, 2, 3, 11, 7)
    torch.testing.assert_close(spread(ranks, scores, (4, 7)), ops.sinkhorn(scores))
    assert spread(ranks, scores[:0], (4, 7)).shape == (0, 3, 11, 7)
    strided = scores.mT.contiguous().mT
    torch.testing.assert_close(spread(ranks, strided, (4, 7)), ops.sinkhorn(scores))


def test_no_samples_anywhere(ranks: Ranks) -> None:
    assert spread(ranks, torch.ones(0, 4), (0, 0)).shape == (0, 4)
    assert spread(ranks, torch.ones(0, 4), (0,)).shape == (0, 4)


def test_a_group_of_one_is_the_compiled_operator(ranks: Ranks) -> None:
    scores = cosines(7, 33, 21).float()
    assert torch.equal(spread(ranks, scores, (33,)), ops.sinkhorn(scores))


def _on(group: Any, device: str, scores: Tensor) -> Tensor:
    return ops.sinkhorn(scores.to(device), group=group).cpu()


def test_tensors_of_the_device(ranks: Ranks, device: str) -> None:
    """gloo carries CUDA tensors too, so one GPU is enough."""
    scores = cosines(8, 40, 23).float()
    parts = ranks.run(_on, *((device, part.clone()) for part in scores.split((15, 25))))
    torch.testing.assert_close(torch.cat(parts), ops.sinkhorn(scores))


@pytest.fixture
def alone(device: str, tmp_path: Path) -> Iterator[Any]:
    """This process as a group of its own, by the backend that the device is served by."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_nothing_waits_for_the_device(alone: Any, device: str) -> None:
    scores = cosines(9, 40, 23).float().to(device)
    expected = ops.sinkhorn(scores)
    torch.testing.assert_close(sinkhorn_group(scores, 0.1, 3, alone), expected)  # also connects
    if device == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        busy = torch.cuda.Event()
        busy.record()
        codes = sinkhorn_group(scores, 0.1, 3, alone)
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(codes, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = sinkhorn_group(scores, 0.1, 3, alone)
    codes.zero_()
    graph.replay()
    torch.testing.assert_close(codes, expected)


def _exchanges(group: Any, scores: Tensor, iterations: int) -> list[tuple[str, int]]:
    counted = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                counted.append((func._schema.name, args[0][0].numel()))
            return func(*args, **(kwargs or {}))

    with Count():
        ops.sinkhorn(scores, 0.1, iterations, group)
    return counted


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_one_all_reduce_of_m_values_per_iteration(ranks: Ranks, iterations: int) -> None:
    counted = ranks.run(_exchanges, *((torch.rand(9, 17), iterations) for _ in range(2)))
    assert counted == [[("c10d::allreduce_", 17)] * (1 + iterations)] * 2


def _codes_carry_no_gradient(group: Any, scores: Tensor) -> bool:
    scores = scores.requires_grad_()
    codes = ops.sinkhorn(scores, group=group)
    (scores * codes).sum().backward()
    return not codes.requires_grad and torch.equal(scores.grad, codes)


def test_codes_carry_no_gradient(ranks: Ranks) -> None:
    assert (
        ranks.run(_codes_carry_no_gradient, (torch.rand(3, 4),), (torch.rand(5, 4),)) == [True] * 2
    )


def _compiled(group: Any, batches: list[Tensor]) -> tuple[list[Tensor], int]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda scores: ops.sinkhorn(scores, group=group) * 1.0, fullgraph=True, backend=counter
    )
    for scores in batches:
        torch._dynamo.mark_dynamic(scores, 0)
    return [function(scores) for scores in batches], counter.frame_count


def test_compiles_as_one_graph_for_all_batch_sizes(ranks: Ranks) -> None:
    batches = [cosines(seed, n, 6) for seed, n in enumerate((7, 12, 30))]
    halves = [batch.split((3, len(batch) - 3)) for batch in batches]
    answers = ranks.run(
        _compiled, *(([part.clone() for part in rank],) for rank in zip(*halves, strict=True))
    )
    assert [graphs for _, graphs in answers] == [1, 1]
    for batch, *parts in zip(batches, *(codes for codes, _ in answers), strict=True):
        torch.testing.assert_close(torch.cat(parts), ops.sinkhorn(batch))


def _error(group: Any, *args: Any) -> str:
    try:
        ops.sinkhorn(*args, group=group)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 0),), r"ValueError: scores should be [..., B, M] with M >= 1, got [2, 0]"),
        ((torch.ones(2),), "ValueError: scores should be [..., B, M] with M >= 1, got [2]"),
        (
            (torch.ones(2, 2).int(),),
            "TypeError: scores should be float32, float16, bfloat16, float64, got torch.int32",
        ),
        ((torch.ones(2, 2), 0.0), "ValueError: temperature should be positive and finite, got 0.0"),
        (
            (torch.ones(2, 2), 1e-46),
            "ValueError: temperature should be in [1.18e-38, 8.51e+37], where float32 holds it and its "
            "inverse, got 1e-46",
        ),
        ((torch.ones(2, 2), 0.1, -1), "ValueError: iterations should be >= 0, got -1"),
    ],
)
def test_errors_come_before_the_first_exchange(
    ranks: Ranks, args: tuple[Any, ...], message: str
) -> None:
    # Only one of the two processes calls: an exchange would wait for the other.
    assert ranks.run(_error_on_first, args, args)[0] == message


def _error_on_first(group: Any, *args: Any) -> str:
    return _error(group, *args) if dist.get_rank() == 0 else ""


def _vmap_error(group: Any, scores: Tensor) -> list[str]:
    errors = []
    for call in (
        torch.vmap(lambda x: ops.sinkhorn(x, group=group)),
        torch.vmap(torch.func.grad(lambda x: (x * ops.sinkhorn(x, group=group)).sum())),
        torch.func.grad(lambda s: torch.vmap(lambda x: ops.sinkhorn(x, group=group))(s).sum()),
    ):
        with pytest.raises(NotImplementedError) as caught:
            call(scores)
        errors.append(str(caught.value))
    outside = torch.vmap(lambda c: c * ops.sinkhorn(scores[0], group=group))(scores)
    assert torch.equal(outside, scores * ops.sinkhorn(scores[0], group=group))
    return errors


def test_vmap_is_refused_before_the_first_exchange(ranks: Ranks) -> None:
    for errors in ranks.run(_vmap_error, (torch.rand(2, 3, 4),), (torch.rand(2, 3, 4),)):
        assert (
            errors == ["sinkhorn should have no group under vmap: give it leading dimensions"] * 3
        )


@pytest.mark.parametrize("group", ["world", 2, dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group(group: Any) -> None:
    with pytest.raises(TypeError, match=r"group should be a torch\.distributed\.ProcessGroup"):
        ops.sinkhorn(torch.ones(2, 2), group=group)
