"""What every conversion does with a state dict."""

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

State = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def rename(state: State, names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply regular expressions, in turn, to every name."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def without_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """What stands under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load(module: Module, state: State, source: str) -> Module:
    """Load a state that must fit exactly.

    Raises:
        ValueError: If it does not.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise ValueError(f"the {source} state does not fit a {type(module).__name__}: {reasons}") from error
    return module
