"""What every data set offers."""

import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from segheads.classes import Classes, Palette, ignored_label
from segheads.data.config import DataConfig
from segheads.data.images import AS_STORED, ImageForm, Picture
from segheads.data.limits import pixel_limit
from segheads.errors import DataError, DataMissingError, ImageFormError, OptionError, SegheadsError

MOST_CLASSES = 2**15 - 1


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images with one class per pixel, the names of the classes, and a colour for each.

    `dataset[i]` is the plain item, ready for a model: floats and int64. Training takes `read(i)` instead, which stays
    8-bit, so that cropping costs little and the device does the floating-point work (`TrainingSamples`).

    Args:
        class_names: One name per class.
        palette: One RGB colour per class, for pictures.

    Shape:
        `dataset[i]` is the image `(C, H, W)`, float32 in [0, 1] (floats as they are stored), and its labels `(H, W)`,
        int64, 255 where ignored; -1 there if there are more than 255 classes. C is 3 unless `image_form` says more.

    Attributes:
        ignore_index: The label of "no class" in what the data set returns: `ignored_label(num_classes)`.
        image_form: Channels and bit depth of its images, and what their EXIF orientation means.
        max_pixels: The most pixels of an image or a label that `read_sample` decodes; None means 1 gigapixel.
        usual_root: Where the data set lies unless a `DataConfig` says otherwise; None for one without such a place.
        options: The fields of `DataConfig` that it heeds, of those that not every data set does.
        labels_share_a_file: Whether the labels of all samples lie in one file, the second of each pair in `files`.
        download_size: How much `fetch` downloads, such as "1 GB"; None where it cannot.
        terms: Page on which its makers say who may use it for what; None where there is none.
        hub_id: Its name among the data sets of the Hugging Face hub; None where there is none of its makers.

    Raises:
        ValueError: Names and colours are not equally many, or there are more than 32,767 classes.
    """

    usual_root: ClassVar[str | None] = None
    options: ClassVar[frozenset[str]] = frozenset()
    labels_share_a_file: ClassVar[bool] = False
    download_size: ClassVar[str | None] = None
    terms: ClassVar[str | None] = None
    hub_id: ClassVar[str | None] = None
    ignore_index: int = 255
    image_form: ImageForm = AS_STORED
    max_pixels: int | None = None

    def __init__(self, class_names: tuple[str, ...], palette: Palette):
        if not 1 <= len(class_names) <= MOST_CLASSES:
            raise ValueError(f"labels have 16 bit at most, so 1 to {MOST_CLASSES} classes fit, not {len(class_names)}")
        self.classes = Classes(class_names, palette)
        if len(class_names) > 255:
            self.ignore_index = ignored_label(len(class_names))

    @classmethod
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:  # noqa: ARG003 for sets that draw
        """Open one split as a configuration says; by default `cls(root, split)`.

        Args:
            config: Root and options; its `dataset` is not looked at.
            split: `"train"`, `"val"`, or what else the data set has.
            seed: Of what the data set draws by itself, such as scenes.

        Raises:
            DataMissingError: A folder or a file is missing.
            DataError: A folder or a file is not what it should be.
            OptionError: There is no root.
        """
        opened: Self = cast(Any, cls)(cls.find_root(config), split)  # a data set's own arguments are not the base's
        return opened

    @classmethod
    def fetch(cls, root: Path) -> None:  # noqa: ARG003 for sets that can
        """Download the data set unless it is there.

        Args:
            root: Where it shall lie, as `open` takes it.

        Raises:
            OptionError: It cannot be downloaded.
            DownloadError: The download failed.
        """
        raise OptionError(f"{cls.__name__} cannot be downloaded by segheads; fetch it by hand and leave out download")

    @classmethod
    def find_root(cls, config: DataConfig) -> Path:
        """Return where the data set lies: what the configuration says, or the usual place.

        Args:
            config: Its `data_root` counts.

        Raises:
            OptionError: It says nothing, and there is no usual place.
        """
        if config.data_root is None and cls.usual_root is None:
            raise OptionError(f"{cls.__name__} has no usual place; give data_root, the folder in which it lies")
        return config.data_root or Path(cls.usual_root or "")

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
    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return one sample as stored: the image and labels `(H, W)`, `ignore_index` where ignored.

        Images of 3 channels and 8 bit are PIL's, of mode RGB; others are arrays `(H, W, C)`, as `read_image` gives
        them. Labels are uint8, or int16 where there are more than 255 classes.
        """

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = read_sample(self, index)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        return pixels.contiguous().float().div_(self.image_form.full_scale), labels.long()


def read_sample(dataset: SegmentationDataset, index: int) -> tuple[Picture, Tensor]:
    """Read a sample of a data set, within its `max_pixels`; what is wrong with it is said of its index.

    Args:
        dataset: Any data set.
        index: The sample's.

    Returns:
        What `dataset.read(index)` does.

    Raises:
        DataError: A file is not what it should be; the message names it and the sample.
        DataMissingError: A file is not there.
    """
    try:
        with pixel_limit(dataset.max_pixels):
            return dataset.read(index)
    except (SegheadsError, OSError) as error:
        words = f"sample {index} of {type(dataset).__name__}: {error}"
        if isinstance(error, ImageFormError):
            raise ImageFormError(words, error.kind) from error
        if isinstance(error, SegheadsError):
            raise type(error)(words) from error
        raise (DataMissingError if isinstance(error, FileNotFoundError) else DataError)(words) from error


def check_same_classes(first: SegmentationDataset, second: SegmentationDataset) -> None:
    """Refuse a split for training and one for evaluation whose labels mean different classes.

    Args:
        first: The one for training.
        second: The other.

    Raises:
        DataError: Names differ, or come in another order.
    """
    one, other = first.class_names, second.class_names
    if one != other:
        pairs = itertools.zip_longest(one, other)
        place, names = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        raise DataError(
            f"train and val have other classes: {len(one)} and {len(other)}, and class {place} is {names[0] or 'none'} "
            f"in train and {names[1] or 'none'} in val; give both the same classes in the same order"
        )


def check_split(split: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the known splits when `split` is none of them."""
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(known)}, not {split!r}")
