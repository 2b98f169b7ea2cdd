"""Weights as a safetensors file: whole, of the model that it is for, and finite."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segheads.errors import SavedModelError, SavedModelMissingError
from segheads.files import whole_file
from segheads.inference.finite import all_finite

WRITTEN = "what save_pretrained wrote"


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a module's state as a whole safetensors file.

    Args:
        path: The file.
        model: Any module.

    Raises:
        SavedModelError: If a weight is NaN or infinite; what the file held before is left.
    """
    state = {key: value.cpu().contiguous().clone() for key, value in model.state_dict().items()}  # shared memory, too
    check_weights(state, path)
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def load_weights(model: nn.Module, path: str | Path, *, new: Collection[str] = ()) -> None:
    """Load a safetensors file into a model that it fits exactly.

    Args:
        model: The model to load into.
        path: A `model.safetensors` that `save_pretrained` wrote.
        new: Names of weights that the model keeps as they are, whatever the file has.

    Raises:
        SavedModelMissingError: If there is no such file.
        SavedModelError: If the file is damaged, or names or shapes differ; the message names the file and shows the
            first differences.
    """
    state, expected = read_weights(path), model.state_dict()
    state = {key: value for key, value in state.items() if key not in new} | {key: expected[key] for key in new}
    differences = [f"{key} is missing" for key in expected if key not in state]
    differences += [f"{key} is not expected" for key in state if key not in expected]
    differences += [
        f"{key} is {_kind_of(state[key])} instead of {_kind_of(value)}"
        for key, value in expected.items()
        if key in state and not _fits(state[key], value)
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise SavedModelError(f"{path} does not fit the model: {'; '.join(differences[:3])}{more}")
    check_weights(state, path)
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Raises:
        SavedModelMissingError: If there is no such file.
        SavedModelError: If it is damaged.
    """
    if not Path(path).is_file():
        raise SavedModelMissingError(f"no weights at {path}; expected a safetensors file that save_pretrained wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:  # the last: dtypes torch lacks
        raise SavedModelError(f"{path} is damaged ({error}); expected {WRITTEN}") from error


def check_weights(state: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights that are NaN or infinite: whatever they are given, they name no class.

    Args:
        state: Weights by name.
        where: The file, or what they are of, for the message.

    Raises:
        SavedModelError: The message names the first, and counts.
    """
    wrong = [key for key, value in state.items() if value.is_floating_point() and not _is_finite(value)]
    if wrong:
        values = state[wrong[0]]
        count = int(values.numel() - values.isfinite().sum())
        more = f", and so are values of {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SavedModelError(
            f"{where}: {count} of {values.numel()} values of {wrong[0]} are NaN or infinite{more}; such weights name "
            "no class: take a checkpoint from before they broke down"
        )


def _is_finite(values: Tensor) -> bool:
    return not values.numel() or bool(all_finite(values))


def _fits(values: Tensor, expected: Tensor) -> bool:
    """Whether a weight may become another: of its shape, and both floats or both of one type."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    same = values.dtype == expected.dtype or (values.dtype in floats and expected.dtype in floats)
    return same and values.shape == expected.shape


def _kind_of(values: Tensor) -> str:
    kind = "" if values.is_floating_point() else f" of {str(values.dtype).removeprefix('torch.')}"
    return f"{tuple(values.shape)}{kind}"
