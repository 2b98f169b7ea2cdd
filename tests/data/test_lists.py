"""Lists of names, and tables, that tell which files are of a split."""

import os
import re
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from segheads.data import DataConfig, FolderDataset, open_dataset
from segheads.errors import DataError, DataMissingError


def draw(root, *names):
    """Images and labels of one grey each, their number in the list."""
    for number, name in enumerate(names):
        for path in (root / "images" / f"{name}.jpg", root / "labels" / f"{name}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 6), number, np.uint8)).save(path, format="PNG")
    return root


def opened(root, split="val", **options):
    return open_dataset(DataConfig(dataset="folder", data_root=root, num_classes=9, **options), split)


def names_of(dataset):
    """Names, once image and label of each are seen to be of one number."""
    for index in range(len(dataset)):
        image, labels = dataset.read(index)
        assert np.asarray(image)[0, 0, 0] == labels[0, 0]
    return [image.name for image, _ in dataset.files]


def write(root, text, name="val.txt", encoding="utf-8"):
    (root / name).write_bytes(text.encode(encoding))
    return root


@pytest.mark.parametrize(
    "text",
    [
        "sub/b\nc d\n",
        "\ufeffsub/b.jpg\r\n\r\nc d.jpg",
        "images/c d.jpg\n./images/sub/b.jpg\n",
        "c d\n  sub\\b.jpg  \n",
    ],
    ids=["names", "files of Windows", "from the root", "backslashes"],
)
def test_lists_of_names(tmp_path, text):
    dataset = opened(write(draw(tmp_path, "a", "sub/b", "c d"), text))
    assert names_of(dataset) == ["c d.jpg", "b.jpg"]
    assert [dataset.name(index) for index in range(2)] == ["c d", "sub/b"]


def test_splits_have_lists_of_their_own(tmp_path):
    root = write(write(draw(tmp_path, "a", "b", "c"), "a\nc\n", "train.txt"), "b\n")
    assert [names_of(opened(root, split)) for split in ("train", "val")] == [["a.jpg", "c.jpg"], ["b.jpg"]]
    with pytest.raises(DataMissingError, match=r"no folder .*images.test, no list test\.txt beside .*, and no table"):
        opened(root, "test")


def test_folders_win_over_lists(tmp_path):
    root = write(draw(tmp_path, "val/a", "val/b"), "val/b\n")
    assert names_of(opened(root)) == ["a.jpg", "b.jpg"]


def test_any_unicode_form(tmp_path):
    draw(tmp_path, unicodedata.normalize("NFD", "ü"), "a")
    dataset = opened(write(tmp_path, unicodedata.normalize("NFC", "ü.jpg") + "\na"))
    assert sorted(map(len, names_of(dataset))) == [5, 5 + (sys.platform != "darwin")]


@pytest.mark.parametrize("line", ["a", "a_rgb", "a_rgb.jpg", "images/a_rgb.jpg"])
def test_suffixes(tmp_path, line):
    draw(tmp_path, "a_rgb", "a_mask")
    dataset = opened(write(tmp_path, line), image_suffix="_rgb", label_suffix="_mask")
    assert [path.name for path in dataset.files[0]] == ["a_rgb.jpg", "a_mask.png"]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "a\nx\n\nb.png\nsub/y\n" + "z\n" * 8,
            DataMissingError,
            r"11 of 12 names in .*\.txt have no image in .*images: x \(line 2\), b.png \(line 4\), sub/y \(line 5\), z"
            r" \(line 6\), .*, z \(line 12\), \.\.\.; add the images or take the names out$",
        ),
        ("a\n\nc\n", DataMissingError, r"1 of 2 names in .* have no label in .*labels: c \(line 3\); add the labels"),
        ("a\nb\na.jpg\n", DataError, r"val\.txt names a\.jpg in line 3, and before in line 1; keep one"),
        ("\n \n", DataError, r"val\.txt names no images; it should hold one name a line"),
        ("\udcff", DataError, r"val\.txt is no text in UTF-8: .*; it should be a list of names, one a line"),
    ],
    ids=["image", "label", "twice", "nothing", "no text"],
)
def test_lists_that_do_not_fit(tmp_path, text, kind, message):
    draw(tmp_path, "a", "b", "c")
    (tmp_path / "labels/c.png").unlink()
    (tmp_path / "val.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(kind, match=message):
        opened(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_broken_links_and_pipes(tmp_path):
    draw(tmp_path, "a", "b", "c")
    for kind, name in (("images", "b.jpg"), ("labels", "c.png")):
        (tmp_path / kind / name).unlink()
    (tmp_path / "images/b.jpg").symlink_to("gone.jpg")
    os.mkfifo(tmp_path / "labels/c.png")
    assert len(opened(write(tmp_path, "a"))) == 1
    with pytest.raises(DataMissingError, match=r"images/b\.jpg is a broken link: its target gone\.jpg is not there"):
        opened(write(tmp_path, "a\nb"))
    with pytest.raises(DataError, match=r"labels/c\.png is a named pipe, but should be a label file"):
        opened(write(tmp_path, "a\nc"))
    (tmp_path / "val.txt").unlink()
    os.mkfifo(tmp_path / "val.txt")
    with pytest.raises(DataError, match=r"val\.txt is a named pipe, but should be a list of names"):
        opened(tmp_path)


def test_files_may_be_given_one_by_one(tmp_path):
    draw(tmp_path, "a", "b")
    images, labels = (sorted((tmp_path / kind).iterdir(), reverse=True) for kind in ("images", "labels"))
    assert names_of(FolderDataset(images, labels, 2)) == ["b.jpg", "a.jpg"]
    for wrong, words in ((labels[:1], "2 files and 1 files"), (tmp_path, f"2 files and the folder {tmp_path}")):
        with pytest.raises(ValueError, match=f"two folders, or equally many files; got {re.escape(words)}"):
            FolderDataset(images, wrong, 2)
