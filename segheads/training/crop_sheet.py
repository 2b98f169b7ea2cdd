"""What a run learns from, as a picture: its first crops with their labels, just as the model is shown them."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segheads.data import PhotometricNormalize, TrainingSamples, collate_samples
from segheads.data.images import ImageForm, to_rgb
from segheads.data.rare_classes import Key
from segheads.drawing import SMALL, ClassColours, picture_or_warning, save_figure, sheet
from segheads.training.batches import training_batches
from segheads.training.setup import Run

CROP_SHEET = "augment.png"  # in the folder of a run
CROPS_SHOWN, COLUMNS, CELL = 16, 4, 1.9  # crops in a row; width of one, inches
log = logging.getLogger(__name__)


def show_crops(run: Run, samples: TrainingSamples, batches: Iterable[list[Key]], prepare: PhotometricNormalize) -> None:
    """Draw the first crops of a run into its folder, before the first step; to be called by every process.

    One process draws, from random numbers that are the crops' own: the run is the same without. A run that goes on has
    its picture already; one with `pictures` 0 gets none.

    Args:
        run: The run, once started.
        samples: What it trains on.
        batches: The keys of its samples, from the first iteration on.
        prepare: What makes a batch the model's input, on the run's device.
    """
    if not run.accelerator.is_main_process or not run.config.pictures or run.folder.latest():
        return
    with picture_or_warning(run.folder.path / CROP_SHEET):  # what is wrong with data the run says
        _draw(run, samples, batches, prepare)


def crops_words(run: Run) -> str:
    """What happens to crops beyond the published pipeline, a line for each thing, each after a line's end.

    Args:
        run: The run, once its labels were looked at.
    """
    config, form = run.config.augmentation, run.training_set.image_form
    asked = ", ".join(f"{name} {value}" for name, value in config.changed_values().items())
    plain = not form.has_colours and not any(config.jitter)
    return (
        (f"\nimages of {form}: crops are resized and mirrored, no colours are changed" if plain else "")
        + (f"\ncrops: {asked}" if asked else "")
        + (f"\nimages are drawn for {run.rare_classes.words(run.training_set.class_names)}" if run.rare_classes else "")
    )


def _draw(run: Run, samples: TrainingSamples, batches: Iterable[list[Key]], prepare: PhotometricNormalize) -> None:
    keys = list(itertools.islice(itertools.chain.from_iterable(batches), CROPS_SHOWN))
    device = prepare.scale.device
    batch = {name: x.to(device) for name, x in collate_samples([samples[key] for key in keys]).items()}
    ((images, labels),) = training_batches([batch], prepare)
    pictures = _as_stored(images, prepare, samples.dataset.image_form)
    labels = labels.cpu()
    height, width = labels.shape[1:]
    size = (CELL, CELL * height / width + 0.2)
    figure, axes = sheet(2 * len(keys), 2 * COLUMNS, size, margins=(1.6, 0), layout="compressed")
    classes = ClassColours(list(labels), samples.dataset.class_names, samples.dataset.palette)
    for number, key in enumerate(keys):
        left, right = axes[2 * number : 2 * number + 2]
        left.imshow(to_rgb(pictures[number]), interpolation="nearest")
        left.set_title(samples.dataset.name(key[1]), fontsize=SMALL)
        right.imshow(classes.of(labels[number]), interpolation="nearest")
        if len(key) > 2:
            right.set_title(f"for {samples.dataset.class_names[key[2]]}", fontsize=SMALL)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="grey", linewidth=0.5)  # where labels are white, which is of no class
    classes.legend(figure)
    save_figure(figure, run.folder.path / CROP_SHEET)


def _as_stored(images: Tensor, prepare: PhotometricNormalize, form: ImageForm) -> list[Any]:
    """Normalised images as arrays `(h, w, C)` in the stored values' scale, uint8 where they were of 8 bit."""
    values = ((images - prepare.shift) / prepare.scale / prepare.to_grey_levels).permute(0, 2, 3, 1).cpu()
    if form.bit_depth in (None, 8):
        values = values.round().clamp(0, 255).to(torch.uint8)
    return list(np.ascontiguousarray(values.numpy()))
