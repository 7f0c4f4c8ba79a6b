"""`python -m crpt.bench pretrain`: an update of pre-training beside the same one written the usual
way.

Each side has a process of its own, as a user would run it, since how a process treats the memory
that it frees is half of the difference. They take turns, so that drift of the machine hits both.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from crpt import cli
from crpt.bench import machine
from crpt.bench.limits import copy_rate, gemm_rate
from crpt.bench.table import Column, Table, no_claim, significant
from crpt.bench.timing import OtherLoad
from crpt.bench.update_clock import Phases, ReplayClock, Stopwatch
from crpt.bench.update_work import flops, moved
from crpt.bench.usual_pretrain import UsualModel, UsualReplay, UsualTrainer
from crpt.config import PretrainConfig
from crpt.files import replace_file
from crpt.memory import keep_freed_memory
from crpt.pretrain.trainer import Trainer
from crpt.pretrain.update_graph import WARM_UP as RECORDED
from crpt.replay import DomainSpec, ReplayBuffer

SCHEMA = 1
DISTURBED = 0.1  # cores that others may take before a row's figures are marked
DOMAIN = "random_pixels"
EPISODE = 100  # steps
WARM_UP = 3  # updates
REPLAYS = 20  # updates in a row that are timed as one, on a GPU
PHASES = ("sample", "forward", "backward", "finish", "rest")
COLUMNS = (
    Column("batch", 5),
    Column("side", 12, number=False),
    Column("ms", 7),
    Column("±", 4),
    *(Column(phase, 8) for phase in PHASES),
    Column("x usual", 7),
    Column("of limit", 8),
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PretrainArguments:
    batches: tuple[int, ...] = (128, 512)
    """Transitions an update."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of ours; the usual way is fp32."""
    updates: int = 12
    """Timed for each side."""
    transitions: int = 3_000
    """In the buffer; frames of random pixels. The usual way takes 127 KB for each."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    json: Path | None = None
    """Also write everything measured to this file."""
    markdown: bool = False
    """Print the table in Markdown."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    batch: int
    side: str
    updates: list[Phases]
    products: float
    """Seconds that its matrix products would take at the rate of the best GEMM in its precision."""
    passes: float
    """Seconds that its passes over memory would take at the rate of a copy."""
    usual: float
    """Seconds of the usual way in the same run."""
    others: float | None
    """Cores that other processes took."""

    @property
    def seconds(self) -> float:
        return statistics.median(sum(update.values()) for update in self.updates)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, over the median."""
        totals = [sum(update.values()) for update in self.updates]
        lower, median, upper = statistics.quantiles(totals, n=4, method="inclusive")
        return (upper - lower) / 2 / median

    @property
    def limit(self) -> float:
        return max(self.products, self.passes)

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED


def pretrain_command(arguments: PretrainArguments) -> int:
    """An update of pre-training beside the same one written the usual way."""
    device = cli.usable_device(arguments.device)
    if min(*arguments.batches, arguments.updates, arguments.transitions) < 2:
        raise ValueError("batches, updates and transitions should be at least 2")
    largest = max(arguments.batches, default=0)
    if arguments.transitions < largest:
        raise ValueError(
            f"transitions should be at least as many as the largest of batches, {largest}, got "
            f"{arguments.transitions}"
        )
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"json should be in a directory that exists, got {arguments.json}")
    table = Table(COLUMNS, arguments.markdown)
    described = machine.describe(device, "pretrain")
    _say([*table.text(machine.header(described)), "", *table.header()])
    rates = {name: gemm_rate(device, dtype) for name, dtype in DTYPES.items()}
    rates["copy"] = copy_rate(device)
    results: list[Result] = []
    for batch in arguments.batches:
        for result in measure(batch, arguments, device, rates):
            results.append(result)
            _say([table.line(_cells(result))])
    _say(["", *table.text(_notes(results, rates))])
    if arguments.json is not None:
        document = {
            "schema": SCHEMA, "bench": "pretrain", **described, "rates": rates,
            "rows": [asdict(result) for result in results],
        }  # fmt: skip
        text = json.dumps(document, indent=1)
        replace_file(arguments.json, lambda path: path.write_text(text + "\n"))
    return 0


def measure(
    batch: int, arguments: PretrainArguments, device: torch.device, rates: dict[str, float]
) -> list[Result]:
    """The usual way, then ours in each precision; all in turns."""

    def config(precision: Literal["fp32", "bf16"]) -> PretrainConfig:
        return PretrainConfig(batch_size=batch, embedding_norm="batch", precision=precision)

    configs = {"usual fp32": config("fp32")}
    configs |= {f"ours {precision}": config(precision) for precision in arguments.precisions}
    updates: dict[str, list[Phases]] = {name: [] for name in configs}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(_side(name, config, arguments.transitions, str(device)))
            for name, config in configs.items()
        }
        for ask in sides.values():
            ask(WARM_UP)
        load, begun, own = OtherLoad(), time.monotonic(), 0.0
        for _ in range(arguments.updates):
            for name, ask in sides.items():
                done, seconds = ask(1)
                updates[name] += done
                own += seconds
        cores = load.cores()
        wall = time.monotonic() - begun
    others = None if cores is None else max(0.0, cores - own / wall)
    usual = Result(batch, "", updates["usual fp32"], 0, 0, 0, None).seconds
    return [
        Result(
            batch, name, done,
            products=flops(batch) / rates[configs[name].precision],
            passes=moved(batch, DTYPES[configs[name].precision]) / rates["copy"],
            usual=usual, others=others,
        )
        for name, done in updates.items()
    ]  # fmt: skip


Ask = Callable[[int], tuple[list[Phases], float]]
"""So many updates of a side: their phases, and the CPU time that they took."""


@contextmanager
def _side(name: str, config: PretrainConfig, transitions: int, device: str) -> Iterator[Ask]:
    """A process that does a side's updates."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    arguments = (theirs, name.startswith("usual"), config, transitions, device)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()

    def ask(count: int) -> tuple[list[Phases], float]:
        with suppress(BrokenPipeError):  # who has ended may have said why
            pipe.send(count)
        try:
            done: tuple[list[Phases], float] | str = pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            process.join(10)
            raise RuntimeError(f"the process of {name} ended by {process.exitcode}") from error
        if isinstance(done, str):
            raise RuntimeError(f"{name}: {done}")
        return done

    try:
        yield ask
        with suppress(BrokenPipeError):
            pipe.send(0)
        process.join(10)
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, *side: Any) -> None:
    try:
        _answer(pipe, *side)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        if os.environ.get("CRPT_TRACEBACK") == "1":
            raise


def _answer(
    pipe: Connection, usual: bool, config: PretrainConfig, transitions: int, device: str
) -> None:
    """The phases of as many updates as are asked for, and the CPU time, until they are 0."""
    buffer = random_pixels(transitions, config.frame_stack)
    update = usual_update(config, buffer, device) if usual else our_update(config, buffer, device)
    while (count := pipe.recv()) > 0:
        cpu = time.process_time()
        done = [update() for _ in range(count)]
        pipe.send((done, time.process_time() - cpu))


def random_pixels(transitions: int, frame_stack: int, image_size: int = 84) -> ReplayBuffer:
    """A buffer of frames that hold nothing: the speed of an update does not depend on them."""
    episodes = -(-transitions // EPISODE)
    shape = (3, image_size, image_size)
    spec = DomainSpec(capacity=episodes * (EPISODE + 1), action_shape=(1,), frame_shape=shape)
    buffer = ReplayBuffer.create(None, {DOMAIN: spec})
    rng = np.random.default_rng(0)
    with buffer.writer(DOMAIN) as writer:
        for _ in range(episodes):
            frames = rng.integers(0, 256, (EPISODE + 1, *shape), np.uint8)
            writer.begin(frames[0])
            for step in range(1, EPISODE + 1):
                writer.append(frames[step], np.zeros(1), 0.0, 1.0, last=step == EPISODE)
    return buffer


def our_update(config: PretrainConfig, buffer: ReplayBuffer, device: str) -> Callable[[], Phases]:
    keep_freed_memory()  # as the commands do
    trainer = Trainer(config, buffer, seed=0, device=torch.device(device))
    if trainer.device.type == "cuda":
        return _replayed(trainer)

    def update() -> Phases:
        watch = Stopwatch(trainer.device)
        trainer.passed = watch.passed
        views = trainer.sample((DOMAIN,))
        watch.passed("sample")
        trainer.step(*views)
        return watch.phases

    return update


def _replayed(trainer: Trainer) -> Callable[[], Phases]:
    clock = ReplayClock(trainer.device)
    trainer.passed = clock.passed

    def update() -> object:
        return trainer.update((DOMAIN,))

    for _ in range(RECORDED + 1):
        update()
    return lambda: clock.time(update, REPLAYS)


def usual_update(config: PretrainConfig, buffer: ReplayBuffer, device: str) -> Callable[[], Phases]:
    replay, where = usual_replay(buffer, config.frame_stack), torch.device(device)
    _, channels, size, _ = replay.obs.shape
    model = UsualModel(channels, size, config).to(where)
    trainer = UsualTrainer(model, config)
    rng = np.random.default_rng(0)

    def update() -> Phases:
        watch = Stopwatch(where)
        obs, next_obs = replay.sample(config.batch_size, config.shift_pad, rng)
        obs, next_obs = obs.to(where), next_obs.to(where)
        watch.passed("sample")
        loss, _, _ = trainer.losses(obs, next_obs)
        watch.passed("forward")
        trainer.backward(loss)
        watch.passed("backward")
        trainer.finish()
        watch.passed("finish")
        return watch.phases

    return update


def usual_replay(buffer: ReplayBuffer, frame_stack: int, least: float = math.inf) -> UsualReplay:
    """The same transitions, in numpy's hands; of the first episodes, `least` at least."""
    frames = buffer.arrays(DOMAIN)["frames"]
    _, c, h, w = frames.shape
    obs, next_obs = [], []
    for slots in buffer.episodes(DOMAIN):
        # The episode's first frame stands in for those before it.
        padded = np.concatenate([np.repeat(slots[:1], frame_stack - 1), slots])
        index = np.lib.stride_tricks.sliding_window_view(padded, frame_stack)
        stacks = frames[index].reshape(-1, frame_stack * c, h, w)
        obs.append(stacks[:-1])
        next_obs.append(stacks[1:])
        if sum(map(len, obs)) >= least:
            break
    return UsualReplay(np.concatenate(obs), np.concatenate(next_obs))


def _cells(result: Result) -> list[str]:
    medians = {
        p: statistics.median(update[p] for update in result.updates)
        for p in PHASES
        if p in result.updates[0]
    }
    return [
        str(result.batch),
        f"{result.side} !" if result.disturbed else result.side,
        significant(result.seconds * 1e3),
        f"{result.spread:.0%}",
        *(significant(medians[p] * 1e3) if p in medians else "-" for p in PHASES),
        f"{result.usual / result.seconds:.2f}",
        f"{result.limit / result.seconds:.0%}",
    ]


def _notes(results: list[Result], rates: dict[str, float]) -> list[str]:
    gemms = ", ".join(f"{name} {rates[name] / 1e9:.0f}" for name in DTYPES)
    lines = [
        "ms: one update, median; ±: half the distance of the quartiles; then its phases: views of "
        "the batch made ready,",
        "  losses, gradients, Adam and moving average; on a GPU ours are events within the graph, "
        "and the rest is what",
        "  lies between two graphs. x usual: the usual way's ms over this side's.",
        "limit: the larger of two floors: convolutions and products at the best GEMM's rate "
        f"({gemms} GFLOP/s), and one",
        "  pass over memory for each layer and the optimiser at the rate of a copy "
        f"({rates['copy'] / 1e9:.0f} GB/s read and written).",
    ]
    lines += [
        f"  batch {r.batch}, {r.side}: products {r.products * 1e3:.3g} ms, passes "
        f"{r.passes * 1e3:.3g} ms; measured {r.seconds / r.limit:.1f} x the larger."
        for r in results
    ]
    disturbed = [result.others or 0.0 for result in results if result.disturbed]
    return lines + no_claim(disturbed, "rows")


def _say(lines: list[str]) -> None:
    print(*lines, sep="\n", flush=True)
