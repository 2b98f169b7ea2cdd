"""What every data set offers."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from segheads.classes import Classes, Palette


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images with one class per pixel, the names of the classes, and a colour for each.

    `dataset[i]` is the plain item, ready for a model: floats and int64. Training takes `read(i)` instead, which stays
    8-bit, so that cropping costs little and the device does the floating-point work (`TrainingSamples`).

    Args:
        class_names: One name per class.
        palette: One RGB colour per class, for pictures.

    Shape:
        `dataset[i]` is the image `(3, H, W)`, float32 in [0, 1], and its labels `(H, W)`, int64, 255 where ignored.

    Raises:
        ValueError: Names and colours are not equally many, or there are more than 255 classes.
    """

    ignore_index: int = 255

    def __init__(self, class_names: tuple[str, ...], palette: Palette):
        if not 1 <= len(class_names) <= 255:
            raise ValueError(f"labels are 8-bit with 255 for ignored, so 1 to 255 classes fit, not {len(class_names)}")
        self.classes = Classes(class_names, palette)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.classes.names

    @property
    def palette(self) -> Palette:
        """One RGB colour per class."""
        return self.classes.palette

    @property
    def num_classes(self) -> int:
        """The number of classes, without the ignored label."""
        return len(self.classes)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a short name of one sample, for messages and picture files."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return one sample as stored: an RGB image and uint8 labels `(H, W)`, 255 where ignored."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.read(index)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
        return pixels.contiguous().float().div_(255), labels.long()


def check_split(split: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the known splits when `split` is none of them."""
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(known)}, not {split!r}")
