"""Files that are whole or not there: written beside their place, synced to the disk, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    temporary = path.with_name(f"{INCOMPLETE}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            _sync(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


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


def _sync(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
