"""A look at the labels before a run begins: errors stop it, suspicions are said, weights of classes are counted."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from segheads.data import SegmentationDataset
from segheads.data.findings import Finding, find_problems
from segheads.data.scan import DataScan, SplitScan, has_files, scan, scan_splits
from segheads.data.scan_cache import default_cache
from segheads.data.weights import RULES, class_weights
from segheads.errors import DataError, RunError, SegheadsError
from segheads.files import read_json, write_json
from segheads.training.config import TrainingConfig

WEIGHTS = "class_weights.json"  # in the folder of a run
log = logging.getLogger(__name__)


def look_at_labels(
    accelerator: Accelerator,
    config: TrainingConfig,
    training_set: SegmentationDataset,
    validation_set: SegmentationDataset,
) -> tuple[float, ...] | None:
    """Scan both splits in the main process, where `scan` is set and there are files; count weights where asked for.

    Args:
        accelerator: What connects the processes; all of them call this.
        config: Numbers of the run.
        training_set: What is trained on.
        validation_set: What is measured with.

    Returns:
        One weight per class, or None where `class_weights` asks for none. A run that goes on keeps its own.

    Raises:
        DataError: Labels are not what they should be: one line for each thing that is wrong.
        OptionError: There are no such weights.
        RunError: A process that reads labels died.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_look(config, training_set, validation_set)]
        except SegheadsError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], SegheadsError):
        raise found[0]
    weights: tuple[float, ...] | None = found[0]
    return weights


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Log the warnings among findings, and raise the errors as one.

    Args:
        findings: What `find_problems` gave.

    Raises:
        DataError: There are errors; each has a line.
    """
    for finding in findings:
        if finding.severity == "warning":
            log.warning("warning: %s", finding.message)
    errors = [finding.message for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("\n".join(errors))


def keep_weights(folder: Path, names: Sequence[str], weights: Sequence[float]) -> None:
    """Write the weights of a run, which `--class-weights` reads again.

    Args:
        folder: The run's.
        names: Of the classes.
        weights: One for each.
    """
    write_json(folder / WEIGHTS, dict(zip(names, weights, strict=True)))


def _look(
    config: TrainingConfig, training_set: SegmentationDataset, validation_set: SegmentationDataset
) -> tuple[float, ...] | None:
    options: dict[str, Any] = {"workers": None if config.machine.workers else 0, "cache": default_cache()}
    rule, kept = config.model.class_weights, config.output / WEIGHTS
    weights = None if isinstance(rule, str) else rule
    if config.resume and kept.is_file() and isinstance(rule, str):
        known: dict[str, float] = read_json(kept, "the class weights of the run", RunError)
        weights = tuple(known.values())
    elif isinstance(rule, str) and rule not in RULES:  # a file, which is read before all labels are
        weights = class_weights(rule, SplitScan(class_names=training_set.class_names))
    looked: DataScan | None = None
    if config.scan and has_files(training_set):
        looked = scan_splits({"train": training_set, "val": validation_set}, **options)
        refuse_errors(find_problems(looked))
    if weights is not None or not isinstance(rule, str):
        return weights
    return class_weights(rule, looked.splits["train"] if looked else scan(training_set, **options))
