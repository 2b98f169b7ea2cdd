"""One process a folder: who has it, and who would be the second."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from segheads.errors import FolderInUseError, RunError
from segheads.files import write_json

LOCK, OWNER = ".lock", ".lock.json"  # what the system locks, and who has done so

PATIENCE = 1.0  # seconds
log = logging.getLogger(__name__)
_held: set[Path] = set()  # by this process


@contextmanager
def only_process(folder: str | Path, what: str = "run") -> Iterator[None]:
    """Keep other processes out of a folder; the process that has it may ask again.

    The system lets go of the lock when its process ends, however that happens: an owner that did not give the folder
    back is told of, and the folder taken. A folder that was made for the lock and holds nothing else goes with it.

    Args:
        folder: The folder; made if need be.
        what: It is the folder of, for messages.

    Raises:
        FolderInUseError: Another process has the folder; the message says which, and on which host.
        RunError: The folder cannot be made, written to or locked.

    Examples:
        >>> import tempfile
        >>> with only_process(tempfile.mkdtemp()):
        ...     pass
    """
    folder = Path(folder).absolute()
    if folder in _held:
        yield
        return
    lock, is_new = FileLock(folder / LOCK, timeout=0), not folder.exists()
    try:
        _acquire(lock, folder)
        _tell_of_stale(folder)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(folder / OWNER, own)
    except Timeout:
        owner = _owner(folder, patience=PATIENCE)
        by = "process {pid} on {host}, since {since}".format(**owner) if len(owner) == 3 else "another process"
        raise FolderInUseError(
            f"{folder} is in use, a {what} of {by}; wait for it, stop it, or use another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        raise RunError(f"{folder} cannot be locked: {error}; give a folder that can be written to") from error
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        (folder / OWNER).unlink(missing_ok=True)
        if is_new and folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}:
            _remove(folder)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    """Lock a file that is in its place: an owner that ends may take the folder away before it lets go."""
    for _ in range(9):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:
            continue
        if (folder / LOCK).exists():
            return
        lock.release()
    raise OSError("its lock comes and goes")


def _remove(folder: Path) -> None:
    """Remove a folder that holds the lock alone, unless another process is quicker."""
    try:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        pass


def _owner(folder: Path, patience: float = 0.0) -> dict[str, Any]:
    """What the owner's file says; empty where there is none after some seconds: it may be about to be written."""
    until = time.monotonic() + patience
    while True:
        try:
            owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
            return owner if isinstance(owner, dict) else {}
        except (OSError, ValueError):
            if time.monotonic() >= until:
                return {}
        time.sleep(patience / 20)


def _tell_of_stale(folder: Path) -> None:
    if owner := _owner(folder):
        log.info(
            "process %s on %s, which had %s, has ended without a word", owner.get("pid"), owner.get("host"), folder
        )
