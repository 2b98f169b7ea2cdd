"""One crop and its labels, augmented together; what of it its neighbour in the batch gets."""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segheads.data.augmentation import AugmentationConfig
from segheads.data.images import FLOATS, ImageForm

AUGMENTATIONS = 2  # the stream of random numbers that all of this comes from; crops are stream 1
# of that, a stream for each kind: one more leaves the others as they were
_ROTATION, _JITTER, _GREY, _BLUR, _ERASING, _MIXING = range(1, 7)
_ASPECT = (0.3, 3.3)  # of what is erased, as published
_TRIES = 10


class Augment:
    """Turns, changes and erases a crop, in the order of `AugmentationConfig`'s fields.

    All of it happens inside the rectangle that is not padding, and depends on nothing but the key: the same in any
    worker and process, and after a resume. Labels are never interpolated. The published distortion of colours comes
    later, to the mean pixel, too.

    - Rotation about the middle: the image bilinear, labels of the nearest pixel.
    - Colour jitter as [torchvision](https://docs.pytorch.org/vision/stable/)'s `ColorJitter`, in floats. The contrast
      of images that are not of colours is about the mean of each band; floats (bit depth 32) are not clipped.
    - Random erasing ([Zhong et al., AAAI 2020](https://arxiv.org/abs/1708.04896)) with the mean pixel.
    - CutMix ([Yun et al., ICCV 2019](https://arxiv.org/abs/1905.04899)): a rectangle of a random share, of the
      proportions of the crop. ClassMix ([Olsson et al., WACV 2021](https://arxiv.org/abs/2007.07936)): half of the
      classes, rounded up; here by the true labels, where the paper has predicted ones of images without. Either way the
      other crop is the neighbour in the batch, `mix_neighbours`, not one drawn from all of it.

    Args:
        config: What to do.
        form: What images hold.
        mean: Of each channel, for values in [0, 1]: the pixel that covers what is uncovered or erased; None means 0.
        ignore_index: The label of no class.

    Shape:
        Called with a crop `(C, h, w)` and its labels `(h, w)` as `RandomScaleCrop` gives them, the height and width
        that are not padding, and a key of integers; returns image and labels of the same types and sizes.

    Raises:
        ValueError: The mean has other channels than images.
        OptionError: An option is out of range, or colours are to be changed, and images have none.

    Examples:
        >>> augment = Augment(AugmentationConfig(rotation=90, rotation_share=1), ImageForm(), ignore_index=255)
        >>> image, labels = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
        >>> augment(image, labels, (8, 8), (0, 0, 5))[1].unique()
        tensor([  0, 255], dtype=torch.uint8)
    """

    def __init__(
        self,
        config: AugmentationConfig,
        form: ImageForm,
        *,
        mean: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        config.check(form)
        if mean is not None and len(mean) != form.channels:
            raise ValueError(f"mean has {len(mean)} values for images of {form}")
        self.config, self.form, self.ignore_index = config, form, ignore_index
        self.fill = torch.tensor(mean or [0.0] * form.channels, dtype=torch.float32) * form.full_scale

    def __call__(
        self, image: Tensor, labels: Tensor, valid: tuple[int, int], key: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Draw what happens to one crop, and do it."""
        config, (height, width) = self.config, valid
        part, classes = image[:, :height, :width], labels[:height, :width]
        if config.rotation and (rng := _stream(key, _ROTATION)).random() < config.rotation_share:
            part, classes = self._rotate(part, classes, rng.uniform(-config.rotation, config.rotation))
        if any(config.jitter) and (rng := _stream(key, _JITTER)).random() < config.jitter_share:
            part = self._jitter(part, rng)
        if config.grey and _stream(key, _GREY).random() < config.grey:
            part = _kernels().rgb_to_grayscale_image(part, 3)
        if config.blur and (rng := _stream(key, _BLUR)).random() < config.blur:
            part = _in_type(_blur(part.float(), rng.uniform(*config.blur_sigma)), image)
        if config.erasing and (rng := _stream(key, _ERASING)).random() < config.erasing:
            part, classes = self._erase(part, classes, rng)
        if part.shape == image.shape:
            return part, classes
        image, labels = image.clone(), labels.clone()
        image[:, :height, :width], labels[:height, :width] = part, classes
        return image, labels

    def gift(self, labels: Tensor, valid: tuple[int, int], key: Sequence[int]) -> Tensor:
        """Draw which pixels of a crop its neighbour gets.

        Args:
            labels: Of the crop, augmented.
            valid: The height and width that are not padding.
            key: Of integers.

        Shape:
            Labels `(h, w)`; returns `(h, w)`, bool.
        """
        rng = _stream(key, _MIXING)
        given, kind = torch.zeros(labels.shape, dtype=torch.bool), rng.random()
        if kind < self.config.cutmix:
            rows, columns = _cutmix_box(valid, rng)
            given[rows, columns] = True
        elif kind < self.config.cutmix + self.config.classmix:
            classes = labels.numpy()
            there = np.flatnonzero(np.bincount(classes[classes != self.ignore_index]))
            chosen = there[rng.permutation(len(there))[: (len(there) + 1) // 2]]
            given = torch.from_numpy(np.isin(classes, chosen))
        return given

    def _rotate(self, image: Tensor, labels: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
        """Turn both anticlockwise about the middle."""
        height, width = labels.shape
        x, y = _turned((height, width), degrees)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        rows, columns = (np.clip(np.floor(z), 0, n - 1).astype(np.intp) for z, n in ((y, height), (x, width)))
        turned = np.where(inside, labels.numpy()[rows, columns], labels.new_tensor(self.ignore_index).numpy())
        grid = np.stack([2 * x / width - 1, 2 * y / height - 1], axis=-1)[None].astype(np.float32)
        sampled = F.grid_sample(
            image[None].float(), torch.from_numpy(grid), mode="bilinear", padding_mode="border", align_corners=False
        )[0]
        filled = torch.where(torch.from_numpy(inside), sampled, self.fill[:, None, None])
        return _in_type(filled, image), torch.from_numpy(turned)

    def _jitter(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Brightness, contrast, saturation and hue, in random order."""
        values, full = image.float() / self.form.full_scale, self.form.full_scale
        *spreads, turns = self.config.jitter
        brightness, contrast, saturation = (rng.uniform(1 - spread, 1 + spread) for spread in spreads)
        hue = rng.uniform(-turns, turns)
        for step in rng.permutation(4).tolist():
            if step == 0 and spreads[0]:
                values = self._clipped(values * brightness)
            elif step == 1 and spreads[1]:
                middle = self._middle(values)
                values = self._clipped((values - middle) * contrast + middle)
            elif step == 2 and spreads[2]:
                values = _kernels().adjust_saturation_image(values, saturation)
            elif step == 3 and turns:
                values = _kernels().adjust_hue_image(values, hue)
        return _in_type(values * full, image)

    def _middle(self, values: Tensor) -> Tensor:
        """The grey that contrast is about, of the image or of each band; by numpy, whose sums know no threads."""
        if self.form.has_colours:
            values = _kernels().rgb_to_grayscale_image(values)
        means = values.contiguous().numpy().reshape(len(values), -1).mean(1, dtype=np.float64)
        return torch.from_numpy(means.astype(np.float32))[:, None, None]

    def _clipped(self, values: Tensor) -> Tensor:
        return values if self.form.bit_depth == FLOATS else values.clamp(0, 1)

    def _erase(self, image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Cover a rectangle; none where 10 do not fit, as published."""
        box = _erased_box((labels.shape[0], labels.shape[1]), self.config.erasing_area, rng)
        if box is None:
            return image, labels
        image, labels = image.clone(), labels.clone()
        rows, columns = box
        image[:, rows, columns] = _in_type(self.fill, image)[:, None, None]
        if self.config.erased_labels == "ignore":
            labels[rows, columns] = self.ignore_index
        return image, labels


def mix_neighbours(images: Tensor, labels: Tensor, given: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Put what crops give into their neighbours: images 0 and 1 of a batch exchange, 2 and 3, and so on.

    Neighbours stay neighbours however an update is cut into parts of an even number of images, accumulated or in
    several processes: it is the same update.

    Args:
        images: Of a batch, on any device; nothing waits for it.
        labels: Theirs.
        given: The pixels that the neighbour gets, as `Augment.gift` draws them.
        valid: The height and width of each that are not padding, where nothing is put; None where there is none.

    Shape:
        Images `(B, C, h, w)`, labels and given `(B, h, w)`, valid `(B, 2)`; returns images and labels.

    Raises:
        ValueError: B is odd.

    Examples:
        >>> images, given = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 1, 2), torch.tensor([[[True, False]]] * 2)
        >>> mix_neighbours(images, torch.zeros(2, 1, 2), given)[0].flatten()
        tensor([1., 0., 0., 1.])
    """
    B, height, width = labels.shape
    if B % 2:
        raise ValueError(f"neighbours are mixed two by two, so a batch must have an even number of images; got {B}")
    here = labels.device
    other = torch.arange(B, device=here).view(-1, 2).flip(1).flatten()
    taken = given[other]
    if valid is not None:
        inside = valid.to(here, non_blocking=True).view(B, 2, 1, 1)
        taken = taken & (torch.arange(height, device=here).view(-1, 1) < inside[:, 0])
        taken = taken & (torch.arange(width, device=here) < inside[:, 1])
    return torch.where(taken[:, None], images[other], images), torch.where(taken, labels[other], labels)


def _stream(key: Sequence[int], kind: int) -> np.random.Generator:
    return np.random.default_rng([*key, AUGMENTATIONS, kind])


def _in_type(values: Tensor, image: Tensor) -> Tensor:
    """Floats in the image's type."""
    return values if image.is_floating_point() else values.round().clamp_(0, 255).to(image.dtype)


def _turned(size: tuple[int, int], degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the middle of each pixel comes from, x and y in pixels from the upper left corner."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (np.arange(length) + 0.5 - length / 2 for length in size)
    y = y[:, None]
    return cos * x - sin * y + size[1] / 2, sin * x + cos * y + size[0] / 2


def _blur(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian, cut off at three standard deviations, mirrored at the rim.

    Sums of products in a fixed order: the last bits of a convolution could depend on the number of threads.
    """
    for axis in (1, 2):
        radius = min(math.ceil(3 * sigma), image.shape[axis] - 1)
        if not radius:
            continue
        at = np.arange(-radius, radius + 1)
        weights = np.exp(-(at**2) / (2 * sigma**2))
        sides = (radius, radius, 0, 0) if axis == 2 else (0, 0, radius, radius)
        padded = F.pad(image[None], sides, mode="reflect")[0]
        summed, product = torch.zeros_like(image), torch.empty_like(image)
        for start, weight in enumerate((weights / weights.sum()).tolist()):
            summed.add_(torch.mul(padded.narrow(axis, start, image.shape[axis]), weight, out=product))
        image = summed
    return image


def _erased_box(
    size: tuple[int, int], area: tuple[float, float], rng: np.random.Generator
) -> tuple[slice, slice] | None:
    """Rows and columns of a rectangle of a random share of the area and of random proportions."""
    for _ in range(_TRIES):
        pixels = rng.uniform(*area) * size[0] * size[1]
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        height, width = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < height < size[0] and 0 < width < size[1]:
            top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
            return slice(top, top + height), slice(left, left + width)
    return None


def _cutmix_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a rectangle about a random pixel; its share, before it is cut at the rim, is uniform."""
    side = math.sqrt(1 - rng.random())
    middle = [int(rng.integers(length)) for length in size]
    halves = [int(length * side) // 2 for length in size]
    rows, columns = (
        slice(max(m - half, 0), min(m + half, length)) for m, half, length in zip(middle, halves, size, strict=True)
    )
    return rows, columns


@cache
def _kernels() -> Any:
    """torchvision's, which take two seconds to import and few crops ask for."""
    return import_module("torchvision.transforms.v2.functional")
