"""From words of a command line to a run, and from errors to one line: the one place that catches and prints."""

import dataclasses
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO, TextIOWrapper
from typing import Any, TypeVar, get_type_hints

import tyro

from segheads.data import DATASETS
from segheads.errors import (
    DataMissingError,
    DownloadError,
    LabelError,
    OptionError,
    PretrainedWeightsError,
    RunEndedError,
    RunExistsError,
    SegheadsError,
    StoppedError,
    options_become_parts,
)
from segheads.exporting import FORMATS
from segheads.heads import list_heads
from segheads.merges import MERGES
from segheads.ranges import check_ranges
from segheads.stopping import stopping
from segheads.training.config import flat

C = TypeVar("C")
R = TypeVar("R")

SIGNALLED = 128  # plus the number of the signal, as shells have it
SIGPIPE = 13  # which Windows has not
TRACEBACK, OF_TRACEBACK = "--traceback", "show, before an error's line, where in the code it came from"
USAGE = 2  # the exit status of a run that cannot begin or go on

# What helps, by the option that does; offered where the command has that option.
WEIGHTS = {
    "backbone_weights": "--backbone-weights PATH takes a local checkpoint",
    "pretrained": "--no-pretrained starts from random weights",
}
DATA = {
    "data_root": "--data-root PATH says where it is",
    "download": "--download fetches it ({size})",
    "demo": "--demo trains without any data",
}
LABELS = {
    "label_values": "--label-values 0 255 says which value is which class",
    "label_map": "--label-map FILE says so in JSON",
    "label_colours": "--label-colours FILE says which colour is which",
    "ignore_index": "--ignore-index lists the values of no class",
}
FOLDER = {"resume": "--resume goes on with it", "output": "--output PATH takes another folder"}
ADVICE: tuple[tuple[type[BaseException], Mapping[str, str]], ...] = (
    (PretrainedWeightsError, WEIGHTS),
    (LabelError, LABELS),
    (DataMissingError, DATA),
    (DownloadError, DATA),
    (RunExistsError, FOLDER),
    (RunEndedError, {"resume": "--resume goes on with the run"}),
    (StoppedError, {"resume": "--resume goes on with the run"}),
)

# Options whose values are names in a table, for the help
NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "head": list_heads,
    "dataset": lambda: list(DATASETS),
    "merge": lambda: list(MERGES),
    "format": lambda: list(FORMATS),
}


def run(
    main: Callable[[C], R],
    config: type[C],
    *,
    demo: C | None = None,
    description: str | None = None,
    args: Sequence[str] | None = None,
    prog: str | None = None,
) -> R:
    """Read a configuration from the command line and run it; say what the user can mend in one line.

    Progress goes to standard output and errors to standard error, of the main process alone. A bug keeps its traceback.

    Args:
        main: What runs.
        config: A dataclass; its fields and those of its parts are the options.
        demo: What the options default to with `--demo`.
        description: Stands at the top of the help.
        args: The words of the command line; None means `sys.argv`'s.
        prog: What the help calls the program; None means the file's name.

    Returns:
        What `main` returns.

    Raises:
        SystemExit: With 2 after an error that the user can mend, words that cannot be read among them; with 0 after
            the help; with 143 and 130 after SIGTERM and SIGINT.
    """
    words = list(sys.argv[1:] if args is None else args)
    shows_all = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    given: Any = None
    with _messages():
        try:
            given = parse(config, words, demo=demo, description=description, prog=prog)
            with stopping():
                result = main(given)
            print(end="", flush=True)  # here a reader that is gone can be told from a fault
            return result
        except StoppedError as stop:
            if _is_main_process() or stop.__cause__:  # its step failed: the main process may be gone
                print("; ".join(filter(None, (f"{_of_process()}{stop}", advise(stop, given)))), file=sys.stderr)
            raise SystemExit(SIGNALLED + stop.signal) from stop
        except (SegheadsError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                raise SystemExit(SIGNALLED + SIGPIPE) from error
            if _is_main_process() or isinstance(error, RunEndedError):  # which may be of one process alone
                if shows_all:
                    traceback.print_exception(error)
                    print(getattr(error, "traceback_of_worker", None) or "", end="", file=sys.stderr)
                print(f"error: {_of_process()}{_told(error)}", file=sys.stderr)
                if advice := advise(error, given):
                    print(advice, file=sys.stderr)
            raise SystemExit(USAGE) from error


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any longer, as after `segheads list backbones | head`."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file of the system
        return False
    if not hasattr(select, "poll"):
        return False
    watcher = select.poll()
    watcher.register(output, 0)
    return any(event & select.POLLERR for _, event in watcher.poll(0))


def parse(
    config: type[C],
    words: Sequence[str],
    *,
    demo: C | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> C:
    """Read a configuration from words; fields of its parts are options of their own names.

    Args:
        config: A dataclass.
        words: Of the command line.
        demo: What the options default to with `--demo`.
        description: Stands at the top of the help.
        prog: What the help calls the program.

    Raises:
        SystemExit: As tyro does, for the help.
        OptionError: If the words cannot be read, a number is out of the range of its field, or a part refuses its
            values.
    """
    options: dict[str, Any] = {"default": demo} if demo is not None and "--demo" in words else {}
    shown = "\n\n".join(part for part in (description, _names(config), f"{TRACEBACK}: {OF_TRACEBACK}") if part)
    said = StringIO()
    try:
        with options_become_parts(), redirect_stderr(said):
            given = tyro.cli(
                config, args=words, prog=prog, description=shown, config=(tyro.conf.OmitArgPrefixes,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise OptionError(_without_box(said.getvalue())) from None
    check_ranges(given)
    return given


def _without_box(text: str) -> str:
    """What tyro says in a box of many lines, or between rules where the terminal lacks its letters, in one."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", text)
    parts = [""] if "╭" in text else []  # else the title stands before the first rule
    for row in text.splitlines():
        line = row.strip("│ \t")
        if line and not line.strip("─-"):
            parts.append("")
        elif parts and not line.startswith(("╭", "╰")):
            parts[-1] += f" {line}"
    said = [" ".join(part.split()).rstrip(".") for part in parts if part.strip()]
    *said, last = [part for part in said if not part.startswith("Argument helptext")] or ["the options cannot be read"]
    program = re.fullmatch(r"For full helptext, (?:run|see):? (.+)", last)
    return "; ".join([*map(_in_short, said), f"{program[1]} lists the options" if program else _in_short(last)])


def _in_short(said: str) -> str:
    """What was expected and what came, where tyro tells why it is none of several types, in Python's words."""
    found = re.search(r"no type matching (.+?) could be instantiated from \[(.*?)\]\. Got errors: ", said)
    if found:
        kinds = [kind.strip("{}") for kind in re.split(r"\|(?![^{]*\})", found[1]) if kind != "{None}"]
        said = f"{said[: found.start()]}expected {' or '.join(kinds)}; got {found[2]}"
    said = re.sub(r"invalid literal for int\(\) with base 10: (.+)", r"expected a whole number; got \1", said)
    return re.sub(r"could not convert string to float: (.+)", r"expected a number; got \1", said)


def _told(error: Exception) -> str:
    """An error in one line; several findings keep a line each."""
    if isinstance(error, OSError) and not isinstance(error, SegheadsError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error)


def advise(error: BaseException, config: Any) -> str:
    """Which options help against an error; empty where none is known.

    Args:
        error: What was raised.
        config: The configuration with which it was; None where that could not be read.
    """
    fields = {} if config is None else flat(config)
    dataset = DATASETS.get(str(fields.get("dataset")))
    size = dataset.download_size if dataset else None
    offers = [
        words.format(size=size)
        for kind, options in ADVICE
        if isinstance(error, kind)
        for option, words in options.items()
        if option in fields and (option != "download" or size)
    ]
    return ", ".join(offers[:-1]) + (", and " if len(offers) > 1 else "") + offers[-1] if offers else ""


def _names(config: Any) -> str:
    """The names that options take from tables, for the help."""
    known = _option_names(config)
    return "\n".join(f"--{name}: {', '.join(names())}" for name, names in NAMES.items() if name in known)


def _option_names(config: Any) -> set[str]:
    names: set[str] = set()
    for name, hint in get_type_hints(config).items():
        names |= _option_names(hint) if dataclasses.is_dataclass(hint) else {name}
    return names


@contextmanager
def _messages() -> Iterator[None]:
    """Let what segheads says of its progress reach standard output, in the main process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a letter shows its code
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("segheads"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    if _is_main_process():
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _of_process() -> str:
    return "" if _is_main_process() else f"process {os.environ['RANK']}: "


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # before Accelerate is set up, too
