"""Bad images and labels, made by code: cut off, flipped, of wrong modes, depths, sizes and kinds, oddly named."""

import os
import socket
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, K = 14, 11, 3
COLOURS = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
VALUES = np.random.default_rng(1).integers(0, K, (HEIGHT, WIDTH), np.uint8)


@dataclass(frozen=True)
class BadFile:
    """A file of a pair: what it is called, how it is made, and whether a reader may find nothing wrong.

    `may_differ` is for what no reader can tell, such as a flipped bit of a format without checksums.
    """

    kind: str
    what: str
    name: str
    write: Callable[[Path], object]
    may_differ: bool = False


def files() -> list[BadFile]:
    """All of them."""
    return [*_cut_off(), *_flipped(), *_of_other_kinds(), *_of_other_sizes(), *_no_files(), *_names()]


def _encoded(array: np.ndarray, **options: object) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    if options.get("format") == "NPY":
        np.save(buffer, array)
    else:
        Image.fromarray(array).save(buffer, **options)
    return buffer.getvalue()


def sources() -> dict[str, tuple[str, bytes]]:
    """Sound files: by their name what they are of, and their bytes."""
    palette = Image.fromarray(VALUES)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    from io import BytesIO

    indexed = BytesIO()
    palette.save(indexed, format="PNG")
    return {
        "rgb.png": ("image", _encoded(COLOURS, format="PNG")),
        "rgb.jpg": ("image", _encoded(COLOURS, format="JPEG")),
        "rgb.tif": ("image", _encoded(COLOURS, format="TIFF")),
        "packed.tif": ("image", _encoded(COLOURS, format="TIFF", compression="tiff_deflate")),
        "rgb.bmp": ("image", _encoded(COLOURS, format="BMP")),
        "rgb.ppm": ("image", _encoded(COLOURS, format="PPM")),
        "rgb.npy": ("image", _encoded(COLOURS, format="NPY")),
        "rgb.webp": ("image", _encoded(COLOURS, format="WEBP", lossless=True)),
        "grey.png": ("label", _encoded(VALUES, format="PNG")),
        "palette.png": ("label", indexed.getvalue()),
        "grey.tif": ("label", _encoded(VALUES, format="TIFF")),
        "grey.bmp": ("label", _encoded(VALUES, format="BMP")),
    }


def _offsets(data: bytes, name: str) -> list[int]:
    """Where parts of a file begin: chunks of a PNG, segments of a JPEG; of others steps of the same size."""
    found = {0, 1, 4, 8, len(data) // 2, len(data) - 1}
    if name.endswith(".png"):
        place = 8
        while place < len(data):
            length = struct.unpack(">I", data[place : place + 4])[0]
            found |= {place + 4, place + 8, place + 8 + length // 2, place + 8 + length}
            place += 12 + length
    else:
        found |= {len(data) * part // 12 for part in range(12)}
    return sorted(offset for offset in found if 0 <= offset < len(data))


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _cut_off() -> Iterator[BadFile]:
    for name, (what, data) in sources().items():
        for offset in _offsets(data, name):
            yield BadFile(f"{name} cut at {offset}", what, name, _bytes(data[:offset]))


def _flipped() -> Iterator[BadFile]:
    for name, (what, data) in sources().items():
        checked = name.endswith(".png")
        for offset in _offsets(data, name):
            changed = bytearray(data)
            changed[offset] ^= 1 << (offset % 8)
            yield BadFile(f"{name} flipped at {offset}", what, name, _bytes(bytes(changed)), not checked)


def _saved(array: np.ndarray, **options: object) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(array).save(path, **options)


def _of_mode(mode: str) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(COLOURS).convert("RGB").convert(mode).save(path)


def _of_other_kinds() -> Iterator[BadFile]:
    for mode in ("RGB", "RGBA", "LA"):
        yield BadFile(f"label of mode {mode}", "label", "a.png", _of_mode(mode))
    yield BadFile("label of mode CMYK", "label", "a.tif", _of_mode("CMYK"))
    yield BadFile("label of mode YCbCr", "label", "a.tif", _of_mode("YCbCr"))
    yield BadFile("label of mode LAB", "label", "a.tif", _of_mode("LAB"))
    for value in (K, 7, 100, 254):
        yield BadFile(f"label of the value {value}", "label", "a.png", _saved(np.full_like(VALUES, value)))
    for kind, value in ((np.uint16, 256), (np.uint16, 65535), (np.int32, 70_000), (np.int32, -1)):
        array, name = np.full(VALUES.shape, value, kind), "a.tif" if kind is np.int32 else "a.png"
        yield BadFile(f"label of {kind.__name__} {value}", "label", name, _saved(array))
    for value in (0.5, np.nan, np.inf, -np.inf, 1e30):
        yield BadFile(f"label of {value}", "label", "a.tif", _saved(np.full(VALUES.shape, value, np.float32)))
    for lossy in ("JPEG", "WEBP"):
        yield BadFile(f"label that is a {lossy}", "label", "a.png", _saved(VALUES, format=lossy))
    yield BadFile("label of two pages", "label", "a.tif", _pages)
    for kind, value in ((np.uint16, 900), (np.int32, 70_000), (np.float32, 0.5), (np.float32, np.nan)):
        name = "a.png" if kind is np.uint16 else "a.tif"
        yield BadFile(f"image of {kind.__name__} {value}", "image", name, _saved(np.full(VALUES.shape, value, kind)))
    for shape in ((), (5,), (0, 5, 3), (5, 0, 3), (HEIGHT, WIDTH, 2), (HEIGHT, WIDTH, 3, 1), (3, 3, 3)):
        yield BadFile(f"array of the shape {shape}", "image", "a.npy", lambda p, s=shape: np.save(p, np.zeros(s, "u1")))
    for kind in ("f4", "f8", "c8", "U3", "i8", "M8[s]", "S4"):
        array = np.zeros((HEIGHT, WIDTH, 3), kind)
        yield BadFile(f"array of {kind}", "image", "a.npy", lambda p, a=array: np.save(p, a))
    yield BadFile("array of objects", "image", "a.npy", lambda p: np.save(p, np.array([[[{}]]], object)))
    for title, content in {
        "empty": b"",
        "text": b"hello",
        "html": b"<html><body>404</body></html>" * 20,
        "zeros": bytes(500),
        "zip": b"PK\3\4" + bytes(200),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
        "npy magic": b"\x93NUMPY\x01\x00\xff\xff{'descr'",
        "npy version": b"\x93NUMPY\x09\x00" + bytes(60),
        "II": b"II*\0\xff\xff\xff\xff",
        "loop of pages": b"II*\0" + struct.pack("<IHI", 8, 0, 8) + bytes(30),
    }.items():
        for what, name in (("image", "a.png"), ("image", "a.npy"), ("image", "a.tif"), ("label", "a.png")):
            yield BadFile(f"{what} {name} of {title}", what, name, _bytes(content))


def _pages(path: Path) -> None:
    pages = [Image.fromarray(VALUES) for _ in range(2)]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(300))) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _of_other_sizes() -> Iterator[BadFile]:
    big = 2**31 - 1
    for size in ((0, 5), (5, 0), (0, 0), (big, 1), (1, big), (40_000, 40_000), (big, big), (100, 100)):
        for what in ("image", "label"):
            content = _png(*size, colour=2 if what == "image" else 0)
            yield BadFile(f"{what} that says {size}", what, "a.png", _bytes(content))
        yield BadFile(f"bmp that says {size}", "image", "a.bmp", _bytes(_bmp(*size)))
        yield BadFile(f"ppm that says {size}", "image", "a.ppm", _bytes(b"P6 %d %d 255 " % size + bytes(50)))
    for depth, colour in ((3, 0), (0, 0), (16, 3), (8, 5), (8, 7), (255, 255)):
        yield BadFile(f"png of depth {depth}, {colour}", "label", "a.png", _bytes(_png(WIDTH, HEIGHT, depth, colour)))
    for height, width in ((HEIGHT + 1, WIDTH), (HEIGHT, WIDTH - 1), (WIDTH, HEIGHT), (1, 1)):
        yield BadFile(f"label of {width}x{height}", "label", "a.png", _saved(np.zeros((height, width), np.uint8)))
        yield BadFile(f"image of {width}x{height}", "image", "a.png", _saved(np.zeros((height, width, 3), np.uint8)))


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(60)


def _no_files() -> Iterator[BadFile]:
    def bind(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path may have 100 letters
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    made: dict[str, Callable[[Path], object]] = {
        "a folder": lambda path: path.mkdir(),
        "a pipe": os.mkfifo,
        "a socket": bind,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "an endless device": lambda path: path.symlink_to("/dev/random"),
        "nothing": lambda path: None,
        "a broken link": lambda path: path.symlink_to("/nowhere/at/all"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a loop of links": lambda path: (path.symlink_to("b"), (path.parent / "b").symlink_to(path.name)),
        "a link to its folder": lambda path: path.symlink_to("."),
        "a file as its folder": lambda path: path.symlink_to("/etc/hostname/x"),
    }
    for title, write in made.items():
        for what, name in (("image", "a.png"), ("image", "a.npy"), ("image", "a.tif"), ("label", "a.png")):
            yield BadFile(f"{what} {name} that is {title}", what, name, write)


def _names() -> Iterator[BadFile]:
    """Damaged files whose names a message has to say."""
    words = [
        "é",
        "Å",
        "ﬁ",
        "한글",
        "🌳",
        "a b",
        "a'b",
        'a"b',
        "-x",
        "$HOME",
        "a%sb",
        "{0}",
        "<b>",
        "a|b",
        "‮abc",
        "x" * 200,
    ]
    for word in words:
        for form in ("NFC", "NFD", "NFKC", "NFKD") if not word.isascii() else ("NFC",):
            name = unicodedata.normalize(form, word)
            yield BadFile(f"label called {name!a} ({form})", "label", f"{name}.png", _bytes(b"no image"))
