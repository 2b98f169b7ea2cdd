import hashlib
import re
import sys

import numpy as np
import pytest
from miniatures import SIZE, coco_stuff, coco_stuff_164k, converted_coco_stuff, draw_labels, label_map
from PIL import Image

from segheads.data import COCOStuff10K, COCOStuff164K
from segheads.errors import DataError, DataMissingError

REMOVED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # "Removed from COCO" in the authors' list of labels


@pytest.fixture
def savemat():
    return pytest.importorskip("scipy.io", reason="the .mat files of COCO-Stuff need SciPy").savemat


def test_official_names_and_colours(tmp_path):
    dataset = COCOStuff10K(converted_coco_stuff(tmp_path))
    assert dataset.num_classes == len(set(dataset.class_names)) == len(dataset.palette) == 171
    spots = {
        0: "person",
        11: "stop sign",
        61: "toilet",
        79: "toothbrush",
        80: "banner",
        148: "solid-other",
        170: "wood",
    }
    assert {index: dataset.class_names[index] for index in spots} == spots
    assert not {"street sign", "hat", "hair brush", "mirror", "window"} & set(dataset.class_names)
    colours = {0: (0, 192, 64), 2: (0, 64, 96), 26: (0, 0, 0), 100: (0, 96, 0), 170: (64, 64, 0)}
    assert {index: dataset.palette[index] for index in colours} == colours
    # of the authors' labels.txt without what they call removed, and of MMSegmentation's palette
    assert hashlib.sha256("\n".join(dataset.class_names).encode()).hexdigest()[:16] == "8ea44449837dceb3"
    assert hashlib.sha256(bytes(sum(dataset.palette, ()))).hexdigest()[:16] == "788e8126c601896b"


def test_every_id_of_the_release(tmp_path, savemat):
    used = [value for value in range(1, 183) if value not in REMOVED]
    dataset = COCOStuff10K(coco_stuff(tmp_path, savemat))
    found = []
    for start in range(0, 171, SIZE[0]):
        part = used[start : start + SIZE[0]]
        savemat(dataset.files[0][1], {"S": label_map(part)})
        found += dataset.read(0)[1][0, : len(part)].tolist()
    assert found == list(range(171))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float64])
def test_release(tmp_path, savemat, dtype):
    dataset = COCOStuff10K(coco_stuff(tmp_path, savemat), "train")
    savemat(dataset.files[0][1], {"S": label_map((0, 1, 13, 92, 182), dtype=dtype), "captions": ["a cat"]})
    image, labels = dataset[0]
    assert labels[0, :5].tolist() == [255, 0, 11, 80, 170]
    assert image.shape == (3, 40, 48)
    assert [dataset.name(index) for index in range(len(dataset))] == ["a_000000_000019", "b_000001_000019"]


def test_converted(tmp_path):
    dataset = COCOStuff10K(converted_coco_stuff(tmp_path, values=(0, 1, 171, 255)), "train")
    assert dataset[0][1][0, :4].tolist() == [255, 0, 170, 255]
    assert [dataset.name(index) for index in range(len(dataset))] == ["a_000000_000019", "b_000001_000019"]


def test_converted_wins_and_needs_no_scipy(tmp_path, savemat, monkeypatch):
    """The converter writes into the folder of the release."""
    converted_coco_stuff(coco_stuff(tmp_path, savemat))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert COCOStuff10K(tmp_path)[0][1][0, :3].tolist() == [255, 0, 170]


@pytest.mark.parametrize("nested", [True, False])
def test_roots_and_splits(tmp_path, savemat, nested):
    coco_stuff(tmp_path / "cocostuff-10k-v1.1" if nested else tmp_path, savemat)
    for split in ("val", "test"):
        dataset = COCOStuff10K(tmp_path, split)
        assert [dataset.name(index) for index in range(len(dataset))] == ["c_000000_000001", "d_000000_000001"]
    with pytest.raises(ValueError, match="split must be one of train, val, test, not 'all'"):
        COCOStuff10K(tmp_path, "all")


def test_grey_images(tmp_path):
    converted_coco_stuff(tmp_path)
    Image.new("L", SIZE, 9).save(tmp_path / "images/train2014/a_000000_000019.jpg")
    assert COCOStuff10K(tmp_path).read(0)[0].mode == "RGB"


def test_without_scipy(tmp_path, monkeypatch):
    coco_stuff(tmp_path, lambda path, *args, **kwargs: path.write_bytes(b""))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"\.mat labels of COCO-Stuff 10K need SciPy, .*: pip install scipy"):
        COCOStuff10K(tmp_path)


def test_version_1_0_is_refused(tmp_path, savemat):
    names = np.array([f"name {index}" for index in range(172)], dtype=object)
    coco_stuff(tmp_path, savemat, values=(1, 2, 172), names=names)
    with pytest.raises(ValueError, match=r"a_000000_000019\.mat holds 172 names, as in version 1\.0 .* has 182"):
        COCOStuff10K(tmp_path)


def test_version_1_1_names_are_accepted(tmp_path, savemat):
    names = np.array([[f"name {index}"] for index in range(182)], dtype=object)
    assert len(COCOStuff10K(coco_stuff(tmp_path, savemat, names=names))) == 2


@pytest.mark.parametrize("value", [12, 91, 183])
def test_ids_that_are_no_class(tmp_path, savemat, value):
    coco_stuff(tmp_path, savemat, values=(0, value))
    message = (
        rf"a_000000_000019\.mat holds the value {value} \(960 pixels out of range\), but .* 0 to 182 without 12, 26"
    )
    with pytest.raises(DataError, match=message):
        COCOStuff10K(tmp_path).read(0)


def test_converted_value_that_is_no_class(tmp_path):
    converted_coco_stuff(tmp_path, values=(1, 172))
    message = r"a_000000_000019_labelTrainIds\.png holds the value 172 .*171 classes allow 1 to 171, and 0 or 255"
    with pytest.raises(DataError, match=message):
        COCOStuff10K(tmp_path).read(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"T": np.zeros((40, 48))}, r"integers S of shape \(height, width\), but it holds no S"),
        ({"S": np.zeros((40, 48, 3), np.uint8)}, r"an S of shape \(40, 48, 3\) and type uint8"),
        ({"S": np.full((40, 48), 0.5)}, r"an S of shape \(40, 48\) and type float64"),
        ({"S": "text"}, r"an S of shape \(1,\) and type <U4"),
        ({"S": np.zeros((4, 5), np.uint8)}, r"is 5x4 but its image .* is 48x40"),
    ],
)
def test_mat_files_with_something_else(tmp_path, savemat, content, message):
    dataset = COCOStuff10K(coco_stuff(tmp_path, savemat))
    savemat(dataset.files[0][1], content)
    with pytest.raises(DataError, match=rf"a_000000_000019\.mat .*{message}"):
        dataset.read(0)


@pytest.mark.parametrize("keep", [0, 60, 200])
def test_damaged_mat_files(tmp_path, savemat, keep):
    dataset = COCOStuff10K(coco_stuff(tmp_path, savemat))
    file = dataset.files[0][1]
    file.write_bytes(file.read_bytes()[:keep])
    dataset = COCOStuff10K(tmp_path)
    with pytest.raises(DataError, match=rf"a_000000_000019\.mat \({keep} bytes\) cannot be read as a \.mat file: "):
        dataset.read(0)


@pytest.mark.parametrize("missing", ["images", "annotations", "imageLists/test.txt"])
def test_missing_parts(tmp_path, missing):
    coco_stuff(tmp_path, lambda path, *args, **kwargs: path.write_bytes(b""))
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    path = re.escape(str(tmp_path / missing))
    with pytest.raises(FileNotFoundError, match=rf"no {path}; .*imageLists/test\.txt, or .*images/test2014/"):
        COCOStuff10K(tmp_path, "val")


def test_missing_files(tmp_path):
    coco_stuff(tmp_path / "a", lambda path, *args, **kwargs: path.write_bytes(b""))
    (tmp_path / "a/annotations/b_000001_000019.mat").unlink()
    message = r"1 of 2 names in .*train\.txt have no label: b_000001_000019 needs .*annotations/b_000001_000019\.mat"
    with pytest.raises(FileNotFoundError, match=message):
        COCOStuff10K(tmp_path / "a")
    (converted_coco_stuff(tmp_path / "b") / "annotations/train2014/b_000001_000019_labelTrainIds.png").unlink()
    message = r"1 of 2 images in .*train2014 have no label: b_000001_000019\.jpg needs .*_000019_labelTrainIds\.png"
    with pytest.raises(FileNotFoundError, match=message):
        COCOStuff10K(tmp_path / "b")


def test_png_in_the_place_of_a_converted_label(tmp_path):
    """A label that lacks the converter's ending is no label."""
    converted_coco_stuff(tmp_path)
    draw_labels(tmp_path / "annotations/train2014/x.png", (1,))
    assert len(COCOStuff10K(tmp_path)) == 2


def test_164k_as_released(tmp_path):
    dataset = COCOStuff164K(coco_stuff_164k(tmp_path, values=(0, 11, 181, 255)), "val")
    removed = "COCO-Stuff's values are 255 and its ids less 1"  # 11 is id 12, which COCO took out
    with pytest.raises(DataError, match=removed):
        dataset.read(0)
    coco_stuff_164k(tmp_path, values=(0, 12, 181, 255))
    assert dataset.read(0)[1][0, :4].tolist() == [0, 11, 170, 255]
    assert (dataset.class_names[11], dataset.class_names[170]) == ("stop sign", "wood")


def test_164k_converted_and_in_other_folders(tmp_path):
    coco_stuff_164k(tmp_path, values=(0, 170, 255), end="_labelTrainIds")
    coco_stuff_164k(tmp_path, values=(0, 181, 255))  # beside them, as MMSegmentation leaves it
    (tmp_path / "stuffthingmaps_trainval2017").rename(tmp_path / "annotations")
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images/train2017")
    dataset = COCOStuff164K(tmp_path)
    assert len(dataset) == 2
    assert dataset.read(1)[1][0, :3].tolist() == [0, 170, 255]
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataMissingError, match=r"^there is no .*/val2017; .* needs val2017/ or images/val2017/, and "):
        COCOStuff164K(tmp_path, "val")
