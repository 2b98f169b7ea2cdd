"""A look at the labels before a run begins: errors stop it, suspicions are said, weights of classes are counted."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from segheads.data import SegmentationDataset
from segheads.data.findings import Finding, find_problems
from segheads.data.rare_classes import RareClasses
from segheads.data.scan import DataScan, SplitScan, has_files, scan, scan_splits
from segheads.data.scan_cache import default_cache
from segheads.data.weights import RULES, class_weights
from segheads.errors import DataError, OptionError, RunError
from segheads.evaluation.tables import SHOWN, named
from segheads.files import read_json, write_json
from segheads.training.config import TrainingConfig
from segheads.training.machine import from_main

WEIGHTS = "class_weights.json"  # in the folder of a run
log = logging.getLogger(__name__)


class Looked(NamedTuple):
    """What a run takes from its labels."""

    class_weights: tuple[float, ...] | None = None
    rare_classes: RareClasses | None = None


def look_at_labels(
    accelerator: Accelerator,
    config: TrainingConfig,
    training_set: SegmentationDataset,
    validation_set: SegmentationDataset,
) -> Looked:
    """Scan both splits in the main process, where `scan` is set and there are files; count classes where asked for.

    Args:
        accelerator: What connects the processes; all of them call this.
        config: Numbers of the run.
        training_set: What is trained on.
        validation_set: What is measured with.

    Returns:
        One weight per class, or None where `class_weights` asks for none (a run that goes on keeps its own), and how
        images are drawn by their classes, or None.

    Raises:
        DataError: Labels are not what they should be: one line for each thing that is wrong.
        OptionError: There are no such weights, or no image shows enough of a class.
        RunError: A process that reads labels died.
    """
    looked: Looked = from_main(accelerator, lambda: _look(config, training_set, validation_set))
    return looked


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


def occurring(looked: DataScan) -> str:
    """How many of the classes occur in each split, and which is the rarest, in one line.

    Args:
        looked: At the labels.

    Examples:
        >>> split = SplitScan(class_names=("a", "b", "c"), samples=2, pixels=(300, 100, 0), images=(2, 1, 0))
        >>> occurring(DataScan(splits={"train": split}))
        'labels: 2 of 3 classes in train (not c; the rarest is b, 25 % of pixels)'
    """
    words = []
    for name, split in looked.splits.items():
        found = [(count, class_name) for count, class_name in zip(split.pixels, split.class_names, strict=True)]
        absent = [class_name for count, class_name in found if not count]
        there = [pair for pair in found if pair[0]]
        aside = [f"not {named(absent, SHOWN)}"] if absent else []
        if there:
            least, rarest = min(there)
            aside.append(f"the rarest is {rarest}, {100 * least / sum(split.pixels):.2g} % of pixels")
        words.append(f"{len(there)} of {len(found)} classes in {name} ({'; '.join(aside)})")
    return f"labels: {', '.join(words)}"


def keep_weights(folder: Path, names: Sequence[str], weights: Sequence[float]) -> None:
    """Write the weights of a run, which `--class-weights` reads again.

    Args:
        folder: The run's.
        names: Of the classes.
        weights: One for each.
    """
    write_json(folder / WEIGHTS, dict(zip(names, weights, strict=True)))


def _look(config: TrainingConfig, training_set: SegmentationDataset, validation_set: SegmentationDataset) -> Looked:
    options: dict[str, Any] = {"workers": None if config.machine.workers else 0, "cache": default_cache()}
    rule, kept = config.model.class_weights, config.output / WEIGHTS
    weights = None if isinstance(rule, str) else rule
    if config.resume and kept.is_file() and isinstance(rule, str):
        known: dict[str, float] = read_json(kept, "the class weights of the run", RunError)
        weights = tuple(known.values())
        if rule not in RULES and Path(rule).is_file():
            _refuse_other_weights(known, class_weights(rule, SplitScan(class_names=training_set.class_names)), rule)
    elif isinstance(rule, str) and rule not in RULES:  # a file, which is read before all labels are
        weights = class_weights(rule, SplitScan(class_names=training_set.class_names))
    looked: DataScan | None = None
    if config.scan and has_files(training_set):
        looked = scan_splits({"train": training_set, "val": validation_set}, **options)
        refuse_errors(find_problems(looked))
        log.info(occurring(looked))
    weighs, draws = weights is None and isinstance(rule, str), config.augmentation.rare_class_temperature is not None
    if not weighs and not draws:
        return Looked(weights)
    found = looked.splits["train"] if looked else scan(training_set, **options)
    if weighs:
        weights = class_weights(str(rule), found)
    return Looked(weights, RareClasses.of(found, config.augmentation) if draws else None)


def _refuse_other_weights(known: Mapping[str, float], given: Sequence[float], path: str) -> None:
    """Refuse a file that says something else than when the run began."""
    for (name, before), now in zip(known.items(), given, strict=True):
        if before != now:
            raise OptionError(f"class_weights {path} was changed since the run began: {name} was {before} and is {now}")
