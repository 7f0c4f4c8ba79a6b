"""The rows of the operators' bench, checked at reduced size; no time is asserted."""

import dataclasses
import json
from functools import lru_cache

import pytest
import torch
from torch import nn

from crpt.bench import ops as bench
from crpt.bench import ops_rows
from crpt.bench.limits import Limit, Limits, Work
from crpt.bench.ops_report import COLUMNS, Result, cells, document, notes
from crpt.bench.ops_rows import Row, rows
from crpt.bench.table import Table
from crpt.bench.timing import Timing
from crpt.config import PretrainConfig
from crpt.objectives.crptpro import CRPTPro

CPU = torch.device("cpu")
CACHE = 1 << 20
SMALL = rows(shrink=16)
EVERY_ROW = pytest.mark.parametrize("row", SMALL, ids=[row.name for row in SMALL])
ARGUMENTS = bench.OpsArguments(device="cpu", compile=False, seconds=1e-3, retries=0)

DESCRIBED = {"seconds": 99.0, "gemm": "oneDNN's linear"}


@lru_cache
def limits(device: torch.device) -> Limits:
    return Limits(device)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch):
    """The sets of inputs that do not fit into its cache are made in no time, and so is the GEMM
    that rows are held against."""
    monkeypatch.setattr("crpt.bench.limits._GEMM_SIZE", {"cpu": 128, "cuda": 8192})
    monkeypatch.setattr("crpt.bench.limits._CHOICE_SECONDS", 1e-3)
    for module in ("machine", "limits", "ops_rows"):
        monkeypatch.setattr(f"crpt.bench.{module}.last_level_cache", lambda device: CACHE)
    ops_rows._store.cache_clear()
    yield
    ops_rows._store.cache_clear()


def measure(row: Row, device: torch.device = CPU) -> list[Result]:
    return list(bench.measure(row, device, limits(device), ARGUMENTS))


def result(row: Row = SMALL[0], **times: float) -> Result:
    sides = {k: Timing(t, 0.9 * t, 1.2 * t, 5, 1) for k, t in times.items()}
    return Result(row, "cold", sides, Limit(1e-3, "copy", 8e10, None), sets=3, others=0.0)


def test_every_operator_and_size_of_the_claims_is_there():
    names = {row.name for row in rows()}
    assert len(names) == len(rows())
    assert names >= {
        "sinkhorn 512x512 fp32",
        "sinkhorn 8x512x512 fp32",
        "sinkhorn 64x256x512 fp32",
        "prototype_loss 512x512 fp32",
        "prototype_loss 4096x2048 fp32",
        "intrinsic_loss 512x128 fp32",
        "objective 512x128x512 fp32",
        "random_shift 512x9x84x84 uint8",
        "random_shift 512x9x84x84 fp32",
        "frame_stack 512x3x3x84x84 fp32",
        "frame_stack 512x3x3x84x84 bf16",
        "frame_stack 512x3x3x84x84 uint8",
        "knn_distance 512x2048x128 fp32",
        "knn_distance 512x2048x128 close fp32",
    }


@EVERY_ROW
def test_a_row_is_right_and_measured(row):
    lines = measure(row)
    assert [line.inputs for line in lines] == ["cold", "warm"]  # small enough for any cache
    for line in lines:
        assert not line.wrong
        gemm = {"gemm"} if row.work.flops else set()
        assert set(line.sides) == {"ours", "twin", "usual", "copy"} | gemm
        assert set(line.ratios) == {"twin", "usual"}
        assert line.fraction > 0
        if row.usual.same:
            assert line.usual_difference < 1e-3  # grid_sample's offsets are not quite whole


@EVERY_ROW
def test_cold_inputs_are_twice_the_cache(row):
    """What calls read, whatever their results: those the allocator gives again and again."""
    made = []

    def make(generator):
        made.append(row.make(generator))
        return made[-1]

    cold = measure(dataclasses.replace(row, make=make))[0]
    assert (cold.inputs, cold.sets) == ("cold", len(made))
    stores = [inputs[0] for inputs in made] if row.operator == "frame_stack" else []
    for inputs in made:
        whole = sum(x.nbytes for x in inputs if isinstance(x, torch.Tensor))
        if stores:  # of which each set reads the frames that its index names
            assert inputs[0] is stores[0]
            assert stores[0].nbytes >= 4 * CACHE
            whole = inputs[1].numel() * stores[0][0].nbytes
        assert row.reads <= whole <= 1.1 * row.reads
    assert len(made) * row.reads >= 2 * CACHE


def test_a_row_with_too_few_sets_is_not_called_cold(monkeypatch):
    monkeypatch.setattr(bench, "MOST_SETS", 7)
    part, warm = measure(SMALL[0])
    assert (part.inputs, part.sets, warm.inputs) == ("part", 7, "warm")
    assert cells(part)[3] in ("part", "part !")
    said = "\n".join(notes([part, warm], DESCRIBED))
    assert "part: as cold, but 7 sets of inputs are less than twice the cache" in said
    assert "copy_" in said
    assert "part" not in "\n".join(notes([warm], DESCRIBED))


def test_no_row_of_the_claims_needs_more_sets_on_a_cache_of_a_gibibyte():
    assert all(-(-(2 << 30) // row.reads) <= bench.MOST_SETS for row in rows())


@pytest.mark.cuda
@EVERY_ROW
def test_a_row_is_right_and_measured_on_a_gpu(row):
    lines = measure(row, torch.device("cuda", 0))
    assert not any(line.wrong for line in lines)
    assert [line.inputs for line in lines] == ["cold", "warm", "graph"]


@EVERY_ROW
def test_a_wrong_operator_gets_no_figures(row):
    def altered(*inputs):
        out = row.ours(*inputs)
        if row.backward:
            return 1.001 * out
        out = out.clone()
        out.view(-1)[out.numel() // 2] += 1
        return out

    lines = measure(dataclasses.replace(row, ours=altered))
    assert len(lines) == 1
    assert lines[0].wrong.startswith("result should")
    assert not lines[0].sides


@pytest.mark.parametrize("row", [r for r in SMALL if r.backward], ids=lambda r: r.name)
def test_a_wrong_gradient_is_wrong(row):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    lines = measure(dataclasses.replace(row, ours=lambda *x: Wrong.apply(row.ours(*x))))
    assert lines[0].wrong.startswith("gradient 1 should be the twin's to within 0.0001")


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (torch.tensor([1.0, float("nan")]), "1 of 2 elements are not"),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), "float32 [2], got torch.float64 [2]"),
        (torch.tensor([[1.0, 2.0]]), "float32 [2], got torch.float32 [1, 2]"),
    ],
)
def test_nan_another_dtype_and_another_shape_are_wrong(ours, message):
    assert message in bench.difference(ours, torch.tensor([1.0, 2.0]), tolerance=1e-4)


def test_close_rows_of_knn_are_of_unit_length_and_near_each_other():
    row = next(row for row in SMALL if row.size.endswith("close"))
    queries, keys, _ = row.make(torch.Generator().manual_seed(0))
    for x in (queries, keys):
        assert torch.allclose(x.norm(dim=-1), torch.ones(len(x)))
    assert 5e-4 < float((queries[:1] - keys).norm(dim=-1).median()) < 2e-3


def test_the_objective_is_what_pre_training_computes():
    class Through(nn.Module):
        """An encoder whose embeddings are its pixels."""

        def features(self, x):
            return x

        project = features

    row = next(row for row in SMALL if row.operator == "objective")
    embeddings, target, _ = row.make(torch.Generator().manual_seed(0))
    config = PretrainConfig(projection_dim=embeddings.shape[1], prototypes=32)
    model = CRPTPro(Through(), config)
    model.before_update()
    online = model.predictor(embeddings)
    total = model(embeddings, target).total
    for compute in (row.ours, row.twin, row.usual.call):
        torch.testing.assert_close(compute(online, target, model.prototypes), total)


def test_ratios_fraction_and_the_line_of_the_table():
    line = result(ours=2e-3, twin=8e-3, usual=1e-3)
    assert line.ratios == {"twin": 4.0, "usual": 0.5}
    assert line.fraction == 0.5
    assert cells(line) == [
        "sinkhorn", "32x32", "fp32", "cold",
        "2.00", "15%", "8.00", "-", "1.00", "4.00", "-", "0.500", "50%",
    ]  # fmt: skip


def test_a_disturbed_row_is_marked_and_no_claim():
    line = dataclasses.replace(result(ours=1e-3, twin=1e-3, usual=1e-3), others=0.7)
    assert cells(line)[3] == "cold !"
    warning = "NO CLAIM: during the rows marked ! other processes took up to 0.7 cores"
    assert warning in "\n".join(notes([line], DESCRIBED))
    assert "NO CLAIM" not in "\n".join(notes([result(ours=1e-3)], DESCRIBED))


def test_a_disturbed_row_is_measured_again_and_the_quietest_kept(monkeypatch):
    loads = iter([0.7, 0.3, 0.5, 0.9, 0.0])
    monkeypatch.setattr(bench.OtherLoad, "cores", lambda self: next(loads))
    again = dataclasses.replace(ARGUMENTS, retries=2)
    cold, warm = bench.measure(SMALL[0], CPU, limits(CPU), again)
    assert (cold.others, warm.others) == (0.3, 0.0)
    assert cold.disturbed
    assert not warm.disturbed


def test_table_and_notes_fit_120_columns():
    table = Table(COLUMNS)
    widest = [
        dataclasses.replace(result(row, ours=1.2345, twin=99.99, usual=8.7654), others=0.7)
        for row in rows()
    ]
    lines = [*table.header(), *(table.line(cells(x)) for x in widest), *notes(widest, DESCRIBED)]
    assert max(map(len, lines)) <= 120


def test_the_command_prints_writes_json_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    def broken(scores, *_):
        return torch.zeros_like(scores)

    chosen = (dataclasses.replace(SMALL[0], ours=broken), SMALL[5])
    monkeypatch.setattr(bench, "rows", lambda: chosen)
    path = tmp_path / "ops.json"
    assert bench.ops_command(dataclasses.replace(ARGUMENTS, json=path, markdown=True)) == 1
    out = capsys.readouterr().out
    assert "| sinkhorn | 32x32 | fp32 | WRONG | - |" in out
    assert (
        "ERROR: sinkhorn 32x32 fp32 was not timed: result should be the twin's to within 0.0001"
        in out
    )
    assert "| intrinsic_loss | 32x8 | fp32 | cold" in out
    saved = json.loads(path.read_text())
    assert (saved["schema"], saved["bench"], saved["device"]) == (1, "ops", "cpu")
    wrong, right = saved["rows"][:2]
    assert wrong["wrong"]
    assert not wrong["seconds"]
    assert right["wrong"] is None
    assert right["seconds"]["ours"]["median"] > 0
    monkeypatch.setattr(bench, "rows", lambda: chosen[1:])
    assert bench.ops_command(ARGUMENTS) == 0


def test_the_document_holds_what_the_table_shows():
    line = result(ours=2e-3, twin=8e-3, usual=1e-3)
    held = json.loads(json.dumps(document({"date": "today"}, [line])))
    assert held["date"] == "today"
    row = held["rows"][0]
    assert row["seconds"]["twin"] == dataclasses.asdict(line.sides["twin"])
    assert row["times_faster_than"] == {"twin": 4.0, "usual": 0.5}
    assert row["fraction_of_limit"] == 0.5
    assert row["limit"] == dataclasses.asdict(line.limit)
    assert (row["operator"], row["size"], row["dtype"]) == ("sinkhorn", "32x32", "fp32")
    assert row["work"] == dataclasses.asdict(Work(2 * 4 * 32 * 32))
