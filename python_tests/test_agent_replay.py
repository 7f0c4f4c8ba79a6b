from dataclasses import replace

import numpy as np
import pytest
import torch

import crpt.agents.replay
from crpt.agents.replay import AgentReplay, ring_capacity
from crpt.config import FinetuneConfig
from crpt.replay import DomainSpec
from crpt.run_directory import CheckpointError

SIZE, STACK = 8, 3
CONFIG = FinetuneConfig(
    task="toy",
    agent_steps=200,
    random_steps=10,
    replay_capacity=20,
    batch_size=64,
    shift_pad=1,
    encode="stored",
)


class Pixels:
    """Features that say which frames they are of, and how these were shifted."""

    frame_stack, dim = STACK, STACK + 2

    def __call__(self, obs):  # [B, 9, H, W]
        number = obs[:, ::3, 4, 4]
        where = obs[:, 1:3, 4, 4]
        return torch.cat([number, where], dim=1).float()


def frame(n: int) -> np.ndarray:
    """Its number, and each pixel's row and column."""
    rows, columns = np.indices((SIZE, SIZE))
    return np.stack([np.full((SIZE, SIZE), n), rows, columns]).astype(np.uint8)


def stack_of(numbers) -> torch.Tensor:
    obs = np.concatenate([frame(n) for n in numbers])
    return Pixels()(torch.from_numpy(obs)[None])[0]


def open_replay(path, config=CONFIG, **saved) -> AgentReplay:
    spec = DomainSpec(
        capacity=ring_capacity(config, STACK), action_shape=(1,), frame_shape=(3, SIZE, SIZE)
    )
    return AgentReplay(path, config, Pixels(), spec, device=torch.device("cpu"), seed=0, **saved)


def play(replay: AgentReplay, first: int, length: int, terminated: bool) -> None:
    """Step n of the replay shows frame n; action -n and reward n / 10 led to it."""
    nothing = np.zeros(0)
    replay.begin(frame(first), nothing, stack_of([first] * STACK))
    for n in range(first + 1, first + length + 1):
        last = n == first + length
        shown = [max(first, n - k) for k in (2, 1, 0)]
        discount = 0.0 if last and terminated else 1.0
        action = np.array([-n], np.float32)
        replay.append(frame(n), action, n / 10, discount, nothing, last, stack_of(shown))


@pytest.fixture
def short_episodes(monkeypatch):
    monkeypatch.setattr(crpt.agents.replay, "LONGEST_EPISODE", 5)


@pytest.mark.parametrize("encode", ["stored", "sampled"])
def test_a_sample_is_of_the_latest_transitions_as_they_happened(encode, tmp_path, short_episodes):
    replay = open_replay(tmp_path / "replay", replace(CONFIG, encode=encode))
    starts = list(range(0, 96, 6))  # episodes of 5 transitions, every other one terminates
    for i, start in enumerate(starts):
        play(replay, start, 5, terminated=i % 2 == 1)
        replay.keep()
    assert replay.steps == 96 > replay.buffer.capacity("toy")
    latest = [n for n in range(96) if n % 6][-20:]
    seen, moved = set(), set()
    for _ in range(5):
        batch = replay.sample()
        for i in range(len(batch.reward)):
            n = int(batch.next_features[i, STACK - 1])
            start = n - n % 6
            seen.add(n)
            before, after = ([max(start, m - k) for k in (2, 1, 0)] for m in (n - 1, n))
            assert batch.features[i, :STACK].tolist() == before
            assert batch.next_features[i, :STACK].tolist() == after
            assert batch.action[i].tolist() == [-n]
            assert batch.reward[i].item() == pytest.approx(n / 10)
            terminated = n % 6 == 5 and start // 6 % 2 == 1
            assert batch.discount[i].item() == (0.0 if terminated else 1.0)
            views = (batch.features[i, STACK:], batch.next_features[i, STACK:])
            moved.add(tuple(tuple(int(x) - 4 for x in view) for view in views))
    assert seen == set(latest)
    nine = {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    if encode == "stored":
        assert moved == {((0, 0), (0, 0))}
    else:  # each view under a shift of its own
        assert {before for before, _ in moved} == {after for _, after in moved} == nine
        assert len(moved) > 60  # of 81
    replay.close()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_checkpoint_s_transitions_outlive_what_comes_after(length, tmp_path, short_episodes):
    # A checkpoint only where there is no room for the longest episode: the ring's hardest case.
    config, path = CONFIG, tmp_path / "replay"
    replay = open_replay(path)
    saves = 0
    for _ in range(config.agent_steps // length):
        play(replay, replay.steps % 250, length, terminated=False)
        if replay.room <= 5:
            # It helps: there is room for more than one episode before the next one is due.
            replay.keep()
            assert replay.room > 5 + length + 1
            saves += 1
            steps, transitions = replay.steps, replay.steps * length // (length + 1)
            generator = replay.generator.get_state()
            expected = replay.sample()
    assert saves > 1
    while replay.room > 5:  # as far as a run may get before it is killed
        play(replay, replay.steps % 250, length, terminated=False)
    replay.close()

    resumed = open_replay(path, steps=steps, transitions=transitions)
    resumed.generator.set_state(generator)
    again = resumed.sample()
    assert torch.equal(again.features, expected.features)
    assert torch.equal(again.next_features, expected.next_features)
    assert torch.equal(again.action, expected.action)
    resumed.close()


def test_without_a_checkpoint_it_begins_anew_also_after_the_ring_went_round(
    tmp_path, short_episodes
):
    replay = open_replay(tmp_path / "replay")
    for start in range(0, 120, 6):
        play(replay, start, 5, terminated=False)
        replay.keep()
    replay.close()
    again = open_replay(tmp_path / "replay")
    assert again.steps == 0
    play(again, 7, 5, terminated=False)
    assert set(again.sample().action[:, 0].tolist()) <= {-8.0, -9.0, -10.0, -11.0, -12.0}
    again.close()


@pytest.mark.parametrize(
    ("steps", "transitions", "message"),
    [
        (6, 5, r"with step 6, got steps 71 to 126"),
        (132, 110, r"with step 132, got steps 71 to 126"),
        (124, 104, r"with an episode that ends before step 124, got none"),
        (78, 65, r"with 20 transitions, got \d+"),
    ],
)
def test_a_replay_that_is_not_the_checkpoint_s(
    steps, transitions, message, tmp_path, short_episodes
):
    replay = open_replay(tmp_path / "replay")
    assert replay.buffer.capacity("toy") == 55
    for start in range(0, 126, 6):
        play(replay, start, 5, terminated=False)
        replay.keep()
    replay.close()
    for _ in range(2):  # an error that leaves the replay open to the next attempt
        with pytest.raises(CheckpointError, match=message) as raised:
            open_replay(tmp_path / "replay", steps=steps, transitions=transitions)
        assert "delete the checkpoint to begin the stage again" in str(raised.value)


def test_a_replay_that_is_gone(tmp_path):
    with pytest.raises(CheckpointError, match="with 6 steps, got nothing; put it back, or delete"):
        open_replay(tmp_path / "replay", steps=6, transitions=5)
    assert not (tmp_path / "replay").exists()


def test_an_episode_without_end_does_not_overwrite_the_checkpoint_s(tmp_path, short_episodes):
    replay = open_replay(tmp_path / "replay")
    play(replay, 0, 5, terminated=False)
    replay.keep()
    with pytest.raises(RuntimeError, match="episode should be of at most 5 agent steps"):
        play(replay, 6, 100, terminated=False)
    replay.close()
    resumed = open_replay(tmp_path / "replay", steps=6, transitions=5)
    assert set(resumed.sample().action[:, 0].tolist()) == {-1.0, -2.0, -3.0, -4.0, -5.0}
    resumed.close()
