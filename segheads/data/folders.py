"""What a folder holds: image files by name, those of its sub-folders among them, and what is passed over."""

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from segheads.errors import DataError, DataMissingError

NAMED = 3  # files of each kind in a message

# A literal list: asking Pillow loads all its plugins, and then every Image.open tries more of them.
# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".npy", ".pbm", ".pcx", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
])
# fmt: on


@dataclass(frozen=True)
class Listing:
    """The image files of a folder and its sub-folders.

    Attributes:
        folder: The folder.
        files: File of each name: its path in the folder without suffix and ending, with slashes, in the normal form C
            of Unicode. Sorted by the names as they are stored.
        odd: Names of what is no regular file, such as a broken link; `check_file` says what it is.
        passed_over: Paths in the folder of what is no image, or lacks the suffix, by the reason.
    """

    folder: Path
    files: dict[str, Path]
    odd: list[str] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)


def list_images(folder: Path, suffix: str = "") -> Listing:
    """List the image files of a folder and its sub-folders by name.

    Args:
        folder: The folder. Links to other folders are followed.
        suffix: What follows the common name in the stems of its files, such as `_mask`, or in the files' whole names,
            such as `_mask.png`; others are passed over.

    Raises:
        DataMissingError: There is no such folder.
        DataError: It holds no image files, two of the same name, or a link that leads round in a loop.
    """
    if not folder.is_dir():
        raise DataMissingError(f"there is no folder {folder}; it should hold image files such as {_example(suffix)}")
    found, odd = Listing(folder, {}), set()
    stored: dict[str, str] = {}
    for place, entry in _walk(folder):
        key = common_name(place, suffix)
        if reason := _reason(place, key, suffix):
            found.passed_over.setdefault(reason, []).append(place)
            continue
        assert key is not None
        if key in stored:
            raise DataError(f"{folder} holds both {_both(stored[key], place)}; keep one file per name")
        stored[key] = place
        if not entry.is_file():
            odd.add(key)
    if not stored:
        raise DataError(_nothing(found, suffix))
    for key in sorted(stored, key=lambda key: os.path.splitext(stored[key])[0]):
        found.files[key] = folder / stored[key]
    found.odd.extend(key for key in found.files if key in odd)
    return found


def walk_images(folder: Path) -> list[Path]:
    """All image files of a folder and its sub-folders, sorted; what is hidden, or no image by its ending, is left out.

    Args:
        folder: The folder. Links to other folders are followed.

    Raises:
        DataError: A link leads round in a loop.
    """
    return sorted(folder / place for place, _ in _walk(folder) if not _reason(place, "", ""))


def common_name(place: str, suffix: str) -> str | None:
    """The part of a file's path that image and label share, in the normal form C of Unicode.

    Args:
        place: Path of the file, with slashes.
        suffix: As in `list_images`.

    Returns:
        None if the file lacks the suffix.

    Examples:
        >>> common_name("city/a_mask.PNG", "_mask"), common_name("city/a_mask.PNG", "_mask.png"), common_name("b", "_x")
        ('city/a', 'city/a', None)
    """
    stem, ending = os.path.splitext(normal(place))
    end, of_end = _split(normal(suffix))
    if of_end and of_end.lower() != ending.lower():
        return None
    return stem.removesuffix(end) if stem.endswith(end) else None


def check_file(path: str | os.PathLike[str], kind: str) -> None:
    """Refuse what is no regular file: opening a named pipe, for one, would wait for ever.

    Args:
        path: The file.
        kind: What it should be, for the message.

    Raises:
        DataMissingError: It is not there, or is a link to what is not there.
        DataError: It is a folder, a pipe, or a link that leads to itself.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise DataMissingError(
                f"{path} is a broken link: its target {os.readlink(path)} is not there; mend or remove it"
            ) from error
        raise DataMissingError(f"there is no {path}, which should be {kind}") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path} is a link that leads back to itself; mend or remove it") from error
        raise
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "no regular file"
        raise DataError(f"{path} is {what}, but should be {kind}; take it out of the folder")


def normal(name: str) -> str:
    """A name in the normal form C of Unicode: macOS may store another form of the same letters.

    Args:
        name: The name.
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def named(names: list[str], most: int = NAMED) -> str:
    """The first names of a list for a message, on one line.

    Args:
        names: Of files.
        most: How many at most.
    """
    shown = [name if name.isprintable() else ascii(name) for name in names[:most]]
    return ", ".join([*shown, *(["..."] if len(names) > most else [])])


def _walk(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Entries of a folder and its sub-folders with their paths in it; of hidden sub-folders the folder alone."""
    todo: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    while todo:
        prefix, above = todo.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                place = prefix + entry.name
                if not _is_folder(entry):
                    yield place, entry
                elif entry.name.startswith("."):
                    yield f"{place}/", entry
                else:
                    todo.append((f"{place}/", (*above, _real(entry, above))))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        check_file(entry.path, "an image file")
        raise


def _real(entry: os.DirEntry[str], above: tuple[str, ...]) -> str:
    """The real path of a sub-folder, which must not be one of those that hold it."""
    if not entry.is_symlink():
        return os.path.join(above[-1], entry.name)
    real = os.path.realpath(entry.path)
    if any(path == real or path.startswith(os.path.join(real, "")) for path in above):
        raise DataError(f"{entry.path} is a link to {real}, which holds it: a loop without end; remove the link")
    return real


def _reason(place: str, key: str | None, suffix: str) -> str:
    """Why an entry is passed over; empty for an image."""
    name = place.rstrip("/").rpartition("/")[2]
    if name.startswith("."):
        return "hidden"
    if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
        return "no image by the ending"
    return f"without the suffix {suffix}" if key is None else ""


def _both(first: str, second: str) -> str:
    """Two names, spelled out where they only look the same."""
    shown = ascii if normal(first) == normal(second) else str
    return f"{shown(first)} and {shown(second)}"


def _nothing(found: Listing, suffix: str) -> str:
    others = found.passed_over.get(f"without the suffix {suffix}", [])
    if others:
        return f"no image file in {found.folder} has the suffix {suffix}; it holds {named(others)}"
    return f"{found.folder} holds no image files; it should hold files such as {_example(suffix)}"


def _example(suffix: str) -> str:
    return f"NAME{suffix}" + ("" if _split(suffix)[1] else ".png")


def _split(suffix: str) -> tuple[str, str]:
    """A suffix without the ending of image files that it may have, and that ending."""
    end, ending = os.path.splitext("x" + suffix)
    return (end[1:], ending) if ending.lower() in IMAGE_SUFFIXES else (suffix, "")
