"""One command that evaluates: it repeats a run's own evaluation, takes options before the run's, and names mistakes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from accelerate.state import AcceleratorState, PartialState

from segheads import SegmentationModel, create_model
from segheads.classes import Classes
from segheads.data import DATASETS
from segheads.errors import SegheadsError
from segheads.metrics import METRICS
from segheads.training import DEMO_RUN, TrainingConfig, run_training

RECIPE = Path(__file__).parents[2] / "segheads" / "cli" / "evaluate.py"
ALONE = ["--workers", "0", "--threads", "1", "--pictures", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two iterations, with windows."""
    small = {"scenes_size": 40, "scale": (48, 48), "crop_size": 32, "iterations": 2, "batch_size": 2, "seed": 3}
    model = {"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0}
    rest = {"tracker": "none", "pictures": 0, "threads": 1, "window": 32, "stride": 24, "calibration": True}
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = TrainingConfig.from_flat(**{**DEMO_RUN, **model, **small, **rest}, output=folder)
    run_training(config, lambda c, n: create_model(c.model.backbone, c.model.head, n, **c.model_options()))
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return folder


@pytest.fixture(scope="module")
def bare(run):
    return str(run / "model")


def start(recipe, *arguments):
    return recipe.main(tyro.cli(recipe.Config, args=[*map(str, arguments), *ALONE]))


def refused(recipe, *arguments):
    """The one line that the recipe ends with."""
    with pytest.raises(SegheadsError) as raised:
        start(recipe, *arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_repeats_the_evaluation_of_the_run(recipe, run, caplog):
    start(recipe, "--model", run)
    before, after = (json.loads((path / "results.json").read_text()) for path in (run, run / "evaluation"))
    for name in ("aAcc", "mAcc", "mIoU", "ECE"):
        assert after[name] == pytest.approx(before[name], rel=1e-6)
    assert [c["pixels"] for c in after["classes"]] == [c["pixels"] for c in before["classes"]]
    told = after["protocol"]
    assert (told["dataset"], told["split"], told["images"], told["resized into"]) == ("scenes", "val", 100, [48, 48])
    assert (told["window"], told["stride"], told["scales"], told["flip"]) == (32, 24, [1.0], False)
    out = "\n".join(caplog.messages)
    assert "on 100 images of scenes val: windows of 32 every 24, scales 1.0; 1 process(es) on cpu" in out
    assert all(f"{name} {after[name]:.4f}" in out for name in ("mIoU", "mF1", "fwIoU", "mIoU_small"))
    assert f"tables and pictures are in {run / 'evaluation'}" in out


@pytest.mark.parametrize(
    ("told", "options", "expected"),
    [
        ({"label_values": [0, 255]}, [], {"label_values": (0, 255), "ignore_index": None}),
        (
            {"label_map": "map.json", "ignore_index": [7, 9]},
            [],
            {"label_map": Path("map.json"), "ignore_index": (7, 9)},
        ),
        ({"ignore_index": 0}, [], {"reduce_zero_label": True, "ignore_index": None}),  # a run of 0.1.0
        ({"ignore_index": 0, "reduce_zero_label": False}, [], {"reduce_zero_label": False, "ignore_index": 0}),
        ({"ignore_index": 9}, ["--ignore-index", "0"], {"reduce_zero_label": False, "ignore_index": 0}),
    ],
)
def test_labels_are_read_as_the_run_read_them(recipe, told, options, expected):
    config = tyro.cli(recipe.Config, args=["--model", "run", *options])
    found = recipe.complete(config, {"dataset": "folder", "data_root": "here", "scenes_size": 128, **told})
    assert {name: getattr(found, name) for name in expected} == expected


def test_the_whole_protocol_and_all_files(recipe, run, tmp_path):
    options = ["--scales", "0.5", "1", "--flip", "--limit", "3", "--stride", "16", "--small-images", "enlarge"]
    arguments = ["--model", str(run), *options, "--output", str(tmp_path), *ALONE[:4], "--pictures", "2"]
    results = recipe.main(tyro.cli(recipe.Config, args=arguments))
    files = [
        "confusion.csv",
        "confusion.png",
        "images.csv",
        "reliability.png",
        "results.json",
        "results.md",
        "worst.png",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    told = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert (told["images"], told["window"], told["stride"], told["scales"]) == (3, 32, 16, [0.5, 1.0])
    assert (told["flip"], told["images below the window"]) == (True, "enlarge")
    with (tmp_path / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mIoU"]) for row in rows] == results["image_mIoU"].tolist()


def renamed(run, folder, names):
    """The run's model with other names of its classes."""
    model = SegmentationModel.from_pretrained(run / "model")
    model.classes = None if names is None else Classes(tuple(names))
    model.save_pretrained(folder)
    return ["--model", folder, "--dataset", "scenes", "--scenes-size", 40, "--limit", 1]


def test_classes_are_compared_by_name(recipe, run, tmp_path):
    first, second, *others = SegmentationModel.from_pretrained(run / "model").classes.names
    message = refused(recipe, *renamed(run, tmp_path / "swapped", [second, first, *others]))
    assert "have the same classes in another order: " in message
    assert f"0 is {second} in the model and {first} in the data set, 1 is {first}" in message
    message = refused(recipe, *renamed(run, tmp_path / "other", ["lava", second, *others]))
    assert f"have other classes: 0 is lava in the model and {first} in the data set; give the data set" in message
    for name, names in {"none": None, "numbers": Classes.numbered(12).names}.items():
        start(recipe, *renamed(run, tmp_path / name, names))


def test_metrics_are_chosen_by_name(recipe, run, tmp_path):
    options = ["--limit", 2, "--metrics", "boundary", "--output", tmp_path]
    results = start(recipe, "--model", run, *options)
    assert {"mBIoU", "mIoU", "image_mIoU"} <= results.keys()
    assert not {"ECE", "mIoU_small"} & results.keys()
    assert not (tmp_path / "reliability.png").exists()
    message = refused(recipe, "--model", run, "--metrics", "iou", "sharpness")
    assert message.endswith(f"no metric is called 'sharpness'; known: {', '.join(METRICS)}")


def test_whole_images_and_slides(recipe, run):
    config = recipe.complete(recipe.Config(model="x", whole=True), recipe.find_model(str(run))[1])
    assert (config.window, config.stride, config.scale, config.scenes_size, config.seed) == (
        None,
        None,
        (48, 48),
        40,
        3,
    )
    whole = {"dataset": "scenes", "window": None, "stride": None, "crop_size": 64}
    config = recipe.complete(recipe.Config(model="x", slide=True), whole)
    assert (config.window, config.stride) == (64, 64)
    config = recipe.complete(recipe.Config(model="x", slide=True), whole | {"crop_size": [32, 64]})
    assert (config.window, config.stride) == ((32, 64), (32, 64))
    wide = tyro.cli(recipe.Config, args=["--model", "x", "--window", "512", "1024", "--stride", "384"])
    assert (wide.window, wide.stride) == ((512, 1024), 384)
    assert recipe.complete(wide, whole).window == (512, 1024)
    with pytest.raises(SegheadsError, match=r"window must be 1 or more; got \(32, 0\)"):
        recipe.complete(recipe.Config(model="x", window=(32, 0)), whole)
    config = recipe.complete(recipe.Config(model="x", slide=True, window=48), whole | {"window": 32, "stride": 8})
    assert (config.window, config.stride) == (48, 48)
    config = recipe.complete(recipe.Config(model="x"), whole)
    assert (config.window, config.stride) == (None, None)


def test_another_data_set_takes_nothing_of_the_runs(recipe):
    run = {"dataset": "folder", "data_root": "mine", "class_names": ["a", "b"], "ignore_index": 7, "scale": [96, 64]}
    config = recipe.complete(recipe.Config(model="x"), run)
    assert (config.data_root, config.class_names, config.ignore_index) == (Path("mine"), ("a", "b"), 7)
    config = recipe.complete(recipe.Config(model="x", dataset="camvid"), run)
    assert (config.data_root, config.class_names, config.ignore_index) == (None, None, None)
    assert config.scale == (96, 64)
    config = recipe.complete(recipe.Config(model="x", data_root=Path("theirs"), scale=(9, 8)), run)
    assert (config.data_root, config.class_names, config.scale) == (Path("theirs"), ("a", "b"), (9, 8))


def test_a_model_that_is_no_run(recipe, bare, tmp_path, monkeypatch):
    results = start(recipe, "--model", bare, "--dataset", "scenes", "--scenes-size", 48, "--limit", 2)
    assert results["pixels"].sum() == 2 * 48 * 48
    assert json.loads((Path(bare) / "evaluation" / "results.json").read_text())["protocol"]["resized into"] == "no"
    assert recipe.output_folder(recipe.Config(model="owner/name")) == Path("evaluation/owner--name")


def test_no_such_run(recipe, tmp_path):
    message = refused(recipe, "--model", tmp_path / "none", "--dataset", "scenes")
    assert f"'{tmp_path / 'none'}' is no local folder, and could not be had" in message
    (tmp_path / "metrics.jsonl").write_text("")
    message = refused(recipe, "--model", tmp_path)
    assert message.endswith(f"--model {tmp_path} is a run that has no folder model yet; its recipe's --resume ends it")


def test_mistakes_in_options_are_named(recipe, run, bare, tmp_path):
    known = ", ".join(DATASETS)
    message = refused(recipe, "--model", bare)
    assert f"--model {bare} is no run that tells its data set; give --dataset, of {known}" in message
    assert f"--dataset mine is not known; choose one of {known}" in refused(recipe, "--model", run, "--dataset", "mine")
    assert "limit must be 1 or more; got 0" in refused(recipe, "--model", run, "--limit", 0)
    assert "scales must be above 0; got (1.0, 0.0)" in refused(recipe, "--model", run, "--scales", 1, 0)
    assert "leave one out" in refused(recipe, "--model", run, "--whole", "--slide")
    message = refused(recipe, "--model", bare, "--dataset", "scenes", "--slide")
    assert message.endswith(f"--model {bare} tells no size of windows; give --window PIXELS")
    assert "stride must be 1 or more; got -1" in refused(recipe, "--model", run, "--stride", -1)
    message = refused(recipe, "--model", run, "--dataset", "camvid", "--data-root", tmp_path)
    assert f"there is no folder {tmp_path / 'val'}" in message
    assert "split must be one of train, val, not 'test'" in refused(recipe, "--model", run, "--split", "test")


def test_classes_of_model_and_data_differ(recipe, run, shared_data):
    message = refused(recipe, "--model", run, "--dataset", "camvid", "--data-root", shared_data("camvid"))
    assert f"--model {run} tells 12 classes apart, and --dataset camvid has 11; give the data set" in message


def test_labels_that_are_no_classes(recipe, run, tmp_path):
    from PIL import Image

    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "val" / "a.png")
    Image.new("L", (40, 30), 77).save(tmp_path / "labels" / "val" / "a.png")
    data = ["--dataset", "folder", "--data-root", tmp_path, "--num-classes", 12]
    message = refused(recipe, "--model", run, *data, "--output", tmp_path / "out")
    assert "--dataset folder: " in message
    assert "77" in message


def test_two_processes_are_one_evaluation(recipe, run, tmp_path):
    options = ["--model", str(run), "--limit", "5", *ALONE]
    start(recipe, *options[:4], "--output", tmp_path / "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "-m", "segheads", "evaluate", *options, "--output", str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es) on cpu" in done.stdout
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "12")
    assert [c["pixels"] for c in one["classes"]] == [c["pixels"] for c in two["classes"]]
    for name in ("aAcc", "mIoU", "mIoU_small", "mBIoU", "ECE"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
    assert (tmp_path / "1" / "images.csv").read_text() == (tmp_path / "2" / "images.csv").read_text()


def test_help_describes_the_options(recipe, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(recipe.Config, description=recipe.__doc__, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The folder of a run, a folder that save_pretrained wrote" in text
    assert "the papers' are 0.5 0.75 1.0 1.25 1.5 1.75. (default: 1.0)" in text
