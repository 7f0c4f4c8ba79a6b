import json
import math
import warnings
from dataclasses import replace

import pytest
import small
import torch

import crpt.pretrain
from crpt.encoder import Encoder, initial_encoder
from crpt.interrupt import Interrupted
from crpt.ops import conv_cpu
from crpt.pretrain import DivergenceError, Trainer, pretrain
from crpt.pretrain.plateau import PlateauWarning
from crpt.run_directory import CheckpointError, ConfigMismatchError, RunDirectory


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def run_all(config, buffer, path, **options):
    run = RunDirectory(path)
    encoder = pretrain(config, buffer, run, seed=0, progress=False, **options)
    return run, encoder


def stop_after(monkeypatch, rounds: int) -> None:
    """A SIGINT that arrives in the middle of the given round."""
    update = Trainer.update
    requests: list[crpt.pretrain.StopRequest] = []

    class Recorded(crpt.pretrain.StopRequest):
        def __enter__(self):
            requests.append(self)
            return super().__enter__()

    def counted(self, domains):
        if self.round == rounds - 1:
            requests[-1].requested = True
        return update(self, domains)

    monkeypatch.setattr(crpt.pretrain, "StopRequest", Recorded)
    monkeypatch.setattr(Trainer, "update", counted)


def assert_same_encoder(a: Encoder, b: Encoder) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_a_run_leaves_metrics_checkpoint_and_encoder(buffer, tmp_path):
    run, encoder = run_all(small.PRETRAIN, buffer, tmp_path)
    lines = run.metrics("pretrain")
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    assert {line["domain"] for line in lines} == {"dot_red", "dot_blue"}
    for key in ("comparison_loss", "distance_from_trivial", "prototypes_in_use", "effective_rank"):
        assert all(key in line for line in lines)
    loaded = Encoder.from_pretrained(run.encoder_dir)
    assert_same_encoder(loaded, encoder)
    assert loaded.metadata["domains"] == ["dot_blue", "dot_red"]
    assert loaded.metadata["render"] == "exact"
    assert len(loaded.prototypes) == 32
    begun = initial_encoder(loaded.config, 0)
    assert not torch.equal(begun.projector.weight, loaded.projector.weight)


def test_same_seed_same_encoder_and_another_seed_another(buffer, tmp_path):
    _, first = run_all(small.PRETRAIN, buffer, tmp_path / "1")
    _, again = run_all(small.PRETRAIN, buffer, tmp_path / "2")
    assert_same_encoder(first, again)
    other = pretrain(small.PRETRAIN, buffer, RunDirectory(tmp_path / "3"), seed=1, progress=False)
    assert not torch.equal(first.projector.weight, other.projector.weight)


@pytest.mark.parametrize(
    ("batches", "precision"), [("alternate", "fp32"), ("mixed", "fp32"), ("mixed", "auto")]
)
def test_interrupted_and_resumed_equals_never_interrupted(
    buffer, tmp_path, monkeypatch, batches, precision
):
    # The kernels for bf16, also where there are no units for it.
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: True)
    config = replace(small.PRETRAIN, batches=batches, precision=precision, checkpoint_every=4)
    whole_run, whole = run_all(config, buffer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted, match="stopped after round 3 of 6"):
            run_all(config, buffer, tmp_path / "cut")
    run, resumed = run_all(config, buffer, tmp_path / "cut")
    assert_same_encoder(whole, resumed)
    assert run.metrics_file.read_text() == whole_run.metrics_file.read_text()


def test_a_stop_in_the_last_round_is_not_swallowed(buffer, tmp_path, monkeypatch):
    _, whole = run_all(small.PRETRAIN, buffer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, small.PRETRAIN.rounds)
        with pytest.raises(Interrupted, match="pretrain is done, and its encoder written"):
            run_all(small.PRETRAIN, buffer, tmp_path / "cut")
    assert_same_encoder(whole, Encoder.from_pretrained(tmp_path / "cut"))
    _, again = run_all(small.PRETRAIN, buffer, tmp_path / "cut")
    assert_same_encoder(whole, again)


def test_lost_rounds_are_done_again_after_a_kill(buffer, tmp_path, monkeypatch):
    config = replace(small.PRETRAIN, checkpoint_every=3, log_every=1)
    whole_run, whole = run_all(config, buffer, tmp_path / "whole")
    update = Trainer.update

    def killed(self, domains):
        if self.round == 5:
            raise SystemExit("as if killed")
        return update(self, domains)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killed)
        with pytest.raises(SystemExit):
            run_all(config, buffer, tmp_path / "cut")
    run, resumed = run_all(config, buffer, tmp_path / "cut")
    assert_same_encoder(whole, resumed)
    assert run.metrics_file.read_text() == whole_run.metrics_file.read_text()
    # Round 5 was logged before the kill, and again.
    assert speed_lines(run, "step", "domain") == speed_lines(whole_run, "step", "domain")


def test_a_finished_run_returns_at_once(buffer, tmp_path, monkeypatch):
    _, encoder = run_all(small.PRETRAIN, buffer, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "__init__", never)
    _, again = run_all(small.PRETRAIN, buffer, tmp_path)
    assert_same_encoder(encoder, again)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_encoder_that_is_not_whole_is_exported_again(buffer, tmp_path, missing):
    run, encoder = run_all(small.PRETRAIN, buffer, tmp_path)
    (run.encoder_dir / missing).unlink()
    _, again = run_all(small.PRETRAIN, buffer, tmp_path)
    assert_same_encoder(encoder, again)


@pytest.mark.parametrize("rounds", [6, 8], ids=["done", "more"])
def test_a_checkpoint_goes_on_only_as_it_was_begun(buffer, tmp_path, rounds):
    run_all(small.PRETRAIN, buffer, tmp_path)
    other = replace(small.PRETRAIN, rounds=rounds, learning_rate=5e-2, temperature=0.7)
    with pytest.raises(ConfigMismatchError) as refused:
        pretrain(other, buffer, RunDirectory(tmp_path), seed=9, progress=False)
    told = str(refused.value).splitlines()
    assert told[1:-1] == [
        "  pretrain.learning_rate: 0.001 -> 0.05",
        *(["  pretrain.rounds: 6 -> 8"] if rounds == 8 else []),
        "  pretrain.temperature: 0.1 -> 0.7",
        "  seed: 0 -> 9",
    ]
    assert "choose another --run-dir" in told[-1]
    assert Encoder.from_pretrained(tmp_path).metadata["seed"] == 0
    # How is no matter.
    run_all(replace(small.PRETRAIN, log_every=3, checkpoint_every=1), buffer, tmp_path)


def test_a_checkpoint_that_does_not_say_how_it_was_begun_goes_on(buffer, tmp_path):
    _, whole = run_all(small.PRETRAIN, buffer, tmp_path / "whole")
    saved = RunDirectory(tmp_path / "whole").load_checkpoint("pretrain")
    del saved["begun_with"]
    RunDirectory(tmp_path / "old").save_checkpoint("pretrain", saved)
    _, again = run_all(small.PRETRAIN, buffer, tmp_path / "old")
    assert_same_encoder(whole, again)


def test_alternate_batches_hold_one_domain_and_mixed_ones_equal_shares(buffer, monkeypatch):
    trainer = Trainer(small.PRETRAIN, buffer, seed=0, device=torch.device("cpu"))
    assert trainer.batches() == [("dot_blue",), ("dot_red",)]
    mixed = Trainer(
        replace(small.PRETRAIN, batches="mixed", batch_size=17),
        buffer,
        seed=0,
        device=torch.device("cpu"),
    )
    assert mixed.batches() == [("dot_blue", "dot_red")] * 2
    drawn = []
    sample = buffer.sample

    def recorded(domain, n, **options):
        drawn.append((domain, n))
        return sample(domain, n, **options)

    monkeypatch.setattr(buffer, "sample", recorded)
    obs, next_obs = mixed.sample(("dot_blue", "dot_red"))
    assert drawn == [("dot_blue", 8), ("dot_red", 9)]
    assert obs.shape == next_obs.shape == (17, 9, 20, 20)
    assert obs.is_contiguous(memory_format=torch.channels_last)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    buffer, tmp_path, monkeypatch
):
    update = Trainer.update

    def poisoned(self, domains):
        if self.round == 3:
            with torch.no_grad():
                self.model.predictor[0].weight.fill_(float("nan"))
        return update(self, domains)

    monkeypatch.setattr(Trainer, "update", poisoned)
    with pytest.raises(
        DivergenceError, match=r"loss .* in round 4; the last checkpoint is kept.*new --run-dir"
    ):
        run_all(small.PRETRAIN, buffer, tmp_path)
    saved = RunDirectory(tmp_path).load_checkpoint("pretrain")
    assert saved["round"] == 2
    assert all(t.isfinite().all() for t in saved["model"].values())


def test_divergence_before_the_first_checkpoint_keeps_none_and_binds_nobody(buffer, tmp_path):
    run = RunDirectory(tmp_path)
    config = replace(small.PRETRAIN, learning_rate=1e20, checkpoint_every=20)
    run.claim({"pretrain": config})
    with pytest.raises(
        DivergenceError,
        match=r"in round 2; no checkpoint was written yet\. Begin again, in the same --run-dir .* "
        "with a learning_rate below",
    ):
        pretrain(config, buffer, run, seed=0, progress=False)
    assert not run.has_checkpoint("pretrain")
    run.claim({"pretrain": small.PRETRAIN})
    pretrain(small.PRETRAIN, buffer, run, seed=0, progress=False)
    assert run.metrics()[0]["step"] == small.PRETRAIN.log_every


@pytest.mark.parametrize("broken", ["weight", "moment"])
def test_weights_that_the_last_step_broke_are_not_saved(buffer, tmp_path, monkeypatch, broken):
    step = torch.optim.Adam.step

    def breaking(self):
        step(self)
        state = self.state[self.param_groups[0]["params"][0]]
        if state["step"] == 8:  # the last of round 4: its losses were finite
            where = self.param_groups[0]["params"][0] if broken == "weight" else state["exp_avg_sq"]
            with torch.no_grad():
                where.view(-1)[0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(DivergenceError, match=r"weights .* finite, and are not, in round 4"):
        run_all(small.PRETRAIN, buffer, tmp_path)
    saved = RunDirectory(tmp_path).load_checkpoint("pretrain")
    assert saved["round"] == 2
    assert all(t.isfinite().all() for t in saved["model"].values())
    assert not (tmp_path / "encoder").exists()


def test_a_step_that_bursts_is_divergence(buffer, tmp_path):
    # The loss before it is finite, and so are the weights after it: the features are not.
    config = replace(small.PRETRAIN, learning_rate=1e18, domains=("dot_red",), log_every=1)
    with pytest.raises(
        DivergenceError, match=r"figures should be finite, got .*rank.* below 1e\+18"
    ):
        run_all(config, buffer, tmp_path)
    assert not RunDirectory(tmp_path).metrics()


def test_only_advice_that_is_left_is_given(buffer, tmp_path, monkeypatch):
    update = Trainer.update
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Trainer, "update", lambda *args: replace(update(*args), total=nan))
    with pytest.raises(DivergenceError) as fp32:
        run_all(small.PRETRAIN, buffer, tmp_path / "fp32")
    assert "learning_rate below 0.001." in str(fp32.value)
    with pytest.raises(DivergenceError, match="or precision fp32"):
        run_all(replace(small.PRETRAIN, precision="bf16"), buffer, tmp_path / "bf16")


@pytest.mark.parametrize("kernels", [False, True], ids=["pytorch", "kernels"])
def test_bf16_follows_fp32(buffer, tmp_path, monkeypatch, kernels):
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: kernels)
    # Slow enough that Adam, which takes full steps from the first on, does not part them.
    config = replace(small.PRETRAIN, learning_rate=2e-4)
    fp32, _ = run_all(config, buffer, tmp_path / "fp32")
    bf16, _ = run_all(replace(config, precision="bf16"), buffer, tmp_path / "bf16")
    for a, b in zip(fp32.metrics("pretrain"), bf16.metrics("pretrain"), strict=True):
        assert b["comparison_loss"] == pytest.approx(a["comparison_loss"], rel=0.01)


def test_standardised_embeddings_leave_the_plateau_and_learn_the_state(buffer, tmp_path):
    config = replace(small.PRETRAIN, rounds=60, batch_size=48, log_every=30, checkpoint_every=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlateauWarning)
        run, _ = run_all(config, buffer, tmp_path)
    first, last = (run.metrics("pretrain")[i]["distance_from_trivial"] for i in (0, -1))
    assert last > 0.3
    assert last > first
    json.dumps(run.metrics())  # plain values only


def test_domains_are_chosen_and_one_named_twice_weighs_twice_as_much(buffer, tmp_path):
    cpu = torch.device("cpu")
    config = replace(small.PRETRAIN, domains=("dot_red", "dot_blue", "dot_red"))
    trainer = Trainer(config, buffer, seed=0, device=cpu)
    assert trainer.domains == ("dot_blue", "dot_red")
    assert trainer.batches() == [("dot_blue",), ("dot_red",), ("dot_red",)]
    mixed = Trainer(replace(config, batches="mixed"), buffer, seed=0, device=cpu)
    assert mixed.batches() == [("dot_blue", "dot_red", "dot_red")] * 3
    with pytest.raises(
        ValueError, match="domains should be some of the dataset's, dot_blue, dot_red, got dot_x"
    ):
        Trainer(replace(config, domains=("dot_red", "dot_x")), buffer, seed=0, device=cpu)
    run, encoder = run_all(replace(config, domains=("dot_red",)), buffer, tmp_path)
    assert encoder.metadata["domains"] == ["dot_red"]
    assert {line["domain"] for line in run.metrics("pretrain")} == {"dot_red"}


def test_the_cosine_schedule_ends_where_nothing_moves_also_when_resumed(
    buffer, tmp_path, monkeypatch
):
    config = replace(small.PRETRAIN, schedule="cosine", checkpoint_every=4)
    rates = []
    step = torch.optim.Adam.step

    def recorded(self):
        rates.append(float(self.param_groups[0]["lr"]))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    _, whole = run_all(config, buffer, tmp_path / "whole")
    expected = [1e-3 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    assert rates == pytest.approx(expected)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run_all(config, buffer, tmp_path / "cut")
    _, resumed = run_all(config, buffer, tmp_path / "cut")
    assert_same_encoder(whole, resumed)
    assert rates[12:] == pytest.approx(expected)


def test_the_last_checkpoints_stay_and_the_one_before_is_gone_on_from(buffer, tmp_path):
    config = replace(small.PRETRAIN, keep_checkpoints=2)
    whole_run, whole = run_all(config, buffer, tmp_path / "whole")
    checkpoints = whole_run.checkpoint_dir
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"pretrain.pt", "pretrain-000000004.pt", "pretrain-000000006.pt"}
    assert (checkpoints / "pretrain.pt").samefile(checkpoints / "pretrain-000000006.pt")
    for name in ("pretrain.pt", "pretrain-000000006.pt"):
        (checkpoints / name).write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=f"(?s){name} .* go on from the one"):
            run_all(config, buffer, tmp_path / "whole")
        (checkpoints / name).unlink()
    assert whole_run.load_checkpoint("pretrain")["round"] == 4
    run, again = run_all(config, buffer, tmp_path / "whole")
    assert_same_encoder(whole, again)
    assert {line["step"] for line in run.metrics("pretrain")} == {2, 4, 6}
    run_all(replace(config, keep_checkpoints=1), buffer, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one" / "checkpoints").iterdir()] == ["pretrain.pt"]


def test_the_pace_of_each_domain_is_logged_apart_from_what_the_seed_decides_on(
    buffer, tmp_path, monkeypatch
):
    clock = iter(range(0, 1000, 2))  # a reading of the clock takes two seconds
    monkeypatch.setattr(crpt.pretrain.time, "monotonic", lambda: float(next(clock)))
    config = replace(small.PRETRAIN, domains=("dot_red", "dot_blue", "dot_red"))
    run, _ = run_all(config, buffer, tmp_path)
    assert speed_lines(run, "step", "domain", "updates_per_second") == [
        (step, domain, rate)
        for step in (2, 4, 6)
        for domain, rate in (("dot_blue", 1.0), ("dot_red", 2.0))
    ]


def speed_lines(run, *keys):
    lines = map(json.loads, run.speed_file.read_text().splitlines())
    return [tuple(line[key] for key in keys) for line in lines]
