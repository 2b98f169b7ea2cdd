"""Files and folders that are whole or not there: written beside their place, synced to the disk, then renamed."""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

INCOMPLETE = ".incomplete-"
LARGEST_JSON = 64 * 2**20  # bytes of a file of settings


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


def read_json(
    path: str | Path, expected: str, error: type[Exception], *, kind: type = dict, finite: bool = False
) -> Any:
    """Read a JSON file that anybody may have written.

    Args:
        path: The file.
        expected: What it should be, for the message: "what save_pretrained wrote".
        error: What is raised.
        kind: Of the whole: `dict`, or `list`.
        finite: Refuse NaN and Infinity, which Python's JSON has and others' has not.

    Raises:
        error: It cannot be read, is no regular file, too large, no JSON in UTF-8, nested too deep, names an entry
            twice, or is of another kind. A missing file is a FileNotFoundError.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text("[1, 2", encoding="utf-8")
        >>> read_json(path, "a configuration", ValueError)
        Traceback (most recent call last):
        ValueError: .../config.json cannot be read (Expecting ',' delimiter: line 1 column 6 (char 5)); expected ...
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > LARGEST_JSON:
            raise ValueError(f"it has {status.st_size} bytes, and {LARGEST_JSON} are the most")
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number if finite else None)
        if not isinstance(values, kind):
            raise ValueError(f"it holds {type(values).__name__}, not {'a dictionary' if kind is dict else 'a list'}")
    except FileNotFoundError:
        raise
    except RecursionError as cause:
        raise error(f"{path} cannot be read (it is nested too deep); expected {expected}") from cause
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"{path} cannot be read ({reason}); expected {expected}") from cause
    return values


def read_lines(path: str | Path, expected: str, error: type[Exception]) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file; a last line that was cut off is left out.

    Args:
        path: The file.
        expected: What it should be, for the message.
        error: What is raised.

    Raises:
        error: It cannot be read, or a line is no JSON dictionary; the message has the line's number.
    """
    number, records = 0, []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):  # noqa: B007 (the message has it)
            if line.endswith("\n"):
                records.append(json.loads(line))
                if not isinstance(records[-1], dict):
                    raise ValueError(f"it is a {type(records[-1]).__name__}")
    except (OSError, ValueError, RecursionError) as cause:
        place = f"{path}, line {number}," if number else path
        raise error(f"{place} cannot be read ({cause}); expected {expected}") from cause
    return records


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an entry that stands twice, of which JSON would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice[:80]!a} twice")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


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
