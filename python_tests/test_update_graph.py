"""Recorded updates: when they are recorded, what they return, and what happens where they cannot
be."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import recorded
import small
import torch

from crpt.pretrain import Trainer
from crpt.pretrain.update_graph import WARM_UP, CaptureWarning, UpdateGraphs
from crpt.pretrain.watch import FiniteWatch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def test_the_first_calls_of_a_key_are_done_as_written_and_the_others_replayed():
    recorder = recorded.Emulated()
    seen = []
    graphs = UpdateGraphs(recorder, lambda key: seen.append(key) or len(seen))
    for i in range(WARM_UP + 2):
        assert graphs("a") == i + 1
    assert (recorder.done_aside, recorder.replays, graphs.recorded) == (WARM_UP, 2, 1)
    graphs("b")
    assert (recorder.done_aside, recorder.replays) == (WARM_UP + 1, 2)
    graphs.forget()
    graphs("a")
    assert (recorder.done_aside, recorder.replays, graphs.recorded) == (WARM_UP + 2, 2, 0)
    assert seen == ["a"] * (WARM_UP + 2) + ["b", "a"]


def test_work_that_cannot_be_recorded_is_done_as_written_with_one_warning():
    class Refuses(recorded.Emulated):
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = Refuses()
    graphs = UpdateGraphs(recorder, lambda key: key)
    with pytest.warns(CaptureWarning, match="slower: operation not permitted when stream is capt"):
        results = [graphs("a") for _ in range(WARM_UP + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results += [graphs(key) for key in ("b", "a", "b", "b", "b", "b")]
    assert results == list("aaaababbbb")
    assert recorder.done_aside == len(results)


def test_memory_that_runs_out_while_recording_is_no_reason_to_go_on():
    class Full(recorded.Emulated):
        def record(self, work):
            raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = UpdateGraphs(Full(), lambda key: key)
    for _ in range(WARM_UP):
        graphs("a")
    with pytest.raises(torch.OutOfMemoryError):
        graphs("a")


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_replayed_updates_are_those_that_are_written(buffer, batches):
    config = replace(small.PRETRAIN, batches=batches)
    plain = Trainer(config, buffer, seed=3, device=CPU)
    replayed = Trainer(config, buffer, seed=3, device=CPU)
    recorder = recorded.Emulated()
    replayed.replay_updates(recorder)
    for _ in range(WARM_UP + 2):
        for domains in plain.batches():
            a, b = plain.update(domains), replayed.update(domains)
            assert not b.total.requires_grad
            assert torch.equal(a.total, b.total)
            assert a.parts.keys() == b.parts.keys()
            assert torch.equal(a.parts["intrinsic_loss"], b.parts["intrinsic_loss"])
            assert torch.equal(a.distance, b.distance)
            assert torch.equal(a.z, b.z)
            assert torch.equal(a.codes, b.codes)
            assert plain.gradient_norm() == replayed.gradient_norm()
    assert recorder.replays > 0
    state = replayed.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.model.state_dict().items())


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_what_an_update_returned_lasts_as_long_as_a_round(buffer, batches):
    class InPlace(recorded.Emulated):
        """The same tensors each time, as in a graph."""

        def record(self, work):
            held = {}

            def replay():
                work()
                for key, new in graphs._results.items():
                    old = held.setdefault(key, new)
                    if new is not old:
                        old.numbers.copy_(new.numbers)
                        old.losses.z.copy_(new.losses.z)
                        old.losses.codes.copy_(new.losses.codes)
                        graphs._results[key] = old

            return replay

    trainer = Trainer(replace(small.PRETRAIN, batches=batches), buffer, seed=3, device=CPU)
    trainer.replay_updates(InPlace())
    graphs = trainer._graphs
    for _ in range(WARM_UP):
        for domains in trainer.batches():
            trainer.update(domains)
    kept, rounds = [], []
    for _ in range(3):
        losses = [trainer.update(domains) for domains in trainer.batches()]
        rounds.append(losses)
        kept.append([[x.clone() for x in (o.total, o.distance, o.z, o.codes)] for o in losses])
        for loss, copies in zip(losses, kept[-1], strict=True):
            assert torch.equal(loss.z, copies[2])
            assert torch.equal(loss.codes, copies[3])
    assert not torch.equal(kept[0][0][2], kept[0][1][2])
    for losses, copies in zip(rounds, kept, strict=True):
        for loss, (total, distance, *_) in zip(losses, copies, strict=True):
            assert torch.equal(loss.total, total)
            assert torch.equal(loss.distance, distance)


def test_a_restored_state_is_recorded_anew(buffer):
    trainer = Trainer(small.PRETRAIN, buffer, seed=3, device=CPU)
    recorder = recorded.Emulated()
    trainer.replay_updates(recorder)
    for _ in range(WARM_UP + 1):
        trainer.update(("dot_red",))
    assert recorder.replays == 1
    trainer.load_state(trainer.state())
    trainer.update(("dot_red",))
    assert (recorder.replays, recorder.done_aside) == (1, WARM_UP + 1)


def test_the_watch_remembers_the_first_update_that_went_wrong():
    watch = FiniteWatch(CPU)
    for loss in (1.0, 2.0):
        watch.observe(torch.tensor(loss, requires_grad=True))
    assert watch.first_bad() is None
    for loss in (float("inf"), 1.0, float("nan")):
        watch.observe(torch.tensor(loss))
    assert watch.first_bad() == 3
    watch.restart(40)
    assert watch.first_bad() is None
    watch.observe(torch.tensor(float("nan")))
    assert watch.first_bad() == 41
