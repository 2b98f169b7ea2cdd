"""The folder of a model: config.json and model.safetensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from segheads.plan import ModelPlan
from segheads.pretrained import why_hub_is_out_of_reach

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

Settings = Mapping[str, Mapping[str, Any]]  # by the name of a part, what may have been changed on it


class SavedModel(NamedTuple):
    """What a folder holds."""

    plan: ModelPlan
    settings: Settings
    weights: Path


def write_folder(folder: Path, model: nn.Module, plan: ModelPlan, settings: Settings) -> None:
    """Write config.json and model.safetensors.

    Raises:
        ValueError: If the plan holds what is no JSON value.
    """
    try:
        text = json.dumps({"model": dataclasses.asdict(plan), "settings": settings}, indent=2)
    except TypeError as error:
        raise ValueError(f"the arguments of create_model must be JSON values to be saved: {error}") from error
    state = {key: value.cpu().contiguous().clone() for key, value in model.state_dict().items()}  # shared memory, too
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(text + "\n")


def read_folder(name: str, **hub_options: Any) -> SavedModel:
    """Read config.json of a local folder or of a model on the hub, and find its weights."""
    files = [Path(name) / file for file in (CONFIG_FILE, WEIGHTS_FILE)]
    if not Path(name).is_dir():
        files = [Path(hf_hub_download(name, file.name, **hub_options)) for file in files]
    config = json.loads(files[0].read_text())
    settings = config["settings"]
    if not all(isinstance(values, dict) for values in settings.values()):
        settings = {"head": settings}  # as they were saved before heads nested
    return SavedModel(ModelPlan(**config["model"]), settings, files[1])


def check_place(name: str, hub_options: dict[str, Any]) -> str | None:
    """Refuse a folder that is not whole; where the hub does not answer, look in its cache alone and say why."""
    if Path(name).is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (Path(name) / file).is_file():
                raise FileNotFoundError(f"{name} holds no {file}; expected a folder that save_pretrained wrote")
    elif not hub_options.get("local_files_only"):
        cause = why_hub_is_out_of_reach()
        hub_options["local_files_only"] = cause is not None  # the cache may have it
        return cause
    return None


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model that it fits exactly.

    Args:
        model: The model to load into.
        path: A `model.safetensors` that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If names or shapes differ; the message names the file and shows the first differences.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a safetensors file that save_pretrained wrote")
    state, expected = load_file(path), model.state_dict()
    differences = [f"{key} is missing" for key in expected if key not in state]
    differences += [f"{key} is not expected" for key in state if key not in expected]
    differences += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(differences[:3])}{more}")
    model.load_state_dict(state)
