import warnings
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F

from crpt.objectives.crptpro import CRPTPro
from crpt.pretrain import pretrain
from crpt.pretrain.plateau import FEWEST_PROTOTYPES, READINGS, Plateau, PlateauWarning
from crpt.run_directory import RunDirectory

STUCK = replace(
    small.PRETRAIN,
    rounds=160,
    learning_rate=1e-4,
    projection_dim=128,
    prototypes=512,
    embedding_norm="none",
    log_every=20,
    checkpoint_every=160,
)


def judge(plateau, round_, distances, ranks, rounds=READINGS):
    """After so many rounds of these distances."""
    for _ in range(rounds):
        for name, distance in distances.items():
            plateau.observe(name, torch.tensor(distance))
    plateau.check(round_, ranks)


def test_a_run_on_the_plateau_says_so_once_with_the_remedy(tmp_path):
    buffer, run = small.dataset(tmp_path / "dataset"), RunDirectory(tmp_path / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(STUCK, buffer, run, seed=0, progress=False)
    (warning,) = [w for w in caught if issubclass(w.category, PlateauWarning)]
    message = str(warning.message)
    # 150 updates are 75 rounds of two domains; the next line of metrics is that of round 80.
    assert message.startswith("after 80 rounds the loss of dot_blue, dot_red is no better ")
    assert "log M = 6.238" in message
    for remedy in (
        "embedding_norm: batch",
        "crpt.pretrain --embedding-norm batch",
        "crpt.train --pretrain.embedding-norm batch",
        "new --run-dir",
    ):
        assert remedy in message
    assert all(abs(line["distance_from_trivial"]) < 0.01 for line in run.metrics()[-2:])


@pytest.mark.parametrize(
    ("rounds", "domains", "first"), [(16_666, 3, 50), (100, 3, 50), (20, 3, 20), (1000, 1, 150)]
)
def test_the_plateau_is_judged_after_150_updates_or_at_the_end(rounds, domains, first):
    plateau = Plateau(replace(STUCK, rounds=rounds), domains)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(plateau, first - 1, {"a": 0.0}, {"a": 5.0})
    with pytest.warns(PlateauWarning):
        judge(plateau, first, {"a": 0.0}, {"a": 5.0})


def test_a_run_too_short_to_leave_the_plateau_is_not_judged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge(Plateau(replace(STUCK, rounds=16), 3), 16, {"a": 0.0}, {"a": 5.0})


def test_only_the_domains_on_the_plateau_are_named_and_standardising_is_not_advised_twice():
    plateau = Plateau(replace(STUCK, embedding_norm="batch"), 2)
    with pytest.warns(PlateauWarning, match="loss of stuck is no better.*learning_rate") as caught:
        judge(plateau, 100, {"moving": 0.5, "stuck": 0.001}, {})
    assert "moving" not in str(caught[0].message)
    assert "--embedding-norm" not in str(caught[0].message)


def test_collapsed_embeddings_are_named():
    plateau = Plateau(replace(STUCK, objective="byol"), 2)
    with pytest.warns(PlateauWarning, match="embeddings of flat have collapsed.*embedding_norm"):
        judge(plateau, 100, {"flat": 0.5, "full": 0.5}, {"flat": 1.1, "full": 20.0})


def warned(plateau, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        judge(plateau, *arguments)
    return [str(w.message) for w in caught]


def test_a_loss_above_the_trivial_one_is_not_called_the_plateau():
    plateau = Plateau(replace(STUCK, prototypes=32, embedding_norm="batch"), 2)
    for _ in range(READINGS):
        plateau.observe("up", torch.tensor(-0.061))
    with pytest.warns(PlateauWarning) as caught:
        plateau.check(100, {"up": 9.0}, {"up": 15.0})
    (message,) = [str(w.message) for w in caught]
    assert "loss of up (by 0.061) is above that of the trivial solution" in message
    assert "learning_rate below 0.0001" in message
    assert "uniform" not in message
    assert "next to nothing" not in message


@pytest.mark.parametrize(
    ("distance", "perplexity", "said"),
    [
        (-0.001, 31.9, "log M = 3.466, and the codes are uniform"),
        (-0.03, 31.9, "log M = 3.466, and the codes are uniform"),  # it comes down to log M
        (-0.001, 15.0, r"the codes are not uniform \(perplexity 15.0 of 32\)"),
        (-0.2, 31.9, r"loss of a \(by 0.200\) is above"),
    ],
)
def test_codes_are_called_uniform_where_they_are(distance, perplexity, said):
    plateau = Plateau(replace(STUCK, prototypes=32), 2)
    for _ in range(READINGS):
        plateau.observe("a", torch.tensor(distance))
    with pytest.warns(PlateauWarning, match=said):
        plateau.check(100, {"a": 9.0}, {"a": perplexity})


def test_each_domain_and_trouble_is_told_of_once():
    plateau = Plateau(replace(STUCK, rounds=1000), 3)
    ranks = {"flat": 1.1, "stuck": 9.0, "up": 9.0}
    distances = {"flat": 0.5, "stuck": 0.001, "up": -0.5}
    first = warned(plateau, 100, distances, ranks)
    assert len(first) == 2
    assert "loss of stuck is no better" in first[0]
    assert "embeddings of flat have collapsed" in first[0]
    assert "loss of up (by 0.500) is above" in first[1]
    assert not warned(plateau, 101, distances, ranks)
    (later,) = warned(plateau, 102, distances | {"flat": 0.0, "up": 0.5}, ranks)
    assert "loss of flat is no better" in later
    (last,) = warned(plateau, 103, distances, ranks | {"up": 1.0})
    assert "embeddings of up have collapsed" in last


def test_one_outlying_batch_is_no_plateau_and_three_in_a_row_are():
    plateau = Plateau(replace(STUCK, rounds=1000), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for round_, distance in enumerate((0.4, -0.1, 0.005, 0.3, -0.1, 0.0), start=200):
            judge(plateau, round_, {"a": distance}, {"a": 5.0}, rounds=1)
    with pytest.warns(PlateauWarning):
        judge(plateau, 206, {"a": 0.009}, {"a": 5.0}, rounds=1)


def test_a_run_that_goes_on_is_judged_by_three_rounds_too():
    plateau = Plateau(replace(STUCK, rounds=1000), 1)  # as after a checkpoint: nothing seen yet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for round_ in (200, 201):
            judge(plateau, round_, {"a": 0.005}, {"a": 5.0}, rounds=1)
    with pytest.warns(PlateauWarning):
        judge(plateau, 202, {"a": 0.005}, {"a": 5.0}, rounds=1)


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def pretrained(config, buffer, path):
    """The figures and the warnings of a run."""
    run = RunDirectory(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrain(config, buffer, run, seed=0, progress=False)
    found = [str(w.message) for w in caught if issubclass(w.category, PlateauWarning)]
    return run.metrics("pretrain"), found


def test_prototypes_that_collapse_are_told_of_once_with_the_remedy(buffer, tmp_path, monkeypatch):
    @torch.no_grad()
    def collapse(self):
        noise = 0.05 * torch.randn_like(self.prototypes)
        self.prototypes.copy_(F.normalize(self.prototypes[0] + noise, dim=-1))

    monkeypatch.setattr(CRPTPro, "before_update", collapse)
    lines, (message,) = pretrained(small.PRETRAIN, buffer, tmp_path)
    assert all(0.9 < line["prototype_similarity_mean"] < 0.99 for line in lines)
    # They begin spread, so it needs no 150 updates to tell.
    assert message.startswith("after 2 rounds the prototypes have collapsed to about one vector")
    for remedy in ("intrinsic_weight above 0.005", "learning_rate below 0.001", "new --run-dir"):
        assert remedy in message


@pytest.mark.parametrize("intrinsic", ["dot", "knn", "none"])
def test_prototypes_of_a_healthy_run_are_not_called_collapsed(buffer, tmp_path, intrinsic):
    config = replace(small.PRETRAIN, rounds=60, batch_size=48, log_every=20, intrinsic=intrinsic)
    lines, messages = pretrained(config, buffer, tmp_path)
    assert not messages
    assert all(abs(line["prototype_similarity_mean"]) < 0.1 for line in lines)


@pytest.mark.parametrize(
    ("changes", "similarity", "said"),
    [
        ({}, 0.94, r"a mean cosine of 0\.94.* Try an intrinsic_weight above 0\.005, or"),
        ({"intrinsic": "none"}, 0.94, "Try intrinsic: dot, or a learning_rate below"),
        ({}, 0.2, None),
        ({"prototypes": FEWEST_PROTOTYPES - 1}, 0.94, None),  # a mean of too few
        ({}, None, None),  # an objective without any
    ],
)
def test_prototypes_are_judged_by_their_mean_cosine(changes, similarity, said):
    plateau = Plateau(replace(STUCK, **changes), 2)
    if said is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plateau.check(1, {}, similarity=similarity)
    else:
        with pytest.warns(PlateauWarning, match=said):
            plateau.check(1, {}, similarity=similarity)
