"""`python -m crpt.ablate`: what it refuses, leaves and tells."""

import re
import sys
from dataclasses import replace

import dot_env
import pytest
import small

from crpt.ablate import __main__ as command
from crpt.ablate.studies import STUDIES, alpha
from crpt.encoder import Encoder
from crpt.pretrain import Trainer
from crpt.run_directory import ConfigMismatchError, RunDirectory
from crpt.stages import Context

STAGES = replace(small.STAGES, probe=replace(small.PROBE, episodes=5, folds=2))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["crpt.ablate", *arguments])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_the_command_says_what_it_can_be_asked(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert all(name in out for name in STUDIES)
    code, _, err = run(monkeypatch, capsys, "sinkhorn")
    assert code == 2
    assert "got sinkhorn" in err
    code, out, _ = run(monkeypatch, capsys, "alpha", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--seeds", "--jobs", "--only", "--pretrain.rounds"))
    flags = ("--run-dir", str(tmp_path), "--device", "cpu", "--preset", "quick")
    for wrong, message in (
        (("--only", "alpha_7"), "only should name some of alpha_0, .* got alpha_7"),
        (("--seeds", "0"), "seeds should be at least 1, got 0"),
        (("--dataset", "nowhere"), "dataset should be one that was recorded, got nowhere"),
    ):
        code, _, err = run(monkeypatch, capsys, "alpha", *flags, *wrong)
        assert code == 1
        assert re.search(message, err)
    code, _, err = run(monkeypatch, capsys, "transitions", *flags, "--dataset", "play")
    assert code == 1
    assert "dataset should be none for transitions, which records play" in err


def ask(monkeypatch, study, run_dir, *, stages=STAGES, **flags):
    """The command on worlds of dots."""
    monkeypatch.setattr("crpt.stages.envs.require_known", lambda name: None)
    monkeypatch.setattr(command.cli, "context", lambda arguments, dataset: Context(
        RunDirectory(arguments.run_dir), arguments.seed, progress=False, make_env=dot_env.make,
        dataset=dataset,
    ))  # fmt: skip
    arguments = command.AblateArguments("quick", run_dir, "cpu", config=stages, **flags)
    return command.ablate(study, arguments)


def test_the_command_leaves_table_json_and_figure(monkeypatch, tmp_path):
    text = ask(monkeypatch, "alpha", tmp_path, only=("alpha_0",))
    assert (tmp_path / "alpha.md").read_text() == text + "\n"
    found = RunDirectory(tmp_path).read_json("alpha.json")
    assert [row["variant"] for row in found["runs"]] == ["alpha_0"]
    assert (tmp_path / "figures" / "alpha.png").exists()


def collecting(**changes):
    return replace(STAGES, collect=replace(STAGES.collect, **changes))


@pytest.mark.parametrize(
    ("held", "changes", "message"),
    [
        (
            {"domains": ("dot_red", "dot_green")}, {},
            r"play, which lacks dot_blue and .* by --collect\.domains dot_green dot_red$",
        ),
        ({}, {"render": "fast"}, r"play, .* is asked for by --collect\.render exact$"),
        ({}, {"action_repeat": 4}, r"by --collect\.action-repeat 2$"),
        ({}, {"image_size": 84}, r"by --collect\.image-size 20$"),
    ],
)  # fmt: skip
def test_other_play_than_is_asked_for_is_refused_before_any_training(
    monkeypatch, tmp_path, held, changes, message
):
    play = small.dataset(tmp_path / "play", replace(small.COLLECT, **held)).path
    with pytest.raises(ValueError, match=f"play as collect asks for, got .*{message}"):
        ask(monkeypatch, "alpha", tmp_path / "run", stages=collecting(**changes), dataset=play)
    assert not (tmp_path / "run").exists()


def test_of_more_play_than_is_asked_for_that_is_trained_on(monkeypatch, tmp_path):
    more = small.replace_domains(small.COLLECT, ("dot_red", "dot_green", "dot_blue"))
    play = small.dataset(tmp_path / "play", more).path
    ask(monkeypatch, "alpha", tmp_path / "run", only=("alpha_0",), dataset=play)
    (row,) = RunDirectory(tmp_path / "run").read_json("alpha.json")["runs"]
    encoder = Encoder.from_pretrained(tmp_path / "run" / "runs" / "alpha_0-seed0" / "encoder")
    assert encoder.metadata["domains"] == row["trained_on"] == ["dot_blue", "dot_red"]
    assert row["z_unseen"] == row["z_domains"]["dot_green"]


def test_a_domain_that_is_trained_on_is_not_unseen(monkeypatch, tmp_path):
    """Also where --probe.unseen names it; and one that a variant leaves out is."""
    stages = replace(STAGES, probe=replace(STAGES.probe, unseen=("dot_blue", "dot_green")))
    ask(monkeypatch, "single", tmp_path, stages=stages)
    red, _, together = RunDirectory(tmp_path).read_json("single.json")["runs"]
    assert together["trained_on"] == ["dot_blue", "dot_red"]
    assert together["z_unseen"] == together["z_domains"]["dot_green"]
    assert red["trained_on"] == ["dot_red"]
    assert red["z_seen_gain"] == red["z_gains"]["dot_red"]
    left_out = [red["z_domains"][name] for name in ("dot_blue", "dot_green")]
    assert red["z_unseen"] == pytest.approx(sum(left_out) / 2)


def test_a_part_leaves_what_stands_in_the_table(monkeypatch, tmp_path):
    few = lambda stages: alpha(stages)[:3]  # noqa: E731
    monkeypatch.setitem(STUDIES, "alpha", replace(STUDIES["alpha"], variants=few))

    def runs(**flags):
        ask(monkeypatch, "alpha", tmp_path, **flags)
        rows = RunDirectory(tmp_path).read_json("alpha.json")["runs"]
        return [(row["variant"], row["seed"]) for row in rows]

    both = [("alpha_0", 0), ("alpha_0", 1)]
    assert runs(only=("alpha_0",), seeds=2) == both
    assert runs(only=("alpha_0.002",)) == [*both, ("alpha_0.002", 0)]
    table = (tmp_path / "alpha.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == [
        "| alpha_0",
        "| alpha_0.002",
    ]
    changed = replace(STAGES, pretrain=replace(STAGES.pretrain, temperature=0.3))
    longer = collecting(transitions=150)
    other = replace(STUDIES["alpha"], variants=lambda stages: few(stages)[1:])
    monkeypatch.setattr(Trainer, "update", None)
    for stages in (changed, longer):
        with pytest.raises(ConfigMismatchError):
            runs(only=("alpha_0.001",), stages=stages)
    monkeypatch.setitem(STUDIES, "alpha", other)
    with pytest.raises(ConfigMismatchError, match="alpha of another config, with alpha_0; ask"):
        runs(only=("alpha_0.001",))
    assert (tmp_path / "alpha.md").read_text() == table
    assert small.ReplayBuffer.open(tmp_path / "dataset").num_transitions("dot_red") == 120


def test_what_is_measured_is_tabled_where_others_fail(monkeypatch, tmp_path):
    update = Trainer.update

    def failing(self, domains):
        if self.config.intrinsic_weight > 0:
            raise OSError("as if the disk were full")
        return update(self, domains)

    monkeypatch.setattr(Trainer, "update", failing)
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed, alpha_0.001-seed0"):
        ask(monkeypatch, "alpha", tmp_path, only=("alpha_0", "alpha_0.001"))
    (row,) = RunDirectory(tmp_path).read_json("alpha.json")["runs"]
    assert row["variant"] == "alpha_0"
    assert "| alpha_0 |" in (tmp_path / "alpha.md").read_text()
    assert (tmp_path / "figures" / "alpha.png").exists()


@pytest.mark.parametrize(
    ("study", "pretrain", "message"),
    [
        (
            "transitions", {"batch_size": 16},
            r"transitions_8 cannot be trained: batch_size should be at most 8, .* got 16",
        ),
        (
            "alpha", {"batch_size": 121},
            r"alpha_0 cannot be trained: batch_size should be at most 120",
        ),
        (
            "components", {"batch_size": 2, "domains": ("dot_red", "dot_red", "dot_blue")},
            r"batches_mixed cannot be trained: batch_size .* the number of domains, 3, .* got 2",
        ),
        (
            "alpha", {"domains": ("dot_red", "dot_green")},
            r"pretrain\.domains should be some of collect\.domains, .*, got dot_green$",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_any_play(
    monkeypatch, tmp_path, study, pretrain, message
):
    stages = replace(STAGES, pretrain=replace(STAGES.pretrain, **pretrain))
    with pytest.raises(ValueError, match=message):
        ask(monkeypatch, study, tmp_path / "run", stages=stages)
    assert not (tmp_path / "run").exists()


def test_as_many_transitions_as_a_batch_are_enough(monkeypatch, tmp_path):
    stages = replace(STAGES, pretrain=replace(STAGES.pretrain, batch_size=120, rounds=1))
    ask(monkeypatch, "alpha", tmp_path / "run", stages=stages, only=("alpha_0",))
    few = small.dataset(tmp_path / "few", replace(small.COLLECT, transitions=100)).path
    with pytest.raises(ValueError, match=r"alpha_0 cannot .* at most 100"):
        ask(monkeypatch, "alpha", tmp_path / "other", stages=stages, dataset=few)
