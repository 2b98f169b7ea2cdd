"""From a published file or folder to a model, with what it tells of its classes."""

import json
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from segheads.classes import Classes
from segheads.convert.reference import from_reference
from segheads.convert.smp import from_smp
from segheads.convert.transformers import from_transformers
from segheads.errors import CheckpointError
from segheads.heads import FCNHead, LinearHead, MeanShiftHead, UPerHead
from segheads.model import SegmentationModel
from segheads.states import plain_state
from segheads.untrusted import no_more_than

FOLDERS = ("smp", "hf")  # the others are files
SOURCES = ("segmenter", "mmseg", "meanshifter", "senformer", *FOLDERS)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LEFT_OUT = re.compile(r"^(auxiliary_head|classification_head|encoder\.(head(_dist)?|fc)|decode_head\.conv_seg)\.")
MOST_WORDS = 600  # of an error
META = ("meta", "dataset_meta")  # what MMSegmentation's checkpoints say of their data

log = logging.getLogger(__name__)


def convert_checkpoint(path: str | Path, source: str, **options: Any) -> SegmentationModel:
    """Turn a published checkpoint into a model; nothing of it is run.

    Args:
        path: A `.pth`, `.pt` or `.safetensors` file; for `"smp"` and `"hf"` a folder with config.json and weights.
        source: `"segmenter"`, `"mmseg"`, `"meanshifter"`, `"senformer"` as `from_reference` has them; `"smp"`, what
            segmentation-models-pytorch's `save_pretrained` wrote; `"hf"`, what that of transformers wrote.
        **options: Further arguments of `from_reference`, for files.

    Returns:
        The model, in evaluation mode, with the names of its classes where the checkpoint has them.

    Raises:
        CheckpointError: If there is no such file, it is damaged, holds other objects than tensors and plain values, or
            cannot be converted; the message names it.
        ValueError: If `source` is unknown, or takes no options.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
    given = [key for key, value in options.items() if value is not None]
    if given and source in FOLDERS:
        raise ValueError(f"source {source!r} takes no {' and no '.join(given)}: its config.json tells")
    path = Path(path)
    try:
        model = _from_folder(path, source) if source in FOLDERS else _from_file(path, source, options)
    except Exception as error:  # whatever an odd state or an odd option makes a part raise
        words = " ".join(str(error).split())[:MOST_WORDS] or type(error).__name__
        lacks = f"it lacks {words}" if isinstance(error, KeyError) else words
        raise CheckpointError(f"{path} cannot be converted from {source}: {lacks}") from error
    return model.eval()


def _from_file(path: Path, source: str, options: Mapping[str, Any]) -> SegmentationModel:
    checkpoint = _read(path)
    state = plain_state(checkpoint)
    _refuse_dilated_head(checkpoint)
    model = from_reference(state, source, **{key: x for key, x in options.items() if x is not None})
    if not isinstance(model, SegmentationModel):
        raise ValueError(f"it has no backbone, so that it is a {type(model).__name__}, which from_reference gives")
    if model.classes is None and isinstance(checkpoint, Mapping):
        model.classes = _classes(checkpoint, model.num_classes)
    _say_what_is_left_out(state, model)
    return model


def _from_folder(path: Path, source: str) -> SegmentationModel:
    config = _json(path / "config.json")
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise ValueError(f"it holds none of {', '.join(WEIGHTS)}")
    state = plain_state(_read(found[0]))
    preprocessing = path / "preprocessor_config.json"
    with no_more_than(found[0]) if found[0].suffix == ".safetensors" else nullcontext():
        if source == "smp":
            model = from_smp(state, config)
        else:
            model = from_transformers(state, config, _json(preprocessing) if preprocessing.is_file() else {})
    _say_what_is_left_out(state, model)
    return model


def _say_what_is_left_out(state: Mapping[str, Tensor], model: SegmentationModel) -> None:
    """What serves training alone: auxiliary heads, and classifiers of images."""
    found = {match[1]: match[0] for key in state if (match := LEFT_OUT.match(key))}
    if isinstance(model.head, (LinearHead, MeanShiftHead, FCNHead, UPerHead)):
        found.pop("decode_head.conv_seg", None)  # theirs
    for prefix in found.values():
        keys = [key for key in state if key.startswith(prefix)]
        log.info("left out %d weights that are in no result: %s*", len(keys), prefix)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError("there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip, safetensors or torch
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"it is damaged, or holds other objects than tensors and plain values, which are not run ({text})"
        ) from error


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path.name} must be an object; got {type(found).__name__}")
    return found


def _refuse_dilated_head(checkpoint: Any) -> None:
    """MMSegmentation's FCN of the names `fcn_d6_*`, which no shape tells from the plain one."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    written = " ".join(str(x) for x in meta.values() if isinstance(x, str)) if isinstance(meta, Mapping) else ""
    head = written.partition("decode_head")[2].partition("auxiliary_head")[0]
    if (found := re.search(r"\bdilation['\"]?\s*[=:]\s*(\d+)", head)) and found[1] != "1":
        raise ValueError(f"its head has dilated convolutions (dilation={found[1]}), which heads here have not")


def _classes(checkpoint: Mapping[str, Any], num_classes: int) -> Classes | None:
    """What MMSegmentation writes beside the weights, in its old and its new words."""
    meta: dict[str, Any] = {}
    for key in META:
        if isinstance(checkpoint.get(key), Mapping):
            meta |= {str(name).lower(): x for name, x in checkpoint[key].items()}
    if isinstance(meta.get("dataset_meta"), Mapping):
        meta |= {str(name).lower(): x for name, x in meta["dataset_meta"].items()}
    names, palette = meta.get("classes"), meta.get("palette") or ()
    if not isinstance(names, (list, tuple)) or len(names) != num_classes:
        return None
    return Classes(tuple(map(str, names)), tuple(map(tuple, palette)) if len(palette) == num_classes else ())
