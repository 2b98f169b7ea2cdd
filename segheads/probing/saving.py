"""Probes on disk: the backbone once, each head in a folder of its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from segheads.classes import num_labels
from segheads.errors import SavedModelError, SavedModelMissingError
from segheads.files import whole_folder, write_json
from segheads.model import SegmentationModel
from segheads.pretrained import BACKBONE_FILE
from segheads.probing.backbone import SharedBackbone
from segheads.probing.probes import Probe
from segheads.saving import (
    FORMAT,
    describing,
    inside,
    meaning_as_json,
    meaning_from_json,
    read_config,
    read_model,
    restore_settings,
    settings_of,
)
from segheads.untrusted import no_more_than
from segheads.weights_file import check_weights, read_weights, write_weights

HEAD_FILE, HEAD_CONFIG_FILE = "head.safetensors", "config.json"


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
        SavedModelMissingError: If there is no such head; the message lists those that there are.
        SavedModelError: If a file is damaged, the weights do not fit the model, or are NaN or infinite.
    """
    own, place = Path(folder) / "heads" / slug, Path(folder) / "heads"
    known = sorted(path.parent.name for path in place.glob(f"*/{HEAD_FILE}"))
    if slug not in known:
        raise SavedModelMissingError(f"{folder} holds no head {slug!r}; it holds {', '.join(known) or 'none'}")
    files = [inside(own, HEAD_FILE), inside(folder, BACKBONE_FILE)]
    path = inside(own, HEAD_CONFIG_FILE)
    with describing(path):
        about = read_config(path, others=("name", "learning_rate"))
        plan = read_model(about["model"], version=about.get("format", 1))
        meaning = meaning_from_json(about, num_labels(plan.num_classes))
        with no_more_than(*files):
            model = SegmentationModel.from_plan(plan)
    state = read_weights(files[0])
    state |= {f"backbone.{key}": value for key, value in read_weights(files[1]).items()}
    check_weights(state, own / HEAD_FILE)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise SavedModelError(f"{own / HEAD_FILE} and {BACKBONE_FILE} do not fit the model: {reason}") from error
    restore_settings(model, about["settings"], path)
    model.classes, model.protocol, model.label_map = meaning
    return model.eval()
