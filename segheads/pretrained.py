"""Pretrained weights of timm's models: where they come from, and clear errors where they cannot be had."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import timm

from segheads.errors import PretrainedWeightsError, PretrainedWeightsMissingError

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
    if pretrained is False:
        return "", {}
    if pretrained is not True:
        path = Path(pretrained)
        if not path.is_file():
            raise PretrainedWeightsMissingError(
                f"pretrained must be a checkpoint file, but there is none at {str(path)!r}"
            )
        return f"checkpoint {str(path)!r}", _load_from(path)
    source = f"the pretrained checkpoint of {name}"
    try:
        config = None if ":" in name else timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that does not exist
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
        raise ValueError(f"{name!r} names weights that timm does not have ({tags}); pass one of these") from error
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


def _load_from(path: Path) -> dict[str, Any]:
    # `file` and not create_model's checkpoint_path, which neither adapts in_chans nor converts keys and sizes
    overlay = {"file": str(path), "custom_load": path.suffix == ".npz", "source": ""}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


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
            return timm.create_model(name, num_classes=0, **weights, **options)
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
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise _weights_error(name, f"{source}: {cause[:400]}") from error


@contextmanager
def log_of_missing_keys() -> Iterator[set[str]]:
    """The parameters that a checkpoint did not hold: timm leaves them random and tells only its log, at level INFO."""
    missing: set[str] = set()
    logger = logging.getLogger("timm.models._builder")
    level, audible = logger.level, logger.getEffectiveLevel()

    def read(record: logging.LogRecord) -> bool:
        if found := re.match(r"Missing keys \((.*?)\)", record.getMessage()):
            missing.update(found[1].split(", "))
        return record.levelno >= audible

    logger.addFilter(read)
    logger.setLevel(logging.INFO)
    try:
        yield missing
    finally:
        logger.setLevel(level)
        logger.removeFilter(read)
