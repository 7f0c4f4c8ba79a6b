"""`python -m crpt.bench replay`: the replay buffer beside cpprb, Stable-Baselines3 and TorchRL.

Transitions of 84x84 RGB frames in stacks of three, in memory; all buffers hold as many, far more
than the caches do. Those compared take turns in blocks of calls (crpt.bench.timing). What is
sampled is checked first.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from crpt.bench import machine, usual_replay
from crpt.bench.pretrain import DOMAIN, EPISODE, random_pixels
from crpt.bench.replay_measure import Measure, Target, exact, timed, undisturbed
from crpt.bench.replay_report import COLUMNS, cells, notes, plain
from crpt.bench.replay_sampling import BATCH, FRAME_STACK, PAD, sampling, sampling_views
from crpt.bench.replay_writers import Steps, WriterProcess, random_steps, writer_processes
from crpt.bench.table import Table
from crpt.bench.timing import OtherLoad, Side, summarise
from crpt.bench.usual_replay import Transitions, Usual, UsualOfMany
from crpt.files import replace_file
from crpt.memory import keep_freed_memory
from crpt.replay import DomainSpec, ReplayBuffer
from crpt.replay.manifest import directory

WHOLE_EPISODE = 500  # agent steps of dm_control's suite at action repeat 2
OPENED = 300_000
OPENINGS = 7
APPENDS = 1_000.0  # a second, beside sampling
ROUNDS = 5  # of those that processes take part in
OTHER = "other"  # a domain beside DOMAIN
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ReplayArguments:
    transitions: int = 8_000
    """In every buffer; 127 KB each in those of others."""
    seconds: float = 3.0
    """For each measure, about."""
    retries: int = 2
    """Times that a measure is repeated while other processes take more than 0.1 cores."""
    json: Path | None = None
    """Also write everything measured to this file."""
    markdown: bool = False
    """Print the table in Markdown."""


def replay_command(arguments: ReplayArguments) -> int:
    """The replay buffer beside cpprb, Stable-Baselines3 and TorchRL."""
    if arguments.transitions < BATCH:
        raise ValueError(f"transitions should be at least {BATCH}, got {arguments.transitions}")
    if not arguments.seconds > 0:
        raise ValueError(f"seconds should be more than 0, got {arguments.seconds:g}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"json should be in a directory that exists, got {arguments.json}")
    found, missing = usual_replay.installed()
    table = Table(COLUMNS, arguments.markdown)
    described = machine.describe(CPU, "replay")
    described["versions"] |= {usual.package: usual.version() for usual in found}
    versions = ", ".join(f"{usual.package} {usual.version()}" for usual in found)
    header = [*machine.header(described), *([versions] if versions else []), *missing]
    _say([*table.text(header), "", *table.header()])
    results: list[Measure] = []
    for result in measure(arguments, found):
        results.append(result)
        _say([table.line(line) for line in cells(result)])
    _say(["", *table.text(notes(results))])
    if arguments.json is not None:
        document = {
            "schema": 1, "bench": "replay", **described, "rows": [plain(r) for r in results],
        }  # fmt: skip
        text = json.dumps(document, indent=1)
        replace_file(arguments.json, lambda path: path.write_text(text + "\n"))
    return 0


def measure(arguments: ReplayArguments, found: Sequence[type[Usual]]) -> Iterator[Measure]:
    count, seconds = arguments.transitions, arguments.seconds
    buffer = random_pixels(count, FRAME_STACK)
    steps = random_steps(buffer.spec(DOMAIN), EPISODE)
    transitions = Transitions.of(steps, FRAME_STACK)
    theirs = {usual.name: usual(count, transitions) for usual in found}
    for usual in theirs.values():
        for _ in range(-(-count // EPISODE)):
            (usual.extend if isinstance(usual, UsualOfMany) else usual.append)(transitions)
    yield _memory(theirs, count)
    again = partial(undisturbed, arguments.retries)
    for call in ("append", "extend"):
        yield again(_writing, call, buffer, steps, theirs, transitions, seconds)
    yield again(sampling, buffer, theirs, DOMAIN, seconds)
    yield again(sampling_views, buffer, DOMAIN, seconds)
    keep_freed_memory()
    yield again(sampling, buffer, theirs, DOMAIN, seconds, "malloc keeps")
    theirs.clear()
    buffer.add_domain(OTHER, buffer.spec(DOMAIN))
    with (
        writer_processes(2, buffer, DOMAIN, EPISODE) as writers,
        writer_processes(1, buffer, OTHER, EPISODE) as others,
    ):
        yield again(_writing_together, writers, others[0], seconds)
        yield again(_sampling_beside, buffer, writers[0], seconds)
    yield _opening()


def _memory(theirs: dict[str, Usual], count: int) -> Measure:
    episodes = 10
    spec = DomainSpec(capacity=episodes * (WHOLE_EPISODE + 1), action_shape=(6,))
    with tempfile.TemporaryDirectory(prefix="crpt-bench-") as folder:
        ReplayBuffer.create(Path(folder) / "dataset", {DOMAIN: spec})
        files = directory(Path(folder) / "dataset", DOMAIN).iterdir()
        ours = sum(path.stat().st_blocks * 512 for path in files) / (episodes * WHOLE_EPISODE)
    sides = {"ours": exact(ours)}
    sides |= {name: exact(usual.nbytes() / count) for name, usual in theirs.items()}
    frame_and_scalars = int(np.prod(spec.frame_shape)) + 4 * spec.action_shape[0] + 4 + 4
    target = Target("bytes of one frame and its scalars", ours / frame_and_scalars, 1.05, True)
    return Measure("memory, on the disk or not", "B/transition", sides, (target,))


def _writing(
    call: Literal["append", "extend"],
    buffer: ReplayBuffer,
    steps: Steps,
    theirs: dict[str, Usual],
    transitions: Transitions,
    seconds: float,
) -> Measure:
    with buffer.writer(DOMAIN) as writer:
        sides = [Side("ours", getattr(steps, call), [(writer,)])]
        sides += [
            Side(name, getattr(usual, call), [(transitions,)])
            for name, usual in theirs.items()
            if call == "append" or isinstance(usual, UsualOfMany)
        ]
        what = "one at a time" if call == "append" else "an episode at a time"
        result = timed(f"writing, {what}", "transitions/s", sides, seconds, rate=EPISODE)
    rate = result.sides["ours"].median
    targets = [Target(f"{result.what}, transitions/s", rate, 200_000)]
    if "cpprb" in result.sides:
        targets.append(Target(f"{result.what}, x cpprb", result.ratio("cpprb"), 3))
    return dataclasses.replace(result, targets=tuple(targets))


def _writing_together(
    writers: list[WriterProcess], elsewhere: WriterProcess, seconds: float
) -> Measure:
    """Two processes that write into one domain, beside one of them, and beside two into two."""
    teams = {"ours": writers, "one of them": writers[:1], "in two domains": [writers[0], elsewhere]}
    rates: dict[str, list[float]] = {name: [] for name in teams}
    load, begun, own = OtherLoad(), time.monotonic(), 0.0
    for _ in range(ROUNDS):
        for name, team in teams.items():
            for writer in team:
                writer.start("append", seconds / ROUNDS / len(teams))
            wrote = [writer.wait() for writer in team]
            rates[name].append(sum(w.rate for w in wrote))
            own += sum(w.cpu for w in wrote)
    others = _others(load, begun, own)
    sides = {name: summarise(values, 1) for name, values in rates.items()}
    pairs = zip(rates["ours"], rates["one of them"], strict=True)
    target = Target("two writer processes, x one", statistics.median(a / b for a, b in pairs), 1.8)
    return Measure("writing, two processes", "transitions/s", sides, (target,), True, others)


def _sampling_beside(buffer: ReplayBuffer, writer: WriterProcess, seconds: float) -> Measure:
    per_second: dict[str, list[float]] = {"beside": [], "alone": []}
    appended: list[float] = []
    load, begun, own = OtherLoad(), time.monotonic(), 0.0
    span = seconds / ROUNDS / 2
    for _ in range(ROUNDS):
        for name, rates in per_second.items():
            if name == "beside":
                writer.start("append", span * 1.1, APPENDS)
            rates.append(_samples_per_second(buffer, span))
            if name == "beside":
                wrote = writer.wait()
                appended.append(wrote.rate)
                own += wrote.cpu
    others = _others(load, begun, own)
    rate = statistics.median(appended)
    sides = {name: summarise(rates, 1) for name, rates in per_second.items()}
    pairs = zip(per_second["beside"], per_second["alone"], strict=True)
    target = Target(
        f"sampling beside {rate:,.0f} appends/s, x alone",
        statistics.median(a / b for a, b in pairs),
        0.9,
    )
    return Measure(
        f"sampling, {rate:,.0f} appends/s beside", "batches/s",
        {"ours": sides["beside"], "alone": sides["alone"]}, (target,), True, others,
    )  # fmt: skip


def _samples_per_second(buffer: ReplayBuffer, seconds: float) -> float:
    count, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        buffer.sample(DOMAIN, BATCH, pad=PAD)
        count += 1
    return count / (now - begun)


def _opening() -> Measure:
    with tempfile.TemporaryDirectory(prefix="crpt-bench-") as folder:
        path = Path(folder) / "dataset"
        sparse_dataset(path, OPENED)
        opened, first = [], []
        for _ in range(OPENINGS):
            begun = time.perf_counter()
            buffer = ReplayBuffer.open(path)
            opened.append(time.perf_counter() - begun)
            buffer.sample(DOMAIN, BATCH)
            first.append(time.perf_counter() - begun)
            if buffer.num_transitions(DOMAIN) != OPENED:
                raise RuntimeError(f"{path} should hold {OPENED} transitions")
    sides = {
        "ours": summarise([x * 1e3 for x in opened], 1),
        "and the first batch": summarise([x * 1e3 for x in first], 1),
    }
    target = Target(f"opening {OPENED:,} transitions, s", sides["ours"].median / 1e3, 0.2, True)
    return Measure(f"opening {OPENED:,} transitions", "ms", sides, (target,))


def sparse_dataset(path: Path, transitions: int) -> None:
    """Whole episodes whose frames, all black, take no room on the disk."""
    episodes = transitions // WHOLE_EPISODE
    steps = episodes * (WHOLE_EPISODE + 1)
    spec = DomainSpec(capacity=1, action_shape=(6,))
    ReplayBuffer.create(path, {DOMAIN: spec})
    folder = directory(path, DOMAIN)
    tickets = np.arange(steps, dtype=np.uint64)
    first = tickets % (WHOLE_EPISODE + 1) == 0
    content = {
        "is_first": first,
        "is_last": np.roll(first, -1),
        "discounts": np.ones(steps, np.float32),
        "previous": np.where(first, tickets, tickets - np.uint64(1)),
        "stamps": tickets + np.uint64(1),
    }
    for name, (dtype, shape) in spec.fields().items():
        # Open it to write, and numpy leaves a hole where nothing is written.
        file = folder / f"{name}.npy"
        if 0 not in shape:
            array = np.lib.format.open_memmap(file, "w+", dtype, (steps, *shape))
            if name in content:
                array[:] = content[name]
            array.flush()
        else:
            np.save(file, np.zeros((steps, *shape), dtype))
    (folder / "cursor").write_bytes(steps.to_bytes(8, "little"))


def _others(load: OtherLoad, begun: float, own: float) -> float | None:
    """Cores taken by others than this process and its writers, which worked for so long."""
    cores = load.cores()
    return None if cores is None else max(0.0, cores - own / (time.monotonic() - begun))


def _say(lines: list[str]) -> None:
    print(*lines, sep="\n", flush=True)
