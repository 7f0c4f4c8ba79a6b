"""`python -m crpt.bench ops`: the operators beside their twins, torch.compile and the usual way.

Every row is checked first and timed only if it is right. Ours, the twin (crpt.ops.reference), the
twin under torch.compile and the named alternative take turns in blocks of calls; medians are over
rounds. Inputs are random, in two ways. `cold`: each call takes the next of so many input sets that
what it reads of them is together twice the last-level cache; frames lie in a store of at least four
times that. Where it would take more than MOST_SETS the row is called `part` instead: some of its
inputs may be found in the cache. `warm`: always the same set, for problems that fit in half that
cache, results included; so the losses find their inputs within an update, where the matrix product
before them has just written them. Results go where the allocator puts them, for all sides alike.
`graph`, on a GPU: ours in a CUDA graph, which is what the device needs; outside of one the host's
own time to start an operator can be longer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crpt import cli
from crpt.bench import machine
from crpt.bench.limits import Limits
from crpt.bench.ops_report import (
    COLUMNS,
    DISTURBED,
    FROM_MEMORY,
    Result,
    cells,
    document,
    notes,
)
from crpt.bench.ops_rows import Row, rows
from crpt.bench.table import Table
from crpt.bench.timing import Inputs, OtherLoad, Side, take_turns, wait_until_idle
from crpt.files import replace_file

MOST_SETS = 8192  # the smallest row's are cold with caches of up to 1 GiB


@dataclass(frozen=True)
class OpsArguments:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    json: Path | None = None
    """Also write everything measured to this file."""
    markdown: bool = False
    """Print the table in Markdown."""
    only: str = ""
    """Rows whose "operator size dtype" this regular expression finds; empty: all."""
    compile: bool = True
    """Also time torch.compile of the twins; compiling takes most of a first run's time."""
    seconds: float = 1.5
    """For timing one row, about; every side runs at least five times, however slow."""
    retries: int = 2
    """Times that a row is measured again while other processes take more than 0.1 cores."""
    patience: float = 0.0
    """Seconds to wait, at most, for those processes to end before a row is measured."""


def ops_command(arguments: OpsArguments) -> int:
    """Every operator beside its plain-PyTorch twin, torch.compile and the usual way."""
    begun = time.monotonic()
    device = cli.usable_device(arguments.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # on whose stream events are recorded
    chosen = _chosen(arguments.only)
    if not arguments.seconds > 0:
        raise ValueError(f"seconds should be more than 0, got {arguments.seconds:g}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"json should be in a directory that exists, got {arguments.json}")
    table = Table(COLUMNS, arguments.markdown)
    described = machine.describe(device, "ops")
    _say([*table.text(machine.header(described)), "", *table.header()])
    limits = Limits(device)
    described["gemm"] = limits.gemm_name
    results: list[Result] = []
    for row in chosen:
        for result in measure(row, device, limits, arguments):
            results.append(result)
            _say([table.line(cells(result))])
    described["seconds"] = time.monotonic() - begun
    _say(["", *table.text(notes(results, described))])
    if arguments.json is not None:
        text = json.dumps(document(described, results), indent=1)
        replace_file(arguments.json, lambda path: path.write_text(text + "\n"))
    return 1 if any(result.wrong for result in results) else 0


def measure(
    row: Row, device: torch.device, limits: Limits, arguments: OpsArguments
) -> Iterator[Result]:
    """The row's lines: cold, or part; warm where that can be; on a GPU in a graph."""
    generator = torch.Generator(device)
    generator.seed()
    cache = machine.last_level_cache(device)
    first = row.make(generator)
    ours, twin = (_complete(row, f) for f in (row.ours, row.twin))
    expected = twin(*first)
    wrong = difference(ours(*first), expected, row.tolerance)
    if wrong:
        yield Result(row, "", {}, wrong=wrong)
        return
    alternative = _complete(row, row.usual.call)
    off = _relative(alternative(*first), expected) if row.usual.same else None
    del expected
    calls = {"ours": ours, "twin": twin}
    compiled = _compiled(row, first) if arguments.compile else None
    if compiled is not None:
        calls["compile"] = compiled
    wanted = max(-(-2 * cache // row.reads), 2)
    count = min(wanted, MOST_SETS)
    sets = [first, *(row.make(generator) for _ in range(count - 1))]
    usual_sets = [row.usual.prepare(*x) for x in sets] if row.usual.prepare else sets

    def line(inputs: str, size: int) -> Result:
        sides = [Side(name, call, sets[:size]) for name, call in calls.items()]
        sides.append(Side("usual", alternative, usual_sets[:size]))
        against = limits.sides(row.work, cached=inputs not in FROM_MEMORY)
        tries: list[Result] = []
        while len(tries) <= arguments.retries and (not tries or tries[-1].disturbed):
            wait_until_idle(DISTURBED, arguments.patience)
            load = OtherLoad()
            timings = take_turns([*sides, *against], device, arguments.seconds)
            limit = limits.of(row.work, against, timings)
            tries.append(Result(row, inputs, timings, limit, size, load.cores(), off))
        return min(tries, key=lambda result: result.others or 0.0)

    yield line("cold" if count == wanted else "part", count)
    fits = row.work.moved <= cache // 2
    if fits:
        yield line("warm", 1)
    if device.type == "cuda":
        size = 1 if fits else count
        calls["ours"] = _captured(ours, sets[:size])
        yield line("graph", size)


def difference(ours: Any, twin: Any, tolerance: float) -> str:
    """Empty where ours is right, else what is wrong with it."""
    ours, twin = (x if isinstance(x, tuple) else (x,) for x in (ours, twin))
    for i, (mine, theirs) in enumerate(zip(ours, twin, strict=True)):
        name = "result" if i == 0 else f"gradient {i}"
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return (
                f"{name} should be {theirs.dtype} {list(theirs.shape)}, "
                f"got {mine.dtype} {list(mine.shape)}"
            )
        a, b = mine.double(), theirs.double()
        bad = ~((a - b).abs() <= tolerance * (b.abs() + 0.1 * b.abs().amax()))  # NaN is bad
        if bad.any():
            return (
                f"{name} should be the twin's to within {tolerance:g}, {int(bad.sum())} of "
                f"{bad.numel()} elements are not, the worst by {float((a - b).abs().amax()):.3g}"
            )
    return ""


def _complete(row: Row, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the gradients of its inputs where the row wants them."""
    if not row.backward:
        return function

    def with_gradients(*inputs: Any) -> tuple[Tensor, ...]:
        loss = function(*inputs)
        leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return with_gradients


def _compiled(row: Row, inputs: Inputs) -> Callable[..., Any] | None:
    """The twin under torch.compile, compiled; None where torch cannot here."""
    torch.compiler.reset()
    # sinkhorn's twin takes two logarithms with .item(), which would cut its graph otherwise.
    torch._dynamo.config.capture_scalar_outputs = True
    compiled = _complete(row, torch.compile(row.twin, dynamic=False))
    try:
        compiled(*inputs)
    except RuntimeError as error:  # as all of torch.compile's: no compiler, unsupported, ...
        _say([f"torch.compile of {row.operator}: {str(error).strip().splitlines()[0]}"])
        return None
    return compiled


def _captured(function: Callable[..., Any], sets: Sequence[Inputs]) -> Callable[..., None]:
    """The call as a CUDA graph, one for each of these input sets."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(*sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
    for inputs in sets:
        graph = graphs[tuple(map(id, inputs))] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(*inputs)
    return lambda *inputs: graphs[tuple(map(id, inputs))].replay()


def _relative(result: Any, twin: Any) -> float:
    """The largest difference, in units of the twin's largest element."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (result, twin)), strict=True)
    return max(
        float((a.double() - b.double()).abs().amax() / b.double().abs().amax()) for a, b in pairs
    )


def _chosen(pattern: str) -> list[Row]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"only should be a regular expression ({error}), got {pattern}") from error
    every = rows()
    chosen = [row for row in every if wanted.search(row.name)]
    if not chosen:
        names = "\n  ".join(row.name for row in every)
        raise ValueError(f"only should find one of these, got {pattern}:\n  {names}")
    return chosen


def _say(lines: list[str]) -> None:
    print(*lines, sep="\n", flush=True)
