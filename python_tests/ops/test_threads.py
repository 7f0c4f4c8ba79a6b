"""Threads: the GIL is released, several Python threads at once are right, and the kernels' teams
have the size that torch.set_num_threads asks for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operator_samples import LARGE, Sample
from test_common import gradients
from torch import Tensor

from crpt.ops import compiled, cpu, cpu_memory, gemm

large = pytest.mark.parametrize("sample", LARGE, ids=str)
WITH_GEMM = (
    "prototype_similarity",
    "intrinsic_loss",
    "prototype_objective",
)  # whose threads are torch's own


def run(sample: Sample) -> list[Tensor]:
    """The result, and its gradients."""
    args, kwargs = sample.arguments(torch.float32, requires_grad=sample.differentiable)
    out = sample.function(*args, **kwargs)
    weight = torch.ones_like(out)
    return [
        out.detach(),
        *(gradients(sample.function, args, kwargs, weight) if sample.differentiable else []),
    ]


@pytest.fixture
def other_thread() -> Iterator[list[int]]:
    """The count of rounds that another Python thread has made.

    It makes one only while this thread lets go of the GIL by itself: nothing else takes the GIL
    away from a running thread within this interval.
    """
    rounds, stop, begun = [0], threading.Event(), threading.Event()

    def count() -> None:
        while not stop.is_set():
            rounds[0] += 1
            begun.set()
            time.sleep(1e-5)  # lets go of the GIL

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    thread.start()
    begun.wait()
    yield rounds
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


class Watched:
    """crpt._cpu, each of whose functions must let the other thread run while it works."""

    def __init__(self, module: Any, rounds: list[int]) -> None:
        self._module, self._rounds = module, rounds
        self.seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        def call(*args: Any) -> Any:
            before = self._rounds[0]
            for _ in range(10_000):  # the system may be slow to wake the other thread, not forever
                out = function(*args)
                if self._rounds[0] != before:
                    self.seen.add(name)
                    return out
            raise AssertionError(f"no other Python thread ran during 10,000 calls of {name}")

        return call if callable(function) else function


def test_this_thread_keeps_the_gil_unless_it_lets_go(other_thread: list[int]) -> None:
    """Or the next test would show nothing."""
    before = other_thread[0]
    total = 0
    for i in range(2_000_000):
        total += i
    assert other_thread[0] == before


def test_kernels_release_the_gil(other_thread: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(compiled._cpu, other_thread)
    for module in (cpu, gemm):
        monkeypatch.setattr(module, "_cpu", watched)
    for sample in LARGE:
        run(sample)
    gemm._by_rows(torch.rand(300, 200).mT)  # no product here needs it on every CPU
    assert {s.operator for s in LARGE} - set(WITH_GEMM) <= watched.seen
    assert {"row_normalize_both", "intrinsic_loss", "prototype_objective"} <= watched.seen
    assert "transpose" in watched.seen


def test_memory_comes_and_goes_without_the_gil(other_thread: list[int]) -> None:
    """Where that takes long: mapped afresh, and unmapped after it was written to."""

    def leave_in_the_pool() -> None:
        cpu_memory.set_cache_limit(1 << 30)
        cpu_memory.new_empty(torch.empty(0), (16 << 20,)).fill_(1.0)

    limit = cpu_memory.cache_limit()
    calls = {
        "take_pages": (lambda: cpu_memory.set_cache_limit(1), lambda: take_pages(64 << 20)),
        "empty_pool": (leave_in_the_pool, cpu_memory.empty_cache),
        "set_pool_limit": (leave_in_the_pool, lambda: cpu_memory.set_cache_limit(0)),
    }
    take_pages = compiled._cpu.take_pages
    try:
        for name, (prepare, call) in calls.items():
            for _ in range(3000):
                prepare()
                before = other_thread[0]
                call()
                if other_thread[0] != before:
                    break
            else:
                raise AssertionError(f"no other Python thread ran during 3,000 calls of {name}")
    finally:
        cpu_memory.set_cache_limit(limit)


@large
def test_two_python_threads_at_once(sample: Sample) -> None:
    """Each with a team of its own."""
    torch.set_num_threads(2)
    expected = run(sample)
    barrier = threading.Barrier(2)
    results: list[list[list[Tensor]]] = [[], []]

    def work(into: list[list[Tensor]]) -> None:
        torch.set_num_threads(2)  # OpenMP keeps this number for each thread
        barrier.wait()
        into.extend(run(sample) for _ in range(2))

    threads = [threading.Thread(target=work, args=(into,)) for into in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in (*results[0], *results[1]):
        for g, e in zip(got, expected, strict=True):
            if sample.operator in WITH_GEMM:
                torch.testing.assert_close(g, e)
            else:
                assert torch.equal(g, e)
    assert len(results[0]) == len(results[1]) == 2


@large
def test_any_number_of_threads_gives_the_same_bits(sample: Sample) -> None:
    torch.set_num_threads(1)
    expected = run(sample)
    for threads in (2, 3, 7, 1):
        torch.set_num_threads(threads)
        for _ in range(2):
            for g, e in zip(run(sample), expected, strict=True):
                if sample.operator in WITH_GEMM:
                    torch.testing.assert_close(g, e)
                else:
                    assert torch.equal(g, e)


# Work for seven threads, of operators in which no matrix product of torch's starts any.
TEAMS = """
import os, torch
from crpt import ops

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
scores = torch.rand(1021, 801)
images = torch.zeros(200, 3, 84, 84, dtype=torch.uint8)
index, shifts = torch.arange(200)[:, None], torch.zeros(200, 2, dtype=torch.int64)
calls = {
    "sinkhorn": lambda: ops.sinkhorn(scores),
    "sinkhorn in log space": lambda: ops.sinkhorn(scores, 0.001),
    "prototype_loss": lambda: ops.prototype_loss(scores, scores),
    "random_shift": lambda: ops.random_shift(images, 4, shifts),
    "frame_stack": lambda: ops.frame_stack(images, index, shifts),
}
for operator, call in calls.items():
    if os.fork() > 0:  # while this process has one thread
        assert os.wait()[1] == 0
        continue
    call()
    before, grown = threads(), []
    for n in (2, 3, 7):  # OpenMP keeps the threads of its largest team
        torch.set_num_threads(n)
        call()
        grown.append(threads() - before)
    print(operator, grown, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_team_has_the_size_that_was_asked_for() -> None:
    """Each operator in a process of its own, in which nothing else starts threads."""
    done = subprocess.run([sys.executable, "-c", TEAMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{operator} [1, 2, 6]"
        for operator in (
            "sinkhorn",
            "sinkhorn in log space",
            "prototype_loss",
            "random_shift",
            "frame_stack",
        )
    ]
