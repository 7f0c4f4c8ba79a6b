"""Figures of each domain, whatever the batches, and domains of different weight."""

import itertools
import sys
from collections import Counter
from dataclasses import replace

import pytest
import recorded
import small
import torch
from test_pretrain import assert_same_encoder, run_all, stop_after

from crpt import commands
from crpt.config import PretrainConfig, Stages
from crpt.encoder import Encoder
from crpt.interrupt import Interrupted
from crpt.measures import effective_rank, prototypes_in_use
from crpt.objectives import OBJECTIVES
from crpt.objectives.crptpro import CRPTPro
from crpt.pretrain import Trainer, _ranks
from crpt.pretrain.feeds import ViewConfig
from crpt.pretrain.inputs import largest_batch
from crpt.pretrain.log import distances, of_domain
from crpt.pretrain.plateau import RANK, Plateau
from crpt.pretrain.streamed_feed import StreamedFeed
from crpt.pretrain.update_graph import WARM_UP
from crpt.run_directory import ConfigMismatchError, RunDirectory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def mixed(**changes) -> PretrainConfig:
    return replace(small.PRETRAIN, batches="mixed", **changes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_figures_of_the_domains_make_those_of_their_mixed_batch(buffer, objective):
    config = mixed(objective=objective, batch_size=17, domains=("dot_red", "dot_blue", "dot_red"))
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    names = trainer.turns.names
    losses = trainer.update(names)
    blue, red = (of_domain(trainer, names, losses, name) for name in ("dot_blue", "dot_red"))
    assert (len(blue.z), len(red.z)) == (5, 12)
    assert torch.equal(torch.cat([blue.z, red.z]), losses.z)
    name = trainer.model.row_loss
    for mean, of_blue, of_red in (
        (losses.total, blue.total, red.total),
        (losses.parts[name], blue.parts[name], red.parts[name]),
    ):
        torch.testing.assert_close((5 * of_blue + 12 * of_red) / 17, mean.detach())
        assert of_blue != of_red
    # The explained share of a variance is no mean over rows.
    if objective != "autoencoder":
        together = (5 * blue.distance + 12 * red.distance) / 17
        torch.testing.assert_close(together, losses.distance, atol=1e-5, rtol=1e-5)


def test_a_domain_of_few_rows_is_not_called_collapsed(buffer):
    config = mixed(domains=("dot_red", "dot_blue"), weights=(1, 7))
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    names = trainer.turns.names
    losses = trainer.update(names)
    figures = {
        name: {"effective_rank": effective_rank(of_domain(trainer, names, losses, name).z)}
        for name in names
    }
    assert figures["dot_red"]["effective_rank"] < RANK  # two rows cannot have more
    assert _ranks(trainer, figures).keys() == {"dot_blue"}


def test_a_collapsed_domain_shows_beside_one_that_is_not(buffer):
    trainer = Trainer(mixed(), buffer, seed=0, device=CPU)
    losses = trainer.update(trainer.turns.names)
    point = losses.z.clone()
    point[:8] = point[0]
    scores = losses.scores.clone()
    scores[:8] = scores[0]
    losses = replace(losses, z=point, scores=scores)
    blue, red = (of_domain(trainer, trainer.turns.names, losses, d) for d in trainer.domains)
    assert (effective_rank(blue.z), prototypes_in_use(blue.scores)) == (0.0, 1)
    assert effective_rank(red.z) > 2
    assert prototypes_in_use(red.scores) > 1


def test_a_collapse_shows_in_the_log(buffer, tmp_path, monkeypatch):
    """One point, through the real Sinkhorn, whose codes use many prototypes."""
    project = CRPTPro.project

    def collapsed(self, encoder, pixels):
        z = project(self, encoder, pixels)
        return z[:1].expand_as(z) + 1e-4 * z if encoder is self.target else z

    monkeypatch.setattr(CRPTPro, "project", collapsed)
    run, _ = run_all(replace(small.PRETRAIN, embedding_norm="none"), buffer, tmp_path)
    for line in run.metrics("pretrain"):
        assert (line["prototypes_in_use"], line["usage_entropy"]) == (1, 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "changes",
    [
        {"batches": "mixed"},
        {"domains": ("dot_red", "dot_blue", "dot_red")},
        {"domains": ("dot_red", "dot_blue"), "weights": (1, 5)},
    ],
    ids=["mixed", "twice", "weights"],
)
def test_every_domain_has_one_line_a_step(buffer, tmp_path, objective, changes):
    run, _ = run_all(
        replace(small.PRETRAIN, objective=objective, log_every=1, **changes), buffer, tmp_path
    )
    lines = run.metrics("pretrain")
    assert [(line["step"], line["domain"]) for line in lines] == [
        (step, domain) for step in range(1, 7) for domain in ("dot_blue", "dot_red")
    ]
    for blue, red in zip(lines[::2], lines[1::2], strict=True):
        assert blue.keys() - {"gradient_norm"} == red.keys() - {"gradient_norm"}
        assert blue["effective_rank"] != red["effective_rank"]


def test_several_turns_of_a_round_are_averaged(buffer, tmp_path):
    config = replace(
        small.PRETRAIN, domains=("dot_red", "dot_blue", "dot_red"), rounds=1, log_every=1
    )
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    found = [trainer.update(domains) for domains in trainer.batches()]
    run, _ = run_all(config, buffer, tmp_path)
    blue, red = run.metrics("pretrain")
    assert blue["loss"] == pytest.approx(found[0].total.item())
    assert red["loss"] == pytest.approx((found[1].total.item() + found[2].total.item()) / 2)
    of_round = distances(trainer, trainer.batches(), found)
    assert list(of_round) == ["dot_blue", "dot_red"]
    torch.testing.assert_close(of_round["dot_red"], (found[1].distance + found[2].distance) / 2)


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_the_plateau_sees_one_distance_of_each_domain_a_round(
    buffer, tmp_path, monkeypatch, batches
):
    seen = []
    monkeypatch.setattr(Plateau, "observe", lambda self, name, distance: seen.append(name))
    domains = ("dot_red", "dot_blue", "dot_red")
    run_all(replace(small.PRETRAIN, batches=batches, domains=domains), buffer, tmp_path)
    assert seen == ["dot_blue", "dot_red"] * 6


def test_recorded_updates_leave_the_figures_of_the_domains(buffer):
    plain, replayed = (Trainer(mixed(), buffer, seed=3, device=CPU) for _ in range(2))
    replayed.replay_updates(recorded.Emulated())
    for _ in range(WARM_UP + 2):
        a, b = (trainer.update(trainer.turns.names) for trainer in (plain, replayed))
        assert torch.equal(a.by_domain, b.by_domain)
        assert torch.equal(a.scores, b.scores)
        assert a.rows is None
        assert b.rows is None


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_measuring_leaves_no_trace(buffer, norm):
    config = replace(small.PRETRAIN, embedding_norm=norm)
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    trainer.update(("dot_red",))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    drawn = trainer.generator.get_state()
    losses = trainer.measure("dot_blue")
    assert losses.total.isfinite()
    assert torch.equal(trainer.measure("dot_blue").z, losses.z)
    assert torch.equal(trainer.generator.get_state(), drawn)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_equal_weights_train_what_none_do(buffer, tmp_path, batches):
    config = replace(small.PRETRAIN, batches=batches, domains=("dot_red", "dot_blue"))
    _, none = run_all(config, buffer, tmp_path / "none")
    _, equal = run_all(replace(config, weights=(0.1, 0.1)), buffer, tmp_path / "equal")
    assert_same_encoder(none, equal)


def test_weights_leave_the_number_of_updates_as_it_is(buffer, tmp_path, monkeypatch):
    config = replace(small.PRETRAIN, domains=("dot_red", "dot_blue"), weights=(3, 1))
    had = Counter()
    update = Trainer.update

    def counted(self, domains):
        had.update(domains)
        return update(self, domains)

    monkeypatch.setattr(Trainer, "update", counted)
    run, encoder = run_all(config, buffer, tmp_path)
    assert had == {"dot_red": 9, "dot_blue": 3}
    assert encoder.metadata["updates"] == 12
    assert encoder.metadata["weights"] == {"dot_blue": 1, "dot_red": 3}
    assert "| weights | dot_blue 1, dot_red 3 |" in (run.encoder_dir / "README.md").read_text()
    assert Encoder.from_pretrained(run.encoder_dir).metadata["weights"]["dot_red"] == 3


def test_a_mixed_batch_has_rows_by_weight(buffer, monkeypatch):
    config = mixed(domains=("dot_red", "dot_blue"), weights=(3, 1))
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    drawn = []
    sample = buffer.sample

    def noted(domain, n, **options):
        drawn.append((domain, n))
        return sample(domain, n, **options)

    monkeypatch.setattr(buffer, "sample", noted)
    trainer.update(trainer.turns.names)
    assert drawn == [("dot_blue", 4), ("dot_red", 12)]
    # Of 120 red and blue transitions, so that the 3 in 4 rows of red are no more than 120.
    assert largest_batch(config, {"dot_red": 120, "dot_blue": 120}) == 160


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_a_weighted_run_that_goes_on_equals_one_that_never_stopped(
    buffer, tmp_path, monkeypatch, batches
):
    config = replace(
        small.PRETRAIN, batches=batches, domains=("dot_red", "dot_blue"), weights=(1, 2.5),
        rounds=9, log_every=2, checkpoint_every=100, schedule="cosine",
    )  # fmt: skip
    whole_run, whole = run_all(config, buffer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            run_all(config, buffer, tmp_path / "cut")
    run, resumed = run_all(config, buffer, tmp_path / "cut")
    assert_same_encoder(whole, resumed)
    assert run.metrics_file.read_text() == whole_run.metrics_file.read_text()


def test_weighted_turns_are_drawn_ahead_in_their_order(buffer):
    config = replace(small.PRETRAIN, domains=("dot_red", "dot_blue"), weights=(1, 2.5))
    trainer = Trainer(config, buffer, seed=0, device=CPU)
    views = ViewConfig(4, 3, 1, torch.float32, slice(0, 4))
    own = torch.Generator().manual_seed(0)
    turns = trainer.turns
    done = 5
    feed = StreamedFeed(
        buffer, trainer.batches(), views, CPU, own, upcoming=lambda: turns.after(done + 1)
    )
    for domains in itertools.islice(turns.after(done), 12):
        feed.draw(domains)
        ahead = feed._ahead
    assert feed._ahead is ahead
    starts = []
    start = feed._start
    feed._start = lambda domains: starts.append(domains) or start(domains)
    for domains in itertools.islice(turns.after(done + 12), 9):
        feed.draw(domains)
    feed.close()
    assert not starts


def test_weights_come_by_the_command_line(monkeypatch, tmp_path):
    seen = []
    for stage, prefix in (("pretrain", "--"), ("train", "--pretrain.")):
        arguments, _ = commands._COMMANDS[stage]
        monkeypatch.setitem(commands._COMMANDS, stage, (arguments, lambda a: seen.append(a.config)))
        names = ["cheetah_run", "walker_run", "hopper_hop"]
        flags = [f"{prefix}domains", *names, f"{prefix}weights", "1", "2", "1"]
        preset = ["--preset", "quick", "--device", "cpu", "--run-dir", str(tmp_path / stage)]
        monkeypatch.setattr(sys, "argv", ["crpt", *preset, *flags])
        commands.run(stage)
    pretrain, stages = seen
    assert isinstance(stages, Stages)
    assert pretrain.weights == stages.pretrain.weights == (1.0, 2.0, 1.0)


def test_a_run_begun_before_there_were_weights_goes_on(buffer, tmp_path):
    run, _ = run_all(small.PRETRAIN, buffer, tmp_path)
    run.claim({"pretrain": small.PRETRAIN})
    config = run.read_config()
    del config["pretrain"]["weights"]
    run.write_json("config.json", config)
    weighted = replace(small.PRETRAIN, domains=("dot_red", "dot_blue"), weights=(1, 2))
    with pytest.raises(ConfigMismatchError, match=r"weights: None -> \[1, 2\]"):
        RunDirectory(tmp_path).check({"pretrain": weighted})
    RunDirectory(tmp_path).claim({"pretrain": small.PRETRAIN})
