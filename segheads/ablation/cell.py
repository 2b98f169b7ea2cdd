"""One training of a grid: what it is called, what is read from it, and what is kept."""

import dataclasses
import gc
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha1
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from segheads.ablation.config import GridConfig
from segheads.ablation.table import ABSENT, BROKE_DOWN, Measured, Row
from segheads.data import EvaluationSamples, open_dataset
from segheads.errors import DivergedError, FolderInUseError, RunError, ScoresError, options_become_parts
from segheads.evaluation.complexity import count_multiply_adds, count_parameters
from segheads.evaluation.evaluate import evaluate
from segheads.evaluation.variance import class_variance
from segheads.files import read_json, write_json
from segheads.inference.protocol import InferenceProtocol
from segheads.inference.windows import pair
from segheads.locks import only_process
from segheads.model import SegmentationModel
from segheads.training.config import MAY_DIFFER, field_defaults
from segheads.training.run import run_training, shown
from segheads.training.run_folder import CHECKPOINTS, RunFolder

MEASURED = "measured.json"

# A cell that is finished keeps its numbers, so what they depend on may not differ, though a resumed run's may.
CELL_MAY_DIFFER = MAY_DIFFER - {"pretrained", "backbone_weights", *InferenceProtocol.__dataclass_fields__}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One training and what is to be read from it.

    Args:
        config: The training's own configuration; `output` is its folder.
        readings: Rows that need it, one for each reading.
    """

    config: GridConfig
    readings: list[Row] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the training is kept."""
        return self.config.output

    @cached_property
    def run(self) -> RunFolder:
        """The training's folder, checked.

        Raises:
            OptionError: If it holds a training of another configuration.
        """
        values, defaults = self.config.as_json(), field_defaults(self.config)
        return RunFolder(self.folder, values, resume=True, may_differ=CELL_MAY_DIFFER, defaults=defaults)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to train or to read."""
        known = self.measured()
        return all(row.reading in known for row in self.readings)

    def measured(self) -> dict[str, Measured]:
        """What has been read, by `Row.reading`."""
        path = self.folder / MEASURED
        known: dict[str, Measured] = read_json(path, "what a cell measured", RunError) if path.is_file() else {}
        return known

    def complete(self, build_model: Callable[[Any, int], SegmentationModel]) -> None:
        """Train what has not been trained, and read what has not been read; to be called by every process.

        Args:
            build_model: Called as `build_model(config, num_classes)`.
        """
        known, base = self.measured(), Row("").reading
        if base not in known:
            known[base] = self._train(build_model)
            self._keep(known)
        if known[base] != BROKE_DOWN and PartialState().is_main_process:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # several times the model's size
        for row in self.readings:
            if known[base] == BROKE_DOWN:
                known[row.reading] = BROKE_DOWN
            if row.reading not in known:
                model = self._model()
                for name, value in row.settings.items():
                    setattr(model.head, name, value)
                known[row.reading] = self._read(model, row)
            self._keep(known)

    def _train(self, build_model: Callable[[Any, int], SegmentationModel]) -> Measured:
        try:
            results = run_training(self.config, build_model, is_last=False)
        except (DivergedError, ScoresError) as error:
            log.info("%s: %s", self.folder.name, error)
            return BROKE_DOWN
        finally:
            gc.collect()  # model and optimizer hang in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self._values(results, self._model())

    def _read(self, model: SegmentationModel, row: Row) -> Measured:
        try:
            return self._values(self._evaluate(model, row.evaluation), model)
        except ScoresError as error:
            log.info("%s, %s: %s", self.folder.name, row.name, error)
            return BROKE_DOWN

    def _model(self) -> SegmentationModel:
        return SegmentationModel.from_pretrained(self.folder / "model")

    def _values(self, results: Mapping[str, Tensor], model: SegmentationModel) -> Measured:
        """All scores in percent, and what the model costs."""
        scores = {key: x.item() for key, x in results.items() if x.ndim == 0 and x.is_floating_point()}
        size = pair("crop_size", self.config.crop_size)
        absent = int(results["IoU"].isnan().sum()) if "IoU" in results else 0
        return {
            **({ABSENT: float(absent)} if absent else {}),
            **{key: 100 * value if math.isfinite(value) else None for key, value in scores.items()},
            "parameters": count_parameters(model) / 1e6,
            "multiply_adds": count_multiply_adds(model, size) / 1e9,
        }

    def _evaluate(self, model: SegmentationModel, options: Mapping[str, Any]) -> dict[str, Tensor]:
        config = self.config
        accelerator = Accelerator(mixed_precision=config.machine.mixed_precision)
        validation_set = open_dataset(config.data, "val", seed=config.seed)
        mean, std = model.data_config["mean"], model.data_config["std"]
        samples = EvaluationSamples(validation_set, mean, std, config.protocol.scale)
        fields = InferenceProtocol.__dataclass_fields__
        with options_become_parts():
            views = dataclasses.replace(shown(config), **{name: x for name, x in options.items() if name in fields})
        others: dict[str, Any] = {"workers": config.machine.workers}
        others |= {name: x for name, x in options.items() if name not in fields}
        varies = others.pop("class_variance", False)
        results = evaluate(accelerator, model.to(accelerator.device), samples, views, **others)
        more = {"class_variance": class_variance(accelerator, model, samples, views)} if varies else {}
        return {**results, **more}

    def _keep(self, known: Mapping[str, Measured]) -> None:
        state = PartialState()
        if state.is_main_process:
            write_json(self.folder / MEASURED, known)
        state.wait_for_everyone()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Keep other sweeps on this machine out of a training's folder; the system lets go when a process ends.

    Args:
        folder: The folder; made if need be.

    Yields:
        Whether it was free, in every process of this sweep.
    """
    with ExitStack() as stack:
        free = [True]
        if PartialState().is_main_process:
            try:
                stack.enter_context(only_process(folder, "training"))
            except FolderInUseError:
                free = [False]
        yield bool(broadcast_object_list(free)[0])


def folder_name(training: Mapping[str, Any], seed: int = 0) -> str:
    """A name of what a training changes, for a folder.

    Args:
        training: Changed fields; `model_kwargs` and its `head_kwargs` are not named, what they hold is.
        seed: Added where it is not 0.

    Examples:
        >>> folder_name({"head": "mean_shift", "model_kwargs": {"head_kwargs": {"num_layers": 2}}}, seed=1)
        'mean_shift__num_layers-2__seed-1'
    """
    changes = dict(training)
    parts = [str(changes.pop("head"))] if "head" in changes else []
    parts += [f"{key}-{value}" for key, value in _flat(changes)]
    parts += [f"seed-{seed}"] if seed else []
    name = "__".join(re.sub(r"[^\w.+=-]+", "-", part).strip("-") for part in parts) or "default"
    return name if len(name) <= 120 else f"{name[:100]}__{sha1(name.encode()).hexdigest()[:12]}"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix if key in ("model_kwargs", "head_kwargs") else f"{prefix}{key}.")
        else:
            listed = isinstance(value, (tuple, list))
            yield f"{prefix}{key}", "-".join(map(str, value)) if listed else str(value)
