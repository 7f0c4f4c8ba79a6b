import re
import sys
from dataclasses import fields, replace

import dot_env
import pytest
import small
import torch
from matplotlib.figure import Figure

from crpt.ablate import __main__ as command
from crpt.ablate import pictures, report, running
from crpt.ablate.studies import ALPHAS, STUDIES, Variant, alpha, components, objectives, single
from crpt.config import PRESETS
from crpt.encoder import Encoder
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


def found(variant, trained_on, gains, seed=0, x=None):
    """What a run would have left, init's R2 being 0.1 everywhere."""
    figures = {"variant": variant, "x": x, "seed": seed, "trained_on": trained_on}
    groups = {"seen": trained_on, "unseen": [name for name in gains if name not in trained_on]}
    for group, names in groups.items():
        mean = sum(gains[name] for name in names) / len(names)
        figures |= {f"z_{group}": 0.1 + mean, f"z_{group}_gain": mean}
    return figures | {"z_gains": gains, "z_domains": {n: 0.1 + g for n, g in gains.items()}}


def drawn(draw, rows):
    figure = Figure()
    draw(figure, rows)
    return figure.axes


def lines_of(axes):
    """What is drawn by label: means, and their deviations."""
    lines = {}
    for container in axes.containers:
        line, _, (deviations,) = container
        ends = [segment[:, 1] for segment in deviations.get_segments()]
        points = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        lines[container.get_label()] = points, [(high - low) / 2 for low, high in ends]
    return lines


def bars_of(axes):
    labels = [text.get_text().partition("\n")[0] for text in axes.get_yticklabels()]
    return {
        c.get_label(): dict(zip(labels, (bar.get_width() for bar in c), strict=True))
        for c in axes.containers
        if c.get_label() in ("one domain alone", "all together", "seen domains", "unseen domains")
    }


def test_curves_show_means_and_deviations_over_the_seeds():
    rows = [
        found(f"alpha_{x}", ["a"], {"a": x + 0.2 * seed, "b": 2 * x}, seed, x)
        for x in (0.0, 0.1)
        for seed in (0, 1)
    ]
    for row in rows:
        row |= {"prototype_similarity_mean": -row["x"], "prototype_similarity_max": 0.5}
    probes, coverage = drawn(STUDIES["alpha"].draw, rows)
    seen, deviations = lines_of(probes)["seen domains"]
    assert seen == pytest.approx({0.0: 0.2, 0.1: 0.3})
    assert deviations == pytest.approx([0.1, 0.1])
    assert lines_of(probes)["unseen domains"][0] == pytest.approx({0.0: 0.1, 0.1: 0.3})
    mean, _ = lines_of(coverage)["mean cosine of two prototypes"]
    assert mean == pytest.approx({0.0: 0.0, 0.1: -0.1})
    assert lines_of(coverage)["largest"][0] == pytest.approx({0.0: 0.5, 0.1: 0.5})


def test_more_domains_are_judged_domain_by_domain():
    """The mean over the domains that are trained on is that of other domains in every variant:
    equal gains of each domain are level curves."""
    level = {"a": 0.6, "b": 0.1, "c": 0.3, "d": 0.2, "e": 0.4}
    rows = [
        found(f"domains_{n}", ["a", "b", "c"][:n], level, seed, n)
        for n in (1, 2, 3)
        for seed in (0, 1)
    ]
    (axes,) = drawn(STUDIES["domains"].draw, rows)
    curves = lines_of(axes)
    for name, gain in level.items():
        assert curves[name][0] == pytest.approx({1: gain, 2: gain, 3: gain})
    assert curves["mean of those never trained on"][0] == pytest.approx({1: 0.3, 2: 0.3, 3: 0.3})
    filled = [line for line in axes.lines if line.get_linestyle() == "None"]
    at = [line.get_xdata() for line in filled if line.get_marker() == "o"]
    assert [list(x) for x in at] == [[1, 2, 3], [2, 3], [3]]
    lines = report.table(rows).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    assert heads[1:] == [
        "variant", "R2 of z, unseen by all", "gain", "a", "gain", "b", "gain", "c", "gain",
        "d", "gain", "e", "gain", "",
    ]  # fmt: skip
    second = [cell.strip() for cell in lines[3].split("|")]
    assert second[1:4] == ["domains_2", "0.400 ± 0.000", "+0.300 ± 0.000"]
    assert second[6:10] == ["**0.200 ± 0.000**", "**+0.100 ± 0.000**", "0.400 ± 0.000",
                            "+0.300 ± 0.000"]  # fmt: skip


def test_each_domain_alone_is_beside_itself_among_all():
    gains = {  # of a, b and the unseen c, by what is trained on
        "a": {"a": 0.5, "b": 0.1, "c": 0.0},
        "b": {"a": 0.2, "b": 0.3, "c": 0.2},
        "all_domains": {"a": 0.6, "b": 0.2, "c": 0.4},
    }
    rows = [
        found(name, ["a", "b"] if name == "all_domains" else [name], of, seed)
        for name, of in gains.items()
        for seed in (0, 1)
    ]
    (axes,) = drawn(STUDIES["single"].draw, rows)
    assert bars_of(axes) == {
        "one domain alone": pytest.approx({"a": 0.5, "b": 0.3, "c": 0.1}),
        "all together": pytest.approx({"a": 0.6, "b": 0.2, "c": 0.4}),
    }
    assert "mean over one-domain encoders" in axes.get_yticklabels()[2].get_text()
    assert "seen |" not in report.table(rows)


def test_variants_have_a_bar_each_for_seen_and_unseen():
    rows = [found("one", ["a"], {"a": 0.5, "b": 0.1}), found("two", ["a"], {"a": 0.4, "b": -0.2})]
    (axes,) = drawn(STUDIES["components"].draw, rows)
    assert bars_of(axes) == {
        "seen domains": pytest.approx({"one": 0.5, "two": 0.4}),
        "unseen domains": pytest.approx({"one": 0.1, "two": -0.2}),
    }
    heads = report.table(rows).splitlines()[0].replace(" | gain", "+")
    assert heads == "| variant | R2 of z, seen+ | R2 of z, unseen+ | a+ | b+ |"


@pytest.mark.parametrize("name", ["alpha", "domains", "single", "components"])
def test_a_figure_is_written(measured, name, tmp_path):
    _, rows = measured
    pictures.save(STUDIES[name].draw, rows, tmp_path / "figures" / "a.png")
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


def test_more_unseen_domains_are_probed_without_training_again(context, monkeypatch):
    variants = alpha(STAGES)[:1]
    (row,) = study(variants, context)
    monkeypatch.setattr(Trainer, "update", None)
    more = replace(STAGES, probe=replace(STAGES.probe, unseen=("dot_green", "dot_white")))
    (again,) = running.run_study(variants, more, context, seeds=(0,), jobs=1)
    assert again["z_domains"] == row["z_domains"] | {"dot_white": again["z_domains"]["dot_white"]}
    assert study(variants, context)[0]["z_unseen"] == row["z_unseen"]


def test_one_domain_has_nothing_to_be_set_beside():
    with pytest.raises(ValueError, match="domains should be at least 2 for single, got dot_red"):
        single(collecting(domains=("dot_red",)))
