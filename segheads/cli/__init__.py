"""The command `segheads`: one file for each of its commands.

A command is a module of this package with a dataclass `Config` and a function `main(config)`; the first line of its
docstring is what `segheads --help` says of it. It is imported when it is called.
"""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

FRAME = {"__init__", "run"}  # what is no command


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
        SystemExit: As `segheads.cli.run.run` does, and with 2 if there is no such command.
    """
    words = list(sys.argv[1:] if args is None else args)
    commands = list_commands()
    if words and words[0] in commands:
        _run_command(words[0], words[1:])
        return  # nothing: what the script returns would become its exit status
    import tyro  # alone: the help needs no torch

    offered = {name: _described(text) for name, text in commands.items()}
    description = (
        "Work with trained models. `segheads COMMAND --help` lists the options of a command; "
        "`accelerate launch -m segheads COMMAND` runs it in several processes."
    )
    tyro.extras.subcommand_cli_from_dict(offered, args=words or ["--help"], prog="segheads", description=description)


def _run_command(name: str, words: list[str]) -> None:
    from segheads.cli.run import run

    module: Any = import_module(f"segheads.cli.{name.replace('-', '_')}")
    run(module.main, module.Config, description=module.__doc__, args=words, prog=f"segheads {name}")


def _described(text: str) -> Callable[[], None]:
    """A stand-in for a command, for the list of them."""

    def command() -> None: ...

    command.__doc__ = text
    return command
