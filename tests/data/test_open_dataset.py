"""A DataConfig, and the data set that it opens."""

import dataclasses
import json
import sys
from pathlib import Path

import miniatures
import pytest

from segheads.data import ADE20K, DATASETS, CamVid, DataConfig, FolderDataset, SubsetDataset, open_dataset
from segheads.data import ade20k as ade20k_module
from segheads.errors import (
    DataError,
    DataMissingError,
    OptionError,
    PackageMissingError,
    SegheadsError,
)


def test_json_there_and_back():
    config = DataConfig(dataset="folder", data_root=Path("here"), class_names=("a", "b"), train_images=3)
    values = {**dataclasses.asdict(config), "data_root": "here", "head": "linear", "scale": [9, 8]}
    assert DataConfig.from_json(json.loads(json.dumps(values))) == config


def test_json_that_leaves_fields_out():
    assert DataConfig.from_json({"scenes_size": None, "class_names": None}) == DataConfig()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cityscape",
            f"^no data set is called 'cityscape'; there are {', '.join(DATASETS)}; did you mean 'cityscapes'",
        ),
        ("xyzzy", f"^no data set is called 'xyzzy'; there are {', '.join(DATASETS)}$"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(OptionError, match=message):
        open_dataset(DataConfig(dataset=name), "val")


def test_options_of_other_data_sets():
    config = DataConfig(dataset="camvid", num_classes=3, ignore_index=0)
    message = (
        r"^dataset camvid takes no num_classes and no ignore_index; leave that out "
        r"\(num_classes is for pascal_context and folder; ignore_index is for folder\)$"
    )
    with pytest.raises(OptionError, match=message):
        open_dataset(config, "val")


class Lawns(FolderDataset):
    """A data set of one's own, in one class."""

    usual_root = "data/lawns"
    options = frozenset({"ignore_index"})

    @classmethod
    def open(cls, config, split, *, seed=0):
        root = cls.find_root(config)
        return cls(root / "images" / split, root / "labels" / split, 3, ignore_index=config.ignore_index)


def test_one_line_adds_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "lawns", Lawns)
    monkeypatch.chdir(tmp_path)
    miniatures.own_folder(Path("data/lawns"), (0, 2, 9))
    dataset = open_dataset(DataConfig(dataset="lawns", ignore_index=9), "val")
    assert type(dataset) is Lawns
    assert dataset.read(0)[1][0, :3].tolist() == [0, 2, 255]
    with pytest.raises(OptionError, match="ignore_index is for folder and lawns"):
        open_dataset(DataConfig(dataset="camvid", ignore_index=9), "val")
    with pytest.raises(OptionError, match="Lawns cannot be downloaded"):
        open_dataset(DataConfig(dataset="lawns", ignore_index=9, download=True), "val")


def test_no_root(monkeypatch):
    monkeypatch.setattr(CamVid, "usual_root", None)
    with pytest.raises(OptionError, match="CamVid has no usual place; give data_root"):
        open_dataset(DataConfig(dataset="camvid"), "val")


def test_a_part_of_the_training_images():
    config = DataConfig(dataset="scenes", train_images=5)
    first, again, other = (open_dataset(config, "train", seed=seed) for seed in (0, 0, 1))
    assert type(first) is SubsetDataset
    assert len(first) == 5
    assert first.indices == again.indices != other.indices
    assert len(open_dataset(config, "val")) == 100
    with pytest.raises(OptionError, match="must have 1 to 2000 images, which are all there are; got 0"):
        open_dataset(dataclasses.replace(config, train_images=0), "train")


@pytest.mark.parametrize(
    ("root", "called_with"),
    [(None, "data"), ("x/ADEChallengeData2016", "x"), ("x/mine", "x/mine")],
)
def test_download(root, called_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def download(folder):
        calls.append(folder)
        miniatures.ade20k(folder / "ADEChallengeData2016")

    monkeypatch.setattr(ade20k_module, "download_ade20k", download)
    config = DataConfig(data_root=root and Path(root), download=True)
    assert type(open_dataset(config, "val")) is ADE20K
    assert calls == [Path(called_with)]


def test_no_download_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(ade20k_module, "download_ade20k", lambda folder: pytest.fail(f"fetched {folder}"))
    miniatures.ade20k(tmp_path)
    assert len(open_dataset(DataConfig(data_root=tmp_path, download=True), "val")) == 2


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - {"ade20k", "scenes"}))
def test_no_download(name, tmp_path):
    with pytest.raises(OptionError, match="cannot be downloaded by segheads; .* leave out download"):
        DATASETS[name].fetch(tmp_path)


def test_scenes_need_no_download():
    assert len(open_dataset(DataConfig(dataset="scenes", download=True), "val")) == 100


def test_splits_that_are_unknown(tmp_path):
    with pytest.raises(OptionError, match="split must be one of train, val, test, not 'all'"):
        open_dataset(DataConfig(dataset="camvid", data_root=tmp_path), "all")


def test_files_that_vanish(tmp_path):
    dataset = open_dataset(DataConfig(dataset="camvid", data_root=miniatures.camvid(tmp_path)), "val")
    dataset.files[0][1].unlink()
    with pytest.raises(DataMissingError, match=rf"there is no {dataset.files[0][1]}, which should be a label image"):
        dataset.read(0)


def test_folders_without_images(tmp_path):
    for folder in ("images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match="images/val holds no image files"):
        open_dataset(DataConfig(dataset="folder", num_classes=2, data_root=tmp_path), "val")


def test_lists_that_are_no_text(tmp_path):
    miniatures.pascal_context(tmp_path)
    listing = tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt"
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=rf"{listing} is no text in UTF-8"):
        open_dataset(DataConfig(dataset="pascal_context", data_root=tmp_path), "val")


def test_a_missing_package(tmp_path, monkeypatch):
    miniatures.coco_stuff(tmp_path, lambda path, *args, **kwargs: path.write_bytes(b""))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(PackageMissingError, match="pip install scipy"):
        open_dataset(DataConfig(dataset="coco_stuff_10k", data_root=tmp_path), "val")
    assert issubclass(PackageMissingError, SegheadsError)
    assert issubclass(PackageMissingError, ImportError)


@pytest.mark.parametrize("path", sorted(Path(ade20k_module.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_messages_speak_of_fields(path):
    """No flags and no exits in the library: the command line translates. Findings are what check-data prints."""
    assert "SystemExit" not in path.read_text()
    assert "--" not in path.read_text() or path.stem == "findings"


def test_the_seed_draws_scenes_to_train_on_and_leaves_those_to_evaluate_on():
    config = DataConfig(dataset="scenes", scenes_size=32)
    for split, same in {"train": False, "val": True}.items():
        first, second = (open_dataset(config, split, seed=seed).read(0)[1] for seed in (0, 1))
        assert first.equal(second) == same
