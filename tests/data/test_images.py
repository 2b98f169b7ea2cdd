import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segheads.data import read_image
from segheads.data.labels import read_labels
from segheads.errors import DataError

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def repeated(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def png16(path, values):
    """A 16-bit grey PNG written by hand."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Image.fromarray(RGB), RGB),
        (lambda: Image.fromarray(GREY), repeated(GREY)),
        (lambda: Image.fromarray(np.dstack([RGB, GREY])), RGB),
        (lambda: Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(RGB[..., 1])]), repeated(GREY)),
        (lambda: Image.fromarray(GREY > 127), repeated((GREY > 127).astype(np.uint8) * 255)),
    ],
    ids=["RGB", "L", "RGBA", "LA", "1"],
)
def test_modes_become_rgb(tmp_path, make, expected):
    make().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_images_are_looked_up(tmp_path, transparent):
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / "a.png", **({"transparency": 1} if transparent else {}))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), colours[indices])


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    png16(tmp_path / "a.png", values)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], [[0, 0, 1, 128, 255]])
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)


def test_32_bit_integers_within_16_bit_are_scaled_and_others_refused(tmp_path):
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 0], [[0, 255]])
    Image.fromarray(np.array([[-3, 70000]], np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif has values -3 to 70000, but 16-bit grey holds 0 to 65535"):
        read_image(tmp_path / "b.tif")


def test_cmyk_jpeg(tmp_path):
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, :8], colours[:, 8:] = (200, 40, 40), (20, 60, 220)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    found = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(found - colours).max() <= 6


def test_adobe_inverted_cmyk_jpeg(tmp_path):
    # Adobe writes CMYK inverted and says so with an APP14 segment.
    cmyk = Image.new("CMYK", (16, 16), (255, 255, 0, 0))
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG")
    assert b"Adobe" in buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg")).astype(int) - (0, 0, 255)).max() <= 6


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (8, 6)


def test_floating_point_image_is_an_error(tmp_path):
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif holds floating-point pixels \(mode F\)"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image_is_an_error(tmp_path, suffix):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / f"a.{suffix}"
    )
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=rf"a\.{suffix} \({len(whole) // 2} bytes\) cannot be read as an image: .*replace"
    ):
        read_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("content", [b"", b"hello, I am no image"])
def test_not_an_image_is_an_error(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg \({len(content)} bytes\) cannot be read as an image"):
        read_image(tmp_path / "a.jpg")


def test_missing_file_keeps_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")
