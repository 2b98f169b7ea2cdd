"""Label files as they are stored, and the classes that their values stand for."""

import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from segheads.data import FolderDataset
from segheads.data.labels import read_label_colours, read_labels, to_class_indices
from segheads.errors import DataError, LabelError

VALUES = np.array([[0, 1, 3, 2, 1], [3, 3, 0, 1, 2]], np.uint8)


def png(path, values, depth, *, kind=0, palette=b"", alpha=b""):
    """A PNG of few bits, written by hand: Pillow writes no grey of 2 or 4 bit. Kind 0 is grey, 3 a palette."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b""
    for row in values.tolist():
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", alpha), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    wanted = [chunk(name, data) for name, data in chunks if data or name == b"IEND"]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(wanted))


@pytest.mark.parametrize(("depth", "highest"), [(1, 1), (2, 3), (4, 15), (8, 200), (16, 60000)])
def test_grey_of_any_depth_is_not_scaled(tmp_path, depth, highest):
    values = np.array([[0, 1, highest, 1, 0]])
    png(tmp_path / "a.png", values, depth)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)


@pytest.mark.parametrize("alpha", [b"", b"\0", b"\0\x80\xff"])
@pytest.mark.parametrize("depth", [2, 4, 8])
def test_palettes_with_and_without_transparency_give_indices(tmp_path, depth, alpha):
    png(tmp_path / "a.png", VALUES, depth, kind=3, palette=bytes([9, 9, 9, 200, 0, 0, 9, 9, 9, 0, 200, 0]), alpha=alpha)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), VALUES)


@pytest.mark.parametrize("alpha", [b"\0\0", b"\0\1"])
def test_grey_with_a_transparent_value(tmp_path, alpha):
    png(tmp_path / "a.png", VALUES, 2, alpha=alpha)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), VALUES)


@pytest.mark.parametrize(("kind", "highest"), [("P2", 20), ("P5", 20), ("P2", 255), ("P2", 300), ("P5", 65535)])
def test_pgm_is_not_stretched(tmp_path, kind, highest):
    values = [0, 5, highest]
    body = " ".join(map(str, values)).encode()
    if kind == "P5":
        body = b"".join(value.to_bytes(1 if highest < 256 else 2, "big") for value in values)
    (tmp_path / "a.pgm").write_bytes(f"{kind}\n3 1\n{highest}\n".encode() + body)
    assert read_labels(tmp_path / "a.pgm").tolist() == [values]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_tiff_of_any_whole_numbers(tmp_path, dtype):
    values = VALUES.astype(dtype) * (1 if dtype == np.uint8 else 300)
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = read_labels(tmp_path / "a.tif")
    assert np.issubdtype(found.dtype, np.integer)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("value", [1.5, np.nan, np.inf, 2.0**31])
def test_fractions_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value, 1]], np.float32)).save(tmp_path / "a.tif")
    message = re.escape(f"a.tif holds floating-point pixels such as {value:g} (1 of them)")
    with pytest.raises(LabelError, match=message):
        read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.jpg", {"quality": 100}, "JPEG"),
        ("a.tif", {"compression": "jpeg"}, "JPEG"),
        ("a.webp", {"lossless": True}, "WebP"),
    ],
)
@pytest.mark.parametrize("read", [read_labels, read_label_colours])
def test_formats_that_change_values_are_refused(tmp_path, name, options, said, read):
    Image.fromarray(np.kron(VALUES, np.ones((8, 8), np.uint8))).save(tmp_path / name, **options)
    with pytest.raises(LabelError, match=rf"label .*{name} is a {said}, which may change class indices .* as a PNG"):
        read(tmp_path / name)


def test_no_class_is_invented_by_a_jpeg(tmp_path):
    """Four classes came back as 21, 27 % of pixels wrong."""
    rng = np.random.default_rng(0)
    truth = np.kron(rng.choice([2, 5, 13, 17], (8, 8)), np.ones((12, 12))).astype(np.uint8)
    (tmp_path / "i").mkdir()
    (tmp_path / "l").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "i" / "a.jpg")
    Image.fromarray(truth).save(tmp_path / "l" / "a.jpg", quality=90)
    with pytest.raises(DataError, match=r"l/a\.jpg is a JPEG"):
        FolderDataset(tmp_path / "i", tmp_path / "l", 21).read(0)


def test_grey_upside_down_is_refused(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    with pytest.raises(LabelError, match=r"a\.tif stores its values upside down \(0 is white\)"):
        read_labels(tmp_path / "a.tif")
    (tmp_path / "b.pbm").write_text("P1\n3 1\n0 1 1\n")
    with pytest.raises(LabelError, match=r"b\.pbm stores its values upside down"):
        read_labels(tmp_path / "b.pbm")


def test_channels_that_differ_and_channels_that_are_equal(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match="say which colour is which class by label_colours, or save it as a single"):
        read_labels(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (7, 7, 7, 255)).save(tmp_path / "b.png")
    with pytest.raises(LabelError, match=r"4 channels.*its channels are equal, so save it as .*getchannel\(0\)"):
        read_labels(tmp_path / "b.png")


RED_BLUE = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours(tmp_path, mode):
    Image.fromarray(RED_BLUE).convert(mode).save(tmp_path / "a.png")
    assert read_label_colours(tmp_path / "a.png").tolist() == [[0xFF0000, 0x0000FF]]


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_colours(tmp_path, mode):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode).save(tmp_path / "a.png")
    assert read_label_colours(tmp_path / "a.png").tolist() == [[0, 0xFFFFFF]]


def test_colours_that_are_blends_or_none(tmp_path):
    blended = np.dstack([RED_BLUE, np.array([[255, 128]], np.uint8)])
    Image.fromarray(blended).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match=r"a\.png has 1 pixels that are half transparent"):
        read_label_colours(tmp_path / "a.png")
    blended[..., 3] = (255, 0)
    Image.fromarray(blended).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match=r"a\.png has 1 pixels that are transparent, so nobody sees which colour"):
        read_label_colours(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 1]], np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(LabelError, match=r"b\.png is of mode I;16, which has no colours of 8 bit|no colours"):
        read_label_colours(tmp_path / "b.png")


@pytest.mark.parametrize("kind", ["RGBA", "P", "L"])
def test_transparent_pixels_have_no_colour(tmp_path, kind):
    image = Image.fromarray(np.array([[0, 1], [1, 1]], np.uint8))
    if kind == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    if kind == "RGBA":
        image = Image.merge("RGBA", [image, image, image, Image.fromarray(np.array([[0, 255], [255, 255]], np.uint8))])
    image.save(tmp_path / "a.png", **({} if kind == "RGBA" else {"transparency": 0}))
    message = r"a\.png has 1 pixels that are transparent, so nobody sees which colour they have; fill them with"
    with pytest.raises(LabelError, match=message):
        read_label_colours(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["tif", "gif", "png"])
def test_labels_of_several_pages(tmp_path, ending):
    pages = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (0, 1, 2)]
    pages[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=pages[1:])
    message = rf"a\.{ending} has 3 pages, but a label has one; save the one that is meant"
    for read in (read_labels, read_label_colours):
        with pytest.raises(DataError, match=message):
            read(tmp_path / f"a.{ending}")


@pytest.mark.parametrize(("kind", "copy"), [(1, np.uint8), (4, bool), (5, bool)])
def test_smaller_copies_and_masks_in_a_tiff_are_no_pages(tmp_path, kind, copy):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.array([[0, 1], [2, 3]], np.uint8), photometric="minisblack")
        file.write(np.ones((1, 1), copy), photometric="minisblack", subfiletype=kind)
    assert read_labels(tmp_path / "a.tif").tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_more_classes_than_8_bit(dtype):
    values = np.array([[0, 1, 255, 256, 300]], dtype)
    found = to_class_indices(values, 300, first=1, ignored=(0,), path="a.png")
    np.testing.assert_array_equal(found, np.array([[-1, 0, 254, 255, 299]], np.int16), strict=True)


def test_several_ignored_values_and_none():
    values = np.array([[0, 1, 254, 255]], np.uint8)
    assert to_class_indices(values, 2, first=0, ignored=(255, 254), path="a.png").tolist() == [[0, 1, 255, 255]]
    with pytest.raises(LabelError, match="2 classes allow 0 to 1, and nothing for ignored"):
        to_class_indices(values, 2, first=0, ignored=(), path="a.png")


def test_labels_are_indices_not_colours(tmp_path):
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4
    image = Image.fromarray(indices)
    image.putpalette([200, 100, 50] * 4)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), indices)
    Image.fromarray(indices > 1).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "b.png"), indices > 1)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (4, "RGBA")])
def test_label_with_channels_is_an_error(tmp_path, channels, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.png has {channels} channels \(mode {mode}\).*single-channel"):
        read_labels(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_values_become_classes(dtype):
    values = np.array([[0, 1, 3, 9]], dtype)
    found = to_class_indices(values, 3, first=1, ignored=(0, 9), path="a.png")
    np.testing.assert_array_equal(found, np.array([[255, 0, 2, 255]], np.uint8), strict=True)


@pytest.mark.parametrize(
    ("values", "first", "ignored", "message"),
    [
        (
            np.array([[0, 3, 7, 7]], np.uint8),
            0,
            (255,),
            "value 7 (2 pixels out of range), but 4 classes allow 0 to 3, and 255",
        ),
        (
            np.array([[0, 255]], np.uint8),
            0,
            (11,),
            "value 255 (1 pixels out of range), but 4 classes allow 0 to 3, and 11",
        ),
        (
            np.array([[0, 255]], np.uint8),
            1,
            (0,),
            "value 255 (1 pixels out of range), but 4 classes allow 1 to 4, and 0",
        ),
        (np.array([[1, 257]], np.uint16), 0, (255,), "value 257 (1 pixels out of range)"),
        (
            np.array([[-1, 1]], np.int32),
            0,
            (0, 255),
            "value -1 (1 pixels out of range), but 4 classes allow 0 to 3, and 0 or 255",
        ),
    ],
)
def test_label_value_out_of_range_is_an_error(values, first, ignored, message):
    with pytest.raises(DataError, match=re.escape(f"label a.png holds the {message}")):
        to_class_indices(values, 4, first=first, ignored=ignored, path="a.png")


@pytest.mark.parametrize("ignored", [(0,), (0, 255), (0, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_zero_labels_are_reduced_alike_in_both_ways(ignored, dtype):
    """8 bit without ignored values takes a short cut; an ignored value among the classes must not."""
    values = np.array([[0, 1, 2], [3, 4, 1]], dtype=dtype)
    expected = [[255, 0, 1], [255 if 3 in ignored else 2, 3, 0]]
    assert to_class_indices(values, 4, first=1, ignored=ignored, path="a.png").tolist() == expected


def test_the_last_of_255_classes_is_not_the_ignored_value():
    values = np.array([[0, 1, 255]], dtype=np.uint8)
    assert to_class_indices(values, 255, first=1, ignored=(0, 255), path="a.png").tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("read", [read_labels, read_label_colours])
def test_several_pages_are_refused(tmp_path, read):
    page = Image.fromarray(np.zeros((2, 2), np.uint8))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(LabelError, match=r"a\.tif has 2 pages, but a label has one"):
        read(tmp_path / "a.tif")
