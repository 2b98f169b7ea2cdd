"""Batches of a training: crops of a data set, distorted and normalised beside the step."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from segheads.data import (
    Augment,
    IterationSampler,
    PhotometricDistortion,
    PhotometricNormalize,
    RandomScaleCrop,
    RareClasses,
    SegmentationDataset,
    TrainingSamples,
    collate_samples,
    mix_neighbours,
)
from segheads.errors import OptionError
from segheads.evaluation.tables import SHOWN, named
from segheads.model import SegmentationModel
from segheads.stopping import leave_signals_to_parent
from segheads.training.config import TrainingConfig

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) and labels (B, H, W)


def training_samples(
    config: TrainingConfig, dataset: SegmentationDataset, mean: Sequence[float] | None = None
) -> TrainingSamples:
    """Crops of a data set, resized about the protocol's scale and augmented as the options say.

    Args:
        config: Size, scale and augmentations of the crops, and the seed.
        dataset: The training set.
        mean: The model's, of each channel, which covers what augmentations uncover or erase.

    Raises:
        OptionError: If the protocol has no scale, or colours are to be changed where there are none.
    """
    if config.protocol.scale is None:
        raise OptionError("training resizes images about a scale, got scale None; give the longer and the shorter side")
    crop = RandomScaleCrop(
        config.crop_size,
        scale=config.protocol.scale,
        flip_probability=0.5 if config.training_flip else 0.0,
        flip_pairs=dataset.classes.flip_pairs,
        ignore_index=dataset.ignore_index,
    )
    asked, ignored = config.augmentation, dataset.ignore_index
    return TrainingSamples(
        dataset,
        crop,
        seed=config.seed,
        distortion=PhotometricDistortion() if asked.distortion else None,
        augment=Augment(asked, dataset.image_form, mean=mean, ignore_index=ignored) if asked.changes_crops else None,
    )


def sampler_options(config: TrainingConfig, start: int = 0) -> dict[str, int]:
    """The arguments of a sampler for the run from iteration `start` on: a batch for each accumulated part.

    Args:
        config: Length of the run, size and parts of a batch, seed.
        start: Number of updates made before.
    """
    parts = config.loop.gradient_accumulation
    return {
        "batch_size": config.loop.batch_size // parts,
        "seed": config.seed,
        "num_iterations": config.loop.iterations * parts,
        "start_iteration": start * parts,
    }


def batch_loader(config: TrainingConfig, samples: Any, sampler: Any, collate: Any = collate_samples) -> DataLoader[Any]:
    """A loader of the whole run, which draws no random number that a checkpoint keeps.

    Args:
        config: How many processes load.
        samples: What the sampler's keys stand for.
        sampler: Yields the keys of each batch.
        collate: Makes a batch of samples.
    """
    workers = config.machine.workers
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # else each new iterator draws from the random state that a checkpoint keeps
    )


def training_loader(
    config: TrainingConfig,
    dataset: SegmentationDataset,
    start: int,
    *,
    mean: Sequence[float] | None = None,
    rare: RareClasses | None = None,
) -> DataLoader[Any]:
    """Crops of the data set from iteration `start` on, one batch for each update and accumulated part.

    Args:
        config: Numbers of the run.
        dataset: The training set.
        start: Number of updates made before.
        mean: As in `training_samples`.
        rare: Draws images by their classes; the run has it.
    """
    sampler = IterationSampler(len(dataset), **sampler_options(config, start), rare=rare)
    return batch_loader(config, training_samples(config, dataset, mean), sampler)


def normalization(model: SegmentationModel) -> PhotometricNormalize:
    """What makes a model's input of crops: its mean, standard deviation and bit depth.

    Args:
        model: The model.
    """
    config = model.data_config
    return PhotometricNormalize(config["mean"], config["std"], bit_depth=model.image_form.bit_depth)


def keys_of_batch(
    config: TrainingConfig, dataset: SegmentationDataset, iteration: int, *, rare: RareClasses | None = None
) -> list[list[Any]]:
    """Keys of the samples of an iteration, in its accumulated parts, as `IterationSampler` gives them.

    Args:
        config: Numbers of the run.
        dataset: The training set.
        iteration: Number of the update, from 1 on.
        rare: As in `training_loader`.
    """
    batches = iter(IterationSampler(len(dataset), **sampler_options(config, iteration - 1), rare=rare))
    return [next(batches) for _ in range(config.loop.gradient_accumulation)]


def explain_batch(
    config: TrainingConfig, dataset: SegmentationDataset, iteration: int, *, rare: RareClasses | None = None
) -> str:
    """What may have made the loss of an iteration NaN: labels that are no class, else the names of its images.

    A GPU does not say which label it was; the samples are read again.

    Args:
        config: Numbers of the run.
        dataset: The training set.
        iteration: Number of the update, from 1 on.
        rare: As in `training_loader`.
    """
    K, ignored = dataset.num_classes, dataset.ignore_index
    keys = [key for part in keys_of_batch(config, dataset, iteration, rare=rare) for key in part]
    samples = training_samples(config, dataset)
    wrong: dict[int, list[str]] = {}
    for key in keys:
        labels, index = samples[key]["labels"], key[1]
        for value in labels[((labels < 0) | (labels >= K)) & (labels != ignored)].unique().tolist():
            wrong.setdefault(value, []).append(dataset.name(index))
    if not wrong:
        return f"whose images were {named([dataset.name(key[1]) for key in keys], SHOWN)}"
    found = ", ".join(f"{value} in {named(names, SHOWN)}" for value, names in sorted(wrong.items()))
    return f"where labels are none of the {K} classes (0 to {K - 1}) nor {ignored} (ignored): {found}"


def training_batches(
    loader: Iterable[dict[str, Tensor]], prepare: PhotometricNormalize, *, channels_last: bool = False
) -> Iterator[Batch]:
    """Distort, normalise and mix what `TrainingSamples` hands over, on the device that it is on.

    Where `prepare` is on a GPU, the copies that the loader makes and the distortion have a stream of their own: the GPU
    does them while it still computes the step before.

    Args:
        loader: Yields collated `TrainingSamples`, on the device of `prepare`.
        prepare: The backbone's normalisation.
        channels_last: Yield images in PyTorch's channels-last memory format, for a model that is in it.

    Shape:
        Yields images `(B, C, H, W)`, float32, and labels `(B, H, W)`, int64.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def prepared() -> Iterator[Batch]:
        for batch in loader:
            images = prepare(batch["image"], batch["distortion"], batch["valid"])
            labels = batch["labels"]
            if "given" in batch:
                images, labels = mix_neighbours(images, labels, batch["given"], batch["valid"])
            yield images.contiguous(memory_format=memory_format), labels.long()

    return _beside_the_step(prepared(), prepare.scale.device)


def _beside_the_step(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Make batches on a stream of their own where the device is a GPU, and let the step's stream wait for each."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # which wrote what is used to make them
    while True:
        # The host asks as soon as it has queued a step, long before the GPU is through with it.
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        step = torch.cuda.current_stream(device)
        step.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(step)  # or the side stream could write to its memory before the step has read it
        yield batch
