import importlib.util
import json
import multiprocessing
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import dot_env
import pytest
import small
import torch

from crpt.encoder import Encoder, EncoderConfig, EncoderFileError
from crpt.model_card import write_card
from crpt.pretrain import Trainer
from crpt.probe import Probe, probe
from crpt.replay import ReplayBuffer
from crpt.run_directory import ConfigMismatchError, RunDirectory
from crpt.stages import (
    Context,
    StageOrderError,
    collect_stage,
    evaluate_stage,
    finetune_stage,
    pretrain_stage,
    probe_stage,
)
from crpt.train import train

CPU = torch.device("cpu")


def context(path: Path, **changes) -> Context:
    return replace(Context(RunDirectory(path), 0, progress=False, make_env=dot_env.make), **changes)


def train_whole(path: Path) -> None:
    torch.set_num_threads(1)
    train(context(path), small.STAGES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    return path, train(context(path), small.STAGES)


def test_probes_refuse_frames_that_are_drawn_otherwise(finished, tmp_path):
    encoder = Encoder.from_pretrained(finished[0])
    drawn = small.dataset(tmp_path / "data", replace(small.COLLECT, render="fast"))
    with pytest.raises(ValueError, match="rendered as what the encoder was trained on, exact, got"):
        probe(small.PROBE, drawn, encoder, encoder, seen=(), progress=False)


def test_probes_refuse_frames_of_another_size(finished, tmp_path):
    encoder = Encoder.from_pretrained(finished[0])
    larger = small.dataset(tmp_path / "data", replace(small.COLLECT, image_size=24))
    with pytest.raises(ValueError, match=r"frames .* should be of 20x20, .* got dot_blue \[3, 24"):
        probe(small.PROBE, larger, encoder, encoder, seen=(), progress=False)


def test_another_action_repeat_than_the_encoder_s_is_named(finished, tmp_path, caplog):
    encoder = Encoder.from_pretrained(finished[0])
    slower = replace(small.FINETUNE, action_repeat=3)
    finetune_stage(context(tmp_path / "run", encoder=finished[0]), slower)
    assert "fine-tuning's action_repeat is 3, and the encoder was trained on" in caplog.text
    assert "frames of action_repeat 2" in caplog.text
    caplog.clear()
    play = small.dataset(tmp_path / "data", replace(small.COLLECT, action_repeat=3))
    probe(small.PROBE, play, encoder, encoder, seen=(), progress=False)
    assert (
        "played with action_repeat 3, those that the encoder was trained on with 2" in caplog.text
    )
    caplog.clear()
    finetune_stage(context(tmp_path / "same", encoder=finished[0]), small.FINETUNE)
    play = small.dataset(tmp_path / "same" / "data")
    probe(small.PROBE, play, encoder, encoder, seen=(), progress=False)
    assert not caplog.text


def test_the_run_directory_holds_what_it_promises(finished):
    path, _ = finished
    config = json.loads((path / "config.json").read_text())
    stages = {"collect", "pretrain", "probe", "finetune", "evaluate"}
    assert set(config) == {"seed", "pretrain_input"} | stages
    assert config["pretrain_input"]["dataset"]["dot_red"] == 120
    for line in (path / "metrics.jsonl").read_text().splitlines():
        assert {"stage", "step"} <= set(json.loads(line))
    for name in ("pretrain", "finetune"):
        torch.load(path / "checkpoints" / f"{name}.pt", weights_only=True)
    assert Encoder.from_pretrained(path).frozen
    summary = json.loads((path / "summary.json").read_text())
    assert {p["domain"]: p["seen"] for p in summary["probe"]["domains"]} == {
        "dot_red": True,
        "dot_blue": True,
        "dot_green": False,
    }
    assert summary["evaluation"]["policy"]["episodes"] == 3
    card = (path / "encoder" / "README.md").read_text()
    assert "What it knows" in card
    assert "| domains | dot_blue, dot_red |" in card
    assert (path / "figures" / "probe.png").stat().st_size > 1000


def test_the_summary_names_every_figure(finished):
    _, text = finished
    for word in ("R2 at init", "gain", "rank", "prototypes", "distance", "mean", "unseen"):
        assert word in text
    for word in ("dot_red", "dot_green", "fine-tuned policy", "uniform random policy"):
        assert word in text


def test_running_it_again_gives_the_same_text_and_trains_nothing(finished, monkeypatch):
    path, text = finished

    def never(*args, **kwargs):
        raise AssertionError("worked again")

    monkeypatch.setattr("crpt.pretrain.Trainer.update", never)
    monkeypatch.setattr("crpt.finetune.finetuner.Finetuner.run_episode", never)
    monkeypatch.setattr("crpt.evaluate.evaluate_policy", never)
    assert train(context(path), small.STAGES) == text


def test_another_config_is_refused_and_changes_nothing(finished):
    path, _ = finished
    before = {p: p.read_bytes() for p in path.rglob("*.json")}
    other = replace(small.STAGES, pretrain=replace(small.PRETRAIN, temperature=0.2))
    with pytest.raises(ConfigMismatchError, match=r"pretrain\.temperature: 0\.1 -> 0\.2"):
        train(context(path), other)
    with pytest.raises(ConfigMismatchError, match="seed: 0 -> 1"):
        train(context(path, seed=1), small.STAGES)
    assert {p: p.read_bytes() for p in path.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("pretrain", {"domains": ("dot_green",)}, r"domains should be some .* got dot_green"),
        ("pretrain", {"objective": "byol"}, r"intrinsic_reward should be 0 .* got 0\.2"),
        ("collect", {"image_size": 14}, "image_size should leave at least one pixel .* got 14"),
        ("collect", {"transitions": 15}, r"batch_size should be at most 15, .* got 16"),
        (
            "finetune",
            {"embedding_statistics": "task"},
            "embedding_statistics should be pretraining .* got task",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused_before_the_first(tmp_path, section, changes, message):
    stages = replace(small.STAGES, pretrain=replace(small.PRETRAIN, embedding_norm="none"))
    stages = replace(stages, **{section: replace(getattr(stages, section), **changes)})
    with pytest.raises(ValueError, match=message):
        train(context(tmp_path), stages)
    assert not list(tmp_path.iterdir())


def test_stages_run_alone_make_the_same_run(finished, tmp_path):
    path, _ = finished
    c = context(tmp_path)
    collect_stage(c, small.COLLECT)
    pretrain_stage(c, small.PRETRAIN)
    probe_stage(c, small.PROBE)
    finetune_stage(c, small.FINETUNE)
    evaluate_stage(c, small.STAGES.evaluate, small.FINETUNE)
    for name in ("probe.json", "evaluation.json", "metrics.jsonl"):
        assert (tmp_path / name).read_text() == (path / name).read_text(), name


def test_a_stage_says_which_one_it_needs(tmp_path):
    c = context(tmp_path)
    with pytest.raises(StageOrderError, match=r"python -m crpt\.collect --run-dir"):
        pretrain_stage(c, small.PRETRAIN)
    for stage, config in ((probe_stage, small.PROBE), (finetune_stage, small.FINETUNE)):
        with pytest.raises(StageOrderError, match=r"python -m crpt\.pretrain --run-dir"):
            stage(c, config)
    with pytest.raises(StageOrderError, match=r"python -m crpt\.finetune --run-dir"):
        evaluate_stage(c, small.STAGES.evaluate, small.FINETUNE)


def test_another_dataset_under_a_begun_pre_training_is_refused(finished, tmp_path):
    path, _ = finished
    other = replace(small.COLLECT, domains=("dot_green",))
    small.dataset(tmp_path / "other", other)
    with pytest.raises(
        ConfigMismatchError, match=r"pretrain_input\.dataset\.dot_green: None -> 120"
    ):
        pretrain_stage(context(path, dataset=tmp_path / "other"), small.PRETRAIN)


def test_a_run_that_lost_its_newest_checkpoint_goes_on_from_the_one_before(tmp_path):
    config = replace(small.PRETRAIN, keep_checkpoints=2)
    small.dataset(tmp_path / "dataset")
    encoder = pretrain_stage(context(tmp_path), config)
    newest = f"pretrain-{config.rounds:09d}.pt"
    for name in ("pretrain.pt", newest):
        (tmp_path / "checkpoints" / name).unlink()
    again = pretrain_stage(context(tmp_path), config)
    assert torch.equal(again.projector.weight, encoder.projector.weight)
    assert (tmp_path / "checkpoints" / newest).exists()


def test_an_encoder_is_adopted_once_and_never_exchanged(finished, tmp_path):
    path, _ = finished
    c = context(tmp_path / "run", encoder=path / "encoder")
    finetune_stage(c, small.FINETUNE)
    own = Encoder.from_pretrained(tmp_path / "run")
    assert own.metadata == Encoder.from_pretrained(path).metadata
    assert (
        "# Visual encoder for control" in (tmp_path / "run" / "encoder" / "README.md").read_text()
    )
    evaluate_stage(context(tmp_path / "run"), small.STAGES.evaluate, small.FINETUNE)
    with torch.no_grad():
        own.projector.weight.mul_(2)
    own.save_pretrained(tmp_path / "other")
    for stage, config in ((probe_stage, small.PROBE), (finetune_stage, small.FINETUNE)):
        with pytest.raises(ConfigMismatchError, match="holds another encoder than"):
            stage(context(tmp_path / "run", encoder=tmp_path / "other"), config)
    small.dataset(tmp_path / "run" / "dataset")
    with pytest.raises(ConfigMismatchError, match="holds an encoder that was trained elsewhere"):
        pretrain_stage(context(tmp_path / "run"), small.PRETRAIN)


def test_an_encoder_without_its_history_is_named(tmp_path):
    Encoder(EncoderConfig(image_size=20, projection_dim=16)).save_pretrained(tmp_path / "e")
    with pytest.raises(EncoderFileError, match="domains, seed, render, action_repeat is missing"):
        probe_stage(context(tmp_path, encoder=tmp_path / "e"), small.PROBE)


def test_a_longer_trained_agent_or_more_episodes_are_evaluated_again(finished, tmp_path):
    path, _ = finished
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(path, run.path)
    first = run.read_json("evaluation.json")
    run.write_json("evaluation.json", first | {"agent_steps": 108})
    c = context(run.path)
    assert evaluate_stage(c, small.STAGES.evaluate, small.FINETUNE) == first
    more = evaluate_stage(c, replace(small.STAGES.evaluate, episodes=4), small.FINETUNE)
    assert more["policy"]["episodes"] == 4
    assert more["policy"]["returns"][:3] == first["policy"]["returns"]


def test_every_environment_is_made_as_its_stage_says(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("crpt.collect.os.sched_getaffinity", lambda process: {0})  # no workers
    made = []

    def make(domain, **settings):
        made.append((domain, settings["render"], settings["action_repeat"]))
        return dot_env.make(domain, **settings)

    stages = replace(
        small.STAGES,
        collect=replace(small.COLLECT, render="fast", action_repeat=3),
        finetune=replace(small.FINETUNE, action_repeat=2),
    )
    train(context(tmp_path, make_env=make), stages)
    # Told before hours are spent, and again.
    assert caplog.text.count("fine-tuning's action_repeat is 2, and the encoder was trained") == 2
    played = [("dot_red", "fast", 3), ("dot_blue", "fast", 3)]
    assert made[:2] == played
    assert sorted(made[2:5]) == sorted([*played, ("dot_green", "fast", 3)])
    assert set(made[5:]) == {("dot_red", "fast", 2)}


def test_what_is_measured_is_not_what_was_trained_on(finished):
    path, _ = finished
    trained, probed = (ReplayBuffer.open(path / d) for d in ("dataset", "probe_dataset"))
    a, b = (set(map(bytes, x.arrays("dot_red")["states"])) for x in (trained, probed))
    assert not a & b


def test_probes_compare_with_the_encoder_that_training_began_with(finished, monkeypatch):
    path, _ = finished
    compared = []

    def recorded(config, dataset, encoder, initial, **options):
        compared.append(initial)
        return Probe([], [], {"dot_red": torch.randn(5, 4)}, torch.zeros(0, 4))

    monkeypatch.setattr("crpt.stages.probe", recorded)
    (path / "probe.json").rename(path / "kept.json")
    try:
        probe_stage(context(path), small.PROBE)
    finally:
        (path / "kept.json").rename(path / "probe.json")
    trainer = Trainer(small.PRETRAIN, ReplayBuffer.open(path / "dataset"), seed=0, device=CPU)
    begun = trainer.model.online.state_dict()
    assert all(
        torch.equal(compared[0].state_dict()[k], begun[k]) for k in begun if k != "prototypes"
    )


def test_probes_of_chosen_domains_know_which_were_seen(finished, tmp_path):
    def probed(*names):
        config = replace(small.PROBE, domains=names)
        result = probe_stage(context(tmp_path / "run", encoder=finished[0]), config)
        return {row["domain"]: row["seen"] for row in result["domains"]}

    assert probed("dot_green", "dot_red") == {"dot_green": False, "dot_red": True}
    assert probed("dot_blue") == {"dot_blue": True}  # of a dataset that has the others, too
    assert probed() == {"dot_blue": True, "dot_green": False, "dot_red": True}
    kept = RunDirectory(tmp_path / "run").read_json("probe.json")
    assert kept is not None
    assert len(kept["domains"]) == 2 * 3  # for z and for h


def test_the_table_goes_to_the_card_of_the_copy_and_what_was_named_stays(finished, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(finished[0] / "encoder", named)
    write_card(Encoder.from_pretrained(named), named)
    before = {path: path.read_bytes() for path in named.iterdir()}
    probe_stage(context(tmp_path / "run", encoder=named), small.PROBE)
    assert {path: path.read_bytes() for path in named.iterdir()} == before
    own = tmp_path / "run" / "encoder"
    assert "What it knows" in (own / "README.md").read_text()
    assert {path.name for path in own.iterdir()} == {path.name for path in named.iterdir()}


def test_a_picture_that_could_not_be_drawn_is_drawn_later(finished, tmp_path, monkeypatch, caplog):
    run = RunDirectory(tmp_path / "run")
    picture, figures = run.path / "figures" / "probe.png", run.path / "probe.json"

    def probed(*names):
        config = replace(small.PROBE, domains=names)
        return probe_stage(context(run.path, encoder=finished[0]), config)

    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        first = probed("dot_red")
        measured = figures.stat().st_mtime_ns
        assert probed("dot_red") == first
        assert caplog.text.count("not drawn, for want of matplotlib") == 2
        assert not picture.exists()
    assert probed("dot_red") == first
    assert picture.stat().st_size > 1000
    assert figures.stat().st_mtime_ns == measured
    with monkeypatch.context() as patch:
        patch.setattr("crpt.figures.available", lambda path: False)
        probed("dot_blue")
    assert not picture.exists()  # rather than one of other domains


def test_kill_9_at_any_moment_and_the_same_command_ends_as_if_never_killed(finished, tmp_path):
    path, _ = finished
    # Forked from a server that has imported everything: what is killed is the run, not an import.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    server.Process(target=time.sleep, args=(0,)).start()
    rng = random.Random(0)
    kills = 0
    for attempt in range(9):
        process = server.Process(target=train_whole, args=(tmp_path,))
        process.start()
        # Later each time, so that every stage is hit; on a busy machine the last one runs on.
        patience = rng.uniform(0.1, 0.4) + 0.3 * attempt
        process.join(patience if attempt < 8 else None)
        if not process.is_alive():
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
    else:
        pytest.fail("never finished")
    assert kills > 0
    for name in ("probe.json", "evaluation.json", "summary.json", "metrics.jsonl"):
        assert (tmp_path / name).read_text() == (path / name).read_text(), name
