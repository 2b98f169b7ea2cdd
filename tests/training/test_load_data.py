"""Every data set that the command line knows, opened and trained on for two iterations."""

import json
import sys
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from runs import SMALL_RUN

from segheads import create_model
from segheads.cli.run import advise, parse
from segheads.data import (
    ADE20K,
    DATASETS,
    VOC2012,
    CamVid,
    Cityscapes,
    COCODataset,
    COCOStuff10K,
    COCOStuff164K,
    DataConfig,
    FolderDataset,
    PascalContext,
    Scenes,
    VOC2012Aug,
    open_dataset,
)
from segheads.errors import DataMissingError, OptionError, PackageMissingError
from segheads.training import TrainingConfig, run_training
from segheads.training.config import changed
from segheads.training.setup import open_data

SMALL = {**SMALL_RUN, "scale": (48, 40), "window": 32, "stride": 8, "pictures": 1}
# name: class, drawing, options of the configuration, the first values of a validation label (255 is ignored)
KINDS = {
    "ade20k": (ADE20K, miniatures.ade20k, {}, [255, 0, 149]),
    "camvid": (CamVid, miniatures.camvid, {}, [0, 10, 255]),
    "cityscapes": (Cityscapes, miniatures.cityscapes, {}, [255, 0, 18]),
    "coco_stuff_10k": (COCOStuff10K, miniatures.converted_coco_stuff, {}, [255, 0, 170]),
    "coco_stuff_164k": (COCOStuff164K, miniatures.coco_stuff_164k, {}, [0, 170, 255]),
    "voc2012": (VOC2012, miniatures.voc2012, {}, [0, 20, 255]),
    "voc2012_aug": (VOC2012Aug, miniatures.voc2012_aug, {}, [0, 20, 255]),
    "pascal_context": (PascalContext, miniatures.pascal_context, {}, [0, 1, 59]),
    "folder": (FolderDataset, miniatures.own_folder, {"class_names": ("lawn", "a path")}, [0, 1, 255]),
    "coco": (COCODataset, miniatures.coco, {}, [0, 1, 2]),
}


def config(dataset, **options):
    return TrainingConfig.from_flat(**{**SMALL, "dataset": dataset, **options})


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_every_data_set_is_here():
    assert set(DATASETS) == {*KINDS, "scenes"}


@pytest.mark.parametrize("name", KINDS)
def test_both_splits(name, tmp_path, accelerator):
    kind, draw, options, values = KINDS[name]
    run = config(name, data_root=draw(tmp_path), output=tmp_path / "run", **options)
    training_set, validation_set = open_data(accelerator, run)
    assert type(training_set) is type(validation_set) is kind is DATASETS[name]
    assert (training_set.name(0)[0], validation_set.name(0)[0]) == ("a", "c")
    assert validation_set.read(0)[1][0, :3].tolist() == values


@pytest.mark.parametrize("name", ["cityscapes", "coco", "coco_stuff_10k", "pascal_context", "folder"])
def test_training(name, tmp_path, accelerator):
    _, draw, options, _ = KINDS[name]
    run = config(name, data_root=draw(tmp_path / "data"), output=tmp_path / "run", **options)
    validation_set = open_dataset(run.data, "val")
    counted = torch.bincount(torch.cat([validation_set[index][1].flatten() for index in range(2)]), minlength=256)[
        : validation_set.num_classes
    ]
    results = run_training(run, lambda c, n: create_model(c.model.backbone, c.model.head, n, **c.model_options()))
    torch.testing.assert_close(results["pixels"].long(), counted, rtol=0, atol=0)
    rows = (tmp_path / "run" / "per_class.md").read_text()
    assert all(f"| {class_name} |" in rows for class_name in validation_set.class_names)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["dataset"], kept["class_names"]) == (name, ["lawn", "a path"] if name == "folder" else None)


def test_coco_stuff_as_released(tmp_path, accelerator):
    io = pytest.importorskip("scipy.io", reason="the .mat files of COCO-Stuff need SciPy")
    miniatures.coco_stuff(tmp_path, io.savemat)
    sets = open_data(accelerator, config("coco_stuff_10k", data_root=tmp_path, output=tmp_path))
    assert [one.read(0)[1][0, :3].tolist() for one in sets] == [[255, 0, 170]] * 2


def test_pascal_context_without_background(tmp_path, accelerator):
    miniatures.pascal_context(tmp_path)
    sets = open_data(accelerator, config("pascal_context", num_classes=59, data_root=tmp_path, output=tmp_path))
    assert [(one.num_classes, one.read(0)[1][0, :3].tolist()) for one in sets] == [(59, [255, 0, 58])] * 2


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"num_classes": 3}, (0, 2, 255), [0, 2, 255]),
        ({"num_classes": 3, "ignore_index": 7}, (0, 2, 7), [0, 2, 255]),
        ({"class_names": ("x", "y"), "reduce_zero_label": True}, (0, 1, 2, 255), [255, 0, 1, 255]),
        ({"label_values": (1, 2, 4), "ignore_index": (0, 255)}, (0, 1, 4, 255), [255, 0, 2, 255]),
        ({"class_names": ("x", "y"), "num_classes": 2}, (0, 1), [0, 1]),
    ],
)
def test_own_labels(tmp_path, options, values, expected):
    miniatures.own_folder(tmp_path, values)
    dataset = open_dataset(config("folder", data_root=tmp_path, output=tmp_path, **options).data, "val")
    assert dataset.read(0)[1][0, : len(values)].tolist() == expected
    assert dataset.class_names == options.get("class_names", ("class 0", "class 1", "class 2"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ignore-index", "0", "255"], {"ignore_index": (0, 255)}),
        (["--ignore-index", "-1"], {"ignore_index": -1}),
        (["--label-values", "0", "255"], {"label_values": (0, 255)}),
        (["--label-map", "map.json"], {"label_map": Path("map.json")}),
        (["--label-colours", "map.json"], {"label_colours": Path("map.json")}),
        (["--reduce-zero-label"], {"reduce_zero_label": True}),
    ],
)
def test_labels_on_the_command_line_and_in_json(tmp_path, words, expected):
    words = ["--dataset", "folder", "--class-names", "a", "b", *words, "--demo"]
    given = parse(TrainingConfig, words, demo=config("scenes", output=tmp_path))
    assert {name: getattr(given.data, name) for name in expected} == expected
    assert DataConfig.from_json(json.loads(json.dumps(given.as_json()))) == given.data


def test_training_on_300_classes(tmp_path, accelerator):
    """16-bit labels; class 255 is learned and measured, 65535 is neither."""
    values = np.full((40, 48), 255, np.uint16)
    values[:, 24:], values[:8] = 299, 65535
    for kind, picture in (("images", Image.new("RGB", (48, 40))), ("labels", Image.fromarray(values))):
        for split in ("train", "val"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            for name in "ab":
                picture.save(tmp_path / "data" / kind / split / f"{name}.png")
    own = {"data_root": tmp_path / "data", "num_classes": 300, "ignore_index": 65535}
    run = config("folder", output=tmp_path / "run", **own)
    results = run_training(run, lambda c, n: create_model(c.model.backbone, c.model.head, n, **c.model_options(n)))
    assert results["pixels"].nonzero().flatten().tolist() == [255, 299]
    assert results["pixels"].sum() == 2 * 32 * 48
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["ignore_index"] == -1
    with pytest.raises(OptionError, match="ignore_index 255 is one of the 300 classes 0 to 299"):
        run_training(
            changed(run, output=tmp_path / "other"),
            lambda c, n: create_model(c.model.backbone, c.model.head, n, **c.model_options()),
        )


def test_a_model_that_ignores_another_label_than_the_data(tmp_path, accelerator):
    run = config("scenes", output=tmp_path)
    message = "the model ignores the label -1, but Scenes of 12 classes means 255 by no class; build the model with"
    with pytest.raises(OptionError, match=message):
        run_training(run, lambda _, n: create_model("test_vit", "linear", n, pretrained=False, ignore_index=-1))


def test_names_on_the_command_line(tmp_path):
    arguments = ["--dataset", "folder", "--class-names", "lawn", "a path", "--ignore-index", "0", "--data-root", "d"]
    given = parse(TrainingConfig, [*arguments, "--demo"], demo=config("scenes", output=tmp_path))
    assert (given.data.dataset, given.data.class_names, given.data.ignore_index) == ("folder", ("lawn", "a path"), 0)
    assert given.as_json()["class_names"] == ("lawn", "a path")


def test_scenes(tmp_path):
    data = config("scenes", output=tmp_path).data
    sets = [open_dataset(data, split, seed=3) for split in ("train", "val")]
    assert [type(one) for one in sets] == [Scenes, Scenes]
    assert (len(sets[1]), sets[1].read(0)[0].size) == (100, (32, 32))
    torch.testing.assert_close(sets[1][0][0], Scenes("val", size=(32, 32))[0][0])  # whatever the seed


@pytest.mark.parametrize(
    ("name", "place", "fetches"),
    [
        ("ade20k", "data/ADEChallengeData2016/images/training", True),
        ("camvid", "data/camvid/train", False),
        ("cityscapes", "data/cityscapes/leftImg8bit/train", False),
        ("coco_stuff_10k", "data/coco_stuff10k/images", False),
        ("pascal_context", "data/VOCdevkit/JPEGImages", False),
        ("voc2012", "data/VOCdevkit/JPEGImages", False),
    ],
)
def test_usual_places(name, place, fetches, tmp_path, accelerator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config(name, output=tmp_path / "run")
    with pytest.raises(DataMissingError, match=rf"^there is no (folder )?{place}; ") as stop:
        open_data(accelerator, run)
    fetch = ", --download fetches it (about 1 GB)" if fetches else ""
    assert advise(stop.value, run) == f"--data-root PATH says where it is{fetch}, and --demo trains without any data"


def test_download_before_both_splits(tmp_path, accelerator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    download = "segheads.data.ade20k.download_ade20k"
    monkeypatch.setattr(download, lambda root: miniatures.ade20k(root / "ADEChallengeData2016"))
    assert [len(one) for one in open_data(accelerator, config("ade20k", download=True, output=tmp_path))] == [2, 2]


def test_data_sets_that_cannot_be_downloaded(tmp_path, accelerator):
    with pytest.raises(OptionError, match="^CamVid cannot be downloaded by segheads; .* leave out download$"):
        open_data(accelerator, config("camvid", download=True, output=tmp_path))


def test_part_of_the_training_images(tmp_path, accelerator):
    sets = open_data(accelerator, config("scenes", train_images=3, seed=4, output=tmp_path))
    assert [len(one) for one in sets] == [3, 100]
    assert (sets[0].dataset.seed, sets[1].seed) == (4, 0)
    with pytest.raises(OptionError, match="^a subset must have 1 to 2000 images, .* got 0$"):
        open_data(accelerator, config("scenes", train_images=0, output=tmp_path))


def test_labels_that_need_a_package(tmp_path, accelerator, monkeypatch):
    miniatures.coco_stuff(tmp_path, lambda path, *args, **kwargs: path.write_bytes(b""))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(PackageMissingError, match=r"^the \.mat labels .*pip install scipy"):
        open_data(accelerator, config("coco_stuff_10k", data_root=tmp_path, output=tmp_path))


def test_own_folder_without_validation_images(tmp_path, accelerator):
    miniatures.own_folder(tmp_path)
    (tmp_path / "images/val").rename(tmp_path / "images/validation")
    with pytest.raises(
        DataMissingError, match=r"^there is no folder .*images/val, no list val\.txt .*, and no table val"
    ):
        open_data(accelerator, config("folder", num_classes=2, data_root=tmp_path, output=tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "camvid",
            {"num_classes": 3},
            "dataset camvid takes no num_classes; .*is for pascal_context and f",
        ),
        (
            "ade20k",
            {"class_names": ("x",), "ignore_index": 0},
            "dataset ade20k takes no class_names and no ig",
        ),
        ("pascal_context", {"ignore_index": 0}, "dataset pascal_context takes no ignore_index; .*is for folder"),
        (
            "folder",
            {"num_classes": 3, "data_root": None},
            "a folder of your own needs data_root, .* images/train, labels/train",
        ),
        ("folder", {}, "a folder of your own needs class_names, or num_classes"),
        ("folder", {"num_classes": 3, "class_names": ("x", "y")}, "num_classes 3 came with 2 names in class_names; "),
    ],
)
def test_options_that_do_not_fit(name, options, message, tmp_path, accelerator):
    chosen = config(name, **{"data_root": tmp_path, "output": tmp_path / "run", **options})
    with pytest.raises(OptionError, match=f"^{message}"):
        open_dataset(chosen.data, "val")
    with pytest.raises(OptionError, match=f"^{message}") as stop:
        open_data(accelerator, chosen)
    assert "\n" not in str(stop.value)


def test_a_number_of_classes_that_pascal_context_has_not(tmp_path, accelerator):
    miniatures.pascal_context(tmp_path)
    with pytest.raises(OptionError, match="^num_classes must be 59, or 60 with background, not 20"):
        open_data(accelerator, config("pascal_context", num_classes=20, data_root=tmp_path, output=tmp_path))
