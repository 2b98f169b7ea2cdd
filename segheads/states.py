"""State dicts as people bring them: inside a checkpoint, under the names that wrappers and trainers add."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Where checkpoints keep their weights; averaged ones first, as in timm
NESTS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "teacher", "encoder", "backbone")
WRAPPERS = ("module.", "_orig_mod.")  # DDP's and torch.compile's
PREFIXES = (*WRAPPERS, "model.", "encoder.", "backbone.", "teacher.")


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights of a file, without running any code of it.

    Args:
        path: A `.safetensors` file, or one that `torch.save` wrote.

    Raises:
        ValueError: If there are no tensors in it.
    """
    safe = path.suffix == ".safetensors"
    found = plain_state(load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True))
    if not found:
        raise ValueError(f"it holds no tensors by name, nor any under {', '.join(NESTS)}")
    return found


def plain_state(checkpoint: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint, out of what they are nested in, without the names of DDP and torch.compile.

    Args:
        checkpoint: A state dict, or a mapping that holds one under one of `NESTS`, at any depth.

    Examples:
        >>> list(plain_state({"epoch": 3, "model": {"module.head.weight": torch.zeros(1)}}))
        ['head.weight']
    """
    while isinstance(checkpoint, Mapping) and not any(isinstance(x, Tensor) for x in checkpoint.values()):
        nests = [key for key in NESTS if isinstance(checkpoint.get(key), Mapping)]
        if not nests:
            return {}
        checkpoint = checkpoint[nests[0]]
    if not isinstance(checkpoint, Mapping):
        return {}
    return {_unwrapped(key): value for key, value in checkpoint.items() if isinstance(value, Tensor)}


def part_of_state(state: Mapping[str, Tensor], expected: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The part of a state that belongs to a module, without the prefixes it stands under, and the names of the rest.

    Args:
        state: A plain state.
        expected: Names of the module's own weights; where the state has none of them, prefixes that all its names
            share are taken off.

    Examples:
        >>> part, rest = part_of_state({"model.backbone.a": torch.zeros(1), "model.head.b": torch.zeros(1)}, ["a"])
        >>> list(part), rest
        (['a'], ['model.head.b'])
    """
    names, best = set(expected), ""
    known = {
        prefix: len(names & {key.removeprefix(prefix) for key in state if key.startswith(prefix)})
        for prefix in _chains(state)
    }
    if max(known.values()):
        best = max(known, key=lambda prefix: (known[prefix], -len(prefix)))
    else:
        shared = [prefix for prefix in known if all(key.startswith(prefix) for key in state)]
        best = max(shared, key=len)
    part = {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}
    return part, [key for key in state if not key.startswith(best)]


def has_prefix(state: Mapping[str, Tensor]) -> bool:
    """Whether any name begins with one of `PREFIXES`."""
    return any(key.startswith(PREFIXES) for key in state)


def _unwrapped(key: str) -> str:
    key = ".".join(part for part in key.split(".") if part != "_orig_mod")
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _chains(state: Mapping[str, Tensor], before: str = "") -> list[str]:
    """Every row of prefixes that some name begins with, the empty one among them."""
    found = [before]
    for prefix in PREFIXES:
        if any(key.startswith(before + prefix) for key in state):
            found += _chains(state, before + prefix)
    return found
