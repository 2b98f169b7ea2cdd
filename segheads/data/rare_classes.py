"""Images drawn by the classes that they show, the rarer the more often."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segheads.data.augmentation import AugmentationConfig
from segheads.data.scan import SplitScan
from segheads.errors import OptionError

RARE_CLASSES = 3  # the stream of random numbers that classes and images are drawn from
Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class RareClasses:
    """Rare-class sampling of [DAFormer](https://arxiv.org/abs/2111.14887) (Hoyer et al., CVPR 2022, equations 13, 14).

    A class is drawn, then an image that shows enough of it, then crops of that image until one shows enough, too
    (https://github.com/lhoyer/DAFormer, `mmseg/datasets/uda_dataset.py`). There are no epochs: an image may come twice
    in a row, in different crops.

    Args:
        probabilities: Of each class, `(K,)`; 0 for one that never occurs.
        images: For each class, the images that have enough of it.
        crop_pixels: Of the class; a crop has more, after up to 10 tries. -1 is any crop.
    """

    probabilities: NDArray[np.float64]
    images: Sequence[NDArray[np.int64]]
    crop_pixels: int

    @classmethod
    def of(cls, scan: SplitScan, config: AugmentationConfig) -> "RareClasses":
        """What a scan of the training set and the options make of it.

        Args:
            scan: Tells the pixels of each class in each image.
            config: Its `rare_class_temperature` T is set: class c, of f_c of all labelled pixels, is drawn with
                softmax((1 - f_c) / T).

        Raises:
            OptionError: An option is out of range, no pixel is labelled, or no image has enough pixels of a class
                that occurs.

        Examples:
            >>> two = SplitScan(class_names=("a", "b"), pixels=(980, 20), class_pixels=({0: 500}, {0: 480, 1: 20}))
            >>> drawn = RareClasses.of(two, AugmentationConfig(rare_class_temperature=1.0, rare_class_pixels=10))
            >>> drawn.probabilities.round(3), drawn.images[1]
            (array([0.277, 0.723]), array([1]))
        """
        config.check()
        pixels = np.array(scan.pixels, dtype=np.float64)
        if not pixels.any():
            raise OptionError("rare_class_temperature needs labels, and no pixel of the training set is of any class")
        least, images = config.rare_class_pixels, []
        for label, name in enumerate(scan.class_names):
            counts = np.array([found.get(label, 0) for found in scan.class_pixels])
            images.append(np.flatnonzero(counts > least))
            if pixels[label] and not len(images[-1]):
                raise OptionError(
                    f"rare_class_pixels {least}: no training image has more pixels of {name}, the most is "
                    f"{counts.max()}; give rare_class_pixels {counts.max() - 1} or fewer"
                )
        shares = pixels / pixels.sum()
        with np.errstate(over="ignore"):  # to minus infinity, whose exponential is 0
            exponents = (shares[pixels > 0].min() - shares) / (config.rare_class_temperature or 1)
        weights = np.exp(np.where(pixels > 0, exponents, -np.inf))
        enough = int(least * config.rare_class_crop) if config.rare_class_crop else -1
        return cls(weights / weights.sum(), images, enough)

    def key(self, seed: int, position: int) -> Key:
        """What `TrainingSamples` takes for one place in a run.

        That is the place, which stands for an epoch, the image drawn, the class, and how many pixels of it the crop
        must have more of.

        Args:
            seed: Of the run.
            position: Number of samples drawn before, over all processes.
        """
        rng = np.random.default_rng([seed, position, 0, RARE_CLASSES])
        label = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return position, int(rng.choice(self.images[label])), label, self.crop_pixels

    def words(self, class_names: Sequence[str], most: int = 3) -> str:
        """The classes that are drawn most often.

        Args:
            class_names: One for each class.
            most: How many to name.
        """
        order = np.argsort(-self.probabilities, kind="stable")[:most]
        return ", ".join(f"{class_names[k]} {100 * self.probabilities[k]:.3g} %" for k in order)
