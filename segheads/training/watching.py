"""What a run shows at every evaluation, in its folder and its trackers: pictures, and the scores of single classes."""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segheads.data import EvaluationSamples
from segheads.data.dataset import read_sample
from segheads.data.images import to_rgb
from segheads.drawing import picture_or_warning
from segheads.evaluation.evaluate import predict
from segheads.evaluation.plots import Row, plot_predictions
from segheads.evaluation.report import score_record
from segheads.evaluation.tables import listed
from segheads.files import whole_file
from segheads.inference.protocol import InferenceProtocol
from segheads.model import SegmentationModel

CLASS_IOU, PICTURE = "class_iou.csv", "predictions.png"  # in the folder of a run
log = logging.getLogger(__name__)


def validation_record(results: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Any]:
    """What the log keeps of an evaluation: `score_record`, and the IoU of each class, None where it does not occur.

    Args:
        results: What `evaluate` gave.
        class_names: The K names.
    """
    return {**score_record(results, class_names), "IoU": listed(results["IoU"])}


def picked_samples(samples: EvaluationSamples, count: int) -> list[int]:
    """The samples that pictures show: so many at equal distances.

    Args:
        samples: Of the whole validation set.
        count: How many, if there are so many.
    """
    places = np.linspace(0, len(samples) - 1, min(count, len(samples)))
    return [int(place) for place in places]


def predicted_row(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    index: int,
    protocol: InferenceProtocol,
) -> Row:
    """Name, image, truth and prediction of a sample, as `plot_predictions` takes them.

    Args:
        accelerator: Tells device and precision.
        model: Not prepared or unwrapped.
        samples: Of the validation set.
        index: Of the sample.
        protocol: How the model is shown it.
    """
    dataset = samples.dataset
    image, labels = read_sample(dataset, index)
    prediction = predict(accelerator, model, samples[index][0], labels.shape, protocol)
    return dataset.name(index), np.array(to_rgb(image)), labels.numpy(), prediction.cpu().numpy()


def draw_predictions(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    protocol: InferenceProtocol,
    *,
    count: int,
    folder: Path,
    iteration: int,
) -> list[Row]:
    """Write predictions.png and hand it to the trackers; to be called by one process.

    Args:
        accelerator: Has the trackers.
        model: Not prepared or unwrapped.
        samples: Of the whole validation set.
        protocol: How the model is shown an image.
        count: Rows of the sheet; 0 draws none.
        folder: Of the run.
        iteration: Number of updates made.

    Returns:
        The rows.
    """
    rows: list[Row] = []
    with picture_or_warning(folder / PICTURE):
        rows += [predicted_row(accelerator, model, samples, i, protocol) for i in picked_samples(samples, count)]
        if rows:
            plot_predictions(rows, samples.dataset, folder / PICTURE)
            with Image.open(folder / PICTURE) as picture:
                track_picture(accelerator, "predictions", np.array(picture.convert("RGB")), iteration)
    return rows


def track_picture(accelerator: Accelerator, name: str, picture: NDArray[np.uint8], iteration: int) -> None:
    """Hand a picture to every tracker that takes some; to be called by the main process.

    A tracker that fails costs a warning, not the run.

    Args:
        accelerator: Has the trackers.
        name: Of the picture.
        picture: `(H, W, 3)`.
        iteration: Number of updates made.
    """
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        # Accelerate's trackers differ: a batch in TensorBoard's order of axes, a list, or one picture
        is_tensorboard, takes_one = tracker.name == "tensorboard", tracker.name in ("aim", "clearml")
        value: Any = picture[None] if is_tensorboard else picture if takes_one else [picture]
        options = {"dataformats": "NHWC"} if is_tensorboard else {}
        try:
            tracker.log_images({name: value}, step=iteration, **options)
        except Exception as error:  # of any service
            log.warning("tracker %s took no picture: %s", tracker.name, error)


def write_class_iou(folder: Path, records: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> None:
    """Write the IoU of each class at each evaluation, a line for each, empty where a class does not occur.

    Args:
        folder: Of the run; without an evaluation nothing is written.
        records: The lines of `metrics.jsonl`.
        class_names: The K names.
    """
    found = {record["iteration"]: record["IoU"] for record in records if record.get("IoU")}  # the last, if made again
    if not found:
        return
    with whole_file(folder / CLASS_IOU) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", *class_names])
        for iteration, iou in found.items():
            writer.writerow([iteration, *("" if value is None else value for value in iou)])


def class_record(values: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, float]:
    """The IoU of each class that occurs, as trackers take it.

    Args:
        values: A record with `IoU`, or another.
        class_names: The K names.
    """
    pairs = zip(class_names, values.get("IoU") or (), strict=False)
    return {f"IoU/{name}": value for name, value in pairs if value is not None}
