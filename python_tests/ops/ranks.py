"""Three processes joined by gloo, started once, for tests of what works across processes."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

SIZE = 3
PATIENCE = 60.0  # seconds; a test that makes a process wait for nothing must fail, not hang


class Ranks:
    """Runs a function in the first n processes: function(group, *arguments of that rank)."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: tuple[Any, ...]) -> list[Any]:
        """One tuple of arguments a rank; what the ranks return, in their order."""
        pipes = self._pipes[: len(arguments)]
        for pipe, mine in zip(pipes, arguments, strict=True):
            pipe.send((function, len(arguments), mine))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE):
                raise TimeoutError(f"rank {rank} is still waiting after {PATIENCE} s")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise AssertionError(f"rank {rank}:\n{error}")
        return [result for result, _ in answers]


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=PATIENCE),
    )
    # Every process takes part in making every group, also those that it is not in.
    groups = {n: dist.new_group(list(range(n))) for n in range(1, SIZE + 1)}
    while True:
        function, size, arguments = pipe.recv()
        try:
            pipe.send((function(groups[size], *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


@contextmanager
def started(store: str) -> Iterator[Ranks]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(SIZE)]
    processes = [
        context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    pipes = [ours for ours, _ in pairs]
    try:
        yield Ranks(pipes)
    finally:
        for process in processes:
            process.kill()  # they hold nothing that is worth the seconds that they take to end
            process.join()
