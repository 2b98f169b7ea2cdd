"""What every conversion does with a state dict."""

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from segheads.model import SegmentationModel

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


def count(state: State, pattern: str) -> int:
    """One more than the highest number that a pattern's group finds at the beginning of the names."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


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


def load_model(model: SegmentationModel, backbone: State, head: State, source: str) -> SegmentationModel:
    """Load the states of a backbone and a head; weights of the backbone that no map depends on may be missing.

    Raises:
        ValueError: If they do not fit.
    """
    own = model.backbone.state_dict()
    unused = {key for key, value in model.backbone.named_parameters() if not value.requires_grad}
    load(model.backbone, {**{key: own[key] for key in unused}, **backbone}, source)
    load(model.head, head, source)
    return model
