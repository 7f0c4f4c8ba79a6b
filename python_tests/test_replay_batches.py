"""Mixtures, n steps, preallocated batches, batches drawn ahead, and copies on a device."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from toy_replay import SPEC, filled, frame, ids, write_episode

from crpt import replay
from crpt.replay import Batch, DomainSpec, ReplayBuffer, memory, resident
from crpt.replay.batch import exact_device


def same(one: Batch, two: Batch) -> bool:
    return all(
        name == other and torch.equal(a.cpu(), b.cpu())
        for (name, a), (other, b) in zip(one.tensors(), two.tensors(), strict=True)
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(**change) -> ReplayBuffer:
    """Domains `a`, whose frames count from 0, and `b`, from 100, with longer actions."""
    specs = {
        "a": DomainSpec(capacity=50, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4)),
        "b": DomainSpec(
            **{"capacity": 50, "action_shape": (3,), "frame_shape": (1, 4, 4), **change}
        ),
    }
    buffer = ReplayBuffer.create(None, specs)
    with buffer.writer("a") as writer:
        write_episode(writer, 0, 9)
    with buffer.writer("b") as writer:
        shape = specs["b"].frame_shape
        writer.begin(np.full(shape, 100, np.uint8))
        for n in range(101, 120):
            writer.append(np.full(shape, n, np.uint8), np.full(specs["b"].action_shape, n), n, 1.0)
    return buffer


# n steps


def test_n_steps_add_up_discounted_rewards():
    buffer = filled(None, episodes=2, length=4)  # the second one terminates
    batch = buffer.gather("toy", np.array([3, 9]), n_step=3, gamma=0.5, pad=0)
    assert ids(batch.obs) == [(0, 0, 0), (10, 10, 11)]
    assert ids(batch.next_obs) == [(1, 2, 3), (12, 13, 14)]
    assert batch.action.tolist() == [[1, -1], [12, -12]]
    assert batch.reward.tolist() == [1 + 2 / 2 + 3 / 4, 12 + 13 / 2 + 14 / 4]
    assert batch.discount.tolist() == [1 / 8, 0]
    assert buffer.indices("toy", n_step=3).tolist() == [3, 4, 8, 9]
    drawn = buffer.sample("toy", 100, n_step=3, gamma=0.5, pad=0)
    assert {row[-1] for row in ids(drawn.next_obs)} == {3, 4, 13, 14}


def test_n_steps_ask_for_a_discount():
    buffer = filled(None)
    with pytest.raises(ValueError, match="gamma should be given for n_step 2"):
        buffer.sample("toy", 4, n_step=2)
    with pytest.raises(ValueError, match=r"gamma should be in \[0, 1\], got 1.5"):
        buffer.sample("toy", 4, gamma=1.5)
    with pytest.raises(ValueError, match="n_step should be at least 1, got 0"):
        buffer.sample("toy", 4, n_step=0)
    with pytest.raises(TypeError, match="n_step should be an int, got float"):
        buffer.sample("toy", 4, n_step=2.0, gamma=0.9)
    with pytest.raises(ValueError, match=r"no transitions to sample from, of 3 .* and 7 steps"):
        buffer.sample("toy", 4, n_step=7, gamma=0.9)
    with pytest.raises(ValueError, match=r"slots should hold whole ones of toy .* got 7 at \[1\]"):
        buffer.gather("toy", np.array([8, 7]))  # a first step


# Mixtures


def test_a_mixture_has_each_domain_s_share_of_the_rows():
    buffer = mixed()
    batch = buffer.sample({"a": 1, "b": 3}, 40, pad=0)
    assert batch.domains == ("a", "b")
    assert batch.widths == (2, 3)
    assert torch.bincount(batch.domain).tolist() == [10, 30]
    assert (batch.domain.diff() >= 0).all()
    newest = batch.next_obs[:, -1, 0, 0].long()
    assert torch.equal(newest >= 100, batch.domain == 1)
    assert torch.equal(batch.reward, newest.float())
    of_a = batch.domain == 0
    assert torch.equal(batch.action[of_a, 1], -newest[of_a].float())
    assert not batch.action[of_a, 2].any()
    assert (batch.action[~of_a] == newest[~of_a, None]).all()


def test_shares_are_right_on_average_and_never_off_by_more_than_a_row():
    buffer = mixed()
    source = generator()
    weights = {"a": 0.03, "b": 0.97}
    counts = [
        int((buffer.sample(weights, 10, generator=source).domain == 0).sum()) for _ in range(400)
    ]
    assert set(counts) == {0, 1}
    assert 0.2 < np.mean(counts) < 0.4  # 0.3


def test_domains_of_a_mixture_are_drawn_apart():
    spec = DomainSpec(capacity=200, action_shape=(1,), frame_shape=(1, 2, 2))
    buffer = ReplayBuffer.create(None, {"a": spec, "b": spec})
    for name in buffer.domains:
        with buffer.writer(name) as writer:
            writer.begin(np.zeros((1, 2, 2), np.uint8))
            for n in range(1, 200):
                writer.append(np.zeros((1, 2, 2), np.uint8), [0], n, 1.0)
    reward = buffer.sample({"a": 1, "b": 1}, 64).reward
    assert (reward[:32] == reward[32:]).sum() < 8


def test_a_mixture_says_what_is_wrong():
    buffer = mixed()
    for weights, error, message in [
        ({}, ValueError, "at least one domain"),
        ({"a": 0.0}, ValueError, "weight of a should be positive, got 0.0"),
        ({"a": 1.0, "c": 1.0}, ValueError, r"domain should be one of \['a', 'b'\], got 'c'"),
        (["a"], TypeError, "domain should be a name or weights by name, got list"),
    ]:
        with pytest.raises(error, match=message):
            buffer.sample(weights, 4)
    with pytest.raises(ValueError, match="frames of all domains of a mixture should be of one sh"):
        mixed(frame_shape=(1, 5, 5)).sample({"a": 1, "b": 1}, 4)
    with pytest.raises(ValueError, match="actions of a mixture should be vectors"):
        mixed(action_shape=(2, 2)).sample({"a": 1, "b": 1}, 4)


# Batches of the caller's own


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_out_is_written_and_returned(dtype):
    buffer = filled(None)
    expected = buffer.sample("toy", 9, dtype=dtype, generator=generator())
    out = buffer.empty("toy", 9, dtype=dtype)
    assert buffer.sample("toy", 9, dtype=dtype, generator=generator(), out=out) is out
    assert same(out, expected)


def test_out_says_what_is_wrong():
    buffer = filled(None)
    for arguments, error, message in [
        ({"batch_size": 8}, ValueError, r"out.obs should be \[9, 3, 4, 4\], got \[8, 3, 4, 4\]"),
        ({"dtype": torch.float32}, TypeError, "out.obs should be torch.uint8, got torch.float32"),
        ({"frame_stack": 2}, ValueError, r"got \[9, 2, 4, 4\]"),
    ]:
        out = buffer.empty("toy", **{"batch_size": 9, **arguments})
        with pytest.raises(error, match=message):
            buffer.sample("toy", 9, out=out)
    with pytest.raises(TypeError, match="out should be a Batch, got dict"):
        buffer.sample("toy", 9, out={})


def test_a_batch_is_the_same_whatever_the_number_of_threads():
    buffer = filled(None)
    torch.set_num_threads(1)
    expected = buffer.sample("toy", 100, generator=generator())
    torch.set_num_threads(4)
    assert same(buffer.sample("toy", 100, generator=generator()), expected)


# Drawn ahead


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "crpt-batches"]


def gone() -> bool:
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_batches_are_a_function_of_seed_and_step():
    buffer = mixed()
    kinds = {"domain": {"a": 1, "b": 1}, "batch_size": 6, "pad": 1}
    first = list(buffer.batches(**kinds, seed=3, stop=5))
    assert len(first) == 5
    again = list(buffer.batches(**kinds, seed=3, start=2, stop=5, prefetch=1))
    assert all(same(a, b) for a, b in zip(first[2:], again, strict=True))
    assert not same(first[0], first[1])
    other = next(buffer.batches(**kinds, seed=4, stop=1))
    assert not same(first[0], other)
    assert gone()


def test_the_thread_ends_with_its_iterator():
    buffer = mixed()
    with buffer.batches("a", 4, seed=0) as batches:
        assert len(next(batches).reward) == 4
        assert len(threads()) == 1
    assert not threads()
    assert list(batches) == []
    dropped = buffer.batches("a", 4, seed=0)
    next(dropped)
    del dropped
    gc.collect()
    assert gone()


_LEFT_OPEN = """
import numpy as np
from crpt.replay import DomainSpec, ReplayBuffer
spec = DomainSpec(capacity=300, action_shape=(1,))
buffer = ReplayBuffer.create(None, {"toy": spec})
with buffer.writer("toy") as writer:
    frames = np.zeros((200, *spec.frame_shape), np.uint8)
    writer.begin(frames[0])
    writer.extend(frames, np.zeros((200, 1)), np.zeros(200), np.ones(200), last=True)
batches = buffer.batches("toy", 2048, seed=0)  # long in the kernel, and the program ends meanwhile
next(batches)
"""


def test_a_program_may_end_while_batches_are_drawn():
    command = [sys.executable, "-c", _LEFT_OPEN]
    programs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for program in programs:
        _, errors = program.communicate(timeout=60)
        assert (program.returncode, errors) == (0, "")


def test_an_error_reaches_the_loop_and_ends_the_thread():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    batches = buffer.batches("toy", 4, seed=0)
    with pytest.raises(ValueError, match="toy has no transitions"):
        next(batches)
    assert gone()
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(ValueError, match="prefetch should be at least 1, got 0"):
        buffer.batches("toy", 4, seed=0, prefetch=0)
    with pytest.raises(ValueError, match="domain should be one of"):
        buffer.batches("tiy", 4, seed=0)


# On a device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


def test_a_resident_copy_draws_the_same_batches(device):
    buffer = mixed()
    copy = buffer.resident(device)
    assert copy.domains == ("a", "b")
    for kinds in [
        {"domain": "a", "pad": 2},
        {"domain": {"a": 1, "b": 2}, "dtype": torch.float32},
        {"domain": "b", "n_step": 3, "gamma": 0.9, "pad": 0, "frame_stack": 2},
    ]:
        ours = copy.sample(batch_size=50, generator=generator(), **kinds)
        assert ours.obs.device.type == device
        assert same(ours, buffer.sample(batch_size=50, generator=generator(), **kinds))
    for ours, theirs in zip(
        copy.batches("a", 5, seed=1, stop=3), buffer.batches("a", 5, seed=1, stop=3), strict=True
    ):
        assert same(ours, theirs)


def test_a_resident_copy_stays_as_it_was(device):
    buffer = filled(None, capacity=40)
    copy = buffer.resident(device, ["toy"])
    before = copy.sample("toy", 50, generator=generator())
    assert copy.num_transitions("toy") == 24
    with buffer.writer("toy") as writer:
        for e in range(10):
            write_episode(writer, 100 + 10 * e, 6)
    assert same(copy.sample("toy", 50, generator=generator()), before)
    assert (buffer.sample("toy", 50).reward >= 100).all()
    with pytest.raises(ValueError, match="domain should be one of"):
        copy.sample("other", 4)


def test_batches_are_sent_to_a_device(device):
    buffer = filled(None)
    expected = buffer.sample("toy", 9, generator=generator())
    sent = buffer.sample("toy", 9, device=device, generator=generator())
    assert sent.obs.device.type == device
    assert same(sent, expected)
    with buffer.batches("toy", 9, seed=5, device=device) as batches:
        ahead = next(batches)
    assert ahead.obs.device.type == device
    assert same(ahead, next(buffer.batches("toy", 9, seed=5, stop=1)))


def test_a_device_is_that_of_out_whatever_it_is_called():
    assert exact_device("cpu:0") == exact_device("cpu") == torch.device("cpu")
    assert exact_device("cuda").index is not None
    assert exact_device("cuda:3") == torch.device("cuda:3")
    buffer = filled(None)
    out = buffer.empty("toy", 5)
    assert buffer.sample("toy", 5, device="cpu:0", out=out) is out
    with pytest.raises(ValueError, match="device should be that of out, cpu, got cuda"):
        buffer.sample("toy", 5, device="cuda", out=out)


def test_torch_s_default_device_is_not_ours():
    buffer = filled(None)
    with torch.device("meta"):
        drawn = [source.sample("toy", 5) for source in (buffer, buffer.resident("cpu"))]
    assert all(tensor.device.type == "cpu" for batch in drawn for _, tensor in batch.tensors())


def test_a_resident_copy_counts_the_transitions_of_n_steps():
    buffer = filled(None)
    copy = buffer.resident("cpu")
    for n in (1, 3, 6):
        assert copy.num_transitions("toy", n_step=n) == buffer.num_transitions("toy", n_step=n) > 0
    with pytest.raises(ValueError, match="n_step should be at least 1, got 0"):
        copy.num_transitions("toy", n_step=0)


def test_a_resident_copy_leaves_out_what_is_overwritten_meanwhile(monkeypatch):
    buffer = filled(None)
    copy_frames = resident._copy_frames

    def while_others_write(*arguments):
        frames = copy_frames(*arguments)
        with buffer.writer("toy") as writer:
            for e in range(100, 113):  # round the ring, and into the third
                write_episode(writer, e, 6)
        return frames

    assert buffer.num_transitions("toy") == 24
    monkeypatch.setattr(resident, "_copy_frames", while_others_write)
    assert buffer.resident("cpu").num_transitions("toy") == 6  # the newest of four episodes


def test_a_copy_that_does_not_fit(monkeypatch):
    buffer = filled(None)
    monkeypatch.setattr(memory, "available_memory", lambda: 100)
    with pytest.raises(replay.NotEnoughMemoryError, match=r"the copy needs .* of memory"):
        buffer.resident("cpu")


# Many steps at once


def test_a_writer_of_many_steps_says_what_is_wrong():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    with buffer.writer("toy") as writer:
        steps = {
            "frames": np.stack([frame(1), frame(2)]),
            "actions": np.zeros((2, 2)),
            "rewards": np.zeros(2),
            "discounts": np.ones(2),
        }
        with pytest.raises(RuntimeError, match=r"call begin\(\) before extend\(\)"):
            writer.extend(**steps)
        writer.begin(frame(0))
        for change, error, message in [
            ({"frames": np.zeros((2, 1, 4, 4))}, TypeError, "frames should be a uint8 array"),
            ({"actions": np.zeros((3, 2))}, ValueError, r"actions should be \[2, 2\], got \[3, 2"),
            ({"actions": [[0, 0], [0, np.inf]]}, ValueError, r"actions should be .*, got inf"),
            ({"rewards": [0, 1e39]}, ValueError, r"reward should be finite in float32, got 1e\+39"),
            ({"discounts": [0, 2]}, ValueError, r"discount should be in \[0, 1\], got 2.0"),
            ({"states": [0.0]}, ValueError, r"states should be \[2, 1\], got \[1\]"),
        ]:
            with pytest.raises(error, match=message):
                writer.extend(**{**steps, **change})
        assert buffer.cursor("toy") == 1
        writer.extend(**steps, last=True)
    assert buffer.num_transitions("toy") == 2
