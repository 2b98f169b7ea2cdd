"""The command `segheads`: one file for each of its commands.

A command is a module of this package with a dataclass `Config` and a function `main(config)`; the first line of its
docstring is what `segheads --help` says of it. It is imported when it is called. A module may have a `DEMO`: what the
options default to with `--demo`; and `GROUPS`, which its help shows the options in.
"""

import ast
import difflib
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from segheads.version import VERSION

FRAME = {"__init__", "groups", "run"}  # what is no command
USAGE = 2  # the exit status where nothing can begin; that of segheads.cli.run, whose import would take seconds

# The order in the help; a command that is in no row comes last
PURPOSES = {
    "Train": ("check-data", "train", "probe", "runs"),
    "Use": ("predict", "export", "convert", "push", "demo", "info"),
    "Measure and look inside": ("evaluate", "analyse"),
    "Help": ("list", "doctor", "completion"),
}
WIDTH, COLUMN = 79, 14


def list_commands() -> dict[str, str]:
    """The commands and what they do, in the words of their files; none is imported.

    Examples:
        >>> list_commands()["evaluate"]
        'Evaluate a trained model as the papers do, and see where it is worst.'
    """
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in FRAME)
    texts = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files}
    return {name.replace("_", "-"): text.partition("\n")[0] for name, text in texts.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: The words of the command line; None means `sys.argv`'s.

    Raises:
        SystemExit: As `segheads.cli.run.run` does, with 0 after the help, and with 2 if there is no such command.
    """
    words = [*(sys.argv[1:] if args is None else args)]  # `list` is a command, and so a module in this package
    commands = list_commands()
    first = words[0] if words else "--help"
    if first in commands:
        _run_command(first, words[1:])  # what it returns would become the script's exit status
    elif first in ("-h", "--help", "--version"):
        print(f"segheads {VERSION}" if first == "--version" else help_text(commands))
        raise SystemExit(0)
    else:
        close = difflib.get_close_matches(first, commands, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: segheads has no command {first!r}; there are {', '.join(commands)}{hint}", file=sys.stderr)
        raise SystemExit(USAGE)


def help_text(commands: dict[str, str]) -> str:
    """What there is, by purpose, without an import of any of it.

    Args:
        commands: What `list_commands` gave.
    """
    named = {name for names in PURPOSES.values() for name in names}
    purposes = {**PURPOSES, "More": tuple(name for name in commands if name not in named)}
    lines = ["usage: segheads COMMAND [OPTIONS]", ""]
    for purpose, names in purposes.items():
        there = [name for name in names if name in commands]
        lines += [f"{purpose}:"] * bool(there)
        for name in there:
            start = f"  {name:<{COLUMN - 3}} "
            lines += textwrap.wrap(start + commands[name], WIDTH, subsequent_indent=" " * COLUMN)
    lines += [
        "",
        "segheads COMMAND --help lists the options of a command, and",
        "accelerate launch -m segheads COMMAND runs it in several processes.",
        "Exit status: 0, or 1 for results with faults, or 2 if nothing could begin.",
    ]
    return "\n".join(lines)


def _run_command(name: str, words: list[str]) -> None:
    from segheads.cli.run import run

    module: Any = import_module(f"segheads.cli.{name.replace('-', '_')}")
    told: dict[str, Any] = {"description": module.__doc__, "args": words, "prog": f"segheads {name}"}
    if groups := getattr(module, "GROUPS", None):
        from segheads.cli.groups import in_groups

        config, flat = in_groups(module.Config, groups)
        run(lambda grouped: module.main(flat(grouped)), config, **told)
    else:
        run(module.main, module.Config, demo=getattr(module, "DEMO", None), **told)
