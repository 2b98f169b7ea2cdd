"""What every run is set up with: processes, folder, data sets, trackers."""

import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import nn

from segheads.data import RareClasses, SegmentationDataset, SubsetDataset, open_dataset
from segheads.data.dataset import check_same_classes
from segheads.data.images import FLOATS
from segheads.data.label_map import LabelMap
from segheads.errors import OptionError, options_become_parts
from segheads.locks import only_process
from segheads.losses import is_binary
from segheads.model import SegmentationModel
from segheads.ranges import check_ranges
from segheads.stopping import Stop, stopping
from segheads.training.config import CONTENTS, ENVIRONMENT, MAY_DIFFER, OLDER, TrainingConfig, changed, field_defaults
from segheads.training.failures import said_in_a_line
from segheads.training.labels import keep_weights, look_at_labels
from segheads.training.machine import command_line, environment, from_main, start_accelerator
from segheads.training.resuming import check_contents, check_environment, check_processes, contents_of, stored
from segheads.training.run_folder import RunFolder
from segheads.training.watching import class_record

C = TypeVar("C", bound=TrainingConfig)
log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that `open_run` set up.

    Attributes:
        config: Its numbers.
        accelerator: What connects its processes and devices.
        folder: Where it keeps what must not be lost.
        training_set: What it trains on.
        validation_set: What it is evaluated on.
        class_weights: Of its loss, as numbers, once labels were looked at; None weighs all classes the same.
        rare_classes: Draws images by their classes, once labels were looked at; None takes each once an epoch.
        resumes_at: The iteration that it goes on from; 0 for a new run.
        stop: Hears of signals.
        has_begun: Whether `start` is through.
        origin: Where its first weights are from, with the commit of the hub; None without `init_from`.
    """

    config: TrainingConfig
    accelerator: Accelerator
    folder: RunFolder
    training_set: SegmentationDataset
    validation_set: SegmentationDataset
    class_weights: tuple[float, ...] | None = None
    rare_classes: RareClasses | None = None
    origin: str | None = None
    _has_looked: bool = False
    resumes_at: int = 0
    stop: Stop = field(default_factory=Stop)
    has_begun: bool = False

    @property
    def num_classes(self) -> int:
        """Of the model: of the data set, or 1 where the loss is of one class and its background."""
        return 1 if is_binary(self.config.model.loss) else self.training_set.num_classes

    def model_config(self, config: C) -> C:
        """A configuration with `class_weights` in numbers, as a model is built from it.

        Args:
            config: The run's.

        Raises:
            SegheadsError: As `look` does, where the weights have to be counted.
        """
        if isinstance(self.config.model.class_weights, str):
            self.look()
        return config if self.class_weights is None else changed(config, class_weights=self.class_weights)

    def look(self) -> None:
        """Look at the labels, unless that was done; to be called by every process.

        Raises:
            SegheadsError: As `look_at_labels` does.
        """
        if not self._has_looked:
            sets = self.training_set, self.validation_set
            self.class_weights, self.rare_classes = look_at_labels(self.accelerator, self.config, *sets)
            self._has_looked = True

    def environment(self) -> dict[str, Any]:
        """Device, versions and processes, as config.json keeps them."""
        return environment(self.accelerator.device, self.accelerator.num_processes)

    def contents(self) -> dict[str, Any]:
        """What the data set's files say, as config.json keeps it."""
        return contents_of(self.training_set, label_map_of(self.training_set))

    def check_resumed(self) -> None:
        """Refuse to go on with other data, or another arithmetic, than the run began with; see `check_processes`.

        Raises:
            OptionError: Says what differs, and both values.
        """
        check_contents(self.folder.path, self.contents())
        check_environment(self.folder.path, self.environment())

    def check_processes(self, *models: nn.Module) -> None:
        """Refuse another number of processes than the run began with, where it changes more than the order of sums.

        Args:
            *models: What is trained.

        Raises:
            OptionError: Says both numbers and why.
        """
        is_synced = self.config.machine.sync_batchnorm and self.accelerator.device.type == "cuda"
        check_processes(self.folder.path, self.accelerator.num_processes, models, is_synced=is_synced)

    def images_per_step(self) -> int:
        """How many images each process takes at once."""
        return self.config.loop.batch_size // self.config.loop.gradient_accumulation // self.accelerator.num_processes

    def batches_line(self) -> str:
        """How an update's batch is shared out, in words."""
        loop, processes = self.config.loop, self.accelerator.num_processes
        shared = f"{processes} process(es) x {loop.gradient_accumulation} part(s) x {self.images_per_step()} image(s)"
        return f"batches of {loop.batch_size}: {shared}"

    def start(self) -> int:
        """Look at the labels; write the configuration and start the trackers, once all that may be missing is there.

        Returns:
            The iteration to go on from; 0 for a new run.

        Raises:
            SegheadsError: As `look` does.
        """
        self.look()  # as late as can be: options that do not fit are said before
        self.accelerator.wait_for_everyone()  # all have looked before the first writes
        values = self.config.as_json()
        if self.accelerator.is_main_process:
            before = stored(self.folder.path).get(ENVIRONMENT, {})
            begun = {
                "weights_from": self.origin or before.get("weights_from"),
                "command": before.get("command") or command_line(sys.argv),
            }
            begun = {name: value for name, value in begun.items() if value is not None}
            about = {ENVIRONMENT: {**self.environment(), **begun}, CONTENTS: self.contents()}
            self.folder.start({**values, **about})
            if self.class_weights is not None:
                keep_weights(self.folder.path, self.training_set.class_names, self.class_weights)
        self.accelerator.wait_for_everyone()
        start = self.resumes_at
        if self.config.resume:
            log.info("resuming %s at iteration %d of %d", self.folder.path, start, self.config.loop.iterations)
        self.accelerator.init_trackers(
            "tensorboard" if self.config.tracker == "tensorboard" else "segheads",  # a folder of the run, or a project
            config={key: v if isinstance(v, (int, float, str)) else str(v) for key, v in values.items()},
            init_kwargs={"tensorboard": {"purge_step": start}},
        )
        self.has_begun = True
        return start

    def check_labels(self, ignore_index: int) -> None:
        """Refuse a model that ignores another label than the data sets do: it would learn "no class" as a class.

        Args:
            ignore_index: The model's.

        Raises:
            OptionError: If they differ.
        """
        for dataset in (self.training_set, self.validation_set):
            if dataset.ignore_index != ignore_index:
                raise OptionError(
                    f"the model ignores the label {ignore_index}, but {type(dataset).__name__} of "
                    f"{dataset.num_classes} classes means {dataset.ignore_index} by no class; build the model with "
                    f"ignore_index={dataset.ignore_index}"
                )

    def tell_input(self, model: SegmentationModel) -> None:
        """Tell the model what the data set is: its classes, and what its images and label files hold.

        Args:
            model: Of the run.

        Raises:
            OptionError: The model takes other channels, or images of other channels or of floats have no mean and
                standard deviation.
        """
        data, form = self.config.data, self.training_set.image_form
        if model.backbone.in_chans != form.channels:
            raise OptionError(
                f"the model takes {model.backbone.in_chans} channels, and images have {form.channels}; build the "
                f"backbone with in_chans={form.channels}, as TrainingConfig.model_options says"
            )
        if data.band_mean is None and (form.channels not in (1, 3) or form.bit_depth == FLOATS):
            raise OptionError(
                f"images of {form} need band_mean and band_std, which the backbone's do not fit; segheads check-data "
                "measures them"
            )
        with options_become_parts():
            model.set_input(bit_depth=form.bit_depth, mean=data.band_mean, std=data.band_std)
        model.classes = self.validation_set.classes
        model.label_map = label_map_of(self.training_set)

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Keep a record in the folder and in the trackers; to be called by every process.

        Args:
            iteration: Number of updates made.
            values: JSON values by name, dicts among them.
        """
        if self.accelerator.is_main_process:
            self.folder.log({"iteration": iteration, **values})
        own = class_record(values, self.validation_set.class_names) if values.get("IoU") else {}
        self.accelerator.log({**flat_record(values), **own}, step=iteration)


@contextmanager
def open_run(
    config: TrainingConfig, *, may_differ: Collection[str] = MAY_DIFFER, is_last: bool = True
) -> Iterator[Run]:
    """Set up processes, check the folder, open the data sets; at the end, close the trackers.

    Nothing but a lock is written, and no label looked at, before `Run.start`; but weights of classes that have to be
    counted are before the model is built.

    Args:
        config: Every number of the run.
        may_differ: Names of fields that a resumed run may change.
        is_last: Whether the processes part afterwards; False where another run follows.

    Raises:
        FolderInUseError: Another process has the folder.
        RunExistsError: The folder holds a run that was not to be resumed.
        RunError: It holds checkpoints, none of which is whole.
        OptionError: Options are out of range, do not fit, or are not those of the run that is resumed.
        SegheadsError: As `open_dataset` does.
        RunEndedError: What was done within ended early, by a signal, a file or a process; see `said_in_a_line`.
    """
    check_ranges(config)
    config.augmentation.check(config.data.image_form)
    accelerator = start_accelerator(config.machine, tracker=config.tracker, folder=config.output)
    _check_batch_size(config, accelerator.num_processes)
    with ExitStack() as stack:
        from_main(accelerator, lambda: stack.enter_context(only_process(config.output)))
        folder = RunFolder(
            config.output,
            config.as_json(),
            resume=config.resume,
            may_differ=may_differ,
            defaults={**field_defaults(config), **OLDER},
            keep=config.loop.keep_checkpoints,
        )
        start = from_main(accelerator, folder.find_start) if config.resume else 0
        stop = stack.enter_context(stopping(folder.left))
        sets = open_data(accelerator, config)
        run = Run(config, accelerator, folder, *sets, resumes_at=start, stop=stop)
        run.check_resumed()
        with said_in_a_line(folder, accelerator.num_processes, lambda: run.has_begun):
            yield run
        accelerator.wait_for_everyone()  # a process that leaves early can hang the others as they shut down
    if is_last:
        accelerator.end_training()
    else:  # without taking down what connects the processes
        for tracker in accelerator.trackers:
            tracker.finish()


def open_data(accelerator: Accelerator, config: TrainingConfig) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation set; what is to be fetched is fetched by one process.

    Args:
        accelerator: Tells the process.
        config: Data set and seed.

    Raises:
        SegheadsError: As `open_dataset` does.
    """
    check_one_class(config)
    with accelerator.main_process_first() if config.data.download else nullcontext():
        training_set, validation_set = (open_dataset(config.data, part, seed=config.seed) for part in ("train", "val"))
    check_same_classes(training_set, validation_set)
    if is_binary(config.model.loss) and training_set.num_classes != 2:
        raise OptionError(
            f"loss {config.model.loss!r} is of one class and its background, labels 1 and 0, and data set "
            f"{config.data.dataset} has {training_set.num_classes} classes; give loss 'ce'"
        )
    if config.training_flip and training_set.classes.sides:
        log.warning(
            "mirrored crops teach the wrong side of %s; --flip-pairs names what becomes each other, and "
            "--no-training-flip mirrors nothing",
            ", ".join(training_set.classes.sides[:4]),
        )
    return training_set, validation_set


def label_map_of(dataset: SegmentationDataset) -> LabelMap | None:
    """The map of a data set, or of the one that it is a part of; None where value i is class i.

    Args:
        dataset: Any data set.
    """
    while isinstance(dataset, SubsetDataset):
        dataset = dataset.dataset
    return getattr(dataset, "label_map", None)


def check_one_class(config: TrainingConfig) -> None:
    """Refuse a data set of one class where the loss is of several.

    Args:
        config: Data set and loss.

    Raises:
        OptionError: There is one class alone and a softmax, or no such loss.
    """
    names, count = config.data.class_names or (), config.data.num_classes
    with options_become_parts():
        if is_binary(config.model.loss) or (len(names) != 1 and count != 1) or config.data.dataset != "folder":
            return
    given, two = (f"class_names {names[0]}", f"background {names[0]}") if names else ("num_classes 1", "")
    raise OptionError(
        f"{given} is one class, whose softmax is 1 at every pixel; give --loss bce, the sigmoid of one class against "
        f"its background (labels 1 and 0), or two classes: {f'--class-names {two}' if two else '--num-classes 2'}"
    )


def flat_record(values: Mapping[str, Any], *path: str) -> dict[str, float]:
    """A record for trackers, without dicts and lists; the innermost name comes second: heads stand side by side.

    Args:
        values: JSON values by name.
        *path: Names of the dicts around them.

    Examples:
        >>> flat_record({"scores": {"linear": {"mIoU": 0.5}}, "seconds": 2.0})
        {'scores/mIoU/linear': 0.5, 'seconds': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat_record(value, *path, name)
        elif not isinstance(value, (list, tuple)):
            first, *others = (*path, name)
            found["/".join((first, *reversed(others)))] = value
    return found


def _check_batch_size(config: TrainingConfig, processes: int) -> None:
    size, accumulation = config.loop.batch_size, config.loop.gradient_accumulation
    parts = accumulation * processes
    if size % parts:
        raise OptionError(
            f"batch_size {size} is over all {processes} processes and {accumulation} accumulated batches, and must be "
            f"a multiple of {parts}"
        )
    if config.augmentation.mixes and size // parts % 2:
        raise OptionError(
            f"cutmix and classmix take neighbours two by two: batch_size {size} over all {processes} processes and "
            f"{accumulation} accumulated batches must be a multiple of {2 * parts}"
        )
