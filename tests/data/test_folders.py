"""Folders as people have them: sub-folders, suffixes, other letters, leftovers, links."""

import logging
import os
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from segheads.data import DataConfig, FolderDataset, open_dataset
from segheads.data.folders import common_name, list_images
from segheads.data.images import read_image
from segheads.data.pairs import find_pairs
from segheads.errors import DataError, DataMissingError, OptionError

NOT_ON_WINDOWS = pytest.mark.skipif(sys.platform == "win32", reason="needs links or pipes")


def draw(folder, *names):
    """Images of which each has a grey of its own, their number in the list."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), number, np.uint8)).save(path, format="PNG")
    return folder


def found(tmp_path, **options):
    pairs = find_pairs(tmp_path / "i", tmp_path / "l", **options)
    return [(a.relative_to(tmp_path / "i").as_posix(), b.relative_to(tmp_path / "l").as_posix()) for a, b in pairs]


def test_sub_folders_are_matched_by_relative_path(tmp_path):
    draw(tmp_path / "i", "x.jpg", "rome/old/x.jpg", "paris/x.jpg", "paris/b.JPG")
    draw(tmp_path / "l", "paris/x.png", "x.png", "paris/b.PNG", "rome/old/x.png")
    expected = [("paris/b.JPG", "paris/b.PNG"), ("paris/x.jpg", "paris/x.png")]
    assert found(tmp_path) == [*expected, ("rome/old/x.jpg", "rome/old/x.png"), ("x.jpg", "x.png")]
    dataset = FolderDataset(tmp_path / "i", tmp_path / "l", 4)
    assert [dataset.name(index) for index in range(4)] == ["paris/b", "paris/x", "rome/old/x", "x"]
    assert [int(dataset.read(index)[1][0, 0]) for index in range(4)] == [2, 0, 3, 1]


def test_a_label_of_another_sub_folder_is_none(tmp_path):
    draw(tmp_path / "i", "paris/x.jpg", "rome/x.jpg")
    draw(tmp_path / "l", "paris/x.png", "x.png")
    with pytest.raises(DataMissingError, match=r"1 of 2 images in .* have no label: rome/x\.jpg needs .*l.rome.x\.png"):
        found(tmp_path)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD")])
def test_any_unicode_form_with_spaces_and_dots(tmp_path, forms):
    names = ("Ü ber/ça va.1", "\u1e69 x")  # the last has two marks, whose order differs between forms
    draw(tmp_path / "i", *(unicodedata.normalize(forms[0], f"{name}.JPeG") for name in names))
    draw(tmp_path / "l", *(unicodedata.normalize(forms[1], f"{name}.png") for name in names))
    dataset = FolderDataset(tmp_path / "i", tmp_path / "l", 2)
    numbers = [(np.asarray(dataset.read(k)[0])[0, 0, 0], int(dataset.read(k)[1][0, 0])) for k in range(2)]
    assert sorted(numbers) == [(0, 0), (1, 1)]


@pytest.mark.skipif(sys.platform == "darwin", reason="one file there")
def test_two_forms_of_one_name_are_told_apart(tmp_path):
    draw(tmp_path / "i", "\u00fc.jpg", "u\u0308.jpg")
    with pytest.raises(DataError, match=r"holds both '(\\xfc|u\\u0308)\.jpg' and '(\\xfc|u\\u0308)\.jpg'"):
        list_images(tmp_path / "i")


@pytest.mark.parametrize(
    ("images", "labels", "ends"),
    [
        (("a.jpg", "b.jpg"), ("a_mask.png", "b_mask.png", "a.png", "c_mask.png"), ("", "_mask")),
        (
            ("c/a_leftImg8bit.png",),
            ("c/a_gtFine_labelIds.png", "c/a_gtFine_color.png"),
            ("_leftImg8bit", "_gtFine_labelIds"),
        ),
        (("a.jpg", "b.jpg"), ("a_m.PNG", "b_m.png", "a_m.tif"), ("", "_m.png")),
    ],
    ids=["label", "both", "with its ending"],
)
def test_suffixes(tmp_path, images, labels, ends):
    draw(tmp_path / "i", *images)
    draw(tmp_path / "l", *labels)
    expected = list(zip(images, labels, strict=False))
    assert found(tmp_path, image_end=ends[0], label_end=ends[1]) == expected


def test_images_and_labels_in_one_folder(tmp_path, caplog):
    draw(tmp_path, "a.jpg", "a_mask.png")
    assert find_pairs(tmp_path, tmp_path, image_end=".jpg", label_end="_mask.png", report=True) == [
        (tmp_path / "a.jpg", tmp_path / "a_mask.png")
    ]
    assert not caplog.records


def test_common_names():
    assert common_name("a_mask.png", ".png") == "a_mask"
    assert common_name("a_mask.tif", "_mask.png") is None
    assert common_name("v1.2_x.png", ".2_x") == "v1"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (("a.jpg", "b.jpg"), ("a_mask.png", "b_mask.png"), r"; all match with label_suffix _mask$"),
        (("1.jpg", "10.jpg", "11.jpg"), ("10_m.png", "11_m.png", "1_m.png"), r"; all match with label_suffix _m$"),
        (
            ("c/a_leftImg8bit.png", "d/b_leftImg8bit.png"),
            ("c/a_gt_color.png", "c/a_gt_labelIds.png", "d/b_gt_color.png", "d/b_gt_labelIds.png"),
            r"; all match with image_suffix _leftImg8bit and label_suffix _gt_(color|labelIds) or image_suffix",
        ),
        (("a.jpg", "b.jpg", "c.jpg"), ("a_m.png", "b_m.png", "x.png"), r"; 2 match with label_suffix _m$"),
        (("a.jpg", "b.jpg", "c.jpg"), ("a_m.png", "b.png", "c.png"), r"a\.jpg needs .*; add the labels or take"),
        (("a.jpg",), ("x.png",), r"; add the labels or take the images out$"),
    ],
    ids=["all", "numbers", "both", "most", "few", "none"],
)
def test_a_suffix_is_suggested(tmp_path, images, labels, message):
    draw(tmp_path / "i", *images)
    draw(tmp_path / "l", *labels)
    with pytest.raises(DataMissingError, match=message):
        found(tmp_path)


def test_a_suffix_that_nothing_has(tmp_path):
    draw(tmp_path / "i", "a.jpg")
    draw(tmp_path / "l", "a_mask.png")
    with pytest.raises(DataError, match=r"no image file in .*l has the suffix _msk; it holds a_mask\.png"):
        found(tmp_path, label_end="_msk")


def test_suffixes_are_options_of_a_folder_alone(tmp_path):
    draw(tmp_path / "images/val", "a_rgb.jpg")
    draw(tmp_path / "labels/val", "a_mask.png")
    config = DataConfig(dataset="folder", data_root=tmp_path, num_classes=2, image_suffix="_rgb", label_suffix="_mask")
    assert open_dataset(config, "val").files[0][1].name == "a_mask.png"
    with pytest.raises(OptionError, match="camvid takes no label_suffix; .*is for folder"):
        open_dataset(DataConfig(dataset="camvid", data_root=tmp_path, label_suffix="_mask"), "val")


def test_what_is_passed_over_is_counted_and_named(tmp_path, caplog):
    images = draw(tmp_path / "i", "a.jpg", ".b.jpg", ".cache/c.jpg", "sub/b.jpg")
    labels = draw(tmp_path / "l", "a.png", "sub/b.png", *(f"{k}.png" for k in range(5)))
    for path in (images / "sub/b.heic", images / "a.txt", labels / "x\ny.npz"):
        path.write_bytes(b"x")
    FolderDataset(images, labels, 2)
    assert [(record.name.split(".")[0], record.levelno) for record in caplog.records] == [
        ("segheads", logging.WARNING)
    ] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"4 files passed over in {images}: ")
    assert ".b.jpg, .cache/ (hidden)" in first
    assert "a.txt, sub/b.heic (no image by the ending)" in first
    assert second == (
        f"6 files passed over in {labels}: 'x\\ny.npz' (no image by the ending); "
        "0.png, 1.png, 2.png, ... (label without an image)"
    )


def test_nothing_passed_over_is_nothing_said(tmp_path, caplog):
    draw(tmp_path / "i", "a.jpg")
    draw(tmp_path / "l", "a.png")
    FolderDataset(tmp_path / "i", tmp_path / "l", 2)
    assert not caplog.records


@NOT_ON_WINDOWS
def test_links_to_files_and_folders_are_followed(tmp_path):
    draw(tmp_path / "far", "b.jpg", "c.jpg")
    draw(tmp_path / "i", "a.jpg")
    draw(tmp_path / "l", "a.png", "a2.png", "far/b.png", "far/c.png")
    (tmp_path / "i/far").symlink_to(tmp_path / "far")
    (tmp_path / "i/a2.jpg").symlink_to("a.jpg")
    assert [a for a, _ in found(tmp_path)] == ["a.jpg", "a2.jpg", "far/b.jpg", "far/c.jpg"]


@NOT_ON_WINDOWS
@pytest.mark.parametrize("kind", ["up", "self", "round", "here"])
def test_loops_of_links(tmp_path, kind):
    draw(tmp_path / "i", "sub/a.jpg")
    draw(tmp_path / "l", "sub/a.png")
    draw(tmp_path / "far", "b.jpg")
    if kind == "round":
        (tmp_path / "far/back").symlink_to(tmp_path / "i")
    target = {"up": tmp_path, "self": "loop", "round": tmp_path / "far", "here": "."}[kind]
    (tmp_path / ("i/loop" if kind == "here" else "i/sub/loop")).symlink_to(target)
    message = {
        "up": r"i/sub/loop is a link to .*, which holds it: a loop without end; remove the link",
        "self": "i/sub/loop is a link that leads back to itself; mend or remove it",
        "round": r"i/sub/loop/back is a link to .*/i, which holds it",
        "here": r"i/loop is a link to .*/i, which holds it",
    }
    with pytest.raises(DataError, match=message[kind]):
        found(tmp_path)


@NOT_ON_WINDOWS
@pytest.mark.parametrize("folder", ["i", "l"])
def test_broken_links_and_pipes(tmp_path, folder):
    draw(tmp_path / "i", "a.jpg")
    draw(tmp_path / "l", "a.png")
    path = tmp_path / folder / ("a.jpg" if folder == "i" else "a.png")
    path.unlink()
    path.symlink_to("gone.png")
    with pytest.raises(DataMissingError, match=rf"{path} is a broken link: its target gone\.png is not there"):
        found(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"{path} is a named pipe, but should be an? (image|label) file"):
        found(tmp_path)


@NOT_ON_WINDOWS
def test_a_link_that_no_pair_needs_is_only_named(tmp_path, caplog):
    draw(tmp_path / "i", "a.jpg")
    draw(tmp_path / "l", "a.png")
    (tmp_path / "l/b.png").symlink_to("gone.png")
    assert len(FolderDataset(tmp_path / "i", tmp_path / "l", 2)) == 1
    assert "b.png (label without an image)" in caplog.text


@NOT_ON_WINDOWS
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg is a named pipe, but should be an image"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="is a folder, but should be an image"):
        read_image(tmp_path)
