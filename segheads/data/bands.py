"""Files that Pillow cannot read or would narrow: TIFF of bands, pages or floats, PNG of 16 bit, NumPy arrays."""

import math
import os
from io import BufferedReader
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from segheads.data.limits import check_pixels, opened
from segheads.errors import DataError, ImageFormError, PackageMissingError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ALPHA = (1, 2)  # of ExtraSamples: associated and unassociated
_MINISBLACK, _RGB = 1, 2  # of PhotometricInterpretation


def is_tiff(file: BufferedReader) -> bool:
    """Whether a file begins as a TIFF does.

    Args:
        file: The file, at its beginning, where it stays.
    """
    return file.peek(4)[:4] in _TIFF


def read_by_pillow(path: str) -> bool:
    """Whether Pillow alone gives all that an image file holds; a 16-bit PNG of several channels counts, too.

    Args:
        path: The file.
    """
    with open(path, "rb") as file:
        return not path.lower().endswith(".npy") and (not is_tiff(file) or _pillow_reads_all(file))


def read_tiff(file: BinaryIO) -> tuple[NDArray[Any], bool, int] | None:
    """Read a TIFF that Pillow cannot read whole; None where it can.

    Pages of one channel and one size are bands; smaller copies of the image (overviews) are passed over.

    Args:
        file: The file.

    Returns:
        Pixels `(H, W, C)`, whether the last channel is transparency, and the orientation.

    Raises:
        PackageMissingError: tifffile is not installed.
        DataError: The file is damaged, or holds what is no image.
    """
    if _pillow_reads_all(file):
        file.seek(0)
        return None
    tifffile, path = _package("tifffile", file.name), file.name
    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            pages = [page for page in tiff.pages if not page.is_reduced and not page.is_mask]
            if not pages:
                raise ValueError("it has no page that is an image")
            first = pages[0]
            orientation = int(first.tags[274].value) if 274 in first.tags else 1
            alpha = len(first.extrasamples) == 1 and int(first.extrasamples[-1]) in _ALPHA
            if int(first.photometric) not in (_MINISBLACK, _RGB):
                raise ValueError(f"its photometric interpretation {first.photometric.name} is not that of bands or RGB")
            for page in pages:
                check_pixels((page.imagewidth, page.imagelength), path)
            bands = [_of_page(page) for page in pages]
    except (ImageFormError, MemoryError):
        raise
    except Exception as error:  # what a damaged file makes a decoder raise
        raise DataError(f"{path} cannot be read as a TIFF image: {error}; save it anew as a plain TIFF") from error
    if len(bands) > 1 and any(band.shape != (*bands[0].shape[:2], 1) for band in bands):
        sizes = sorted({"x".join(map(str, band.shape)) for band in bands})
        raise DataError(
            f"{path} has {len(bands)} pages of {', '.join(sizes[:3])} (height x width x channels); pages are taken as "
            "bands where they are of one channel and one size: keep the one that is the image"
        )
    return np.concatenate(bands, axis=2), alpha and len(bands) == 1, orientation


def read_png(file: BinaryIO, path: object) -> NDArray[Any]:
    """Read a PNG of 16 bit and several channels, `(H, W, C)`, which Pillow would narrow to 8 bit.

    Args:
        file: The file.
        path: Its path.

    Raises:
        PackageMissingError: imagecodecs is not installed.
        DataError: The file is damaged.
    """
    imagecodecs = _package("imagecodecs", str(path))
    file.seek(0)
    try:
        values: NDArray[Any] = imagecodecs.png_decode(file.read())
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file makes it raise
        raise DataError(f"{path} cannot be read as a PNG image of 16 bit: {error}; replace the damaged file") from error
    return values


def read_npy(file: BinaryIO, channels: int | None, path: object) -> NDArray[Any]:
    """Read a NumPy file of `(H, W)`, `(H, W, C)` or `(C, H, W)` as `(H, W, C)`.

    Args:
        file: The file.
        channels: C, which tells one order from the other; None takes the shorter of the first and the last axis.
        path: Its path.

    Raises:
        ImageFormError: The array is of another shape or type, or of C on both sides.
    """
    _check_npy(file, path)
    values: NDArray[Any] = np.load(file, allow_pickle=False)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.dtype.kind not in "buif" or not values.size:
        raise ImageFormError(
            f"image {path} is an array {values.shape} of {values.dtype}; expected numbers (H, W), (H, W, C) or "
            "(C, H, W)",
            "channels",
        )
    ends = values.shape[0], values.shape[2]
    if channels is not None and ends == (channels, channels):
        raise ImageFormError(
            f"image {path} is an array {values.shape} with {channels} on both sides, so that its channels may be the "
            "first or the last axis; save it padded, or as TIFF",
            "channels",
        )
    is_first = ends[0] == channels if channels in ends else ends[0] < ends[1]
    return np.moveaxis(values, 0, 2) if is_first else values


def _check_npy(file: BinaryIO, path: object) -> None:
    """Look at the header of a NumPy file, before its array is made: its size must be that of the file."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its format is {version[0]}.{version[1]}, where 1.0 or 2.0 was expected")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    start = file.tell()
    here, said = file.seek(0, os.SEEK_END) - start, math.prod(shape) * dtype.itemsize
    if here != said:
        raise ValueError(f"its header says {said} bytes of {dtype} {shape}, and {here} follow")
    file.seek(0)
    if len(shape) in (2, 3):
        check_pixels(sorted(shape)[-2:], path)


def _of_page(page: Any) -> NDArray[Any]:
    """Pixels of one page, `(H, W, C)`."""
    values: NDArray[Any] = page.asarray()
    if page.axes == "YX":
        return values[..., None]
    if page.axes == "SYX":
        return np.moveaxis(values, 0, 2)
    if page.axes != "YXS":
        raise ValueError(f"its axes are {page.axes}, not those of an image")
    return values


def _pillow_reads_all(file: BinaryIO) -> bool:
    """Whether Pillow gives every band of a TIFF with all its bits, in the order in which they are stored."""
    try:
        with opened(file, file.name) as found:
            image: Any = found
            count = image.n_frames
    except UnidentifiedImageError:
        return False
    tags = image.tag_v2
    samples, bits = tags.get(277, 1), tags.get(258, (1,))
    plain = tags.get(274, 1) == 1 and count == 1
    is_signed = any(form == 2 for form in tags.get(339, ()))
    return bool(plain and samples == len(image.getbands()) and (samples == 1 or max(bits) <= 8) and not is_signed)


def _package(name: str, path: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise PackageMissingError(
            f"{path} needs {name}, which reads it as it is; pip install 'segheads[tiff]', or save it as a PNG or TIFF "
            "of 8 bit and 3 channels"
        ) from error
