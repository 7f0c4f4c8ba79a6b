"""What tells a dataset from another of the same names and sizes, which has no metadata either."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from toy_replay import filled, write_episode

from crpt.ablate.studies import Variant
from crpt.ablate.task import Task, check_config
from crpt.dataset import export_episodes, import_episodes
from crpt.pretrain import pretrain
from crpt.pretrain.inputs import dataset_identity
from crpt.replay import DomainSpec, ReplayBuffer, open_together
from crpt.run_directory import ConfigMismatchError, RunDirectory
from crpt.stages import Context, pretrain_stage

CONFIG = replace(small.PRETRAIN, rounds=1)


def noise(place, seed=0, *domains, transitions=30, capacity=64):
    """A dataset of one's own: an episode of noise in each domain."""
    spec = DomainSpec(capacity=capacity, action_shape=(1,), frame_shape=(3, 20, 20))
    buffer = ReplayBuffer.create(place, dict.fromkeys(domains or ("mine",), spec))
    rng = np.random.default_rng(seed)
    for name in buffer.domains:
        with buffer.writer(name) as writer:
            frames = rng.integers(0, 256, (transitions + 1, 3, 20, 20), np.uint8)
            writer.begin(frames[0])
            actions = rng.uniform(-1, 1, (transitions, 1))
            writer.extend(
                frames[1:], actions, np.zeros(transitions), np.ones(transitions), last=True
            )
    return buffer


def content(buffer):
    return dataset_identity(buffer)["dataset_content"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run on `a`, and `b`, of other noise."""
    path = tmp_path_factory.mktemp("begun")
    noise(path / "a")
    noise(path / "b", 1)
    stage(path / "run", path / "a")
    return path


def stage(run, *datasets):
    context = Context(RunDirectory(run), 0, progress=False, dataset=datasets[0])
    return pretrain_stage(replace(context, more_datasets=datasets[1:]), CONFIG)


def test_a_run_goes_on_with_the_dataset_that_it_was_begun_with_alone(begun, tmp_path):
    with pytest.raises(ConfigMismatchError) as refused:
        stage(begun / "run", begun / "b")
    first, field, last = str(refused.value).splitlines()
    assert "was begun with another dataset; these fields differ" in first
    was, now = (content(ReplayBuffer.open(begun / name))["mine"] for name in "ab")
    assert field == f"  pretrain_input.dataset_content.mine: {was!r} -> {now!r}"
    assert last.startswith("Ask for the same dataset to go on, choose another --run-dir")
    shutil.copytree(begun / "a", tmp_path / "copy")
    stage(begun / "run", tmp_path / "copy")


def test_a_checkpoint_knows_the_dataset_that_it_was_begun_with(begun, tmp_path):
    """Also that of who calls pretrain, without a config.json."""
    shutil.copytree(begun / "run" / "checkpoints", tmp_path / "checkpoints")
    b = ReplayBuffer.open(begun / "b")
    with pytest.raises(ConfigMismatchError, match=r"another dataset; .*\n.*dataset_content\.mine"):
        pretrain(CONFIG, b, RunDirectory(tmp_path), seed=0, progress=False)
    # Nor does the command that is refused bind the run to what was asked for.
    with pytest.raises(ConfigMismatchError, match=r"another dataset; .*\n.*dataset_content\.mine"):
        stage(tmp_path, begun / "b")
    stage(tmp_path, begun / "a")


@pytest.mark.parametrize("noted", ["nothing", "sizes"])
def test_a_run_that_was_begun_before_there_were_digests_goes_on(begun, tmp_path, noted):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(begun / "run", run.path)
    config, saved = run.read_config(), run.load_checkpoint("pretrain")
    for inputs in (config, saved["begun_with"]):
        del inputs["pretrain_input"]["dataset_content"]
        if noted == "nothing":
            del inputs["pretrain_input"]
    run.write_json("config.json", config)
    run.save_checkpoint("pretrain", saved)
    shutil.rmtree(run.encoder_dir)
    stage(run.path, begun / "a")
    assert run.encoder_dir.exists()
    with pytest.raises(ConfigMismatchError, match=r"dataset_content\.mine"):
        stage(run.path, begun / "b")  # it is known now


def test_a_study_keeps_to_its_dataset(begun):
    variant = Variant("as_it_is", CONFIG, transitions=30)
    task = Task(
        variant, 0, begun / "run", begun / "a", begun, small.PROBE, ("mine",), "cpu", threads=1
    )
    check_config(task)
    with pytest.raises(ConfigMismatchError, match=r"another dataset; .*\n.*dataset_content\.mine"):
        check_config(replace(task, dataset=begun / "b"))


def test_a_dataset_is_the_same_however_it_is_opened(tmp_path):
    a, b = noise(tmp_path / "a", 0, "x", "y"), noise(tmp_path / "b", 1, "z")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    both = content(a) | content(b)
    assert len(set(both.values())) == 3
    assert content(ReplayBuffer.open(tmp_path / "copy")) == content(a)
    assert content(noise(None, 0, "x", "y", capacity=31)) == content(a)
    for names in ("a", "b"), ("b", "copy"):
        together = open_together([tmp_path / name for name in names])
        assert content(together) == content(pickle.loads(pickle.dumps(together))) == both
    # Of one name, each is a domain of its own.
    assert content(open_together([tmp_path / "a", tmp_path / "copy"]))["x#2"] == both["x"]


def test_of_episodes_that_went_out_and_in_again_nothing_differs(tmp_path):
    a = noise(tmp_path / "a")
    export_episodes(tmp_path / "a", tmp_path / "out", domain="mine", progress=False)
    import_episodes(tmp_path / "b", [tmp_path / "out"], domain="mine", progress=False)
    assert dataset_identity(ReplayBuffer.open(tmp_path / "b")) == dataset_identity(a)


def test_where_in_a_ring_the_steps_lie_is_no_matter_but_which_they_are(tmp_path):
    """Three episodes of seven steps, in a ring of two."""
    ring, whole = (filled(tmp_path / name, episodes=0, capacity=14) for name in ("ring", "whole"))
    seen = []
    with ring.writer("toy") as writer:
        for e in range(4):
            write_episode(writer, 10 * e, 6)
            seen.append(dataset_identity(ring))
    assert seen[1]["dataset"] == seen[2]["dataset"] == seen[3]["dataset"]
    assert len({told["dataset_content"]["toy"] for told in seen}) == 4
    with whole.writer("toy") as writer:
        write_episode(writer, 10, 6)
        write_episode(writer, 20, 6)
    assert dataset_identity(whole) == seen[2]


@pytest.mark.parametrize("transitions", [0, 1, 2, 3, 31, 33])
def test_any_number_of_transitions_has_a_digest(transitions):
    one, other = (content(noise(None, seed, transitions=transitions)) for seed in (0, 1))
    assert (one != other) == (transitions > 0)


def test_it_tells_frames_and_actions_and_leaves_no_trace(tmp_path):
    noise(tmp_path / "a")
    state = torch.get_rng_state()
    was = content(ReplayBuffer.open(tmp_path / "a"))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("actions", "frames"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        file = np.load(tmp_path / name / "mine" / f"{name}.npy", mmap_mode="r+")
        file[:] += file.dtype.type(1)
        file.flush()
        assert content(ReplayBuffer.open(tmp_path / name)) != was


def test_of_a_large_dataset_little_is_read(monkeypatch):
    buffer = noise(None, transitions=5000, capacity=6000)
    was, arrays, read = content(buffer), buffer.arrays("mine"), []

    class Watched:
        def __init__(self, name):
            self.array = arrays[name]

        def __getitem__(self, slots):
            read.append(slots)
            return self.array[slots]

    watched = {name: Watched(name) for name in arrays}
    monkeypatch.setattr(buffer, "arrays", lambda domain: watched)
    assert content(buffer) == was
    assert len(read) == 2  # frames and actions
    for slots in read:
        assert len(np.unique(slots)) == 32
        assert slots.min() < 5000 / 32
        assert slots.max() > 5000 - 5000 / 32
