"""What decoders pass over in damaged files: checksums of a PNG, pages of a TIFF that lead round in a loop."""

import struct
import zlib
from typing import BinaryIO

MOST_PAGES = 65_536
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_WIDTHS = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # bytes of a TIFF's types
_TAGS_OF_PIXELS = {*range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 317, 320, *range(322, 326), 338, 339}
_OF_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")


def check_structure(file: BinaryIO) -> None:
    """Refuse a PNG of which a part that pixels depend on was changed, and a TIFF without an end.

    Args:
        file: The file; it is read from its beginning, where it is left.

    Raises:
        ValueError: The message says what is wrong.
    """
    file.seek(0)
    start = file.read(8)
    if start == _PNG:
        _check_png(file)
    elif start[:4] in _TIFF:
        _check_tiff(file, *_TIFF[start[:4]])
    file.seek(0)


def _check_png(file: BinaryIO) -> None:
    """Compare the checksums of chunks, which Pillow and libpng do not all look at."""
    while True:
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":  # the decoder says if pixels are missing
            return
        length = int.from_bytes(head[:4], "big")
        if head[4:] not in _OF_PIXELS:
            file.seek(length + 4, 1)
            continue
        content, known = file.read(length), file.read(4)
        if len(content) < length or len(known) < 4:
            raise ValueError(f"it is cut off in its chunk {head[4:].decode()}")
        if zlib.crc32(content, zlib.crc32(head[4:])) != int.from_bytes(known, "big"):
            raise ValueError(f"the checksum of its chunk {head[4:].decode()} is wrong, so it was changed")


def _check_tiff(file: BinaryIO, order: str, is_big: bool) -> None:
    """Follow the pages from one to the next, and look whether what tags point to is there: readers pass over them."""
    count_format, offset, entry = (f"{order}Q", f"{order}Q", 20) if is_big else (f"{order}H", f"{order}I", 12)
    size, seen = file.seek(0, 2), set[int]()
    place = 8 if is_big else 4
    while place < size:
        page = _number(file, place, offset)
        if not page:  # the last, or cut off, which the decoder says
            return
        if page in seen or len(seen) >= MOST_PAGES:
            raise ValueError("its pages lead round in a loop" if page in seen else f"it has {MOST_PAGES} pages or more")
        seen.add(page)
        count = _number(file, page, count_format)
        entries = file.read(min(count, MOST_PAGES) * entry)
        for start in range(0, len(entries) - entry + 1, entry):
            _check_entry(entries[start : start + entry], order, offset, size)
        place = page + struct.calcsize(count_format) + entry * count


def _check_entry(entry: bytes, order: str, offset: str, size: int) -> None:
    tag, kind = struct.unpack(f"{order}HH", entry[:4])
    width = struct.calcsize(offset)
    count, place = (struct.unpack(offset, entry[at : at + width])[0] for at in (4, 4 + width))
    length = count * _WIDTHS.get(kind, 1)
    if tag in _TAGS_OF_PIXELS and length > width and place + length > size:
        raise ValueError(f"its tag {tag} lies beyond its end, so it is cut off")


def _number(file: BinaryIO, place: int, kind: str) -> int:
    """A number in the file; 0 where it has ended."""
    file.seek(place)
    found = file.read(struct.calcsize(kind))
    return int(struct.unpack(kind, found)[0]) if len(found) == struct.calcsize(kind) else 0
