"""Probes on disk: the backbone once, each head in a folder of its own."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from segheads.errors import SavedModelError
from segheads.files import whole_folder, write_json
from segheads.model import SegmentationModel
from segheads.probing.backbone import SharedBackbone
from segheads.probing.probes import Probe
from segheads.saving import (
    FORMAT,
    meaning_as_json,
    meaning_from_json,
    read_model,
    restore_settings,
    settings_of,
    write_weights,
)

BACKBONE_FILE, HEAD_FILE, HEAD_CONFIG_FILE = "backbone.safetensors", "head.safetensors", "config.json"


def save_probes(folder: str | Path, shared: SharedBackbone, probes: Sequence[Probe]) -> None:
    """Write the backbone once, and the weights of every head in a folder of its own, for `join_head`.

    Args:
        folder: Where to; heads go to `heads/NAME`.
        shared: The backbone.
        probes: Heads from `create_model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / BACKBONE_FILE, shared.backbone)
    for probe in probes:
        if probe.model.plan is None:
            raise ValueError(f"head {probe.name} was assembled from parts; only one of create_model can be saved")
        about = {
            "format": FORMAT,
            "name": probe.name,
            "learning_rate": probe.learning_rate,
            "model": dataclasses.asdict(probe.model.plan),
            "settings": settings_of(probe.model),
            **meaning_as_json(probe.model.classes, probe.model.protocol, probe.model.label_map),
        }
        with whole_folder(folder / "heads" / probe.slug) as own:
            write_weights(own / HEAD_FILE, probe.model)
            write_json(own / HEAD_CONFIG_FILE, about)


def join_head(folder: str | Path, slug: str) -> SegmentationModel:
    """Join a head that `save_probes` wrote to its backbone again.

    Args:
        folder: The folder of the run.
        slug: Name of the head's folder in `heads`.

    Returns:
        The model, in evaluation mode and on the CPU, with `save_pretrained` and all else of `create_model`'s models.

    Raises:
        FileNotFoundError: If there is no such head; the message lists those that there are.
        ValueError: If the weights do not fit the model.
    """
    own = Path(folder) / "heads" / slug
    if not (own / HEAD_FILE).is_file():
        known = sorted(path.parent.name for path in Path(folder).glob(f"heads/*/{HEAD_FILE}"))
        raise FileNotFoundError(f"{folder} holds no head {slug!r}; it holds {', '.join(known) or 'none'}")
    about = json.loads((own / HEAD_CONFIG_FILE).read_text(encoding="utf-8"))
    model = SegmentationModel.from_plan(read_model(about["model"], version=about.get("format", 1)))
    state = load_file(own / HEAD_FILE)
    state |= {f"backbone.{key}": value for key, value in load_file(Path(folder) / BACKBONE_FILE).items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise SavedModelError(f"{own / HEAD_FILE} and {BACKBONE_FILE} do not fit the model: {error}") from error
    restore_settings(model, about.get("settings", {}), own / HEAD_CONFIG_FILE)  # 0.1.0 kept none
    model.classes, model.protocol, model.label_map = meaning_from_json(about)
    return model.eval()
