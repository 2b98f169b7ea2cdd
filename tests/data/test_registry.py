import re

import numpy as np
import pytest
import torch
from miniatures import camvid
from PIL import Image
from testers import DatasetTester

from segheads.classes import distinct_colours
from segheads.data import ADE20K, DATASETS, CamVid, FolderDataset, Scenes
from segheads.errors import DataError


def write_pair(images, labels, stem="a", size=(8, 6), values=(0, 1), suffix=".jpg"):
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(images / f"{stem}{suffix}")
    array = np.full(size[::-1], values[0], np.uint8)
    array[0, : len(values)] = values
    Image.fromarray(array).save(labels / f"{stem}.png")


@pytest.mark.parametrize("name", list(DATASETS))
class TestDatasets(DatasetTester):
    pass


def test_ade20k_labels_shift_and_both_roots(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    write_pair(base / "images" / "training", base / "annotations" / "training", values=(0, 1, 150))
    for root in (tmp_path, base):
        dataset = ADE20K(root)
        assert dataset[0][1][0, :3].tolist() == [255, 0, 149]
    assert (dataset.num_classes, dataset.class_names[0], dataset.palette[2]) == (150, "wall", (6, 230, 230))


def test_camvid_unlabelled(tmp_path):
    assert CamVid(camvid(tmp_path), "train")[0][1][0, :3].tolist() == [0, 10, 255]


def test_real_camvid(shared_data):
    dataset = CamVid(shared_data("camvid"), "val")
    image, labels = dataset[0]
    assert (len(dataset), image.shape, int(labels[0, 200])) == (101, (3, 360, 480), 0)


def test_real_ade20k(shared_data):
    dataset = ADE20K(shared_data("ade20k_sample"), "train")
    assert len(dataset) == 2
    labels = dataset[0][1]
    assert {dataset.class_names[value] for value in labels.unique() if value != 255} >= {"building", "sky", "tree"}


@pytest.mark.parametrize(
    ("kind", "names"), [(ADE20K, "train, val"), (CamVid, "train, val, test"), (Scenes, "train, val")]
)
def test_unknown_split(kind, names, tmp_path):
    with pytest.raises(ValueError, match=f"split must be one of {names}, not 'validation'"):
        kind(split="validation") if kind is Scenes else kind(tmp_path, "validation")


def test_missing_layout_names_folder_and_remedy(tmp_path):
    missing = re.escape(str(tmp_path / "images" / "training"))
    with pytest.raises(FileNotFoundError, match=f"no folder {missing}; .*images/training.*download_ade20k"):
        ADE20K(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*/train; CamVid keeps images in train/"):
        CamVid(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*/trainannot; .*labels in trainannot/"):
        CamVid(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere; it should hold image files"):
        FolderDataset(tmp_path / "nowhere", tmp_path, 2)


def test_empty_folder(tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "l").mkdir()
    (tmp_path / "i" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"/i holds no image files"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 2)


def test_image_without_label(tmp_path):
    write_pair(tmp_path / "i", tmp_path / "l")
    write_pair(tmp_path / "i", tmp_path / "l", "b")
    (tmp_path / "l" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images in .*/i have no label: b\.jpg needs .*/l/b\.png"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 2)


def test_two_images_of_one_name(tmp_path):
    write_pair(tmp_path / "i", tmp_path / "l")
    write_pair(tmp_path / "i", tmp_path / "l", suffix=".png")
    with pytest.raises(ValueError, match=r"holds both a\.(jpg|png) and a\.(jpg|png); keep one"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 2)


def test_label_of_another_size(tmp_path):
    write_pair(tmp_path / "i", tmp_path / "l")
    Image.new("L", (5, 4)).save(tmp_path / "l" / "a.png")
    with pytest.raises(DataError, match=r"label .*a\.png is 5x4 but its image .*a\.jpg is 8x6"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 2)[0]


def test_fewer_classes_than_labels(tmp_path):
    write_pair(tmp_path / "i", tmp_path / "l", values=(0, 1, 4))
    with pytest.raises(DataError, match=r"a\.png holds the value 4 .*3 classes allow 0 to 2, and 255 for ignored"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 3)[0]


def test_folder_options(tmp_path):
    write_pair(tmp_path / "i", tmp_path / "l", values=(0, 1, 2, 7))
    plain = FolderDataset(tmp_path / "i", tmp_path / "l", 3, ignore_index=7)
    assert plain[0][1][0, :4].tolist() == [0, 1, 2, 255]
    reduced = FolderDataset(
        tmp_path / "i", tmp_path / "l", 2, ignore_index=7, reduce_zero_label=True, class_names=("x", "y")
    )
    assert reduced[0][1][0, :4].tolist() == [255, 0, 1, 255]
    assert (plain.class_names[2], reduced.class_names, plain.name(0)) == ("class 2", ("x", "y"), "a")


def test_folder_names_and_colours_must_agree(tmp_path):
    with pytest.raises(ValueError, match="num_classes is 3 but 2 class names came"):
        FolderDataset(tmp_path, tmp_path, 3, class_names=("a", "b"))
    with pytest.raises(ValueError, match="2 class names came with 1 colours"):
        FolderDataset(tmp_path, tmp_path, 2, palette=((0, 0, 0),))
    with pytest.raises(ValueError, match="1 to 32767 classes fit, not 32768"):
        FolderDataset(tmp_path, tmp_path, 2**15)


def test_default_colours_are_distinct():
    assert len(set(distinct_colours(255))) == 255


def test_scenes_are_a_function_of_seed_split_and_index():
    one, again = Scenes(length=5), Scenes(length=9)
    torch.testing.assert_close(one[3], again[3], rtol=0, atol=0)
    for other in (Scenes(seed=1)[3][0], Scenes("val")[3][0], one[4][0]):
        assert (one[3][0] - other).abs().mean() > 0.02
    with pytest.raises(IndexError, match="scene 5 is outside the 5 scenes"):
        one.read(5)


@pytest.mark.parametrize("size", [(96, 96), (65, 130)])
def test_scenes_show_every_class(size):
    scenes = Scenes(size=size, length=60)
    counts = sum(torch.bincount(scenes.read(index)[1].flatten().long(), minlength=12) for index in range(60))
    assert scenes[0][0].shape == (3, *size)
    assert counts.min() / counts.sum() > 0.01
