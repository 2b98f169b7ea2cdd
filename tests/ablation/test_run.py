"""Grids of trainings: kept, gone on with, shared out, rendered."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image

from segheads import SegmentationModel
from segheads.ablation import (
    Column,
    GridConfig,
    Row,
    Table,
    axis,
    csv_text,
    folder_name,
    markdown,
    parse_shard,
    plot_table,
    run_grid,
    write_table,
)
from segheads.ablation.cell import claimed
from segheads.data import Scenes
from segheads.data.samples import EvaluationSamples
from segheads.errors import DataMissingError, OptionError, ScoresError
from segheads.evaluation import evaluate
from segheads.locks import LOCK
from segheads.training import DEMO_RUN
from segheads.training.setup import open_data

SMALL = {
    **DEMO_RUN,
    "backbone": "test_vit",
    "head": "linear",
    "loss_reduction": "all",  # the mean over processes is the mean over images
    "power": 1.0,
    "dataset": "camvid",
    "scale": (32, 32),
    "crop_size": 32,
    "iterations": 6,
    "batch_size": 2,
    "warmup_iterations": 0,
    "checkpoint_every": 2,
    "tracker": "none",
    "pictures": 0,
    "threads": 1,
}


def shifted(layers):
    return {"head": "mean_shift", "model_kwargs": {"head_kwargs": {"num_layers": layers}}}


TABLES = {
    "shift": Table(
        "Shift",
        [
            Row("none", paper={"mIoU": 31.44}),
            Row("one", shifted(1), axes={"layers": 1}, seeds=2),
            Row("one, read with two", shifted(1), {"num_layers": 2}, axes={"layers": 2}),
        ],
        x="layers",
    ),
    "rate": Table("Rate", [Row("0.1", {"learning_rate": 0.1}), Row("as it is")]),
}
CELLS = ["default", "mean_shift__num_layers-1", "mean_shift__num_layers-1__seed-1", "learning_rate-0.1"]

# A sweep that stops for good in the middle of its third training, so that a test can kill it there
STOPPED = """
import sys, time
from pathlib import Path
from segheads.training import loop
step, steps = loop.train_step, 0

def train_step(*args, **options):
    global steps
    if (steps := steps + 1) == 2 * 6 + 4:
        (Path(sys.argv[1]) / "stopped").touch()
        time.sleep(600)
    return step(*args, **options)

loop.train_step = train_step
"""


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass


def small(folder, **changes):
    return GridConfig.from_flat(output=folder, data_root=Path(os.environ["GRID_TEST_DATA"]), **{**SMALL, **changes})


@pytest.fixture(scope="module", autouse=True)
def _images(tmp_path_factory):
    """A CamVid of few drawn scenes, so that evaluations are short; where it is goes to processes, too."""
    root = tmp_path_factory.mktemp("camvid")
    for split, length in (("train", 8), ("val", 3)):
        scenes = Scenes(split, size=(32, 32), length=length)
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for index in range(length):
            image, labels = scenes.read(index)
            image.save(root / split / f"{index}.png")
            Image.fromarray(labels.numpy()).save(root / f"{split}annot" / f"{index}.png")
    os.environ["GRID_TEST_DATA"] = str(root)
    yield
    del os.environ["GRID_TEST_DATA"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep that nothing disturbed: its configuration and results."""
    config = small(tmp_path_factory.mktemp("grid") / "finished")
    return config, run_grid(config, TABLES)


def files(folder):
    """What a sweep found out, by file."""
    found = [*folder.glob("table_*"), *folder.glob("*/measured.json"), *folder.glob("*/results.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_training_is_made_once_and_read_by_every_row(finished):
    config, results = finished
    assert sorted(path.name for path in config.output.iterdir() if path.is_dir()) == sorted(CELLS)
    none, one, read = results["shift"]
    assert results["rate"][1] == none
    assert len(one) == 2
    assert one[0] != one[1]
    of_run = json.loads((config.output / CELLS[1] / "results.json").read_text())
    assert one[0]["mIoU"] == 100 * of_run["mIoU"]
    assert not (config.output / CELLS[1] / "checkpoints").exists()  # the model is there

    model = SegmentationModel.from_pretrained(config.output / CELLS[1] / "model")
    model.head.num_layers = 2
    _, scenes = open_data(Accelerator(), config)
    samples = EvaluationSamples(scenes, model.data_config["mean"], model.data_config["std"], (32, 32))
    torch.testing.assert_close(read[0]["mIoU"], 100 * evaluate(Accelerator(), model, samples)["mIoU"].item())
    assert read[0]["multiply_adds"] > one[0]["multiply_adds"]
    assert read[0]["parameters"] == one[0]["parameters"] > none[0]["parameters"]


def test_a_killed_sweep_goes_on_to_the_same_tables(finished, tmp_path, caplog):
    script, folder = tmp_path / "sweep.py", tmp_path / "killed"
    body = "runpy.run_path(sys.argv[2])['sweep'](sys.argv[1])"
    script.write_text(f"{STOPPED}\nimport runpy\n{body}\n")
    folder.mkdir()
    errors = tmp_path / "errors"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, script, folder, __file__], env=environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        until = time.monotonic() + 300
        while not (folder / "stopped").exists():
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < until, "the sweep never came to its third training"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / CELLS[2] / "checkpoints").iterdir()) == ["00000002"]
    assert "1 of 2" in (folder / "table_shift.md").read_text()
    before = {name: (folder / name / "results.json").stat().st_mtime_ns for name in CELLS[:2]}

    resumed = []
    run_grid(small(folder), TABLES, build_model=lambda config, K: _build(config, K, resumed))
    assert resumed == CELLS[2:]
    printed = caplog.text
    assert f"[3 of 4] {CELLS[2]}: iteration 2\n" in printed
    assert f"{CELLS[2]} at iteration 2 of 6\n" in printed
    assert {name: (folder / name / "results.json").stat().st_mtime_ns for name in CELLS[:2]} == before
    config, _ = finished
    assert files(folder) == files(config.output)


def _build(config, num_classes, built):
    from segheads.ablation.run import build_from_fields

    built.append(config.output.name)
    return build_from_fields(config, num_classes)


def sweep(folder, tables=()):
    """What other processes run."""
    run_grid(small(Path(folder), tables=tables), TABLES)


def test_a_finished_sweep_trains_and_reads_nothing(finished, monkeypatch, caplog):
    config, results = finished
    before = files(config.output)
    monkeypatch.setattr("segheads.ablation.cell.run_training", None)
    monkeypatch.setattr("segheads.ablation.cell.evaluate", None)
    assert run_grid(config, TABLES) == results
    assert files(config.output) == before
    assert caplog.text.count("kept") == len(CELLS)
    assert run_grid(small(config.output, tables=("rate",)), TABLES) == {"rate": results["rate"]}


def test_shards_share_the_trainings_out(finished, tmp_path):
    config, _ = finished
    shares = []
    for number in range(2):
        built = []
        run_grid(small(tmp_path, shard=f"{number}/2"), TABLES, lambda config, K, built=built: _build(config, K, built))
        shares.append(built)
        whole = number == 1
        text = "".join((tmp_path / f"table_{name}.md").read_text() for name in TABLES)
        assert ("not yet" in text or " of 2" in text) is not whole
    assert sorted(shares[0] + shares[1]) == sorted(CELLS)
    assert shares[0]
    assert shares[1]
    assert files(tmp_path) == files(config.output)


def test_two_processes_are_one_sweep(finished, tmp_path):
    script = tmp_path / "sweep.py"
    heard = "import logging, sys\nlogging.basicConfig(stream=sys.stdout, level=logging.INFO)\n"
    script.write_text(f"{heard}import runpy\nrunpy.run_path(sys.argv[2])['sweep'](sys.argv[1], ('shift',))\n")
    # accelerate launch starts several CPU processes through MPI only
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    command = [*launch, script, tmp_path / "runs", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    assert done.stdout.count("\nShift\n") == 1
    config, _ = finished
    for name in CELLS[:3]:
        one, two = (json.loads((f / name / "measured.json").read_text()) for f in (config.output, tmp_path / "runs"))
        assert one.keys() == two.keys()
        for reading, measured in one.items():  # gradients are summed up in another order
            assert measured == pytest.approx(two[reading], abs=0.5)


def test_render_only_makes_tables_of_what_is_there(tmp_path, caplog):
    assert run_grid(small(tmp_path, render_only=True), TABLES)["rate"] == [[None], [None]]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert "| 0.1 | – | not yet | – |" in (tmp_path / "table_rate.md").read_text()
    assert "| 0.1 | – | not yet | – |" in caplog.text


def test_a_training_in_use_is_left_to_the_other_process(tmp_path, caplog):
    (tmp_path / "default").mkdir()
    with FileLock(tmp_path / "default" / LOCK):
        with claimed(tmp_path / "default") as free:
            assert not free
        assert run_grid(small(tmp_path, tables=("t",)), {"t": Table("T", [Row("a")])}) == {"t": [[None]]}
    assert "[1 of 1] default: another process is at it" in caplog.text
    with claimed(tmp_path / "default") as free:
        assert free


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 7}, "iterations was 6 and is 7"),
        ({"window": 32}, "window was None and is 32"),
        ({"pretrained": True}, "pretrained was False and is True"),
        ({"model_kwargs": {"head_kwargs": {}}}, "model_kwargs was {} and is {'head_kwargs': {}}"),
    ],
)
def test_another_configuration_is_refused_before_anything_is_trained(finished, change, message):
    config, _ = finished
    before = files(config.output)
    tables = {"new": Table("New", [Row("new", {"learning_rate": 0.2}), Row("as it is")])}
    with pytest.raises(OptionError, match=f"default/config.json is of a run with .*{message}$"):
        run_grid(small(config.output, **change), tables)
    assert files(config.output) == before
    assert not (config.output / "learning_rate-0.2").exists()


def test_what_a_training_does_not_depend_on_may_differ(finished, monkeypatch):
    config, results = finished
    monkeypatch.setattr("segheads.ablation.cell.run_training", None)
    assert run_grid(small(config.output, threads=2, checkpoint_every=1, shard="0/1", seeds=5), TABLES) == results


def test_a_training_that_breaks_down_is_named_and_the_sweep_goes_on(tmp_path):
    fast = {**shifted(1), "learning_rate": 1e38}
    rows = [Row("too fast", fast, seeds=2), Row("read", fast, {"num_layers": 0}), Row("good")]
    results = run_grid(small(tmp_path, iterations=2), {"t": Table("T", rows)})
    assert results["t"][:2] == [[{"mIoU": None}] * 2, [{"mIoU": None}]]
    assert results["t"][2][0]["mIoU"] > 0
    text = (tmp_path / "table_t.md").read_text()
    assert "| too fast | – | not finite | – | – | – | – | 2 |" in text
    assert "| read | – | not finite |" in text


def test_scores_that_are_nan_break_down_one_row_alone(tmp_path, monkeypatch):
    def refused(accelerator, model, *others, **options):
        if model.head.num_layers == 2:
            raise ScoresError("image: NaN")
        return evaluate(accelerator, model, *others, **options)

    monkeypatch.setattr("segheads.ablation.cell.evaluate", refused)
    rows = [Row("good", shifted(1)), *(Row(str(n), shifted(1), {"num_layers": n}) for n in (2, 3))]
    results = run_grid(small(tmp_path, iterations=1), {"t": Table("T", rows)})["t"]
    assert results[1] == [{"mIoU": None}]
    assert results[0][0]["mIoU"] > 0
    assert results[2][0]["mIoU"] > 0


def test_other_errors_end_the_sweep(tmp_path):
    rows = [Row("none", {"dataset": "camvid", "data_root": tmp_path / "nowhere"})]
    with pytest.raises(DataMissingError, match="there is no folder .*nowhere/train"):
        run_grid(small(tmp_path / "runs"), {"t": Table("T", rows)})


def test_wrong_declarations_are_named(tmp_path):
    with pytest.raises(OptionError, match="^tables 7 x must be some of shift rate"):
        run_grid(small(tmp_path, tables=("7", "rate", "x")), TABLES)
    with pytest.raises(ValueError, match=r"row 'a' changes \['layers'\], which GridConfig does not have"):
        run_grid(small(tmp_path), {"t": Table("T", [Row("a", {"layers": 3})])})
    same = [Row("a", {"head": "smp:unet"}), Row("b", {"head": "smp-unet"})]
    with pytest.raises(ValueError, match="two different trainings would be kept in .*smp-unet; 'b' is the second"):
        run_grid(small(tmp_path), {"t": Table("T", same)})


@pytest.mark.parametrize("shard", ["4/4", "1", "a/2", "-1/2", "0/0", "1/2/3"])
def test_a_wrong_shard_is_named(shard):
    with pytest.raises(OptionError, match=f"shard must be I/N with I from 0 to N - 1.*; got '{shard}'"):
        parse_shard(shard)


def test_axes_are_no_part_of_a_training(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Config(GridConfig):
        layers: tuple[int, ...] = axis((1, 2))

    written = Config.from_flat(output=tmp_path, **SMALL).as_json()
    assert not {"layers", "tables", "seeds", "shard", "render_only"} & written.keys()
    assert {"iterations", "model_kwargs", "backbone_lr_scale"} <= written.keys()
    assert Config.from_flat(output=tmp_path, **SMALL).layers == (1, 2)


def test_model_kwargs_are_merged_with_the_fields(tmp_path):
    dropout = {"backbone_kwargs": {"model_kwargs": {"proj_drop_rate": 0.1}}, "pyramid": "fpn"}
    options = small(tmp_path, patch_size=8, model_kwargs=dropout).model_options()
    assert options["backbone_kwargs"]["model_kwargs"] == {"patch_size": 8, "proj_drop_rate": 0.1}
    assert options["backbone_kwargs"]["img_size"] == 32
    assert options["pyramid"] == "fpn"


@pytest.mark.parametrize(
    ("training", "name"),
    [
        ({}, "default"),
        ({"head": "smp:unet"}, "smp-unet"),
        ({"head": "senformer", "model_kwargs": {"pyramid": None}}, "senformer__pyramid-None"),
        ({"model_kwargs": {"head_kwargs": {"learner_kwargs": {"n": 4}, "n": 2}}}, "learner_kwargs.n-4__n-2"),
        ({"drop_path_rate": 1e-4, "scale": (4, 2)}, "drop_path_rate-0.0001__scale-4-2"),
    ],
)
def test_folders_are_named_after_what_changes(training, name):
    assert folder_name(training) == name


def test_long_folder_names_stay_apart():
    names = {folder_name({"model_kwargs": {"a" * 200: value}}, seed=1) for value in range(3)}
    assert len(names) == 3
    assert max(map(len, names)) < 120


SEVERAL = Table(
    "Several",
    [
        Row("base", paper={"mIoU": 39.0}, seeds=2),
        Row("a|b", paper={"mIoU": 19.37, "parameters": 7.0}, axes={"kernel": "dot", "L": 1, "blurring": True}, seeds=3),
        Row("c", axes={"kernel": "dot", "L": 2, "blurring": True}),
        Row("d", axes={"kernel": "cosine", "L": 1, "blurring": False}),
    ],
    columns=[Column("mIoU", "mIoU", 2), Column("parameters", "parameters, M")],
    x="L",
    note="A note.",
)
NUMBERS = [
    [{"mIoU": 40.0, "parameters": 1.0}, {"mIoU": 44.0, "parameters": 1.0}],
    [{"mIoU": 30.0, "parameters": 2.0}, {"mIoU": 31.0, "parameters": 2.0}, None],
    [None],
    [{"mIoU": 20.5, "parameters": None}],
]


def test_markdown():
    assert markdown(SEVERAL, NUMBERS).splitlines() == [
        "Several",
        "",
        "A note.",
        "",
        "| | mIoU, paper | mIoU | parameters, M, paper | parameters, M | seeds |",
        "|---|--:|--:|--:|--:|--:|",
        "| base | 39 | 42.00 ± 2.83 | – | 1.0 | 2 |",
        "| a\\|b | 19.37 | 30.50 ± 0.71 | 7 | 2.0 | 2 of 3 |",
        "| c | – | not yet | – | – | 0 of 1 |",
        "| d | – | 20.50 | – | – | 1 |",
    ]
    broken = [[{"mIoU": None}, {"mIoU": 40.0}], *NUMBERS[1:]]
    assert "| base | 39 | 40.00 (1 of 2 not finite) |" in markdown(SEVERAL, broken)
    own = Table("Own", [Row("a")], from_paper=False)
    assert markdown(own, [[{"mIoU": 1.0}]]).splitlines()[2].startswith("| | mIoU | aAcc |")


def test_markdown_tells_how_many_classes_are_left_out():
    rows = [Row("one"), Row("two")]
    table = Table("A title", rows, columns=[Column("mIoU", "mIoU", 2)])
    lines = markdown(table, [[{"mIoU": 40.0, "absent_classes": 2.0}], [{"mIoU": 50.0}]]).splitlines()
    assert lines[-2:] == ["", "Absent classes, which mIoU leaves out: one 2"]


def test_csv_has_a_line_for_each_row_and_seed():
    lines = list(csv.DictReader(csv_text(SEVERAL, NUMBERS).splitlines()))
    assert len(lines) == 2 + 3 + 1 + 1
    assert lines[3] == {
        **{"row": "a|b", "kernel": "dot", "L": "1", "blurring": "True", "seed": "1", "mIoU": "31.0"},
        **{"parameters": "2.0", "paper_mIoU": "19.37", "paper_parameters": "7.0"},
    }
    assert (lines[4]["seed"], lines[4]["mIoU"]) == ("2", "")


def test_plot_of_lines():
    (plot,) = plot_table(SEVERAL, NUMBERS).axes
    lines = {line.get_label(): line for line in plot.lines}
    assert lines["base"].get_ydata() == [42.0, 42.0]
    assert lines["base, paper"].get_ydata() == [39.0, 39.0]
    assert lines["paper"].get_xydata().tolist() == [[1, 19.37]]
    assert plot.get_xlabel() == "L"
    assert plot.get_ylabel() == "mIoU, percent"
    means = {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in plot.containers}
    assert means == {"kernel dot, blurring": [[1, 30.5]], "kernel cosine, not blurring": [[1, 20.5]]}
    colours = {bar.lines[0].get_color() for bar in plot.containers}
    assert len(colours) == 2
    assert [text.get_text() for text in plot.get_xticklabels()] == ["1", "2"]


def test_plot_of_panels_and_of_rows():
    from dataclasses import replace

    dot, cosine = plot_table(replace(SEVERAL, panel="kernel"), NUMBERS).axes
    assert (dot.get_title(), cosine.get_title()) == ("kernel dot", "kernel cosine")
    assert [bar.lines[0].get_xydata().tolist() for bar in cosine.containers] == [[[1, 20.5]]]
    (points,) = plot_table(replace(SEVERAL, x=None), NUMBERS).axes
    assert [text.get_text() for text in points.get_yticklabels()] == ["base", "a|b", "c", "d"]
    assert [bar.lines[0].get_xydata().tolist() for bar in points.containers] == [[[42, 0]], [[30.5, 1]], [[20.5, 3]]]


def test_tables_are_written_whole(tmp_path, monkeypatch):
    write_table(tmp_path / "table_1.5", SEVERAL, NUMBERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table_1.5.csv", "table_1.5.md", "table_1.5.png"]
    assert (tmp_path / "table_1.5.md").read_text() == markdown(SEVERAL, NUMBERS) + "\n"
    with Image.open(tmp_path / "table_1.5.png") as picture:
        assert min(picture.size) > 400
    write_table(tmp_path / "empty", SEVERAL, [[None]] * 4)
    assert not (tmp_path / "empty.png").exists()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_table(tmp_path / "table_1.5", SEVERAL, [[None]] * 4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
