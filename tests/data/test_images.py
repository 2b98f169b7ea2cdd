import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from segheads.data import read_image
from segheads.data.images import ImageForm, to_rgb, turned
from segheads.data.labels import read_labels
from segheads.data.pairs import read_pair
from segheads.errors import DataError, ImageFormError, PackageMissingError

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


def test_16_bit_grey_keeps_all_its_levels(tmp_path):
    values = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    png16(tmp_path / "a.png", values)
    found = read_image(tmp_path / "a.png", ImageForm(bit_depth=16))
    np.testing.assert_array_equal(found, repeated(values))
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)


def test_32_bit_integers_within_16_bit_are_kept_and_others_refused(tmp_path):
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "a.tif")
    found = read_image(tmp_path / "a.tif", ImageForm(1, 16))
    np.testing.assert_array_equal(found[..., 0], [[0, 65535]])
    Image.fromarray(np.array([[-3, 70000]], np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif has values -3 to 70000, but integers may be 0 to 65535"):
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
    with pytest.raises(DataError, match=r"a\.tif holds floating-point pixels, where integers of 8 bit .* bit_depth 32"):
        read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", ImageForm(1, 32))[..., 0], GREY.astype(np.float32))


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


WIDE = np.random.default_rng(1).integers(0, 4096, (6, 8, 5)).astype(np.uint16)
BANDS = {
    "contiguous": {"photometric": "minisblack", "planarconfig": "contig"},
    "planar": {"photometric": "minisblack", "planarconfig": "separate"},
    "pages": {},
    "compressed": {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"},
}


@pytest.mark.parametrize("kind", BANDS)
def test_every_band_and_bit_of_a_tiff(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    is_first = kind in ("planar", "pages")
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(WIDE, 2, 0) if is_first else WIDE, **BANDS[kind])
    found = read_image(tmp_path / "a.tif", ImageForm(5, 12))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, WIDE)
    with pytest.raises(ImageFormError, match=r"a\.tif has 5 channels, and in_chans is 3; give in_chans 5"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ImageFormError, match=r"a\.tif has 16 bit a value, the largest is 40\d\d, .* such as 12"):
        read_image(tmp_path / "a.tif", ImageForm(5))
    with pytest.raises(
        ImageFormError, match=r"has the value 40\d\d, but bit_depth 10 allows 0 to 1023; give bit_depth 12"
    ):
        read_image(tmp_path / "a.tif", ImageForm(5, 10))


@pytest.mark.parametrize("is_alpha", [False, True])
def test_a_fourth_band_is_dropped_only_where_it_is_transparency(tmp_path, is_alpha):
    tifffile = pytest.importorskip("tifffile")
    values = np.dstack([RGB, GREY])
    kind = "unassalpha" if is_alpha else "unspecified"
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=[kind])
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", ImageForm(4)), values)
    if is_alpha:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)
    else:
        with pytest.raises(ImageFormError, match=r"a\.tif has 4 channels, and in_chans is 3"):
            read_image(tmp_path / "a.tif")


def test_overviews_of_a_tiff_are_no_bands_and_other_pages_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RGB, photometric="rgb")
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(RGB, photometric="rgb")
        file.write(GREY[::2, ::2])
    with pytest.raises(DataError, match=r"b\.tif has 2 pages of 3x4x1, 6x8x3"):
        read_image(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_rgb_of_16_bit_is_not_narrowed(tmp_path, suffix):
    if suffix == "png":
        data = pytest.importorskip("imagecodecs").png_encode(WIDE[..., :3].copy())
        (tmp_path / "a.png").write_bytes(data)
    else:
        pytest.importorskip("tifffile").imwrite(tmp_path / "a.tif", WIDE[..., :3], photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}", ImageForm(bit_depth=12)), WIDE[..., :3])
    with pytest.raises(ImageFormError, match="how many bits are in use is not told"):
        read_image(tmp_path / f"a.{suffix}")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    pytest.importorskip("tifffile").imwrite(tmp_path / "a.tif", WIDE)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(PackageMissingError, match=r"a\.tif needs tifffile.*segheads\[tiff\]"):
        read_image(tmp_path / "a.tif", ImageForm(6, 12))


def test_a_16_bit_ppm_is_refused_rather_than_narrowed(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6 8 6 65535\n" + WIDE[..., :3].astype(">u2").tobytes())
    with pytest.raises(ImageFormError, match=r"a\.ppm is a PPM of more than 8 bit in 3 channels"):
        read_image(tmp_path / "a.ppm")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays(tmp_path, dtype):
    depth = {np.uint8: None, np.uint16: 12}.get(dtype, 32)
    values = WIDE.astype(dtype)
    for order in (values, np.moveaxis(values, 2, 0)):
        np.save(tmp_path / "a.npy", order)
        found = read_image(tmp_path / "a.npy", ImageForm(5, depth))
        np.testing.assert_array_equal(found, values)
    assert found.dtype == (np.float32 if depth == 32 else dtype)
    np.save(tmp_path / "b.npy", np.zeros((5, 6, 5), np.uint8))
    with pytest.raises(ImageFormError, match=r"b\.npy is an array \(5, 6, 5\) with 5 on both sides"):
        read_image(tmp_path / "b.npy", ImageForm(5))


def test_values_that_are_not_finite_are_refused(tmp_path):
    values = WIDE.astype(np.float32)
    values[0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ImageFormError, match=r"a\.npy has 1 values that are NaN or infinite"):
        read_image(tmp_path / "a.npy", ImageForm(5, 32))


def test_8_bit_files_among_12_bit_ones_are_refused(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(ImageFormError, match=r"a\.png has 8 bit a value, and bit_depth is 12"):
        read_image(tmp_path / "a.png", ImageForm(1, 12))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_are_pillows(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    np.testing.assert_array_equal(turned(RGB, orientation), expected)
    np.testing.assert_array_equal(turned(Image.fromarray(RGB), orientation), expected)


def pair(tmp_path, orientation, label_size, image=RGB):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.zeros(label_size, np.uint8)).save(tmp_path / "l.png")
    return tmp_path / "a.png", tmp_path / "l.png"


def test_a_label_of_the_turned_size_turns_the_image(tmp_path):
    image, labels = read_pair(pair(tmp_path, 6, (8, 6)), 2, ignored=(255,))
    assert image.size == (6, 8)
    assert labels.shape == (8, 6)
    np.testing.assert_array_equal(image, np.rot90(RGB, -1))


def test_a_label_of_the_stored_size_leaves_the_image(tmp_path):
    image, _ = read_pair(pair(tmp_path, 6, (6, 8)), 2, ignored=(255,))
    np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize(("orientation", "image"), [(3, RGB), (2, RGB), (6, RGB[:, :6])])
def test_an_orientation_that_the_sizes_do_not_decide_is_an_error(tmp_path, orientation, image):
    files = pair(tmp_path, orientation, image.shape[:2], image)
    message = rf"a\.png has the EXIF orientation {orientation}, .* exif apply .* exif ignore .* remove the tag"
    with pytest.raises(ImageFormError, match=message):
        read_pair(files, 2, ignored=(255,))
    stored, _ = read_pair(files, 2, ignored=(255,), form=ImageForm(exif="ignore"))
    np.testing.assert_array_equal(stored, image)
    upright, _ = read_pair(files, 2, ignored=(255,), form=ImageForm(exif="apply"))
    np.testing.assert_array_equal(upright, turned(image, orientation))


def test_an_image_that_fits_in_neither_way_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"is 5x5 but its image .* is 8x6"):
        read_pair(pair(tmp_path, 6, (5, 5)), 2, ignored=(255,))


@pytest.mark.parametrize(("options", "message"), [((0,), "in_chans"), ((3, 7), "bit_depth"), ((3, 8, "on"), "exif")])
def test_forms_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ImageForm(*options)


def test_pictures_of_bands_are_stretched():
    shown = np.asarray(to_rgb(WIDE // 16 + 100))
    assert shown.shape == (6, 8, 3)
    assert (shown.min(), shown.max()) == (0, 255)
    assert to_rgb(WIDE[..., :1]).size == (8, 6)
    np.testing.assert_array_equal(to_rgb(np.dstack([RGB, GREY])), RGB)
