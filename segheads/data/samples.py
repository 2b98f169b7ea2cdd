"""Training samples that are a function of (seed, epoch, index), and the order in which they come."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from segheads.data.augment import Augment
from segheads.data.crop import RandomScaleCrop
from segheads.data.dataset import SegmentationDataset, read_sample
from segheads.data.photometric import PhotometricDistortion
from segheads.data.rare_classes import Key, RareClasses
from segheads.data.resize import resize_keep_ratio, to_input

# The stream of random numbers that crops and distortions come from; 0 are orders and drawn scenes, 2 is what `Augment`
# and 3 what `RareClasses` draws.
CROPS = 1

_PUBLISHED = PhotometricDistortion()


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Crops of a data set, as stored, with the photometric distortion drawn but not yet done.

    Indexed by `(epoch, index)`, as `IterationSampler` yields them. All randomness of a sample comes from a generator
    seeded with (seed, epoch, index), so it is the same in any worker, in any process, and after a resume; what
    `augment` draws comes from generators of its own and changes no crop. `PhotometricNormalize` turns a batch into the
    model's input, on the device.

    Args:
        dataset: Any data set of the package.
        crop: Resize, crop and flip.
        seed: One number for the run.
        distortion: What to draw from; None for undistorted images. Images without 3 channels of colour, whose range is
            known, are not distorted.
        augment: What else happens to crops.

    Shape:
        A dictionary of `image` `(C, h, w)`, uint8 (float32 of more than 8 bit); `labels` `(h, w)`, uint8 or int16;
        `distortion` `(5,)`, float32; `valid` `(2,)`, int64, the height and width that are not padding; where `augment`
        mixes, `given` `(h, w)`, bool, what `mix_neighbours` puts into its neighbour. `collate_samples` stacks them.

    Raises:
        ValueError: The crop pads labels with another value than the data set ignores.
        DataError: A file is not what it should be; the message names it and the sample.

    Examples:
        >>> from segheads.data.scenes import Scenes
        >>> samples = TrainingSamples(Scenes("train", length=4), RandomScaleCrop(64, scale=(96, 96)), seed=0)
        >>> samples[0, 3]["image"].shape
        torch.Size([3, 64, 64])
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        crop: RandomScaleCrop,
        *,
        seed: int,
        distortion: PhotometricDistortion | None = _PUBLISHED,
        augment: Augment | None = None,
    ):
        if crop.ignore_index != dataset.ignore_index:
            raise ValueError(
                f"the crop pads labels with {crop.ignore_index}, but {type(dataset).__name__} of {dataset.num_classes} "
                f"classes ignores {dataset.ignore_index}; give the crop ignore_index={dataset.ignore_index}"
            )
        self.dataset = dataset
        self.crop = crop
        self.seed = seed
        self.distortion = distortion
        self.augment = augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, index, *wanted = key
        image, labels = read_sample(self.dataset, index)
        # numpy takes missing numbers for 0: without the last, sample 0 would draw what shuffled its epoch, and a drawn
        # scene's crop what drew the scene
        rng = np.random.default_rng([self.seed, epoch, index, CROPS])
        pixels, classes, valid = self.crop(image, labels, rng, *([(wanted[0], wanted[1])] if wanted else []))
        is_distorted = self.distortion is not None and self.dataset.image_form.has_colours
        drawn = (
            self.distortion(rng)
            if self.distortion is not None and is_distorted
            else torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
        )
        more: dict[str, Tensor] = {}
        if self.augment is not None:
            pixels, classes = self.augment(pixels, classes, valid, (self.seed, epoch, index))
            if self.augment.config.mixes:
                more["given"] = self.augment.gift(classes, valid, (self.seed, epoch, index))
        return {"image": pixels, "labels": classes, "distortion": drawn, "valid": torch.tensor(valid), **more}


class EvaluationSamples(Dataset[tuple[Tensor, Tensor]]):
    """Images of a data set at the size at which a model sees them; labels at their own.

    Args:
        dataset: Any data set of the package.
        mean: The backbone's, per channel.
        std: The backbone's, per channel.
        scale: Limits of the longer and the shorter side, pixels, to which images are resized with their aspect ratio
            kept; None leaves them.

    Shape:
        Image `(C, h, w)`, float32, and labels `(H, W)`, uint8 or int16.

    Raises:
        ValueError: The data set's images have other channels than there are means.
        DataError: A file is not what it should be; the message names it and the sample.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        mean: Sequence[float],
        std: Sequence[float],
        scale: tuple[int, int] | None = None,
    ) -> None:
        if dataset.image_form.channels != len(mean):
            raise ValueError(
                f"the model takes images of {len(mean)} channels, and those of {type(dataset).__name__} have "
                f"{dataset.image_form.channels}; in_chans must be the same for both"
            )
        self.dataset, self.mean, self.std, self.scale = dataset, mean, std, scale

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = read_sample(self.dataset, index)
        if self.scale is not None:
            image = resize_keep_ratio(image, self.scale)
        return to_input(image, self.mean, self.std, bit_depth=self.dataset.image_form.bit_depth), labels


def collate_samples(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples as `default_collate` does, but leave the images in the order in which they lie in memory.

    Decoders and 8-bit kernels work pixel by pixel; to reorder the channels costs as much as a third of the crop, and
    the device does it for nothing. Pass it to a `DataLoader` as `collate_fn`.

    Args:
        samples: Items of `TrainingSamples`.

    Shape:
        `image` is `(B, C, h, w)` in PyTorch's channels-last memory format; all else as usual.

    Examples:
        >>> from segheads.data.scenes import Scenes
        >>> samples = TrainingSamples(Scenes("train", length=4), RandomScaleCrop(64, scale=(96, 96)), seed=0)
        >>> collate_samples([samples[0, 0], samples[0, 1]])["image"].shape
        torch.Size([2, 3, 64, 64])
    """
    batch: dict[str, Tensor] = default_collate([s | {"image": s["image"].permute(1, 2, 0)} for s in samples])
    batch["image"] = batch["image"].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
    return batch


class IterationSampler:
    """Yields one batch of `(epoch, index)` per iteration; epochs follow one another without a gap.

    Each epoch is a permutation that depends on (seed, epoch) alone, and a batch may reach over the border of two. A
    sampler that starts at iteration k yields exactly what a full one yields from there on, without walking to it.
    Pass it to a `DataLoader` as `batch_sampler`.

    Args:
        length: How many samples the data set has.
        batch_size: Samples per iteration, over all processes.
        seed: One number for the run.
        num_iterations: Iterations of the whole run.
        start_iteration: The first iteration to yield, for a resumed run.
        rare: Draw images by their classes instead; then there are no epochs, and keys have the class, too.

    Raises:
        ValueError: Length or batch size is below 1, or the start lies outside the run.

    Examples:
        >>> list(IterationSampler(3, 2, seed=0, num_iterations=3))
        [[(0, 2), (0, 0)], [(0, 1), (1, 2)], [(1, 0), (1, 1)]]
        >>> list(IterationSampler(3, 2, seed=0, num_iterations=3, start_iteration=2))
        [[(1, 0), (1, 1)]]
    """

    drop_last = False  # accelerate asks; every batch is full

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        num_iterations: int,
        start_iteration: int = 0,
        rare: RareClasses | None = None,
    ):
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, not {length} and {batch_size}")
        if not 0 <= start_iteration <= num_iterations:
            raise ValueError(f"start_iteration {start_iteration} is outside the run of {num_iterations} iterations")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.num_iterations = num_iterations
        self.start_iteration = start_iteration
        self.rare = rare

    def __len__(self) -> int:
        return self.num_iterations - self.start_iteration

    def __iter__(self) -> Iterator[list[Key]]:
        shuffled, order = -1, np.arange(0)
        for iteration in range(self.start_iteration, self.num_iterations):
            batch: list[Key] = []
            for position in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                if self.rare is not None:
                    batch.append(self.rare.key(self.seed, position))
                    continue
                epoch, place = divmod(position, self.length)
                if epoch != shuffled:
                    shuffled, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append((epoch, int(order[place])))
            yield batch
