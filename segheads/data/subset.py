"""A part of a data set, drawn at random but always the same."""

import numpy as np
from torch import Tensor
from typing_extensions import Self

from segheads.data.dataset import SegmentationDataset
from segheads.data.images import Picture


class SubsetDataset(SegmentationDataset):
    """So many images of a data set, for learning curves over its size.

    The choice is a function of the seed and of the data set's length: of two subsets of one seed the larger holds the
    smaller. The images keep the data set's order.

    Args:
        dataset: Any data set of the package.
        length: How many images.
        seed: Another number draws other images.

    Shape:
        As the data set.

    Raises:
        ValueError: If the data set has fewer images, or `length` is below 1.

    Examples:
        >>> from segheads.data import Scenes
        >>> subset = SubsetDataset(Scenes(length=100), 5)
        >>> len(subset), subset.indices
        (5, [5, 20, 36, 82, 93])
    """

    def __init__(self, dataset: SegmentationDataset, length: int, *, seed: int = 0):
        super().__init__(dataset.class_names, dataset.palette)
        if not 1 <= length <= len(dataset):
            raise ValueError(f"a subset must have 1 to {len(dataset)} images, which are all there are; got {length}")
        self.classes, self.dataset = dataset.classes, dataset
        self.ignore_index = dataset.ignore_index
        self.image_form, self.max_pixels = dataset.image_form, dataset.max_pixels
        self.indices: list[int] = sorted(np.random.default_rng(seed).permutation(len(dataset))[:length].tolist())

    @classmethod
    def spaced(cls, dataset: SegmentationDataset, length: int) -> Self:
        """So many images at equal distances, the first and the last among them; all, if there are no more.

        Args:
            dataset: Any data set of the package.
            length: How many images.
        """
        subset = cls(dataset, min(length, len(dataset)))
        subset.indices = np.linspace(0, len(dataset) - 1, len(subset)).round().astype(int).tolist()
        return subset

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the sample's name in the data set."""
        return self.dataset.name(self.indices[index])

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the sample as the data set has it."""
        return self.dataset.read(self.indices[index])
