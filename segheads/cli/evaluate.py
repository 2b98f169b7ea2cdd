"""Evaluate a trained model as the papers do, and see where it is worst.

    accelerate launch -m segheads evaluate --model runs/segmenter_ade20k
    accelerate launch -m segheads evaluate --model RUN --slide --scales 0.5 0.75 1.0 1.25 1.5 1.75 --flip
    accelerate launch -m segheads evaluate --model OWNER/NAME --dataset ade20k --data-root data/ADEChallengeData2016

RUN is the folder of a recipe's run, and its config.json tells the data set, where that lies, how images are resized,
and the window. Any other model (a folder of `save_pretrained`, a name on the hub) needs `--dataset`. The first command
repeats the evaluation at the end of the run; options override.

Writes into `--output` (RUN/evaluation): results.json; results.md with aAcc, mAcc, mIoU, F1, mIoU by size of
segments, boundary IoU, calibration error, classes and the protocol; images.csv with the scores of every image;
worst.png, the images of lowest mIoU with their errors; confusion.csv and confusion.png; and reliability.png.
docs/evaluate.md says what each number means.

The result does not depend on the number of processes. What size, boundary and calibration cost beside the model:
docs/evaluate.md.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from segheads import SegmentationModel
from segheads.classes import check_names
from segheads.data import DATASETS, DataConfig, EvaluationSamples, SegmentationDataset, open_dataset
from segheads.data.config import PATHS, in_new_words
from segheads.data.dataset import read_sample
from segheads.data.images import to_rgb
from segheads.errors import DataError, OptionError, options_become_parts
from segheads.evaluation import evaluate, predict, worst_images, write_evaluation
from segheads.evaluation.evaluate import warn_of_squashing
from segheads.evaluation.plots import Row
from segheads.evaluation.report import score_line
from segheads.inference.protocol import InferenceProtocol, Size, SmallImages
from segheads.metrics import METRICS, find_metric
from segheads.ranges import SEED_LIMIT, Range, check_ranges
from segheads.run_config import read_run_config
from segheads.training.machine import Precision, launched_precision, share_cores

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where the model and the data are, and the protocol. None means what the run has, where the model is a run's."""

    model: str
    """The folder of a run, a folder that save_pretrained wrote, or a model's name on the Hugging Face hub."""
    output: Path | None = None
    """Where the results go; None means the folder evaluation in the model's."""

    # The data
    dataset: str | None = None
    """Any of segheads.data.DATASETS: a published data set, scenes drawn by the code, or a folder of your own."""
    data_root: Path | None = None
    """Where the data set lies."""
    split: str = "val"
    """The part of the data set, in the words of its class."""
    limit: Annotated[int | None, Range(1)] = None
    """Evaluate on the first so many images."""
    image_suffix: str | None = None
    """What follows the common name in the files of your own images."""
    label_suffix: str | None = None
    """What follows it in those of your own labels."""
    class_names: tuple[str, ...] | None = None
    """The classes of your own folder."""
    num_classes: Annotated[int | None, Range(1)] = None
    """How many classes your own folder has; or 59 for pascal_context without background."""
    ignore_index: Annotated[int | tuple[int, ...] | None, Range(-(2**31), 2**31 - 1)] = None
    """The values in your own label files that mean no class, one or several."""
    label_values: Annotated[tuple[int, ...] | None, Range(0, 2**31 - 1)] = None
    """The value of each class in your own label files."""
    label_map: Path | None = None
    """A JSON file of value to class in your own label files."""
    label_colours: Path | None = None
    """A JSON file of colour to class in your own label files."""
    reduce_zero_label: bool | None = None
    """In your own label files 0 means no class and 1 is the first class."""
    flip_pairs: tuple[str, ...] | None = None
    """Names of classes, two by two, that become each other in the mirror: "left arm" "right arm"."""
    in_chans: Annotated[int | None, Range(1)] = None
    """Channels of your own images; None means the model's."""
    bit_depth: Annotated[int | None, Range(8, 32)] = None
    """Bits that the values of your own images use, 32 for floats; None means the model's."""
    exif: Literal["apply", "ignore"] | None = None
    """Whether your own labels are drawn on images turned by their EXIF orientation, or on the pixels as stored."""
    background: Literal["class", "ignore"] | None = None
    """What pixels are that no annotation of a COCO JSON covers."""
    max_pixels: Annotated[int | None, Range(1)] = None
    """The most pixels of an image or a label file that are decoded; None means the run's, or 1,000,000,000."""
    scenes_size: Annotated[int | None, Range(1)] = None
    """Side of the drawn scenes, pixels; None means 128."""
    seed: Annotated[int | None, Range(0, SEED_LIMIT)] = None
    """Of the drawn scenes; None means 0."""

    # The protocol
    scale: Annotated[tuple[int, int] | None, Range(1)] = None
    """Longest and shortest side, pixels, into which images are resized; None leaves them. ADE20K's is 2048 512."""
    slide: bool = False
    """Show the model windows of the image, also if the run showed it whole images."""
    whole: bool = False
    """Show the model whole images, also if the run showed it windows."""
    window: Annotated[Size | None, Range(1)] = None
    """Side of the windows, pixels, or their height and width; None means the run's, or that of its training crops."""
    stride: Annotated[Size | None, Range(1)] = None
    """Pixels between windows; None means the run's, or that of the window."""
    scales: Annotated[tuple[float, ...], Range(0, above=True)] = (1.0,)
    """Factors of the image's size whose probabilities are averaged; the papers' are 0.5 0.75 1.0 1.25 1.5 1.75."""
    flip: bool = False
    """Average with the mirrored image, too."""
    small_images: SmallImages = "shrink_window"
    """Make the window smaller for an image below its size (MMSegmentation), or enlarge the image (Segmenter)."""
    threshold: Annotated[float | None, Range(0, 1, above=True, below=True)] = None
    """Of a model of one class: the probability above which a pixel is of it; None means the model's own."""

    # The scores
    metrics: tuple[str, ...] = tuple(METRICS)
    """What to measure; iou, from which the scores of single images come, is always among it."""

    # The machine and the pictures
    batch_size: Annotated[int, Range(1)] = 4
    """Windows in one call of the model."""
    mixed_precision: Precision | None = None
    """Precision of the forward pass; None means the launcher's, or fp32."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads of each process; None shares all cores out."""
    workers: Annotated[int, Range(0)] = 4
    """Processes that load images, for each process that evaluates."""
    pictures: Annotated[int, Range(0)] = 10
    """Rows of the sheet of the worst images; 0 draws none."""


GROUPS = {
    "data": (
        "What it is measured on.",
        (
            *("dataset", "data_root", "split", "limit", "image_suffix", "label_suffix", "class_names", "num_classes"),
            *("ignore_index", "label_values", "label_map", "label_colours", "reduce_zero_label", "flip_pairs"),
            *("in_chans", "bit_depth", "exif", "background", "max_pixels", "scenes_size", "seed"),
        ),
    ),
    "protocol": (
        "How the model is shown images.",
        ("scale", "slide", "whole", "window", "stride", "scales", "flip", "small_images", "threshold"),
    ),
    "results": ("What is measured and drawn.", ("metrics", "pictures")),
    "machine": ("Precision and speed.", ("batch_size", "mixed_precision", "threads", "workers")),
}


def main(config: Config) -> dict[str, Tensor]:
    """Evaluate a model, and write what was measured."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision or launched_precision())
    share_cores(accelerator, config.threads)
    where, run = find_model(config.model)
    config = complete(config, run)
    model = SegmentationModel.from_pretrained(where).to(accelerator.device)
    if config.threshold is None:
        config = dataclasses.replace(config, threshold=model.protocol.threshold)
    with options_become_parts():
        views_of(config).check_threshold(model.num_classes)
    warn_of_squashing(model, views_of(config))
    dataset = load_dataset(config, model)
    samples = EvaluationSamples(dataset, model.data_config["mean"], model.data_config["std"], config.scale)
    count, views = len(dataset) if config.limit is None else min(config.limit, len(dataset)), views_of(config)
    log.info(
        f"{config.model} on {count} images of {config.dataset} {config.split}: "
        + (f"windows of {config.window} every {config.stride}" if config.window else "whole images")
        + f", scales {', '.join(map(str, config.scales))}{', mirrored too' if config.flip else ''}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    options: dict[str, Any] = {"limit": config.limit, "workers": config.workers, "metrics": config.metrics}
    try:
        results = evaluate(accelerator, model, samples, views, batch_size=config.batch_size, per_image=True, **options)
    except DataError as error:
        raise OptionError(f"--dataset {config.dataset}: {error}") from error
    if accelerator.is_main_process:
        output, rows = output_folder(config), worst_rows(accelerator, config, model, samples, results)
        write_evaluation(
            output, results, protocol(config, accelerator, count, is_single=model.num_classes == 1), dataset, rows
        )
        log.info(score_line(results, dataset.class_names))
        log.info("tables and pictures are in %s", output)
    accelerator.wait_for_everyone()  # a process that leaves early can hang the others as they shut down
    accelerator.end_training()
    return results


def views_of(config: Config) -> InferenceProtocol:
    """How the model is shown images; the samples are resized into the scale as they are read."""
    names = (field.name for field in dataclasses.fields(InferenceProtocol) if field.name != "scale")
    return InferenceProtocol(**{name: getattr(config, name) for name in names})


def worst_rows(
    accelerator: Accelerator,
    config: Config,
    model: SegmentationModel,
    samples: EvaluationSamples,
    results: dict[str, Tensor],
) -> list[Row]:
    """The rows of the sheet of the worst images."""
    rows: list[Row] = []
    for index in worst_images(results, config.pictures):
        image, labels = read_sample(samples.dataset, index)
        picture = np.array(to_rgb(image))
        prediction = predict(
            accelerator, model, samples[index][0], labels.shape, views_of(config), batch_size=config.batch_size
        )
        rows.append((samples.dataset.name(index), picture, labels.numpy(), prediction.cpu().numpy()))
    return rows


def find_model(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes, and the configuration of the run, which is empty where there is none."""
    folder = Path(name)
    if (folder / "model").is_dir():
        return str(folder / "model"), read_run_config(folder)
    if (folder / "metrics.jsonl").is_file():
        raise OptionError(f"--model {name} is a run that has no folder model yet; its recipe's --resume ends it")
    return name, {}


def complete(config: Config, run: dict[str, Any]) -> Config:
    """Take what was not given from the run, and refuse options that are out of range or contradict each other."""
    check_ranges(config)
    dataset = config.dataset or run.get("dataset")
    known = ", ".join(DATASETS)
    if dataset is None:
        raise OptionError(f"--model {config.model} is no run that tells its data set; give --dataset, of {known}")
    if dataset not in DATASETS:
        raise OptionError(f"--dataset {dataset} is not known; choose one of {known}")
    with options_become_parts():
        for name in config.metrics:
            find_metric(name)
    if not config.scales:
        raise OptionError("--scales must be one number or more; got none")
    if config.whole and (config.slide or config.window or config.stride):
        raise OptionError("--whole shows no windows, and --slide, --window and --stride do; leave one out")
    run = {name: tuple(x) if isinstance(x, list) else x for name, x in run.items()}
    window = None if config.whole else config.window or run.get("window")
    if config.slide:
        window = window or run.get("crop_size")
    if window is None and (config.slide or config.stride):
        raise OptionError(f"--model {config.model} tells no size of windows; give --window PIXELS")
    stride = config.stride or (run.get("stride") if window == run.get("window") else None) or window
    told = in_new_words(run)
    taken = {name: told.get(name) for name in OF_THE_DATA if dataset == run.get("dataset")}
    given = {name: getattr(config, name) for name in (*OF_THE_DATA, "scale")}
    values = {**taken, "scale": run.get("scale"), **{name: x for name, x in given.items() if x is not None}}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    values |= {name: Path(values[name]) for name in PATHS if values.get(name) is not None}
    values["scenes_size"], values["seed"] = values.get("scenes_size") or 128, values.get("seed") or 0
    return dataclasses.replace(config, dataset=dataset, window=window, stride=stride, **values)


def load_dataset(config: Config, model: SegmentationModel) -> SegmentationDataset:
    """The data set, whose classes are those of the model: by name, or by number where either has no names."""
    form = model.image_form
    if not form.is_rgb and "in_chans" in DATASETS[str(config.dataset)].options:
        config = dataclasses.replace(
            config, in_chans=config.in_chans or form.channels, bit_depth=config.bit_depth or form.bit_depth
        )
    dataset = open_dataset(DataConfig.from_json(vars(config)), config.split, seed=config.seed or 0)
    theirs = dataset.image_form
    if (theirs.channels, theirs.full_scale) != (form.channels, form.full_scale):
        raise OptionError(
            f"--model {config.model} takes images of {form}, and those of --dataset {config.dataset} are said to be of "
            f"{theirs}; they must be the same"
        )
    if dataset.num_classes != model.num_labels:
        raise OptionError(
            f"--model {config.model} tells {model.num_labels} classes apart, and --dataset {config.dataset} "
            f"has {dataset.num_classes}; give the data set that it was trained on"
        )
    if model.classes is not None:
        with options_become_parts():
            check_names(model.classes, dataset.classes)
    if dataset.classes.flip_pairs or model.classes is None:
        model.classes = dataset.classes
    if config.flip and model.classes.sides:
        log.warning(
            "the mirrored image has the wrong side of %s; --flip-pairs names what becomes each other (LEFT RIGHT ...)",
            ", ".join(model.classes.sides[:4]),
        )
    return dataset


def output_folder(config: Config) -> Path:
    """Where the results go."""
    if config.output is not None:
        return config.output
    folder = Path(config.model)
    return folder / "evaluation" if folder.is_dir() else Path("evaluation") / config.model.replace("/", "--")


def protocol(config: Config, accelerator: Accelerator, count: int, *, is_single: bool) -> dict[str, Any]:
    """How it was measured, as the files say it."""
    return {
        "model": config.model,
        "dataset": config.dataset,
        "split": config.split,
        "images": count,
        **dataclasses.replace(views_of(config), scale=config.scale).in_words(is_single=is_single),
        "precision": accelerator.mixed_precision,
    }


# What is of a run's data, and no other data set's
OF_THE_DATA = {"seed", *(field.name for field in dataclasses.fields(DataConfig))} & set(Config.__dataclass_fields__)
OF_THE_DATA -= {"dataset"}
