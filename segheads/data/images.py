"""Read one image file: any channels and bit depth to the form that a data set's images have, or a clear error."""

import itertools
import os
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segheads.data.bands import is_tiff, read_npy, read_png, read_tiff
from segheads.data.folders import check_file
from segheads.data.limits import opened
from segheads.data.structure import check_structure
from segheads.errors import DataError, ImageFormError, SegheadsError

Picture: TypeAlias = Image.Image | NDArray[Any]
"""An RGB image of 8 bit, or else an array `(H, W, C)` of uint8, uint16 or float32."""

FLOATS = 32  # the bit depth that stands for floats
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = 1
NPY = b"\x93NUMPY"  # the beginning of such a file
NEW_SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4  # a tag of TIFF and its bits
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TOLD_BY = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # of Pillow's info, where getexif looks
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_WIDE = ("I", "F")  # beginnings of Pillow's modes of more than 8 bit


@dataclass(frozen=True)
class ImageForm:
    """What the images of a data set hold, and so what a model takes.

    Args:
        channels: Channels, or bands, of an image.
        bit_depth: Bits that the values use, 8 to 16, whatever the file has room for: 12 where a camera's 12 bits are
            stored in 16. 32 are floats, which are taken as they are. None means 8, and files with room for more are
            refused, since Pillow and most viewers would darken or clip them.
        exif: Whether labels are drawn on images turned as their EXIF orientation says (`"apply"`) or on the pixels as
            stored (`"ignore"`). None tells it by the label's size, and refuses a pair where both fit.

    Raises:
        ValueError: A number is out of range.

    Examples:
        >>> ImageForm(5, 12).full_scale
        4095.0
    """

    channels: int = 3
    bit_depth: int | None = None
    exif: Literal["apply", "ignore"] | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"in_chans must be 1 or more; got {self.channels}")
        if self.bit_depth is not None and not (8 <= self.bit_depth <= 16 or self.bit_depth == FLOATS):
            raise ValueError(f"bit_depth must be 8 to 16, or 32 for floats; got {self.bit_depth}")
        if self.exif not in (None, "apply", "ignore"):
            raise ValueError(f"exif must be 'apply' or 'ignore', or None; got {self.exif!r}")

    @property
    def full_scale(self) -> float:
        """The value that becomes 1: the largest of the bit depth; of floats 1."""
        return full_scale(self.bit_depth)

    @property
    def is_rgb(self) -> bool:
        """Whether images are of 3 channels and 8 bit."""
        return self.channels == 3 and self.bit_depth in (None, 8)

    @property
    def has_colours(self) -> bool:
        """Whether colours can be changed in training: 3 channels of a known range."""
        return self.channels == 3 and self.bit_depth != FLOATS

    def __str__(self) -> str:
        depth = "floats" if self.bit_depth == FLOATS else f"{self.bit_depth or 8} bit"
        return f"{_channels(self.channels)}, {depth}"


RGB = ImageForm()
AS_STORED = ImageForm(exif="ignore")  # of published data sets, whose labels are drawn on the stored pixels


def full_scale(bit_depth: int | None) -> float:
    """The value that becomes 1 in a model's input: the largest of the bit depth; of floats (32) 1.

    Args:
        bit_depth: See `ImageForm`.
    """
    return 1.0 if bit_depth == FLOATS else float(2 ** (bit_depth or 8) - 1)


def read_image(path: str | os.PathLike[str], form: ImageForm = RGB) -> Picture:
    """Read an image file: PNG, JPEG and what else Pillow reads; TIFF of any bands and depth; or `.npy`.

    No value is changed, clipped or scaled, and no channel is dropped, but for these: where 3 channels are wanted, grey
    is repeated; transparency is dropped (not composited) where the file says that it is that and one channel fewer
    is wanted; palettes are looked up; CMYK becomes RGB. Anything else that does not have the form is an error. Pixels
    stay as stored unless `form.exif` is `"apply"`.

    Args:
        path: The file. What Pillow would narrow or cannot read (TIFF of several bands, pages, or floats; PNG of 16 bit
            with several channels) needs `pip install "segheads[tiff]"`. A `.npy` holds `(H, W)`, `(H, W, C)` or
            `(C, H, W)`.
        form: What the image must hold; by default 3 channels of 8 bit.

    Returns:
        A PIL image of mode RGB for 3 channels of 8 bit; else an array `(H, W, C)`, uint8, uint16 (more than 8 bit) or
        float32.

    Raises:
        DataMissingError: There is no such file.
        DataError: The file is no image, is damaged or truncated.
        ImageFormError: It is of another form: other channels, values beyond the bit depth, floats that are not finite,
            or more than 8 bit where the bit depth is not told.
        PackageMissingError: Reading it needs a package that is not installed.
    """
    picture, orientation = read_stored(path, form)
    return turned(picture, orientation) if form.exif == "apply" else picture


def read_stored(path: str | os.PathLike[str], form: ImageForm) -> tuple[Picture, int]:
    """Read an image file with its pixels as stored.

    Args:
        path: The file.
        form: What it must hold.

    Returns:
        What `read_image` does, and the EXIF orientation: 1 is upright, 6 a camera held upright.

    Raises:
        DataError: As `read_image` does.
    """
    return _in_form(_decoded(path, form.channels), form, path)


def read_encoded(data: bytes, form: ImageForm = RGB) -> Picture:
    """What `read_image` gives of a file, of its bytes: an upload, an archive's member, a database's cell.

    Args:
        data: The whole file.
        form: What the image must hold.

    Raises:
        DataError: As `read_image` does; the image is called the given one.
    """
    file = _File(data)
    picture, orientation = _in_form(_decoded_file(file, file.name, form.channels, data[:6] == NPY), form, file.name)
    return turned(picture, orientation) if form.exif == "apply" else picture


class _File(BytesIO):
    """Bytes as a file that readers can look into and call by a name."""

    name = "given"

    def __repr__(self) -> str:
        return self.name

    def peek(self, size: int = 0) -> bytes:
        """What comes next, which stays to be read."""
        place = self.tell()
        found = self.read(size)
        self.seek(place)
        return found


def _in_form(decoded: tuple[Picture, bool, int], form: ImageForm, path: Any) -> tuple[Picture, int]:
    """What was decoded in the form that is wanted, and the orientation."""
    picture, has_alpha, orientation = decoded
    if isinstance(picture, Image.Image):
        if form.is_rgb and not picture.mode.startswith(_WIDE):  # the usual case
            return picture if picture.mode == "RGB" else picture.convert("RGB"), orientation
        picture = _array(picture, form.channels)
    return as_form(_fit_channels(picture, has_alpha, form, path), form, path), orientation


def from_pillow(image: Image.Image, form: ImageForm) -> Picture:
    """A PIL image in the form that is wanted, turned upright unless `form.exif` is `"ignore"`.

    Args:
        image: The image, decoded or not.
        form: What it must hold.

    Raises:
        ImageFormError: It is of another form.
    """
    orientation = UPRIGHT if form.exif == "ignore" or image.format == "TIFF" else _orientation(image)
    if form.is_rgb and not image.mode.startswith(_WIDE):
        return turned(image.convert("RGB"), orientation)
    values = _fit_channels(_array(image, form.channels), image.mode in _WITH_ALPHA, form, "given")
    return turned(as_form(values, form, "given"), orientation)


def as_form(values: NDArray[Any], form: ImageForm, path: object) -> Picture:
    """Stored values `(H, W, C)` in the type of a form, none of them changed.

    Args:
        values: Integers or floats.
        form: What they must hold.
        path: The file, for messages.

    Raises:
        ImageFormError: A value is out of range, or of another kind.
    """
    fitting = _fit_values(values, form, path)
    return Image.fromarray(fitting) if form.is_rgb else fitting


def read_bands(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read an image file whatever it holds, `(H, W, C)`, in the type and with the values that are stored.

    Args:
        path: The file.

    Raises:
        DataError: The file is no image, or is damaged.
    """
    picture, _, _ = _decoded(path, None)
    return _array(picture, 0) if isinstance(picture, Image.Image) else picture


def turned(picture: Picture, orientation: int) -> Picture:
    """The picture as an EXIF orientation says that it is to be looked at.

    Args:
        picture: Pixels as stored.
        orientation: 1 to 8; others are 1.
    """
    if orientation not in _TURNS:
        return picture
    if isinstance(picture, Image.Image):
        return picture.transpose(_TURNS[orientation])
    values: NDArray[Any] = picture.swapaxes(0, 1) if orientation >= 5 else picture
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


def fit_label(
    picture: Picture, orientation: int, size: tuple[int, int], form: ImageForm, path: str | os.PathLike[str]
) -> Picture:
    """Turn an image by its EXIF orientation, or not, so that it lies as its label does.

    Args:
        picture: Pixels as stored.
        orientation: The file's.
        size: Height and width of the label.
        form: Its `exif` decides where it is not None.
        path: The image file.

    Raises:
        ImageFormError: Both the stored and the turned pixels have the label's size.
    """
    if orientation not in _TURNS or form.exif == "ignore":
        return picture
    upright = turned(picture, orientation)
    if form.exif == "apply":
        return upright
    stored_fits, upright_fits = size_of(picture) == size, size_of(upright) == size
    if stored_fits and upright_fits:
        raise ImageFormError(
            f"image {path} has the EXIF orientation {orientation}, and its label fits both the stored and the turned "
            "pixels; give exif apply if labels are drawn on what viewers show, exif ignore if on the stored pixels, "
            "or turn the pixels and remove the tag",
            "exif",
        )
    return upright if upright_fits else picture


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width of a picture, pixels."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    shape: tuple[int, ...] = picture.shape
    return shape[0], shape[1]


def to_rgb(picture: Picture) -> Image.Image:
    """A picture that can be looked at: of more than 3 bands the first three, of fewer the first.

    Bands of 8 bit and 3 channels stay as they are; of others the range from the 2nd to the 98th percentile of all is
    stretched to 8 bit, for the eye alone.

    Args:
        picture: What `read_image` gave.
    """
    if isinstance(picture, Image.Image):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    shown = picture[..., :3] if picture.shape[2] >= 3 else np.repeat(picture[..., :1], 3, 2)
    if picture.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(shown))
    low, high = np.percentile(shown, (2, 98))
    scaled = (shown.astype(np.float32) - low) * (255 / max(float(high - low), 1e-12))
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def open_image(path: str | os.PathLike[str], kind: str) -> tuple[Image.Image, tuple[Any, ...]]:
    """Open and decode an image file.

    Args:
        path: The file.
        kind: What it should be, for messages.

    Returns:
        The image as Pillow has it, and what its decoder was told of how values are stored.

    Raises:
        DataMissingError: There is no such file.
        DataError: The file is no image or is damaged.
    """
    check_file(path, kind)
    with open(path, "rb") as file:
        try:
            check_structure(file)
            with opened(file, path) as image:
                coding = _coding(image)
                image.info["pages"] = _count_pages(image)  # which looks at the file
                image.load()
        except (SegheadsError, MemoryError):
            raise
        except Exception as error:  # whatever a damaged file makes a decoder raise
            raise _damaged(path, file, kind, error) from error
    return image, coding


def _count_pages(image: Any) -> int:
    """Pages or frames of a file, without a TIFF's smaller copies and masks of others."""
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    count = 0
    for page in itertools.count():
        try:
            image.seek(page)
        except EOFError:
            break
        except SyntaxError:  # a page that Pillow cannot show, whose tags it has read
            pass
        count += not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK)
    image.seek(0)
    return count


def _damaged(path: Any, file: Any, kind: str, error: Exception) -> DataError:
    size = file.seek(0, os.SEEK_END)
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{path} ({size} bytes) cannot be read as {kind}: {reason}; "
        "replace the damaged file or take it out of the folder"
    )


def _coding(image: Any) -> tuple[Any, ...]:
    """What the decoder is told of how values are stored, which is gone once it is done."""
    tile: Any = image.tile[0] if getattr(image, "tile", None) else ("", (), 0, ())
    return (tile[0], *(tile[3] if isinstance(tile[3], tuple) else (tile[3],)))


def _decoded(path: str | os.PathLike[str], channels: int | None) -> tuple[Picture, bool, int]:
    """The stored pixels as Pillow has them or as an array `(H, W, C)`, whether the last is alpha, the orientation."""
    check_file(path, "an image")
    with open(path, "rb") as file:
        return _decoded_file(file, path, channels, str(os.fspath(path)).lower().endswith(".npy"))


def _decoded_file(file: Any, path: Any, channels: int | None, is_npy: bool) -> tuple[Picture, bool, int]:
    """The same of an open file, which messages call `path`."""
    try:
        if is_npy:
            return read_npy(file, channels, path), False, UPRIGHT
        check_structure(file)
        if is_tiff(file) and (found := read_tiff(file)) is not None:
            return found
        with opened(file, path) as image:
            coding = _coding(image)
            raw = str(coding[1]) if len(coding) > 1 else ""
            if image.format == "PNG" and ";16" in raw and not raw.startswith(("L;", "I;")):
                return read_png(file, path), raw.startswith(("RGBA", "LA")), _orientation(image)
            image.load()
            orientation = UPRIGHT if image.format == "TIFF" else _orientation(image)  # read_tiff takes turned ones
            _refuse_narrowed(image, coding, file, path)
    except (SegheadsError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise _damaged(path, file, "an image", error) from error
    return image, image.mode in _WITH_ALPHA, orientation


def _orientation(image: Image.Image) -> int:
    if not _TOLD_BY & image.info.keys():
        return UPRIGHT
    try:
        found = image.getexif().get(ORIENTATION, UPRIGHT)
    except Exception:  # damaged EXIF data, which no viewer heeds either
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def _refuse_narrowed(image: Image.Image, coding: tuple[Any, ...], file: Any, path: Any) -> None:
    """Formats whose 16 bit Pillow makes 8 without a word."""
    if image.mode.startswith(_WIDE):
        return
    is_wide = coding[0] in ("ppm", "ppm_plain") and isinstance(coding[-1], int) and coding[-1] > 255
    if image.format == "JPEG2000":
        file.seek(0)
        place = (head := file.read(4096)).find(b"ihdr")
        is_wide = place >= 0 and (head[place + 14] & 0x7F) > 7
    if is_wide:
        raise ImageFormError(
            f"image {path} is a {image.format} of more than 8 bit in {len(image.getbands())} channels, which Pillow "
            "narrows to 8; save it as TIFF or PNG",
            "bit_depth",
        )


def _array(image: Image.Image, channels: int) -> NDArray[Any]:
    """What Pillow decoded, `(H, W, C)`, palettes looked up."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if channels == 4 else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode == "CMYK" and channels == 3:
        image = image.convert("RGB")
    values = np.asarray(image)
    return values[..., None] if values.ndim == 2 else values


def _fit_channels(values: NDArray[Any], has_alpha: bool, form: ImageForm, path: Any) -> NDArray[Any]:
    found = values.shape[2]
    if found == form.channels:
        return values
    if has_alpha and form.channels in (found - 1, 3 * (found == 2)):
        values = values[..., :-1]
    if values.shape[2] == 1 and form.channels == 3:
        return np.repeat(values, 3, axis=2)
    if values.shape[2] != form.channels:
        raise ImageFormError(
            f"image {path} has {_channels(found)}, and in_chans is {form.channels}; give in_chans {found}, "
            "or make all images of a set alike",
            "channels",
        )
    return values


def _fit_values(values: NDArray[Any], form: ImageForm, path: Any) -> NDArray[Any]:
    if values.dtype.kind == "b":
        values = values.astype(np.uint8) * np.uint8(255)
    if (values.dtype.kind == "f") != (form.bit_depth == FLOATS):
        expected = "floats (bit_depth 32)" if form.bit_depth == FLOATS else f"integers of {form.bit_depth or 8} bit"
        holds = "floating-point" if values.dtype.kind == "f" else f"{8 * values.dtype.itemsize}-bit integer"
        remedy = "; give bit_depth 32 and the bands' mean and std" if values.dtype.kind == "f" else ""
        raise ImageFormError(f"image {path} holds {holds} pixels, where {expected} were expected{remedy}", "bit_depth")
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            row, column, channel = np.argwhere(~finite)[0].tolist()
            raise ImageFormError(
                f"image {path} has {np.count_nonzero(~finite)} values that are NaN or infinite, the first in row "
                f"{row}, column {column}, channel {channel}; fill them in, and label those pixels as ignored",
                "unreadable",
            )
        return np.ascontiguousarray(values, dtype=np.float32)
    if values.dtype == np.uint8 and form.bit_depth in (None, 8):
        return np.ascontiguousarray(values)
    return _fit_integers(values, form, path)


def _fit_integers(values: NDArray[Any], form: ImageForm, path: Any) -> NDArray[Any]:
    low, high = int(values.min()), int(values.max())
    bits = 8 * values.dtype.itemsize
    if low < 0 or high > 65535:
        raise ImageFormError(
            f"image {path} has values {low} to {high}, but integers may be 0 to 65535; save it as floats, and give "
            "bit_depth 32",
            "bit_depth",
        )
    if form.bit_depth is None:
        raise ImageFormError(
            f"image {path} has {bits} bit a value, the largest is {high}, and how many bits are in use is not told; "
            f"give bit_depth, such as {used_bits(high)} (segheads check-data looks at all files)",
            "bit_depth",
        )
    if bits == 8:
        raise ImageFormError(
            f"image {path} has 8 bit a value, and bit_depth is {form.bit_depth}, in which it would be almost black; "
            "give the bit depth of the files, the same for all",
            "bit_depth",
        )
    if high > form.full_scale:
        raise ImageFormError(
            f"image {path} has the value {high}, but bit_depth {form.bit_depth} allows 0 to {form.full_scale:g}; give "
            f"bit_depth {used_bits(high)}",
            "bit_depth",
        )
    return np.ascontiguousarray(values, dtype=np.uint8 if form.bit_depth == 8 else np.uint16)


def used_bits(highest: int) -> int:
    """The usual bit depth that holds a value: 8, 10, 12, 14 or 16.

    Args:
        highest: The largest value, 0 to 65535.
    """
    return next(bits for bits in (8, 10, 12, 14, 16) if highest < 2**bits)


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"
