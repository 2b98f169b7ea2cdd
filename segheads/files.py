"""Files and folders that are whole or not there: written beside their place, synced to the disk, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

INCOMPLETE = ".incomplete-"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; what was written takes the place of `path` when the context ends without an error.

    The path ends as `path` does, so that writers that look at the ending choose the same format. After an error, or a
    kill, `path` is as it was before.

    Args:
        path: The file; its folder is made if need be.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> with whole_file(path) as temporary:
        ...     _ = temporary.write_text("a,b", encoding="utf-8")
        >>> path.read_text(encoding="utf-8"), [file.name for file in path.parent.iterdir()]
        ('a,b', ['table.csv'])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into; it takes the place of `path` when the context ends without an error.

    What another folder held in that place goes, but for files and folders of names that the new one lacks: somebody
    else put them there.

    Args:
        path: The folder; the one that it lies in is made if need be.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> with whole_folder(path) as temporary:
        ...     _ = (temporary / "weights").write_bytes(b"0")
        >>> [file.name for file in path.parent.rglob("*")]
        ['model', 'weights']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        place_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def place_folder(temporary: Path, path: Path) -> None:
    """Sync a folder that was written beside its place, and rename it; see `whole_folder`.

    Args:
        temporary: What was written.
        path: Its place.
    """
    for file in temporary.rglob("*"):
        _sync_folder(file) if file.is_dir() else sync(file)
    _sync_folder(temporary)
    old = _beside(path)
    if path.is_dir():
        path.rename(old)
    temporary.rename(path)
    if old.is_dir():
        for file in old.iterdir():
            if not (path / file.name).exists():
                file.rename(path / file.name)
        shutil.rmtree(old)
    _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, which is whole or not there even if that is cut short.

    Args:
        path: The folder.
    """
    aside = _beside(path)
    path.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder in which nobody writes now.

    Args:
        folder: The folder.
    """
    for leftover in folder.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder(name: str) -> Path:
    """A folder for what can be made again, in the one that SEGHEADS_CACHE names or in ~/.cache/segheads; not made here.

    Args:
        name: Of the folder.
    """
    return Path(os.environ.get("SEGHEADS_CACHE") or Path.home() / ".cache" / "segheads") / name


def readable(words: str) -> str:
    r"""Words of a command line, or the name of a file, in their own letters where the locale could not read them.

    Python keeps each byte that the locale lacks as a lone surrogate, which no UTF-8 file may hold.

    Args:
        words: As the system gave them.

    Examples:
        >>> readable("Stra\udcc3\udc9fe")
        'Straße'
    """
    return words.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file.

    Args:
        path: The file.
        text: Its content.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a whole JSON file, indented.

    Args:
        path: The file.
        value: JSON values.

    Raises:
        TypeError: If the value is none that JSON has.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file.

    Args:
        path: The file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder; only POSIX opens folders."""
    if os.name == "posix":
        sync(path)


def _beside(path: Path) -> Path:
    """A name beside a file or folder that no other process takes, on this machine or another."""
    return path.with_name(f"{INCOMPLETE}{uuid4().hex[:8]}-{path.name}")
