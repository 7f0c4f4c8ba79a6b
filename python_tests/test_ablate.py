import re
import sys
from dataclasses import fields, replace

import dot_env
import pytest
import small
import torch

from crpt.ablate import __main__ as command
from crpt.ablate import report, running
from crpt.ablate.studies import ALPHAS, STUDIES, Variant, alpha, components, objectives, single
from crpt.config import PRESETS
from crpt.pretrain import Trainer
from crpt.run_directory import RunDirectory
from crpt.stages import Context

STAGES = replace(small.STAGES, probe=replace(small.PROBE, episodes=5, folds=2))


@pytest.fixture
def context(tmp_path):
    return Context(RunDirectory(tmp_path), 0, progress=False, make_env=dot_env.make)


def study(variants, context, seeds=(0,), jobs=1):
    return running.run_study(variants, STAGES, context, seeds=seeds, jobs=jobs)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two variants with two seeds: the context, and the rows."""
    path = tmp_path_factory.mktemp("measured")
    context = Context(RunDirectory(path), 0, progress=False, make_env=dot_env.make)
    return context, study(alpha(STAGES)[:2], context, seeds=(0, 1))


def differing(a, b) -> set[str]:
    return {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}


@pytest.mark.parametrize("preset", PRESETS)
def test_components_change_one_thing_at_a_time(preset):
    base = PRESETS[preset].pretrain
    variants = {v.name: v.config for v in components(PRESETS[preset])}
    assert variants.pop("as_it_is") == base
    assert differing(variants.pop("paper"), PRESETS["paper"].pretrain) <= {
        "rounds", "batch_size", "precision", "log_every", "checkpoint_every",
    }  # fmt: skip
    for name, config in variants.items():
        (field,) = differing(config, base)
        assert name in (f"{field}_{getattr(config, field)}", str(config.objective)) or (
            name == f"{field}_{getattr(config, field):g}"
        )
    changed = {next(iter(differing(config, base))) for config in variants.values()}
    assert changed >= {
        "embedding_norm", "batches", "learning_rate", "schedule", "temperature", "target_rate",
        "sinkhorn_iterations", "projection_dim", "shift_pad", "prototypes", "objective",
    }  # fmt: skip


def test_alone_and_together_get_as_many_updates():
    stages = PRESETS["quick"]
    *alone, together = single(stages)
    assert [v.config.domains for v in alone] == [(d,) for d in stages.collect.domains]
    assert {v.config.rounds * len(v.config.domains) for v in [*alone, together]} == {300}
    names = [v.config.domains for v in STUDIES["domains"].variants(stages)]
    assert names == [stages.collect.domains[:n] for n in (1, 2, 3)]


def test_alpha_and_transitions_have_their_place_on_the_axis():
    stages = PRESETS["quick"]
    assert [v.config.intrinsic_weight for v in alpha(stages)] == [v.x for v in alpha(stages)]
    assert ALPHAS[0] == 0
    assert ALPHAS[-1] == 0.1
    counts = [v.transitions for v in STUDIES["transitions"].variants(stages)]
    assert counts == [v.x for v in STUDIES["transitions"].variants(stages)]
    assert counts[-1] == stages.collect.transitions
    assert counts == sorted(set(counts))


def test_every_objective_is_trained_and_probed_and_tabled(context):
    rows = study(objectives(STAGES), context)
    assert [row["variant"] for row in rows] == ["crptpro", "atc", "byol", "autoencoder", "proto_rl"]
    for row in rows:
        assert row["updates"] == 12
        assert set(row["z_domains"]) == {"dot_red", "dot_blue", "dot_green"}
        seen = [row["z_domains"][name] for name in ("dot_red", "dot_blue")]
        assert row["z_seen"] == pytest.approx(sum(seen) / 2)
        assert row["z_unseen"] == row["z_domains"]["dot_green"]
    assert "prototypes_in_use" in rows[0]
    assert "prototypes_in_use" not in rows[1]
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert f"| crptpro | {rows[0]['z_seen']:.3f} |" in lines[2]


def test_what_is_measured_is_not_measured_again(measured, monkeypatch):
    variants = alpha(STAGES)[:2]
    context, rows = measured
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("alpha_0", 0), ("alpha_0", 1), ("alpha_0.001", 0), ("alpha_0.001", 1)
    ]  # fmt: skip
    assert rows[0]["z_seen"] != rows[1]["z_seen"]

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(Trainer, "update", never)
    assert study(variants, context, seeds=(0, 1)) == rows
    other = replace(variants[0], config=replace(variants[0].config, temperature=0.3))
    with pytest.raises(RuntimeError, match=r"(?s)ConfigMismatch.*temperature: 0\.1 -> 0\.3"):
        study([other], context)
    play = small.dataset(context.run.path / "other", replace(small.COLLECT, transitions=80)).path
    with pytest.raises(RuntimeError, match=r"(?s)ConfigMismatch.*dataset\.dot_red: 120 -> 80"):
        study(variants[:1], replace(context, dataset=play))


def test_one_that_fails_leaves_the_others(context, monkeypatch):
    variants = alpha(STAGES)[:2]
    update = Trainer.update

    def failing(self, domains):
        if self.config.intrinsic_weight > 0:
            raise OSError("as if the disk were full")
        return update(self, domains)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", failing)
        with pytest.raises(RuntimeError, match=r"1 of 2 runs failed, alpha_0.001-seed0; .* disk"):
            study(variants[::-1], context)
    assert (context.run.path / "runs" / "alpha_0-seed0" / "figures.json").exists()
    assert [row["variant"] for row in study(variants, context)] == ["alpha_0", "alpha_0.001"]


def untimed(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


@pytest.mark.slow
def test_processes_find_what_one_finds(context, tmp_path):
    variants = alpha(STAGES)[:3]
    torch.set_num_threads(1)
    alone = study(variants, context)
    elsewhere = replace(context, run=RunDirectory(tmp_path / "jobs"))
    together = study(variants, elsewhere, jobs=64)  # one thread each
    assert untimed(together) == untimed(alone)


def test_fewer_transitions_are_the_first_of_more(context):
    rows = study(
        [Variant("few", small.PRETRAIN, 40, 40), Variant("all", small.PRETRAIN, 120, 120)], context
    )
    few, all_ = (
        running.ReplayBuffer.open(context.run.path / name) for name in ("dataset_40", "dataset")
    )
    for domain in ("dot_red", "dot_blue"):
        head = few.cursor(domain)
        assert head < all_.cursor(domain)
        frames = [buffer.arrays(domain)["frames"][:head] for buffer in (few, all_)]
        assert (frames[0] == frames[1]).all()
    assert [row["x"] for row in rows] == [40, 120]


@pytest.mark.parametrize("axis", ["intrinsic weight", None])
def test_a_figure_is_drawn(measured, axis, tmp_path):
    _, rows = measured
    report.draw(rows, axis, tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").stat().st_size > 1000
    table = report.table(rows)
    assert table.count("±") > 4
    assert len(table.splitlines()) == 4


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


def test_the_command_leaves_table_json_and_figure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("crpt.stages.envs.require_known", lambda name: None)
    monkeypatch.setattr(command.cli, "context", lambda arguments, dataset: Context(
        RunDirectory(arguments.run_dir), arguments.seed, progress=False, make_env=dot_env.make
    ))  # fmt: skip
    arguments = command.AblateArguments("quick", tmp_path, "cpu", config=STAGES, only=("alpha_0",))
    text = command.ablate("alpha", arguments)
    assert (tmp_path / "alpha.md").read_text() == text + "\n"
    found = RunDirectory(tmp_path).read_json("alpha.json")
    assert [row["variant"] for row in found["runs"]] == ["alpha_0"]
    assert (tmp_path / "figures" / "alpha.png").exists()
