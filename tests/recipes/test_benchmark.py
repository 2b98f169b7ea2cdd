"""The benchmark: both sides compute the same, memory is counted, tables say what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from segheads import create_model
from segheads.heads import HEADS, ClassAttentionHead, SenFormerHead

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark" / "__main__.py"
sys.path.insert(0, str(RECIPE.parent))  # as for a script: its other files lie beside it

import jobs  # noqa: E402
import measure  # noqa: E402
import plain  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
from rows import choose, rows  # noqa: E402
from work import Setup  # noqa: E402

ROWS = rows(quick=True)
EXACT = Setup(dtype="float64", quick=True)
BUILT = [row for row in ROWS if row.build is not None and not row.name.startswith("scaling")]


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.name)
def test_plain_and_ours_compute_the_same(row):
    ours, other = row.build(EXACT), row.build(EXACT)  # a step changes the weights: each side has its own
    if "plain" not in other.functions:
        assert row.group == "head_forward"
        return
    for tiny in (True, False):
        expected, found = other.call("plain", tiny=tiny), ours.call("ours", tiny=tiny)
        if row.name == "head_forward/senformer":  # probabilities summed, or averaged: constants in the logarithm
            expected, found = expected.log_softmax(1), found.log_softmax(1)
        is_label_map = isinstance(found, torch.Tensor) and found.dtype == torch.uint8  # int64 on the plain side
        torch.testing.assert_close(expected, found, check_dtype=not is_label_map)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_plain_loss_is_that_of_the_model(reduction):
    model = create_model("test_vit", "linear", 4, pretrained=False, loss_reduction=reduction).double()
    images, labels = torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.randint(4, (2, 32, 48))
    labels[:, :9] = 255
    torch.testing.assert_close(plain.model_loss(model, images, labels), model(images, labels))


@pytest.mark.parametrize("shared_block", [True, False])
def test_plain_learner_reads_keys_and_values_in_every_layer(shared_block):
    head, calls = ClassAttentionHead(16, 3, num_layers=4, shared_block=shared_block), []
    torch.nn.init.normal_(head.class_embeddings)
    for block in head.blocks:
        block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 16, 4, 6)
    logits = plain.class_attention(head, x)
    assert len(calls) == 4
    torch.testing.assert_close(logits, head(x))


@pytest.mark.parametrize(("name", "has"), [("linear", False), ("uper", False), ("senformer", True)])
def test_which_heads_have_a_plain_forward(name, has):
    assert plain.has_plain_forward(HEADS[name]([8, 8] if HEADS[name].multi_level else 8, 3)) is has


def test_plain_ensemble_averages_only():
    with pytest.raises(ValueError, match="averages and has no shift; got product"):
        plain.predictions(SenFormerHead([8, 8], 3, merge="product"), [torch.zeros(1, 8, 4, 4)] * 2)


def test_plain_windows_of_an_image_smaller_than_one():
    model = create_model("test_vit", "linear", 4, pretrained=False).double().eval()
    image = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(plain.slide_inference(model, image, 64, 48), model(image).argmax(1)[0])


def test_every_head_has_its_rows():
    names = {row.name for row in ROWS}
    assert {f"{group}/{head}" for group in ("head_forward", "head_step") for head in HEADS} <= names
    assert len(names) == len(ROWS)
    assert len({row.name for row in rows()}) == len(rows())


def test_rows_are_chosen_by_group_or_name():
    assert {row.group for row in choose(ROWS, ["loss", "label_map"], "cpu")} == {"loss", "label_map"}
    assert [row.name for row in choose(ROWS, ["step/senformer"], "cpu")] == ["step/senformer"]
    everything = [row.name for row in choose(ROWS, [], "cpu")]
    assert "input/512" in everything
    assert "largest_batch/mean_shift" not in everything
    assert "largest_batch/mean_shift" in [row.name for row in choose(ROWS, [], "cuda:0")]


def test_unknown_rows(recipe, tmp_path):
    with pytest.raises(SystemExit, match="no row or group is called 'lose'; groups: loss, label_map"):
        recipe.main(recipe.Config(only=("lose",), output=tmp_path))
    with pytest.raises(SystemExit, match="none of largest_batch/mean_shift runs on cpu"):
        recipe.main(recipe.Config(only=("largest_batch",), output=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(recipe, tmp_path):
    with pytest.raises(SystemExit, match="device cuda is asked for, and PyTorch finds no GPU"):
        recipe.main(recipe.Config(device="cuda", output=tmp_path))


def test_nothing_to_render(recipe, tmp_path):
    with pytest.raises(SystemExit, match="benchmark.json has no results"):
        recipe.main(recipe.Config(render=True, output=tmp_path))


def test_peak_memory_of_a_call():
    def call():
        large = torch.ones(40_000_000)  # 160 MB, freed again
        return large[:10].clone()

    found = measure.memory_of(call, "cpu")
    assert 155e6 < found["extra"] < 175e6
    assert found["whole"] > found["extra"] + 100e6  # libraries
    again = measure.memory_of(lambda: torch.ones(10_000_000), "cpu")["extra"]
    assert 35e6 < again < 55e6  # the first call's peak is forgotten


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("plain", "ours")}
    seconds = measure.seconds_in_turns(calls, 2, "cpu")
    assert [len(turns) for turns in seconds.values()] == [2, 2]
    assert order[:2] == ["plain", "ours"]
    changes = [name for name, before in zip(order[2:], order[1:], strict=False) if name != before]
    assert changes == ["plain", "ours", "plain", "ours"]


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 64, 100])
def test_largest_that_fits(largest):
    assert measure.largest_that_fits(lambda n: n <= largest) == largest


def test_machine_and_its_rates():
    assert "torch 2." in measure.machine("cpu")
    work = {"exponentials": 1e9, "bytes": 1.0, "flops": 1.0}
    assert 0.01 < measure.seconds_at_best(work, "cpu") < 10
    assert measure.seconds_at_best({}, "cpu") is None


def test_plain_side_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(jobs, "free_bytes", lambda device: 1000)
    result = jobs.perform(jobs.Job("loss/150", "seconds", Setup(quick=True), turns=1))
    assert list(result["seconds"]) == ["ours"]
    assert result["notes"]["plain"] == "does not fit: needs about 0.0 GB, 0.0 GB are free"


def test_plain_side_that_cannot_be_compiled(monkeypatch):
    def fail(function, dynamic):
        raise_it = RuntimeError("no compiler\nand more")

        def call(*_):
            raise raise_it

        return call

    monkeypatch.setattr(torch, "compile", fail)
    result = jobs.perform(jobs.Job("label_map/150", "seconds", Setup(quick=True), turns=1, compiles=True))
    assert result["seconds"] == {}
    assert result["notes"] == {"compiled": "cannot be compiled: no compiler"}


@pytest.mark.parametrize(
    "row", ["scaling/classes/loss/2", "scaling/batch/label_map/2", "head_step/fcn", "step/mean_shift"]
)
def test_every_kind_of_row_is_timed(row, monkeypatch):
    monkeypatch.setattr(measure, "ON_CPU", (256, 32, 16))
    result = jobs.perform(jobs.Job(row, "seconds", Setup(quick=True, dtype="bfloat16"), turns=2))
    assert set(result["seconds"]) - {"backbone"} == {"plain", "ours"}
    assert all(len(turns) == 2 and min(turns) > 0 for turns in result["seconds"].values())


def test_input_pipeline_is_a_row():
    pytest.importorskip("cv2")
    threads = torch.get_num_threads()
    result = jobs.perform(jobs.Job("input/512", "seconds", Setup(quick=True), turns=1))
    torch.set_num_threads(threads)  # the pipelines are compared on one core
    seconds = {side: turns[0] for side, turns in result["seconds"].items()}
    assert set(seconds) == {"plain", "hand-over", "ours", "decoding"}
    assert 0 < seconds["decoding"] < seconds["ours"]


def test_a_process_that_fails():
    with pytest.raises(jobs.JobError, match="loss/150, memory nobody: exit status 1: KeyError: 'nobody'"):
        jobs.in_own_process(jobs.Job("loss/150", "memory", Setup(quick=True), side="nobody"))


def test_one_process_measures_the_same_and_names_what_fails(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "in_own_process", None)  # is not called
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    config = recipe.Config(only=("loss/150",), output=tmp_path, quick=True, turns=2, plots=False, one_process=True)
    recipe.main(config)
    (loss,) = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert set(loss["seconds"]) == set(loss["extra"]) == {"plain", "ours", "compiled"}
    with pytest.raises(jobs.JobError, match="loss/150, memory nobody: KeyError: 'nobody'"):
        jobs.in_this_process(jobs.Job("loss/150", "memory", Setup(quick=True), side="nobody"))


def test_run_adds_to_what_was_measured_and_renders_again(recipe, tmp_path, capsys):
    config = recipe.Config(only=("loss/150",), output=tmp_path, quick=True, compile=False, turns=2, threads=1)
    older = {**record(), "quick": True, "name": "step/mean_shift", "title": "an older row"}
    recipe.keep(tmp_path, {**record(), "quick": True, "name": "loss/150", "dtype": "float32"})
    recipe.keep(tmp_path, older)
    recipe.main(config)
    loss, kept = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert kept == json.loads(json.dumps(older))
    assert loss["title"] == "loss, 5 classes, 4x4 to 32x32, batch 8"
    assert [len(loss["seconds"][side]) for side in ("plain", "ours")] == [2, 2]
    assert set(loss["extra"]) == set(loss["whole"]) == {"plain", "ours"}
    assert loss["goals"][0] == {"measure": "seconds", "limit": 0.18, "against": "plain"}
    written = (tmp_path / "benchmark.md").read_text()
    assert written.strip() in capsys.readouterr().out
    assert "Quick run" in written
    (tmp_path / "benchmark.md").unlink()
    recipe.main(recipe.Config(output=tmp_path, render=True, plots=False))
    assert (tmp_path / "benchmark.md").read_text() == written
    assert (tmp_path / "ratios_cpu_float32.png").stat().st_size > 1000


def test_ctrl_c_keeps_what_was_measured(recipe, tmp_path, monkeypatch):
    def one_then_stop(config, row):
        if row.name != "loss/150":
            raise KeyboardInterrupt
        return {**record(), "name": row.name, "quick": True}

    monkeypatch.setattr(recipe, "measure", one_then_stop)
    with pytest.raises(SystemExit, match="--render writes its table"):
        recipe.main(recipe.Config(output=tmp_path, quick=True))
    assert [row["name"] for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["loss/150"]


def test_a_row_that_fails_does_not_end_the_run(recipe, tmp_path, monkeypatch, capsys):
    def fail_first(config, row):
        if row.name == "loss/150":
            raise jobs.JobError("loss/150, seconds: was killed")
        return {**record(), "name": row.name, "quick": True}

    monkeypatch.setattr(recipe, "measure", fail_first)
    recipe.main(recipe.Config(only=("loss",), output=tmp_path, quick=True, plots=False))
    assert "failed: loss/150, seconds: was killed" in capsys.readouterr().err
    assert [name for name, *_ in recipe.read(tmp_path)] == ["loss/19", "loss/150_batch2"]


def test_names_of_the_rows(recipe, capsys):
    recipe.main(recipe.Config(list=True))
    assert "loss, 150 classes, 32x32 to 512x512, batch 8" in capsys.readouterr().out


def record(**changes):
    made = {
        "name": "loss/150",
        "title": "a loss",
        "device": "cpu",
        "dtype": "float32",
        "quick": False,
        "turns": 3,
        "is_model": False,
        "point": None,
        "machine": "a machine",
        "threads": 2,
        "notes": {},
        "seconds": {"plain": [1.0, 2.0, 4.0], "compiled": [0.4, 0.4, 0.4], "ours": [0.2, 0.2, 0.2]},
        "extra": {"plain": 100_000_000, "compiled": 50_000_000, "ours": 2_000_000},
        "whole": {"plain": 900_000_000, "compiled": 850_000_000, "ours": 802_000_000},
        "limit": "3 M exponentials",
        "least_seconds": 0.1,
        "goals": [
            {"measure": "seconds", "limit": 0.18, "against": "plain"},
            {"measure": "extra", "limit": 0.05, "against": "plain"},
        ],
    }
    return {**made, **changes}


def test_tables():
    text = report.markdown([record(notes={"plain": "was slow"})])
    rows = [line for line in text.splitlines() if line.startswith("| a loss")]
    assert "## cpu, float32: a machine, 2 threads" in text
    compared = "0.1 (0.05 to 0.2) | 0.5 (0.5 to 0.5)"
    verdict = "reached against plain; missed against compiled"
    assert rows[0] == f"| a loss | time | plain | 2.00 s | 400 ms | 200 ms | {compared} | ≤ 0.18 | {verdict} |"
    assert rows[1] == "| a loss | extra memory | plain | 100 MB | 50 MB | 2.0 MB | 0.02 | 0.04 | ≤ 0.05 | reached |"
    assert rows[2].endswith("| 3 M exponentials: 100 ms, ours 2 x |")
    assert rows[3] == "| a loss | 100 | 50 | 2.0 | 0.02 | 0.04 | 900 | 802 | 0.891 |"
    assert "- a loss: plain was slow" in text
    assert "| backbone |" not in text  # no column for what no row has
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_tables_of_a_step_a_scaling_row_and_the_largest_batch():
    against = {"measure": "seconds", "limit": 1.2, "against": "backbone"}
    seconds = {"plain": [3.0], "ours": [1.5], "ours compiled": [1.1], "backbone": [1.0]}
    point = record(point=["classes", "loss", 150], goals=[], seconds={"plain": [1.0], "ours": [0.5]})
    double = {"measure": "largest", "limit": 2.0, "against": "plain"}
    largest = {"largest": {"plain": 20, "ours": 50}, "goals": [double]}
    without = {name: value for name, value in record(**largest).items() if name not in ("seconds", "extra", "whole")}
    text = report.markdown([record(seconds=seconds, goals=[against], is_model=True), point, without])
    assert "| a loss | time | backbone | 1.00 s | 1.50 s | 1.5 | ≤ 1.2 | missed |" in text
    assert "| a loss, ours compiled | time | backbone | 1.00 s | 1.10 s | 1.1 | ≤ 1.2 | reached |" in text
    assert "| classes | 150 | loss | 1.00 s | 500 ms | 0.5 | 100 | 2.0 | 0.02 |" in text
    assert "| a loss | largest batch | plain | 20 | 50 | 2.5 | ≥ 2 | reached |" in text
    assert "--compile-models" in text


def test_goals_without_both_sides():
    alone = record(seconds={"ours": [1.0]}, extra={"ours": 5}, whole={"ours": 5})
    assert report.verdict(alone["goals"][0], alone) == "not measured"
    assert report.ratios(alone, "seconds", "plain") == []


def test_plots(tmp_path):
    points = [
        record(point=[axis, line, value])
        for axis, lines in {"classes": ["loss", "label map"], "tokens": ["mean shift"]}.items()
        for line in lines
        for value in (10, 20)
    ]
    written = plots.write_plots([record(), *points, record(device="cuda:0", point=["batch", "loss", 2])], tmp_path)
    names = ["scaling_cpu_float32.png", "ratios_cpu_float32.png", "scaling_cuda0_float32.png"]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 1000 for path in written)


def test_labels_hold_ignored_pixels_and_classes():
    labels = next(row for row in ROWS if row.name == "loss/19").build(EXACT).inputs[1]
    values = set(labels.unique().tolist())
    assert 255 in values
    assert values <= {*range(19), 255}
    assert torch.equal(labels[0, ::8, ::8], F.max_pool2d(labels.double(), 8)[0].long())  # patches of 8
