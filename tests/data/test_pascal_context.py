import hashlib
import re

import pytest
from miniatures import draw_image, draw_labels, pascal_context

from segheads.data import PascalContext
from segheads.errors import DataError


def test_official_names_and_colours(tmp_path):
    pascal_context(tmp_path)
    with_background, without = PascalContext(tmp_path), PascalContext(tmp_path, num_classes=59)
    assert with_background.num_classes == len(set(with_background.class_names)) == len(with_background.palette) == 60
    assert without.num_classes == 59
    assert without.class_names == with_background.class_names[1:] == tuple(sorted(without.class_names))
    assert without.palette == with_background.palette[1:]
    spots = {0: "background", 1: "aeroplane", 3: "bed", 4: "bedclothes", 34: "motorbike", 40: "pottedplant", 59: "wood"}
    assert {index: with_background.class_names[index] for index in spots} == spots
    # of MMSegmentation's names, which are those of the authors' labels.txt at the ids that the converter picks
    assert hashlib.sha256("\n".join(with_background.class_names).encode()).hexdigest()[:16] == "e29ff1a0eaea71eb"
    colours = {0: (120, 120, 120), 1: (180, 120, 120), 2: (6, 230, 230), 48: (140, 140, 140), 59: (31, 0, 255)}
    assert {index: with_background.palette[index] for index in colours} == colours


def test_background_is_a_class_or_ignored(tmp_path):
    pascal_context(tmp_path, values=(0, 1, 59, 255))
    assert PascalContext(tmp_path)[0][1][0, :4].tolist() == [0, 1, 59, 255]
    assert PascalContext(tmp_path, num_classes=59)[0][1][0, :4].tolist() == [255, 0, 58, 255]


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2010"])
def test_roots(tmp_path, inside):
    assert len(PascalContext(pascal_context(tmp_path) / inside, "val")) == 2


def test_a_list_picks_and_its_order_does_not_matter(tmp_path):
    base = pascal_context(tmp_path) / "VOCdevkit/VOC2010"
    for stem in ("2008_000002", "an odd.name", "unlisted"):
        draw_image(base / "JPEGImages" / f"{stem}.jpg")
        draw_labels(base / "SegmentationClassContext" / f"{stem}.png", (1,))
    listing = base / "ImageSets/SegmentationContext/train.txt"
    listing.write_bytes("\ufeffan odd.name\r\n\r\n2008_000002 \r\nb_000001_000019".encode())
    dataset = PascalContext(tmp_path)
    assert [dataset.name(index) for index in range(3)] == ["2008_000002", "an odd.name", "b_000001_000019"]
    assert len(dataset) == 3
    assert dataset.read(1)[1].unique().tolist() == [1]
    val = PascalContext(tmp_path, "val")
    assert [val.name(index) for index in range(2)] == ["c_000000_000001", "d_000000_000001"]


@pytest.mark.parametrize(
    "missing", ["JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/train.txt"]
)
def test_missing_parts(tmp_path, missing):
    base = pascal_context(tmp_path) / "VOCdevkit/VOC2010"
    (base / missing).rename(tmp_path / "elsewhere")
    path = re.escape(str(base / missing))
    with pytest.raises(FileNotFoundError, match=rf"no {path}; .*ImageSets/SegmentationContext/train\.txt in .*VOC2010"):
        PascalContext(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("JPEGImages/a_000000_000019.jpg", r"no image: a_000000_000019 needs .*JPEGImages/a_000000_000019\.jpg; "),
        (
            "SegmentationClassContext/b_000001_000019.png",
            r"no label: b_000001_000019 needs .*SegmentationClassContext/b_000001_000019\.png; add the labels",
        ),
    ],
)
def test_missing_files(tmp_path, file, message):
    (pascal_context(tmp_path) / "VOCdevkit/VOC2010" / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 names in .*train\.txt have {message}"):
        PascalContext(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n \n", r"train\.txt names no images; .*one name a line"), ("x\ny\nx\n", r"train\.txt names x twice")],
)
def test_bad_lists(tmp_path, text, message):
    base = pascal_context(tmp_path) / "VOCdevkit/VOC2010"
    (base / "ImageSets/SegmentationContext/train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        PascalContext(tmp_path)


def test_values_that_are_no_class(tmp_path):
    pascal_context(tmp_path, values=(0, 60))
    with pytest.raises(DataError, match=r"a_000000_000019\.png holds the value 60 .*60 classes allow 0 to 59, and 255"):
        PascalContext(tmp_path)[0]
    with pytest.raises(DataError, match=r"holds the value 60 .*59 classes allow 1 to 59, and 0 or 255"):
        PascalContext(tmp_path, num_classes=59)[0]


def test_arguments(tmp_path):
    pascal_context(tmp_path)
    with pytest.raises(ValueError, match="num_classes must be 59, or 60 with background, not 33"):
        PascalContext(tmp_path, num_classes=33)
    with pytest.raises(ValueError, match="split must be one of train, val, not 'trainval'"):
        PascalContext(tmp_path, "trainval")
