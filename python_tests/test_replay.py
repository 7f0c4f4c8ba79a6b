"""The replay buffer: what it draws, writes and refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_replay import SPEC, filled, frame, ids, write_episode

from crpt import replay
from crpt.ops import reference
from crpt.replay import DomainSpec, ReplayBuffer


@pytest.fixture(params=["memory", "files"])
def place(request, tmp_path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "data"


# Sampling


def test_stacks_repeat_the_first_frame_and_never_cross_episodes(place):
    buffer = filled(place, episodes=2, length=3)
    obs = ids(buffer.observations("toy", np.concatenate(buffer.episodes("toy"))))
    assert obs == [
        (0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3),
        (10, 10, 10), (10, 10, 11), (10, 11, 12), (11, 12, 13),
    ]  # fmt: skip


def test_a_batch_has_the_fields_of_its_transitions(place):
    batch = filled(place).sample("toy", 500, pad=0)
    newest = torch.tensor([ids_[-1] for ids_ in ids(batch.next_obs)])
    previous = torch.tensor([ids_[-1] for ids_ in ids(batch.obs)])
    assert torch.equal(previous + 1, newest)
    assert torch.equal(batch.reward, newest.float())
    assert torch.equal(batch.action, torch.stack([newest, -newest], 1).float())
    terminated = (newest % 10 == 6) & (newest // 10 % 2 == 1)
    assert torch.equal(batch.discount, (~terminated).float())
    assert terminated.any()
    assert not terminated.all()


def test_sampling_is_uniform_over_the_transitions():
    buffer = filled(None, episodes=5, length=4)
    generator = torch.Generator().manual_seed(0)
    batch = buffer.sample("toy", 20_000, pad=0, generator=generator)
    counts = torch.bincount(batch.reward.long())
    counts = counts[counts > 0].double()
    assert len(counts) == 20
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom, 0.1%


def test_obs_and_next_obs_are_shifted_apart_from_each_other():
    spec = {"frame_shape": (3, 12, 12), "state_shape": (0,), "action_shape": (1,)}
    buffer = ReplayBuffer.create(None, {"toy": DomainSpec(capacity=20, **spec)})
    noise = np.random.default_rng(0).integers(0, 256, (11, 3, 12, 12), np.uint8)
    with buffer.writer("toy") as writer:
        writer.begin(noise[0])
        for n in range(1, 11):
            writer.append(noise[n], np.zeros(1), n, 1.0, last=n == 10)
    batch = buffer.sample("toy", 300, pad=2, generator=torch.Generator().manual_seed(1))
    slots = batch.reward.long().numpy()
    offsets = []
    for shifted, base in ((batch.obs, slots - 1), (batch.next_obs, slots)):
        plain = buffer.observations("toy", base)
        found = torch.full((300, 2), 99)
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                by = torch.tensor([[dy, dx]]).expand(300, 2)
                same = (reference.random_shift(plain, 2, by) == shifted).flatten(1).all(1)
                found[same] = torch.tensor([dy, dx])
        assert (found != 99).all(), "a view is no shift of its stack"
        assert len(torch.unique(found, dim=0)) == 25
        offsets.append(found)
    assert 0 < (offsets[0] == offsets[1]).all(1).sum() < 60  # 1 in 25, were they independent


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_floating_views_are_scaled_to_one(dtype):
    batch = filled(None).sample("toy", 64, pad=1, dtype=dtype)
    assert batch.obs.dtype == batch.next_obs.dtype == dtype
    scale = 1 if dtype == torch.uint8 else 255
    expected = batch.reward / scale
    torch.testing.assert_close(batch.next_obs[:, -1, 1, 1].float(), expected, rtol=1e-2, atol=1e-3)


def test_the_generator_decides_the_batch(place):
    buffer = filled(place)
    one, two, other = (
        buffer.sample("toy", 32, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    for name in ("obs", "action", "reward", "discount", "next_obs"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.reward, other.reward)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_stacks_of_other_depths(place, depth):
    buffer = filled(place, capacity=11)  # 28 steps were written: the floor is 17
    batch = buffer.sample("toy", 200, frame_stack=depth, pad=0)
    # Step 17 is frame 23; of its episode only 23 to 26 are left, too few for a stack of 5.
    assert min(min(stack) for stack in ids(batch.obs)) == {1: 23, 2: 23, 5: 30}[depth]
    for before, after in zip(ids(batch.obs), ids(batch.next_obs), strict=True):
        start = after[-1] // 10 * 10
        assert after == tuple(max(start, after[-1] - k) for k in range(depth - 1, -1, -1))
        assert before == tuple(max(start, after[-1] - 1 - k) for k in range(depth - 1, -1, -1))


def test_sampling_says_what_is_wrong():
    buffer = filled(None)
    for arguments, message in [
        (("toy", 0), "batch_size should be at least 1, got 0"),
        (("toi", 4), r"domain should be one of \['toy'\], got 'toi'"),
    ]:
        with pytest.raises(ValueError, match=message):
            buffer.sample(*arguments)
    with pytest.raises(ValueError, match="pad should be at least 0, got -1"):
        buffer.sample("toy", 4, pad=-1)
    with pytest.raises(ValueError, match="frame_stack should be at least 1, got 0"):
        buffer.sample("toy", 4, frame_stack=0)
    with pytest.raises(ValueError, match=r"slots should be in \[0, 28\), got 3 to 28"):
        buffer.gather("toy", np.array([3, 28]))
    with pytest.raises(TypeError, match="slots should be a vector of ints, got float64"):
        buffer.observations("toy", np.array([3.0]))
    with pytest.raises(ValueError, match="toy has no transitions"):
        ReplayBuffer.create(None, {"toy": SPEC}).sample("toy", 1)


def test_reading_a_dataset_on_disk_warns_of_nothing_and_writes_nothing(tmp_path):
    filled(tmp_path / "data")
    buffer = ReplayBuffer.open(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.sample("toy", 8)
    with pytest.raises(ValueError, match="read-only"):
        buffer.arrays("toy")["rewards"][0] = 1


# Writing


def test_the_writer_says_what_is_wrong(place):
    buffer = ReplayBuffer.create(place, {"toy": SPEC})
    writer = buffer.writer("toy")
    ok = {"frame": frame(1), "action": np.zeros(2), "reward": 0.0, "discount": 1.0}
    ok["state"] = np.zeros(1)
    with pytest.raises(RuntimeError, match="begin"):
        writer.append(**ok)
    writer.begin(frame(0))
    with pytest.raises(RuntimeError, match="not ended"):
        writer.begin(frame(0))
    for change, error, message in [
        ({"frame": np.zeros((1, 4, 5), np.uint8)}, ValueError, r"\[1, 4, 4\], got \[1, 4, 5\]"),
        ({"frame": np.zeros((1, 4, 4))}, TypeError, "frame should be a uint8 array, got float64"),
        ({"action": np.zeros(3)}, ValueError, r"action should be \[2\], got \[3\]"),
        ({"action": [0, np.nan]}, ValueError, "action should be finite in float32, got nan"),
        ({"state": np.zeros(2)}, ValueError, r"state should be \[1\], got \[2\]"),
        ({"reward": float("nan")}, ValueError, "reward should be finite in float32, got nan"),
        ({"discount": 1.5}, ValueError, r"discount should be in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(error, match=message):
            writer.append(**{**ok, **change})
    assert buffer.cursor("toy") == 1
    writer.append(**ok, last=True)
    with pytest.raises(RuntimeError, match="begin"):
        writer.append(**ok)
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.begin(frame(0))


def test_one_writer_at_a_time(place):
    buffer = ReplayBuffer.create(place, {"toy": SPEC, "other": SPEC})
    with buffer.writer("toy"):
        with pytest.raises(replay.DatasetLockedError, match="writ"):
            buffer.writer("toy")
        buffer.writer("other").close()
    buffer.writer("toy").close()


def test_a_growing_domain_keeps_everything(place):
    buffer = ReplayBuffer.create(place, {"toy": SPEC})
    reader = ReplayBuffer.open(place) if place else buffer
    with buffer.writer("toy", when_full="grow") as writer:
        for e in range(10):
            write_episode(writer, 20 * e, 12)
        assert buffer.num_transitions("toy") == 120
        assert reader.num_transitions("toy") == 120
        assert reader.sample("toy", 50).obs.shape == (50, 3, 4, 4)
        writer.fit(0)
    assert buffer.capacity("toy") == reader.capacity("toy") == 130
    assert len(reader.arrays("toy")["rewards"]) == 130
    if place:
        on_disk = np.load(place / "toy" / "frames.npy", mmap_mode="r")
        assert on_disk.shape == (130, 1, 4, 4)
        assert (place / "toy" / "frames.npy").stat().st_size == 128 + 130 * 16


def test_a_ring_that_has_overwritten_steps_cannot_grow(place):
    buffer = filled(place, capacity=9)
    with pytest.raises(ValueError, match="when_full should be overwrite"):
        buffer.writer("toy", when_full="grow")
    buffer.writer("toy").close()


def test_a_dataset_is_plain_numpy_files(tmp_path):
    buffer = filled(tmp_path / "data", episodes=2, length=3)
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert content["format_version"] == 2
    assert content["domains"]["toy"]["capacity"] == 100
    for name, array in buffer.arrays("toy").items():
        on_disk = np.load(tmp_path / "data" / "toy" / f"{name}.npy", mmap_mode="r")
        assert on_disk.dtype == array.dtype
        np.testing.assert_array_equal(on_disk, array)
    first = [True, False, False, False] * 2
    last = [False, False, False, True] * 2
    np.testing.assert_array_equal(np.load(tmp_path / "data/toy/is_first.npy")[:8], first)
    np.testing.assert_array_equal(np.load(tmp_path / "data/toy/is_last.npy")[:8], last)
    assert np.load(tmp_path / "data/toy/rewards.npy")[:8].tolist() == [0, 1, 2, 3, 0, 11, 12, 13]


def test_metadata_and_geometry_come_back(tmp_path):
    metadata = {"render": "fast", "seed": 3, "versions": {"mujoco": "3.17.0"}}
    ReplayBuffer.create(tmp_path / "data", {"toy": SPEC}, metadata)
    buffer = ReplayBuffer.open(tmp_path / "data")
    assert buffer.metadata == metadata
    assert buffer.spec("toy") == SPEC
    buffer.add_domain("more", SPEC)
    assert buffer.domains == ("toy", "more")
    assert set(ReplayBuffer.open(tmp_path / "data").domains) == {"toy", "more"}
    with pytest.raises(ValueError, match="new one, got more"):
        buffer.add_domain("more", SPEC)


def test_create_replaces_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="already exists"):
        ReplayBuffer.create(tmp_path / "data", {"toy": SPEC})
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "thesis.tex"]


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "dataset.json"])
def test_a_domain_is_a_directory(tmp_path, name):
    with pytest.raises(ValueError, match="domain should be"):
        ReplayBuffer.create(tmp_path / "data", {name: SPEC})


def test_geometry_says_what_is_wrong():
    good = {"capacity": 5, "action_shape": (1,)}
    for change, error, message in [
        ({"capacity": 0}, ValueError, "capacity should be at least 1, got 0"),
        ({"capacity": 1.5}, TypeError, "capacity should be made of ints, got float"),
        (
            {"frame_shape": (84, 84)},
            ValueError,
            r"frame_shape should be \[C, H, W\], got \[84, 84\]",
        ),
        ({"frame_shape": (3, 0, 84)}, ValueError, "frame_shape should be at least 1, got 0"),
        ({"action_shape": (-1,)}, ValueError, "action_shape should be at least 0, got -1"),
    ]:
        with pytest.raises(error, match=message):
            DomainSpec(**{**good, **change})
