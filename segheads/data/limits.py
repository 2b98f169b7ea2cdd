"""How large an image may be: looked at in its header, before anything is decoded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import IO, Any

from PIL import Image

from segheads.errors import ImageFormError

MAX_PIXELS = 1_000_000_000
# What Pillow may take a file for, by its content: no PostScript, for which it starts a program, nor anything as rare.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "PCX", "JPEG2000", "AVIF", "DIB")
_PLUGINS = ("Tiff", "WebP", "Tga", "Pcx", "Jpeg2K", "Avif")  # which Pillow does not load by itself

_LOCK = Lock()
_INSIDE: list[int | None] = []  # Pillow's limit, once for each that is inside of `opened`
_LIMIT: ContextVar[int] = ContextVar("max_pixels", default=MAX_PIXELS)


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Read images and labels of so many pixels at most, in this thread; outside it is `MAX_PIXELS`, 1 gigapixel.

    Args:
        max_pixels: Height times width; None leaves the limit as it is.

    Raises:
        ValueError: If it is below 1.
    """
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be 1 or more; got {max_pixels}")
    token = _LIMIT.set(_LIMIT.get() if max_pixels is None else max_pixels)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def check_pixels(size: Sequence[int], path: object) -> None:
    """Refuse an image by the size in its header.

    Args:
        size: Width and height, or height and width.
        path: The file, for the message.

    Raises:
        ImageFormError: It has no pixels, or more than the limit.
    """
    pixels, most = int(size[0]) * int(size[1]), _LIMIT.get()
    if pixels < 1:
        raise ImageFormError(f"{path} is an image of {size[0]} x {size[1]} pixels, that is none; replace it", "size")
    if pixels > most:
        raise ImageFormError(
            f"{path} is an image of {size[0]} x {size[1]}, {pixels:,} pixels, and {most:,} are the most that are "
            "decoded; cut it into tiles, or raise max_pixels",
            "size",
        )


@contextmanager
def opened(file: str | Path | IO[bytes], path: object) -> Iterator[Any]:
    """Open an image with Pillow, whose own limit and warning give way to `check_pixels`; nothing is decoded yet.

    Args:
        file: The file, or its path.
        path: Its path, for messages.

    Raises:
        ImageFormError: It has no pixels, or too many.
    """
    with _without_pillows_limit():
        image = Image.open(file, formats=_formats())
        check_pixels(image.size, path)
        yield image


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow's limit is one for the whole process: the first that comes takes it away, the last one puts it back."""
    with _LOCK:
        _INSIDE.append(_INSIDE[0] if _INSIDE else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _LOCK:
            known = _INSIDE.pop()
            if not _INSIDE:
                Image.MAX_IMAGE_PIXELS = known


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; it knows them once their plugins are loaded."""
    Image.preinit()
    for name in _PLUGINS:
        with suppress(ImportError):
            import_module(f"PIL.{name}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)
