"""What a run that goes on must find as it was, beside its options: files' contents, arithmetic, processes."""

import logging
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from segheads.data import SegmentationDataset
from segheads.data.label_map import LabelMap
from segheads.errors import OptionError, RunError
from segheads.files import read_json
from segheads.training.config import CONTENTS, ENVIRONMENT
from segheads.training.run_folder import CONFIG

VERSIONS = ("torch", "timm", "segheads")
ARITHMETIC = {
    "tf32_products": "tf32",
    "tf32_convolutions": "tf32",
    "cudnn_benchmark": "cudnn_benchmark",
    "cudnn_deterministic": "torch.backends.cudnn.deterministic",
}
log = logging.getLogger(__name__)


def contents_of(training_set: SegmentationDataset, label_map: LabelMap | None) -> dict[str, Any]:
    """What files say that options only name: JSON values for config.json.

    Args:
        training_set: Of the run.
        label_map: Which value, or colour, of its label files is which class.
    """
    names = [training_set.name(index) for index in range(len(training_set))]
    return {
        "class_names": list(training_set.class_names),
        "label_map": None if label_map is None else label_map.as_json(),
        "training_images": [len(names), sha256("\n".join(names).encode()).hexdigest()[:16]],
    }


def check_contents(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on with other classes, labels or images than the run began with.

    Args:
        folder: The run's; one of an older version says nothing.
        now: What `contents_of` gives.

    Raises:
        OptionError: Says what differs, and both values.
    """
    before = stored(folder).get(CONTENTS, {})
    differing = [_difference(key, value, now[key]) for key, value in before.items() if now.get(key, value) != value]
    if differing:
        raise OptionError(f"{folder / CONFIG} is of a run on other data: {'; '.join(differing)}")


def check_environment(folder: Path, now: Mapping[str, Any]) -> None:
    """Refuse to go on with another arithmetic of a GPU; say in a line which versions are others.

    Args:
        folder: The run's; one of an older version says nothing.
        now: What `environment` gives.

    Raises:
        OptionError: TF32 or cuDNN's choices differ; says which, and both values.
    """
    before = stored(folder).get(ENVIRONMENT, {})
    known = {key: (before.get(key), now.get(key)) for key in (*ARITHMETIC, *VERSIONS)}
    changed = {key: both for key, both in known.items() if None not in both and both[0] != both[1]}
    wrong = [f"{ARITHMETIC[key]}: {key} was {x} and is {y}" for key, (x, y) in changed.items() if key in ARITHMETIC]
    if wrong:
        raise OptionError(f"{folder / CONFIG} is of a run with another arithmetic: {'; '.join(wrong)}")
    if changed:
        said = ", ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
        log.warning("%s: the run goes on, and its numbers may differ from those of one made at once", said)


def check_processes(folder: Path, processes: int, models: Iterable[nn.Module], *, is_synced: bool = False) -> None:
    """Refuse another number of processes where it changes more than the order of sums.

    Args:
        folder: The run's; one of an older version says nothing.
        processes: Number of processes.
        models: What is trained, in the modes in which it is.
        is_synced: Whether batch norms will see the images of all processes.

    Raises:
        OptionError: Batch norms see the images of their process, or each process drops what it draws.
    """
    before = stored(folder).get(ENVIRONMENT, {}).get("processes")
    if before in (None, processes):
        return
    parts = [module for model in models for module in model.modules() if module.training]
    why = []
    if not is_synced and any(isinstance(part, _BatchNorm) for part in parts):
        why.append("batch norms see the images of their process alone")
    if any((isinstance(x, _DropoutNd) and x.p > 0) or (isinstance(x, DropPath) and x.drop_prob > 0) for x in parts):
        why.append("each process drops what it draws")
    if why:
        raise OptionError(
            f"{folder / CONFIG} is of a run in another number of processes: it was {before} and is {processes}, and "
            f"{' and '.join(why)}; launch {before}"
        )


def stored(folder: Path) -> dict[str, Any]:
    """The run's config.json; empty where there is none.

    Args:
        folder: The run's.

    Raises:
        RunError: It is damaged.
    """
    path = folder / CONFIG
    found: dict[str, Any] = read_json(path, "the configuration of a run", RunError) if path.is_file() else {}
    return found


def _difference(key: str, before: Any, now: Any) -> str:
    """One option in words: what was and what is, of lists and maps the first that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        value = next(value for value in [*before, *now] if before.get(value, "") != now.get(value, ""))
        return f"{key}: {value} was {before.get(value, 'not in it')!r} and is {now.get(value, 'not in it')!r}"
    if key == "training_images":
        same = before[0] == now[0]
        return f"{key}: {before[0]} have other names" if same else f"{key} were {before[0]} and are {now[0]}"
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        index = next(index for index, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
        return f"{key}: class {index} was {before[index]!r} and is {now[index]!r}"
    return f"{key} was {before!r} and is {now!r}"
