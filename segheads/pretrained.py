"""Pretrained weights of timm's models: where they come from, and clear errors where they cannot be had."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch

from segheads.errors import PretrainedWeightsError, PretrainedWeightsMissingError
from segheads.states import has_prefix, part_of_state, read_state

log = logging.getLogger(__name__)

SAVED = "model.safetensors"  # in the folder of a saved model
BACKBONE_FILE = "backbone.safetensors"  # of a run of probes, whose heads share it

HUB_TIMEOUT = 5.0  # seconds to wait for the hub's first sign of life


def why_hub_is_out_of_reach() -> str | None:
    """Why the Hugging Face hub does not answer, or None where it does; huggingface_hub itself retries for a minute."""
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=HUB_TIMEOUT)
    except Exception as error:  # requests' or httpx' own, or "offline mode", as huggingface_hub's version has it
        return f"{endpoint} is out of reach: {error}"
    return None


def find_weights(name: str, pretrained: bool | str | Path) -> tuple[str, dict[str, Any]]:
    """Where the weights come from in words, and the arguments with which timm loads them."""
    config = _config_of(name)
    if pretrained is False:
        return "", {}
    if pretrained is not True:
        path = _file_of(Path(pretrained))
        source = f"checkpoint {str(path)!r}"
        return source, _load_from(path) if path.suffix == ".npz" else _load_state(name, path, source)
    source = f"the pretrained checkpoint of {name}"
    if ":" not in name and not (config and config.has_weights):
        raise _weights_error(name, "timm has none")
    if config and config.hf_hub_id and not config.custom_load:
        # the cache first: huggingface_hub asks the hub even for what it has, and retries for most of a minute
        cached = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
        if isinstance(cached, str):
            return source, _load_from(Path(cached))
    if name.startswith(("hf-hub:", "hf_hub:")) or (config and config.hf_hub_id):
        cause = why_hub_is_out_of_reach()
        if cause:
            raise _weights_error(name, cause)
    return source, {"pretrained": True}


def _config_of(name: str) -> Any:
    """What timm knows of the weights that a name stands for; None for those of a hub or a folder."""
    try:
        return None if ":" in name else timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that does not exist
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
        raise ValueError(f"{name!r} names weights that timm does not have ({tags}); pass one of these") from error


def origin(backbone: str, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the backbone's first weights come from, as far as is known: a run tells, and timm knows the licence.

    Args:
        backbone: Its name in timm.
        run: Options of the run; empty where there is none.
    """
    if run.get("pretrained") is not True or run.get("backbone_weights") or run.get("init_from"):
        source = run.get("init_from") or run.get("backbone_weights")
        return {"words": f"began from {source}", "licence": None, "hub_id": None} if source else None
    known = timm.get_pretrained_cfg(backbone) if timm.is_model(backbone.partition(".")[0]) else None
    if known is None or not known.has_weights:
        return None
    words = f"weights as of timm's {known.architecture}.{known.tag}"
    return {"words": words, "licence": known.license, "hub_id": known.hf_hub_id}


def _load_from(path: Path) -> dict[str, Any]:
    # `file` and not create_model's checkpoint_path, which neither adapts in_chans nor converts keys and sizes
    overlay = {"file": str(path), "custom_load": path.suffix == ".npz", "source": ""}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _file_of(path: Path) -> Path:
    """A checkpoint, or that of a saved model's or a run's folder."""
    for file in (path, path / SAVED, path / "model" / SAVED):
        if file.is_file():
            return file
    raise PretrainedWeightsMissingError(
        f"pretrained must be a checkpoint file or the folder of a saved model, but there is none at {str(path)!r}"
    )


def _load_state(name: str, path: Path, source: str) -> dict[str, Any]:
    """Arguments for timm that load the backbone's part of a checkpoint."""
    try:
        state = read_state(path)
    except Exception as error:  # of pickle, safetensors or torch
        raise _weights_error(name, f"{source}: {_in_a_line(error)}") from error
    if has_prefix(state):
        state, others = part_of_state(state, _own_names(name))
        if others:
            log.info("%s: left out %d that are not the backbone's: %s", source, len(others), few(others))
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "custom_load": False, "source": ""}}


def _own_names(name: str) -> list[str]:
    """Names of an architecture's weights; none where it is not known without the hub."""
    if ":" in name:
        return []
    with torch.random.fork_rng(devices=[]):
        return list(timm.create_model(name).state_dict())


def few(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _weights_error(name: str, cause: str) -> PretrainedWeightsError:
    return PretrainedWeightsError(
        f'pretrained weights of {name} cannot be loaded ({cause}); pass pretrained="PATH" to a local checkpoint, or '
        "pretrained=False for random weights"
    )


def create_timm_model(name: str, options: dict[str, Any], weights: dict[str, Any], source: str) -> Any:
    """timm.create_model, without the options that an architecture refuses."""
    options = dict(options)
    while True:
        try:
            model: Any = timm.create_model(name, num_classes=0, **weights, **options)
            model.pretrained_cfg.pop("state_dict", None)  # or it would be kept as long as the model
            return model
        except TypeError as error:  # noqa: PERF203 (a handful of turns)
            if "unexpected keyword argument" not in str(error):
                raise
            optional = {"dynamic_img_size", "drop_path_rate", "img_size"} & options.keys()
            refused = optional & set(re.findall(r"'(\w+)'", str(error)))
            if not refused:
                raise
            for option in refused:
                del options[option]
            if "drop_path_rate" in refused:
                warnings.warn(f"{name} has no stochastic depth; drop_path_rate is ignored", stacklevel=3)
        except Exception as error:
            if not weights:
                raise
            raise _weights_error(name, f"{source}: {_in_a_line(error)}") from error


@contextmanager
def log_of_missing_keys() -> Iterator[tuple[set[str], set[str]]]:
    """What a checkpoint lacked and what it held besides: timm tells only its log, at level INFO, and goes on."""
    missing: set[str] = set()
    unexpected: set[str] = set()
    logger = logging.getLogger("timm.models._builder")
    level, audible = logger.level, logger.getEffectiveLevel()

    def read(record: logging.LogRecord) -> bool:
        if found := re.match(r"Missing keys \((.*?)\)", record.getMessage()):
            missing.update(found[1].split(", "))
        if found := re.match(r"Unexpected keys \((.*?)\)", record.getMessage()):
            unexpected.update(found[1].split(", "))
        return record.levelno >= audible

    logger.addFilter(read)
    logger.setLevel(logging.INFO)
    try:
        yield missing, unexpected
    finally:
        logger.setLevel(level)
        logger.removeFilter(read)
