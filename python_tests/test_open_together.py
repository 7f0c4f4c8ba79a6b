import pickle
from dataclasses import replace

import numpy as np
import pytest
import small
import torch

from crpt.pretrain import Trainer, pretrain
from crpt.replay import ReplayBuffer, open_together
from crpt.run_directory import ConfigMismatchError, RunDirectory
from crpt.stages import Context, StageOrderError, pretrain_stage


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two directories; both have dot_red, of different seeds."""
    path = tmp_path_factory.mktemp("hosts")
    small.dataset(path / "a", seed=0)
    small.dataset(path / "b", replace(small.COLLECT, domains=("dot_green", "dot_red")), seed=1)
    return path / "a", path / "b"


def test_all_domains_are_there_and_same_names_are_kept_apart(hosts):
    both = open_together(hosts)
    assert sorted(both.domains) == ["dot_blue", "dot_green", "dot_red", "dot_red#2"]
    for name, path in (("dot_red", hosts[0]), ("dot_red#2", hosts[1])):
        own = ReplayBuffer.open(path).arrays("dot_red")["frames"]
        assert np.array_equal(both.arrays(name)["frames"], own)
    assert both.metadata["render"] == "exact"
    assert "seed" not in both.metadata  # they differ in it
    assert both.metadata["seeds"] == [0, 1]
    again = pickle.loads(pickle.dumps(both))
    assert again.domains == both.domains
    assert torch.equal(
        again.sample("dot_red#2", 4, generator=torch.Generator().manual_seed(0)).obs,
        both.sample("dot_red#2", 4, generator=torch.Generator().manual_seed(0)).obs,
    )


@pytest.mark.parametrize("silent_first", [True, False])
def test_what_one_of_them_does_not_tell_is_unknown_of_both(tmp_path, caplog, silent_first):
    small.dataset(tmp_path / "fast", replace(small.COLLECT, render="fast"))
    spec = ReplayBuffer.open(tmp_path / "fast").spec("dot_red")
    ReplayBuffer.create(tmp_path / "silent", {"dot_green": spec}, {"imported": True})
    ReplayBuffer.create(tmp_path / "as_silent", {"dot_green": spec}, {"imported": True})
    names = ("silent", "fast") if silent_first else ("fast", "silent")
    both = open_together([tmp_path / name for name in names])
    for key in ("render", "action_repeat"):
        assert both.metadata.get(key) is None
        assert f"{key} of the datasets together is unknown, for {tmp_path / 'silent'}" in (
            caplog.text
        )
    caplog.clear()
    open_together([tmp_path / "silent", tmp_path / "as_silent"])
    open_together([tmp_path / "fast"])
    assert not caplog.text


def test_an_encoder_of_both_names_each_domain_once(hosts, tmp_path):
    buffer = open_together(hosts)
    trainer = Trainer(small.PRETRAIN, buffer, seed=0, device=torch.device("cpu"))
    assert trainer.batches() == [("dot_blue",), ("dot_green",), ("dot_red",), ("dot_red#2",)]
    encoder = pretrain(small.PRETRAIN, buffer, RunDirectory(tmp_path), seed=0, progress=False)
    assert encoder.metadata["domains"] == ["dot_blue", "dot_green", "dot_red"]


def test_who_names_one_of_two_of_a_name_is_told_of_the_other(hosts, tmp_path, caplog):
    buffer = open_together(hosts)

    def train(name, *domains):
        config = replace(small.PRETRAIN, rounds=1, domains=domains)
        pretrain(config, buffer, RunDirectory(tmp_path / name), seed=0, progress=False)

    train("one", "dot_red", "dot_red", "dot_blue")
    assert (
        "of dot_red, which several datasets have, dot_red is trained on and dot_red#2 left out"
        in (caplog.text)
    )
    assert "--domains dot_red dot_red#2" in caplog.text
    caplog.clear()
    train("other", "dot_red#2")
    assert "dot_red#2 is trained on and dot_red left out" in caplog.text
    caplog.clear()
    train("both", "dot_red#2", "dot_red")
    train("unlike", "dot_green")
    train("all")
    assert not caplog.text


def test_the_stage_remembers_what_it_was_begun_with(hosts, tmp_path):
    context = Context(RunDirectory(tmp_path), 0, progress=False, dataset=hosts[0])
    pretrain_stage(replace(context, more_datasets=hosts[1:]), small.PRETRAIN)
    with pytest.raises(ConfigMismatchError, match=r"dataset\.dot_green: 120 -> None"):
        pretrain_stage(context, small.PRETRAIN)
    small.dataset(tmp_path / "c", replace(small.COLLECT, domains=("dot_green", "dot_red")), seed=2)
    with pytest.raises(ConfigMismatchError, match=r"dataset\.seeds: \[0, 1\] -> \[0, 2\]"):
        pretrain_stage(replace(context, more_datasets=(tmp_path / "c",)), small.PRETRAIN)
    with pytest.raises(StageOrderError, match="nowhere should be a dataset"):
        pretrain_stage(replace(context, more_datasets=(tmp_path / "nowhere",)), small.PRETRAIN)


def test_what_does_not_belong_together_is_refused(hosts, tmp_path):
    with pytest.raises(ValueError, match=r"different directories, at least one, got \[\]"):
        open_together([])
    with pytest.raises(ValueError, match="different directories"):
        open_together([hosts[0], hosts[0] / ".." / "a"])
    small.dataset(tmp_path / "fast", replace(small.COLLECT, render="fast"))
    with pytest.raises(ValueError, match=r"render of all datasets should be one, got .* fast"):
        open_together([hosts[0], tmp_path / "fast"])
    small.dataset(tmp_path / "large", replace(small.COLLECT, domains=("dot_x",), image_size=24))
    other = open_together([hosts[0], tmp_path / "large"])
    with pytest.raises(ValueError, match=r"frames of all domains should be .* dot_x \[3, 24, 24\]"):
        Trainer(small.PRETRAIN, other, seed=0, device=torch.device("cpu"))
