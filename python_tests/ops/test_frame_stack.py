from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from copies import copies
from hypothesis import given, settings
from hypothesis import strategies as st

from crpt import ops
from crpt.ops import reference

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12),
    st.integers(1, 40), st.integers(0, 6), st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_equals_stacking_shifting_and_casting_one_after_another(
    seed: int, b: int, k: int, c: int, h: int, w: int, pad: int, dtype: torch.dtype, shifted: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (8, c, h, w), generator=g, dtype=torch.uint8)
    index = torch.randint(0, 8, (b, k), generator=g)
    shifts = torch.randint(-pad, pad + 1, (b, 2), generator=g) if shifted else None
    expected = torch.cat([frames[index[:, i]] for i in range(k)], dim=1)
    if shifts is not None:
        expected = ops.random_shift(expected, pad, shifts)
    if dtype != torch.uint8:
        expected = (expected.double() / 255).to(torch.promote_types(dtype, torch.float32)).to(dtype)
    got = ops.frame_stack(frames, index, shifts, pad, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pixel_value_is_cast_as_the_twin_does(dtype: torch.dtype, device: str) -> None:
    frames = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16)
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    got = ops.frame_stack(frames, index, dtype=dtype)
    assert torch.equal(got, reference.frame_stack(frames, index, dtype=dtype))


def test_reads_a_mapped_file_without_loading_it(tmp_path: Path) -> None:
    """A read-only (sparse) file of more than 2**31 bytes: memory grows by what is read of it."""
    store = np.lib.format.open_memmap(
        tmp_path / "frames.npy", mode="w+", dtype=np.uint8, shape=(110_000, 3, 84, 84)
    )
    store[109_999] = np.arange(3 * 84 * 84, dtype=np.uint32).reshape(3, 84, 84) % 251
    del store
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        frames = torch.from_numpy(mapped)
    out = ops.frame_stack(frames, torch.tensor([[109_999, 5, 99_999]]))
    assert torch.equal(out[0, :3], torch.from_numpy(np.array(mapped[109_999])))
    assert (out[0, 3:] == 0).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_every_other_frame_of_a_store_is_not_copied(device: str) -> None:
    frames = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, device=device)
    index = torch.tensor([[0, 3], [19, 7]], device=device)
    for part in (frames[::2], frames[:, 1:], frames[..., 1::2], frames.mT):
        assert torch.equal(ops.frame_stack(part, index), part[index].flatten(1, 2))
        assert copies(ops.frame_stack, part, index) == []
        out = torch.empty(part[index].flatten(1, 2).shape, dtype=torch.uint8, device=device)
        assert copies(ops.frame_stack, part, index, out=out) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_where_it_is_told(dtype: torch.dtype, device: str) -> None:
    frames = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8, device=device)
    index = torch.tensor([[0, 3], [19, 7]], device=device)
    shifts = torch.tensor([[1, -2], [0, 3]], device=device)
    memory = torch.full((4, 6, 9, 7), 42, dtype=dtype, device=device)
    out = memory[1:3]
    version = memory._version
    assert ops.frame_stack(frames, index, shifts, dtype=dtype, out=out) is out
    assert torch.equal(out, ops.frame_stack(frames, index, shifts, dtype=dtype))
    assert (memory[::3] == 42).all()
    assert memory._version > version  # autograd must notice
    twins = torch.zeros_like(out)
    reference.frame_stack(frames, index, shifts, dtype=dtype, out=twins)
    assert torch.equal(twins, out)


def test_out_is_declared_and_compiles(device: str) -> None:
    frames = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8, device=device)
    index = torch.tensor([[0, 3], [19, 7]], device=device)
    out = torch.zeros(2, 6, 9, 7, device=device)
    torch.library.opcheck(torch.ops.crpt.frame_stack_out, (frames, index, None, 4, out))
    torch._dynamo.reset()

    def twice(out: torch.Tensor) -> torch.Tensor:
        return ops.frame_stack(frames, index, dtype=torch.float32, out=out) * 2

    got = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")(out.zero_())
    expected = ops.frame_stack(frames, index, dtype=torch.float32)
    assert torch.equal(out, expected)
    assert torch.equal(got, expected * 2)
    with torch.inference_mode():
        ops.frame_stack(frames, index, dtype=torch.float32, out=out.clone())
    with pytest.raises(NotImplementedError, match="no out under vmap"):
        torch.func.vmap(lambda o: ops.frame_stack(frames, index, dtype=o.dtype, out=o))(out[None])


def test_out_is_left_alone_where_a_value_is_wrong() -> None:
    out = torch.full((1, 9, 4, 4), 42, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"index should be in \[0, 4\], got 9 at \[0, 2\]"):
        ops.frame_stack(F, torch.tensor([[0, 1, 9]]), out=out)
    assert (out == 42).all()


def test_out_has_memory_of_its_own(device: str) -> None:
    memory = torch.zeros(7, 3, 4, 4, dtype=torch.uint8, device=device)
    index = torch.zeros(2, 1, dtype=torch.int64, device=device)
    ops.frame_stack(memory[:5], index, out=memory[5:])
    with pytest.raises(ValueError, match="out should not overlap frames in memory"):
        ops.frame_stack(memory[:6], index, out=memory[5:])
    with pytest.raises(ValueError, match="out should not overlap frames in memory"):
        ops.frame_stack(memory[::6], index, out=memory[1:3])
    bytes_ = index.view(torch.uint8).view(2, 1, 2, 4)
    with pytest.raises(ValueError, match="out should not overlap index in memory"):
        ops.frame_stack(memory[:, :1, :2], index, out=bytes_)


FLIPPED = """
import threading, time
import torch
from crpt import ops

frames = torch.randint(0, 256, (4, 1, 1, 8), dtype=torch.uint8)
index = torch.zeros(400_000, 1, dtype=torch.int64)
out = torch.empty(400_000, 1, 1, 8, dtype=torch.uint8)
stop = threading.Event()

def flip():
    last = index.numpy()[-10:]
    while not stop.is_set():
        last[:] = 1 << 44
        last[:] = 0

thread = threading.Thread(target=flip)
thread.start()
done = refused = 0
end = time.monotonic() + 0.5
while time.monotonic() < end or not (done and refused):
    try:
        ops.frame_stack(frames, index, out=out)
        done += 1
        assert (out[-10:] == frames[0]).all()
    except ValueError as error:
        assert "index should be in [0, 3], got 17592186044416 at [39999" in str(error)
        refused += 1
stop.set()
thread.join()
"""


def test_an_index_that_another_thread_writes_meanwhile_is_right_or_refused() -> None:
    """In a process of its own, which would die of a frame read far beyond the store."""
    done = subprocess.run([sys.executable, "-c", FLIPPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


F = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
I = torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((np.zeros((5, 3, 4, 4), np.uint8), I), {}, TypeError, "frames should be a Tensor, got ndarray"),
        ((F.float(), I), {}, TypeError, "frames should be torch.uint8, got torch.float32"),
        ((F[0], I), {}, ValueError, r"frames should be \[N, C, H, W\] with C, H, W >= 1, got \[3, 4, 4\]"),
        ((F, [0, 1]), {}, TypeError, "index should be a Tensor, got list"),
        ((F, I.int()), {}, TypeError, "index should be torch.int64, got torch.int32"),
        ((F, I[0]), {}, ValueError, r"index should be \[B, K\] with K >= 1, got \[3\]"),
        ((F, I[:, :0]), {}, ValueError, r"index should be \[B, K\] with K >= 1, got \[2, 0\]"),
        ((F, torch.tensor([[0, 1], [2, 5]])), {}, ValueError, r"index should be in \[0, 4\], got 5 at \[1, 1\]"),
        ((F, torch.tensor([[0, -1]])), {}, ValueError, r"index should be in \[0, 4\], got -1 at \[0, 1\]"),
        ((F, torch.tensor([[2**62]])), {}, ValueError, r"index should be in \[0, 4\], got 4611686018427387904 at \[0, 0\]"),
        ((F[:0], I), {}, ValueError, r"frames should be \[N, C, H, W\] with N >= 1 where index has rows, got \[0, 3, 4, 4\]"),
        ((F, I, torch.zeros(3, 2).long()), {}, ValueError, r"shifts should be \[2, 2\], got \[3, 2\]"),
        ((F, I, torch.tensor([[0, 0], [0, -5]])), {}, ValueError, r"shifts should be in \[-4, 4\], got -5 at \[1, 1\]"),
        ((F, I), {"pad": -1}, ValueError, "pad should be >= 0, got -1"),
        ((F, I), {"pad": 2**62}, ValueError, "pad should be <= 2147483647, got"),
        ((F, I), {"dtype": torch.int32}, TypeError, "dtype should be float32, float16, bfloat16, float64, uint8, got torch.int32"),
        ((F, I), {"dtype": "float32"}, TypeError, "dtype should be a torch.dtype, got str"),
        ((F, I), {"out": np.zeros((2, 9, 4, 4), np.uint8)}, TypeError, "out should be a Tensor, got ndarray"),
        ((F, I), {"out": torch.zeros(2, 9, 4, 4)}, TypeError, "out should be torch.uint8 like the argument dtype, got torch.float32"),
        ((F, I), {"dtype": torch.int32, "out": torch.zeros(2, 9, 4, 4).int()}, TypeError, "out should be float32, float16, bfloat16, float64, uint8, got torch.int32"),
        ((F, I), {"out": F}, ValueError, r"out should be \[2, 9, 4, 4\], got \[5, 3, 4, 4\]"),
        ((F, I), {"out": F.new_zeros(2, 9, 4, 8)[..., ::2]}, ValueError, r"out should be contiguous, got strides \[288, 32, 8, 2\]"),
        ((F, I), {"out": F.new_zeros(2, 9, 4, 4, device="meta")}, ValueError, "out should be on cpu, got meta"),
        ((F, I), {"dtype": torch.float32, "out": torch.zeros(2, 9, 4, 4, requires_grad=True)}, ValueError, "out should not require a gradient"),
        ((F, I.to("meta")), {}, ValueError, "index should be on cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.frame_stack(*args, **kwargs)


def test_a_compiled_graph_checks_values_too() -> None:
    torch._dynamo.reset()
    stack = torch.compile(ops.frame_stack, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"index should be in \[0, 4\], got 9 at \[0, 0\]"):
        stack(F, torch.tensor([[9]]))
