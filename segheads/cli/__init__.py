"""The command `segheads`: one file for each of its commands."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS: dict[str, str] = {
    "evaluate": "Measure a trained model as the papers do, and see where it is worst.",
    "analyse": "Draw what a trained model looks at.",
}
"""The commands and what they do; each is a module here with a dataclass `Config` and a function `main(config)`."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: The words of the command line; None means `sys.argv`'s.

    Raises:
        SystemExit: With 2 if there is no such command, with 0 after the help, or as the command ends.
    """
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: segheads COMMAND [OPTIONS]\n")
        for command, summary in COMMANDS.items():
            print(f"  {command:<10} {summary}")
        print("\n`segheads COMMAND --help` lists the options of one; `accelerate launch -m segheads COMMAND` runs it")
        print("in several processes.")
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    import tyro  # not before a command is known: the help answers at once

    module: Any = import_module(f"segheads.cli.{name}")
    config = tyro.cli(module.Config, args=rest, prog=f"segheads {name}", description=module.__doc__)
    module.main(config)
