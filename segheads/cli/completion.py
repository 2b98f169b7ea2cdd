"""Print a script with which a shell completes commands and options.

    segheads completion bash > ~/.local/share/bash-completion/completions/segheads
    segheads completion zsh > ~/.zfunc/_segheads    # with fpath+=~/.zfunc before compinit
    segheads completion fish > ~/.config/fish/completions/segheads.fish

The script holds what this version offers: write it anew after an update.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import tyro

from segheads.cli import list_commands


@dataclass(frozen=True, kw_only=True)
class Config:
    """For which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell."""


def main(config: Config) -> None:
    """Run the command."""
    configs = {name: import_module(f"segheads.cli.{name.replace('-', '_')}").Config for name in list_commands()}
    tyro.extras.subcommand_cli_from_dict(
        configs,
        prog="segheads",
        args=["--tyro-print-completion", config.shell],
        config=(tyro.conf.OmitArgPrefixes,),
    )
