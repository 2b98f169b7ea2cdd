"""Say what a trained model is: parts, sizes, classes, protocol, scores, licence of its backbone's weights.

segheads info runs/own
segheads info OWNER/NAME --json
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from segheads.cli.evaluate import find_model
from segheads.errors import SavedModelError
from segheads.evaluation.complexity import count_parameters
from segheads.evaluation.tables import words
from segheads.metrics import METRICS
from segheads.model import SegmentationModel
from segheads.pretrained import origin
from segheads.saving import find_folder, settings_of

OF_A_RUN = ("dataset", "data_root", "iterations", "batch_size", "crop_size", "optimizer", "learning_rate", "loss")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, and how it is shown."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL"), tyro.conf.Positional]
    """The folder of a run, a folder that save_pretrained wrote, or a model's name on the Hugging Face hub."""
    json: bool = False
    """Print JSON, for programs."""


def main(config: Config) -> None:
    """Run the command."""
    if config.json:
        logging.getLogger("segheads").setLevel(logging.CRITICAL)  # standard output is for the JSON alone
    values = describe(config.model)
    print(json.dumps(values) if config.json else described(values))


def describe(name: str) -> dict[str, Any]:
    """What there is to say of a model, in JSON values.

    Args:
        name: As `--model` of other commands.

    Raises:
        SavedModelMissingError: There is no such model.
        SavedModelError: It is damaged.
    """
    where, run = find_model(name)
    saved = find_folder(where)
    model = SegmentationModel.from_pretrained(where)
    plan, kept = saved.plan, json.loads(saved.config.read_text(encoding="utf-8"))
    settings = settings_of(model)
    names = None if model.classes is None else model.classes.names
    return {
        "model": name,
        "segheads": kept.get("segheads", "0.1.0"),
        "parameters": count_parameters(model),
        "weights": {"bytes": saved.weights.stat().st_size, "sha256": _sha256(saved.weights)},
        "backbone": {
            "name": plan.backbone,
            "strides": [float(stride) for stride in model.backbone.strides],
            "channels": [*model.backbone.channels],
            "parameters": count_parameters(model.backbone),
            "weights_from": origin(plan.backbone, run),
        },
        "pyramid": None
        if model.pyramid is None
        else {"name": plan.pyramid, "options": plan.pyramid_kwargs, "parameters": count_parameters(model.pyramid)},
        "head": {
            "name": plan.head,
            "options": plan.head_kwargs,
            "settings": {part: dict(values) for part, values in settings.items()},
            "parameters": count_parameters(model.head),
        },
        "input": {
            "channels": model.image_form.channels,
            "bit_depth": model.image_form.bit_depth or 8,
            **{key: list(model.data_config[key]) for key in ("mean", "std")},
        },
        "num_classes": model.num_classes,
        "classes": None if names is None else list(names),
        "protocol": model.protocol.as_json(),
        "trained": {key: run[key] for key in OF_A_RUN if run.get(key) is not None} or None,
        "scores": _scores(Path(name)) or None,
    }


def described(values: Mapping[str, Any]) -> str:
    """The same in words, a line each.

    Args:
        values: What `describe` gave.
    """
    weights, backbone, head, given = (values[key] for key in ("weights", "backbone", "head", "input"))
    origin = backbone["weights_from"]
    lines = {
        "model": f"{values['model']}, saved by segheads {values['segheads']}",
        "weights": f"{_millions(values)} parameters, {weights['bytes'] / 1e6:.1f} MB, SHA-256 {weights['sha256']}",
        "backbone": f"{backbone['name']}, strides {words([f'{x:g}' for x in backbone['strides']])}, channels "
        f"{words(backbone['channels'])}, {_millions(backbone)}",
        "": f"{origin['words']}, licence {origin['licence'] or 'not told'}" if origin else "",
        "pyramid": "none" if values["pyramid"] is None else _part(values["pyramid"]),
        "head": _part(head),
        "settings": "; ".join(f"{part}: {_options(own)}" for part, own in head["settings"].items()),
        "input": f"{given['channels']} channels, {given['bit_depth']} bit, mean {_numbers(given['mean'])}, std "
        f"{_numbers(given['std'])}",
        "protocol": _options({key: x for key, x in values["protocol"].items() if x is not None}),
        "classes": f"{values['num_classes']}: {words(values['classes'] or 'without names')}",
        "trained": _options(values["trained"] or {}),
        "scores": ", ".join(f"{key} {x:.4f}" for key, x in (values["scores"] or {}).items()) or "none beside the model",
    }
    return "\n".join(f"{title:<10}{line}" for title, line in lines.items() if line)


def _scores(folder: Path) -> dict[str, float]:
    """The scores of a run, of its last whole evaluation."""
    path = folder / "results.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: found[key] for metric in METRICS.values() for key in metric.scores if found.get(key) is not None}
    except (ValueError, AttributeError) as error:
        raise SavedModelError(f"{path} is damaged ({error}); segheads evaluate writes results anew") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _part(part: Mapping[str, Any]) -> str:
    options = _options(part["options"])
    return f"{part['name']}{f' ({options})' if options else ''}, {_millions(part)}"


def _options(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {words(x)}" for key, x in values.items())


def _millions(part: Mapping[str, Any]) -> str:
    return f"{part['parameters'] / 1e6:.3f} M"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{x:.4g}" for x in values)
