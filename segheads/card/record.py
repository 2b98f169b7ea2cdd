"""What is known of a model beside its own files: what its run, or an evaluation, left."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segheads.backbones import TimmBackbone
from segheads.card.text import is_number
from segheads.data import DATASETS
from segheads.errors import RunError
from segheads.files import read_json
from segheads.pretrained import BACKBONE_FILE, SAVED, origin
from segheads.run_config import read_run_config

SCORES = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "accuracy"}  # and their names on the hub
PICTURES = {  # of a run, and what they show
    "predictions.png": "Images of the validation set, their labels, and what the model says",
    "curves.png": "Loss, learning rate and scores over the training",
}
OTHER_SETS = {"folder": "its author's own data", "coco": "data annotated as COCO is", "scenes": "drawn scenes"}
OF_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


class Record(NamedTuple):
    """What is known of a model beside its own files; each part may be empty.

    Attributes:
        run: The config.json of the run that trained it.
        results: What was measured: a results.json.
        pictures: Files of the run, of the names in `PICTURES`.
    """

    run: Mapping[str, Any] = {}
    results: Mapping[str, Any] = {}
    pictures: Sequence[Path] = ()

    @property
    def dataset(self) -> str | None:
        """The data set, of the scores if there are some: a name that `--dataset` takes."""
        found = self.results.get("protocol", self.run).get("dataset")
        return found if isinstance(found, str) else None

    @property
    def data(self) -> str:
        """The data set in words."""
        kind = DATASETS.get(self.dataset or "")
        return OTHER_SETS.get(self.dataset or "") or (kind.__name__ if kind else self.dataset or "unknown data")

    @property
    def split(self) -> str:
        """The part of the data set that the scores are of."""
        return str(self.results.get("protocol", {}).get("split", "val"))

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the whole, fractions."""
        return {key: self.results[key] for key in SCORES if is_number(self.results.get(key))}

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Name and scores of each class."""
        return [row for row in self.results.get("classes", ()) if isinstance(row, dict)]

    @property
    def about(self) -> dict[str, Any]:
        """Versions, device and command of the run."""
        return self.run.get("environment") or {}

    def origin(self, backbone: TimmBackbone) -> tuple[str, str | None]:
        """What the model began from, in a sentence, and its name on the hub, if it has one.

        Args:
            backbone: The model's.
        """
        run = self.run or {"pretrained": backbone.licence is not None}
        begun = str(self.about.get("weights_from") or self.run.get("init_from") or "")
        if match := OF_THE_HUB.fullmatch(begun):
            return f"Its weights began as those of {begun} on the hub, whose card tells their terms.", match[1]
        if begun or self.run.get("backbone_weights"):
            return "It began from a file of weights whose terms are not known here.", None
        if self.run.get("pretrained") is False:
            return "It began from random weights.", None
        if found := origin(backbone.name, run):
            licence = f"is {found['licence']}" if found["licence"] else "timm does not tell"
            return f"Its backbone began from {found['words']}, whose licence {licence}.", found["hub_id"]
        return "What it began from is not known here.", None


def read_record(place: Path) -> Record:
    """What the folder of a run has beside the model, or that of a saved model if it is newer than the weights.

    Of a head that was probed, in `models` of its run, what that was started with counts, too.

    Args:
        place: The folder.

    Raises:
        RunError: If a file is damaged.
    """
    if (place / "model").is_dir():
        pictures = [place / name for name in PICTURES if (place / name).is_file()]
        return Record(read_run_config(place), _results(place / "results.json"), pictures)
    models, results = place.resolve().parent, dict[str, Any]()
    is_probe = models.name == "models" and (models.parent / BACKBONE_FILE).is_file()
    for path in (place / "evaluation" / "results.json", place / "results.json"):  # of segheads evaluate, of a probe
        if not results and path.is_file() and path.stat().st_mtime >= (place / SAVED).stat().st_mtime:
            results = _results(path)
    return Record(read_run_config(models.parent) if is_probe else {}, results)


def _results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, "what segheads evaluate writes", RunError) if path.is_file() else {}
    return found
