"""Large results in memory that is kept: seen from outside they are tensors like any other."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from crpt import ops
from crpt.ops import cpu_memory
from crpt.ops.compiled import _cpu

SHAPE = (40, 9, 308, 308)  # uint8: 32.6 MiB, just above what is kept


def images() -> Tensor:
    return torch.arange(308, dtype=torch.uint8).expand(SHAPE)


def shifted(value: int = 0) -> Tensor:
    """Every row is 0, 1, 2, ..., moved by `value`."""
    shifts = torch.tensor([[0, value]]).expand(SHAPE[0], 2)
    return ops.random_shift(images(), 4, shifts)


def is_shifted(out: Tensor, value: int = 0) -> bool:
    columns = (torch.arange(308) + value).clamp(0, 307).to(torch.uint8)
    return out.shape == SHAPE and torch.equal(out, columns.expand(SHAPE))


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    limit = cpu_memory.cache_limit()
    cpu_memory.empty_cache()
    yield
    cpu_memory.set_cache_limit(limit)
    cpu_memory.empty_cache()


def test_memory_is_used_again_when_its_last_tensor_is_gone() -> None:
    out = shifted(1)
    address, part = out.data_ptr(), out[3, 2]
    del out
    assert cpu_memory.cached_bytes() == 0  # `part` still lies there
    other = shifted(2)
    assert other.data_ptr() != address
    assert part[0, :3].tolist() == [1, 2, 3]
    assert is_shifted(other, 2)
    del part
    assert cpu_memory.cached_bytes() >= 32 << 20
    again = shifted(3)
    assert again.data_ptr() == address
    assert is_shifted(again, 3)
    assert is_shifted(other, 2)


def test_small_results_are_torchs() -> None:
    out = ops.random_shift(torch.ones(2, 3, 84, 84))
    del out
    assert cpu_memory.cached_bytes() == 0


def test_the_limit_holds_and_can_be_zero() -> None:
    outs = [shifted() for _ in range(3)]
    cpu_memory.set_cache_limit(80 << 20)
    assert cpu_memory.cache_limit() == 80 << 20
    outs.clear()
    assert 60 << 20 < cpu_memory.cached_bytes() <= 80 << 20
    cpu_memory.empty_cache()
    assert cpu_memory.cached_bytes() == 0
    cpu_memory.set_cache_limit(0)
    assert is_shifted(shifted(1), 1)
    assert cpu_memory.cached_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (-1, ValueError, r"limit should be in \[0, 2\*\*63\), got -1"),
        (2**63, ValueError, r"limit should be in \[0, 2\*\*63\)"),
        (1.5, TypeError, "limit should be an int, got float"),
        (True, TypeError, "limit should be an int, got bool"),
    ],
)
def test_errors(limit: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cpu_memory.set_cache_limit(limit)


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_limit_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    show = "from crpt.ops import cpu_memory; print(cpu_memory.cache_limit())"
    assert int(python(show, CRPT_CPU_CACHE_MIB="").stdout) == 256 << 20
    assert int(python(show, CRPT_CPU_CACHE_MIB="3").stdout) == 3 << 20
    for wrong in ("-1", "1GB", "1" * 13):
        monkeypatch.setenv("CRPT_CPU_CACHE_MIB", wrong)
        message = "CRPT_CPU_CACHE_MIB should be a number of MiB, 0 or more, got"
        with pytest.raises(ValueError, match=message):
            cpu_memory._limit_at_the_start()
    assert message in python(show, CRPT_CPU_CACHE_MIB=wrong).stderr


def test_layouts_are_those_of_small_results() -> None:
    for like in (
        torch.empty(SHAPE, dtype=torch.uint8),
        torch.empty(SHAPE, dtype=torch.uint8).to(memory_format=torch.channels_last),
        torch.empty(308 * 4, 1, 308, 90, dtype=torch.uint8).transpose(0, 1).transpose(0, 1),
    ):
        out, expected = ops.random_shift(like), torch.empty_like(like)
        assert out.stride() == expected.stride()
        assert out._base is None
        assert out.storage_offset() == 0
        assert cpu_memory.cached_bytes() == 0
        del out
        assert cpu_memory.cached_bytes() > 0
        cpu_memory.empty_cache()


def test_gradients_are_kept_as_long_as_they_are_needed() -> None:
    x = torch.zeros(10, 9, 308, 308, requires_grad=True)
    out = ops.random_shift(x, 4)
    assert out.grad_fn is not None
    product = out * out  # saves `out`
    del out
    gc.collect()
    assert cpu_memory.cached_bytes() == 0
    product.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_pickling_copying_and_sharing() -> None:
    out = shifted(2)
    file = io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    assert is_shifted(torch.load(file), 2)
    assert is_shifted(copy.deepcopy(out), 2)
    assert out.share_memory_().is_shared()
    assert is_shifted(out, 2)
    assert cpu_memory.cached_bytes() > 0  # it has moved


class Dataset(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return shifted(i)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_from_workers_of_a_data_loader(start: str) -> None:
    shifted()  # so that the parent has something to inherit
    loader = torch.utils.data.DataLoader(
        Dataset(), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    for i, out in enumerate(loader):
        assert is_shifted(out, i)


def test_in_a_compiled_graph_and_in_inference_mode() -> None:
    torch._dynamo.reset()
    shift = torch.compile(ops.random_shift, fullgraph=True, backend="aot_eager")
    shifts = torch.tensor([[0, 1]]).expand(SHAPE[0], 2)
    assert is_shifted(shift(images(), 4, shifts), 1)
    with torch.inference_mode():
        out = shifted(1)
        assert out.is_inference()
        assert is_shifted(out.add_(0), 1)


def test_torchs_filling_of_fresh_memory_is_left_to_torch() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        out = shifted(1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_shifted(out, 1)
    del out
    assert cpu_memory.cached_bytes() == 0


def test_tensors_may_outlive_the_interpreter() -> None:
    program = """
import atexit, sys, threading, torch
from crpt import ops
x = torch.zeros(40, 9, 308, 308, dtype=torch.uint8)
sys.kept = torch.kept = kept = ops.random_shift(x)
cycle = [ops.random_shift(x)]
cycle.append(cycle)
atexit.register(lambda out: out.add_(1), ops.random_shift(x))
threading.Thread(target=lambda: threading.local().__setattr__("x", ops.random_shift(x))).start()
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_no_memory_is_torchs_error() -> None:
    program = """
import resource, torch
from crpt import ops
x = torch.zeros(1, 1, 1, 1).expand(400, 9, 1000, 1000)
frames = torch.zeros(1, 3, 1000, 1000, dtype=torch.uint8)
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
try:
    ops.frame_stack(frames, torch.zeros(400, 3, dtype=torch.int64), dtype=torch.float32)
except RuntimeError as error:
    assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    print("refused")
"""
    done = python(program)
    assert done.stdout == "refused\n", done.stderr


def test_memory_that_a_kernel_needs_and_does_not_get_is_named() -> None:
    """The kernel itself, before it touches anything: so large a result would be torch's error."""
    problems = 1 << 50
    text = f"intrinsic_loss: no memory for {8 * problems} bytes of scratch"
    with pytest.raises(MemoryError, match=text):
        _cpu.intrinsic_loss(0, 0, 0, problems, 1, 1.5, 1)
