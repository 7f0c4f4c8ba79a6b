"""Sampling, for `bench replay`: beside other buffers, the usual chain, and a copy of as many bytes.

What sampling cannot do without: every row's frames are read once, K + 1 for both of its stacks, and
both stacks are written once. A copy moves as many bytes in the time that is the limit.

Others allocate their results by malloc, and how it is disposed decides on a half of their time:
glibc takes blocks of this size from the system afresh, page by page, unless it was told to keep
what is freed. So they are timed both ways.
"""

from __future__ import annotations

import dataclasses
from math import prod

import numpy as np
import torch

from crpt.bench.pretrain import usual_replay as usual_chain
from crpt.bench.replay_measure import Measure, Target, timed
from crpt.bench.timing import Side
from crpt.bench.usual_replay import Usual
from crpt.replay import ReplayBuffer

BATCH = 512
FRAME_STACK, PAD = 3, 4
RIVALS = ("cpprb", "Stable-Baselines3")
COPY = "a copy, as many B"


def sampling(
    buffer: ReplayBuffer, theirs: dict[str, Usual], domain: str, seconds: float, memory: str = ""
) -> Measure:
    """obs and next_obs as uint8. memory: how malloc is disposed, in words."""
    _check(buffer, domain)
    moved = bytes_moved(buffer, domain)
    source = torch.ones(moved // 2, dtype=torch.uint8)
    copy = torch.empty_like(source).copy_
    sides = [
        Side("ours", lambda: buffer.sample(domain, BATCH, pad=0), [()]),
        Side("ours, shifted", lambda: buffer.sample(domain, BATCH, pad=PAD), [()]),
        Side(COPY, copy, [(source,)]),
        *(Side(name, usual.sample, [(BATCH,)]) for name, usual in theirs.items()),
    ]
    what = f"sampling {BATCH}, uint8" + (f", {memory}" if memory else "")
    result = timed(what, "ms", sides, seconds)
    share = result.ratio(COPY)
    remark = f"{what}: {moved / 1e6:.0f} MB read and written at {share:.2f} x a copy's rate"
    rivals = [name for name in RIVALS if name in theirs]
    if not rivals:
        return dataclasses.replace(result, remarks=(remark,))
    faster = min(rivals, key=result.ratio)
    times = result.ratio(faster)
    remark += f"; at that rate it would be {times / share:.2f} x {faster}"
    target = Target(f"{what}, x the faster of {' and '.join(rivals)}", times, 3)
    return dataclasses.replace(result, targets=(target,), remarks=(remark,))


def bytes_moved(buffer: ReplayBuffer, domain: str) -> int:
    """By a batch at least: K + 1 frames of a row read, 2 K written."""
    frame = prod(buffer.spec(domain).frame_shape)
    return BATCH * frame * (FRAME_STACK + 1 + 2 * FRAME_STACK)


def sampling_views(buffer: ReplayBuffer, domain: str, seconds: float) -> Measure:
    """Shifted, as float32."""
    chain, rng = usual_chain(buffer, FRAME_STACK), np.random.default_rng(0)
    sides = [
        Side("ours", lambda: buffer.sample(domain, BATCH, pad=PAD, dtype=torch.float32), [()]),
        Side("the usual chain", lambda: chain.sample(BATCH, PAD, rng), [()]),
    ]
    result = timed(f"sampling {BATCH}, shifted, float32", "ms", sides, seconds)
    target = Target(f"{result.what}, x the usual chain", result.ratio("the usual chain"), 20)
    return dataclasses.replace(result, targets=(target,))


def _check(buffer: ReplayBuffer, domain: str) -> None:
    """Raises RuntimeError unless what is gathered are the frames that numpy finds."""
    slots = buffer.indices(domain)[:BATCH]
    batch = buffer.gather(domain, slots, pad=0)
    # Both in the order of the episodes.
    rows, zeros = np.arange(len(slots)), np.zeros((2, len(slots), 2), np.int64)
    obs, next_obs = usual_chain(buffer, FRAME_STACK, len(slots)).views(rows, zeros, 0)
    for name, mine, wanted in (("obs", batch.obs, obs), ("next_obs", batch.next_obs, next_obs)):
        if not torch.equal(mine, (wanted * 255).round().to(torch.uint8)):
            raise RuntimeError(f"{name} should be the stacked frames, got others: not timed")
