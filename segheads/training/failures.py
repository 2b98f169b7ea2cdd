"""What ends a run that had begun, in one line: what it was, and what is left."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from segheads.errors import DataError, DataMissingError, RunEndedError, RunError, ScoresError, SegheadsError
from segheads.training.run_folder import RunFolder

MOMENT = 1.0  # seconds
LOADER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)")
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|peer|timed out|watchdog", re.IGNORECASE)


@contextmanager
def said_in_a_line(folder: RunFolder, processes: int, has_begun: Callable[[], bool]) -> Iterator[None]:
    """Say what ended the run in one line, and which checkpoint it can go on from; a bug keeps its own words.

    Args:
        folder: The run's.
        processes: How many the run has.
        has_begun: Whether it has; before that errors are as they are.

    Raises:
        RunEndedError: For files that are gone, damaged or cannot be written, and processes that are gone.
    """
    try:
        yield
    except (RunError, ScoresError):
        raise
    except Exception as error:
        if has_begun() and (words := _what_ended(_told_later(error), processes)):
            raise RunEndedError(f"{words}; {folder.left()}") from error
        raise


def _told_later(error: Exception) -> Exception:
    """What PyTorch says of a loading process that is gone, which may come after its connection broke."""
    if not isinstance(error, (ConnectionError, EOFError)):
        return error
    try:
        time.sleep(MOMENT)  # the handler of SIGCHLD raises
    except RuntimeError as later:
        return later
    return error


def _what_ended(error: Exception, processes: int) -> str | None:
    """What it was that nobody can foresee, in words; None for a bug."""
    if isinstance(error, (DataError, DataMissingError, OSError)):
        return _line(error)
    if not isinstance(error, RuntimeError) or isinstance(error, SegheadsError):
        return None
    if found := LOADER.search(str(error)):
        return (
            f"the process {found[1]}, which loads images, is gone: it was killed, or memory (/dev/shm, too) was not "
            "enough for so many workers"
        )
    if processes > 1 and LOST.search(str(error)):
        return f"another of the {processes} processes of the run is gone ({_line(error)})"
    return None


def _line(error: Exception) -> str:
    """The last line of a message: that of a process that loads images begins with its whole traceback."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else repr(error)
