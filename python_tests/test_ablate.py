from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from types import SimpleNamespace

import dot_env
import pytest
import small
import torch

from crpt.ablate import report, running, task
from crpt.ablate.studies import ALPHAS, STUDIES, Variant, alpha, components, objectives, single
from crpt.config import PRESETS
from crpt.encoder import Encoder
from crpt.objectives import OBJECTIVES
from crpt.pretrain import Trainer
from crpt.run_directory import ConfigMismatchError, RunDirectory
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
    assert [row["variant"] for row in rows] == [*OBJECTIVES, "proto_rl"]
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
    with pytest.raises(ConfigMismatchError, match=r"temperature: 0\.1 -> 0\.3"):
        study([other], context)
    play = small.dataset(context.run.path / "other", replace(small.COLLECT, transitions=80)).path
    with pytest.raises(ConfigMismatchError, match=r"dataset\.dot_red: 120 -> 80"):
        study(variants[:1], replace(context, dataset=play))


def test_what_variants_begin_with_is_measured_once_a_seed(context, monkeypatch):
    measure, measured = task.measure, []

    def counted(config, dataset, encoder, domains, **options):
        measured.append(encoder.config.projection_dim)
        return measure(config, dataset, encoder, domains, **options)

    monkeypatch.setattr(task, "measure", counted)
    wide = Variant("wide", replace(small.PRETRAIN, projection_dim=24), 120)
    rows = study([*alpha(STAGES)[:2], wide], context, seeds=(0, 1))
    assert measured == [16, 24, 16, 24]
    assert rows == study([*alpha(STAGES)[:2], wide], context, seeds=(0, 1))


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


def test_a_run_leaves_an_encoder_and_no_weights_beside_it(context, monkeypatch):
    """An optimiser's state is three times the encoder, and a study trains dozens."""
    kept = []
    save = RunDirectory.save_checkpoint

    def counting(run, *args, **options):
        save(run, *args, **options)
        kept.append(len(list(run.checkpoint_dir.iterdir())))

    monkeypatch.setattr(RunDirectory, "save_checkpoint", counting)
    (row,) = study(alpha(STAGES)[:1], context)
    run = context.run.path / "runs" / "alpha_0-seed0"
    encoder = Encoder.from_pretrained(run / "encoder")
    assert encoder.metadata["updates"] == row["updates"]
    assert len(kept) == 4
    assert max(kept) == 1
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.stat().st_size < 10_000
    assert {path.name for path in run.iterdir()} >= {"probe.json", "figures.json"}
    # A run that was killed between the two.
    (run / "figures.json").unlink()
    monkeypatch.setattr(Trainer, "update", None)
    assert untimed(study(alpha(STAGES)[:1], context)) == untimed([row])


def test_workers_keep_freed_memory(monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, mp_context, **options):
            super().__init__(workers, **options)

    told = []
    monkeypatch.setattr(running, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(running, "keep_freed_memory", lambda: told.append("keep"))
    monkeypatch.setattr(running, "train_and_probe", lambda task: {"task": task, "told": [*told]})
    task = SimpleNamespace(seed=0)
    with running._submitted([task], jobs=2) as results:
        assert [get() for _, get in results] == [{"task": task, "told": ["keep"]}]


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


def test_the_table_is_of_means_over_seeds(measured):
    _, rows = measured
    table = report.table(rows)
    assert table.count("±") > 4
    assert len(table.splitlines()) == 4


@pytest.mark.parametrize("study", [alpha, components, objectives])
def test_all_variants_are_trained_on_the_domains_that_are_asked_for(study):
    asked = replace(STAGES.pretrain, domains=("dot_red", "dot_blue"), weights=(1, 2))
    configs = [variant.config for variant in study(replace(STAGES, pretrain=asked))]
    assert {config.domains for config in configs} == {("dot_red", "dot_blue")}
    assert {config.weights for config in configs} == {(1, 2)}


def test_a_domain_that_is_named_twice_keeps_both_weights():
    asked = replace(STAGES.pretrain, domains=("dot_red", "dot_blue", "dot_blue"), weights=(1, 2, 3))
    together = single(replace(STAGES, pretrain=asked))[-1].config
    weights = dict(zip(together.domains, together.weights, strict=True))
    assert weights["dot_blue"] == 5 * weights["dot_red"]


def test_more_unseen_domains_are_probed_without_training_again(context, monkeypatch):
    variants = alpha(STAGES)[:1]
    (row,) = study(variants, context)
    monkeypatch.setattr(Trainer, "update", None)
    more = replace(STAGES, probe=replace(STAGES.probe, unseen=("dot_green", "dot_white")))
    (again,) = running.run_study(variants, more, context, seeds=(0,), jobs=1)
    assert again["z_domains"] == row["z_domains"] | {"dot_white": again["z_domains"]["dot_white"]}
    assert again["pretrain_seconds"] == row["pretrain_seconds"] > 0
    assert study(variants, context)[0]["z_unseen"] == row["z_unseen"]


def test_domains_that_are_trained_on_may_be_chosen():
    stages = replace(STAGES, pretrain=replace(STAGES.pretrain, domains=("dot_blue", "dot_blue")))
    stages = replace(stages, collect=replace(stages.collect, domains=("a", "dot_blue")))
    (variant,) = STUDIES["domains"].variants(stages)
    assert variant.config.domains == ("dot_blue",)
    assert variant.config.rounds == 2 * STAGES.pretrain.rounds


def test_one_domain_has_nothing_to_be_set_beside():
    with pytest.raises(ValueError, match="domains should be at least 2 for single, got dot_red"):
        single(replace(STAGES, collect=replace(STAGES.collect, domains=("dot_red",))))
