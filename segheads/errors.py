"""What segheads raises on purpose. Every kind is also the built-in exception that callers already catch.

A plain wrong argument of a class or a function is a ValueError. It becomes an `OptionError` where the options of a run
are turned into parts, so that a program that runs recipes can tell a user's mistake from a bug.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_IN_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")


class SegheadsError(Exception):
    """The base of all errors below: what a user can mend, said in one line.

    A `DataLoader` makes the error of a worker anew, of its class and of one text, the worker's whole traceback: the
    words that were meant are taken out of it again.

    Attributes:
        traceback_of_worker: That text; None of an error of this process.
    """

    def __init__(self, *args: object) -> None:
        self.traceback_of_worker: str | None = None
        if len(args) == 1 and isinstance(args[0], str) and _IN_A_WORKER.match(args[0]):
            self.traceback_of_worker = args[0]
            name = f"\n{type(self).__module__}.{type(self).__qualname__}: "
            args = (args[0].rpartition(name)[2].strip(),)
        super().__init__(*args)


class OptionError(SegheadsError, ValueError):
    """An option is out of range, unknown, or does not fit the others."""


class DataError(SegheadsError, ValueError):
    """A file of a data set is not what it should be; the message names it."""


class LabelError(DataError):
    """A label file does not say which class a pixel has, or says it in values that name no class."""


class UnknownLabelError(LabelError):
    """A label file holds a value or a colour that is no class."""


class ImageFormError(DataError):
    """An image file holds other channels, or is of another bit depth, orientation or size, than was told.

    Args:
        message: What was expected, what came, what helps.
        kind: What it is about: `"channels"`, `"bit_depth"`, `"exif"`, `"size"` or `"unreadable"`.

    Attributes:
        kind: What it is about.
    """

    def __init__(self, message: str, kind: str = "channels") -> None:
        super().__init__(message)
        self.kind = kind


class DataMissingError(SegheadsError, FileNotFoundError):
    """A data set, a folder or a file of it is not there."""


class DownloadError(SegheadsError, OSError):
    """A download failed; what was there before is untouched."""


class PackageMissingError(SegheadsError, ImportError):
    """A package that segheads does not install by itself is needed."""


class PretrainedWeightsError(SegheadsError, RuntimeError):
    """Pretrained weights are missing, out of reach or do not fit."""


class PretrainedWeightsMissingError(PretrainedWeightsError, FileNotFoundError):
    """There is no such checkpoint of a backbone."""


class CheckpointError(SegheadsError, ValueError):
    """A published checkpoint is missing, damaged, or cannot be converted; the message names it."""


class SavedModelError(SegheadsError, ValueError):
    """A saved model is damaged, or does not fit what it says of itself."""


class SavedModelMissingError(SavedModelError, FileNotFoundError):
    """There is no saved model, or a file of it is missing."""


class HubError(SegheadsError, OSError):
    """The Hugging Face hub is out of reach, lacks something, or refuses; the message says why."""


class ExportError(SegheadsError, RuntimeError):
    """A model cannot be exported as asked, or the written graph does not give what the model gives."""


class RunError(SegheadsError, RuntimeError):
    """A run cannot begin or go on as it was asked to."""


class RunExistsError(RunError, FileExistsError):
    """The folder of a new run holds another one."""


class FolderInUseError(RunError):
    """Another process has the folder."""


class RunEndedError(RunError):
    """A run that had begun ended early, and can be resumed; the message says from where."""


class StoppedError(KeyboardInterrupt):
    """A signal ended a run, or a command.

    Like Python's own answer to Ctrl-C it is no `Exception`: what copes with damaged files must not cope with it.

    Args:
        message: What is left.
        signal: Its number.

    Attributes:
        signal: Its number.
    """

    def __init__(self, message: str, signal: int = 15) -> None:  # as pickle makes it anew: SIGTERM
        super().__init__(message)
        self.signal = signal


class DivergedError(RunError, FloatingPointError):
    """A loss or a weight is no longer finite.

    Args:
        message: What it was, and what is left.
        iteration: The first iteration at which it was so.

    Attributes:
        iteration: The first iteration at which it was so.
    """

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message)
        self.iteration = iteration


class ScoresError(SegheadsError, FloatingPointError):
    """A model's scores are NaN or infinite, so that they name no class; the message names the image where known."""


@contextmanager
def options_become_parts() -> Iterator[None]:
    """Raise an `OptionError` for every plain ValueError: the place where options are turned into parts.

    Raises:
        OptionError: In the words of the ValueError.

    Examples:
        >>> with options_become_parts():
        ...     raise ValueError("num_classes must be 1 or more; got 0")
        Traceback (most recent call last):
        segheads.errors.OptionError: num_classes must be 1 or more; got 0
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, SegheadsError):
            raise
        raise OptionError(str(error)) from error
