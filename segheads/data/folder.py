"""A user's own images and labels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from typing_extensions import Self, override

from segheads.classes import Palette, distinct_colours
from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset
from segheads.data.lists import find_split
from segheads.data.pairs import Pair, find_pairs, read_pair
from segheads.errors import OptionError


class FolderDataset(SegmentationDataset):
    """Pairs of files of the same name: `images/a.jpg` with `labels/a.png`, also in sub-folders of the same names.

    A warning names the files that are passed over.

    Images may be of any format and mode that Pillow reads. Labels are single-channel images, as a rule PNG with 8 bit,
    16 bit or a palette (then the indices count, not the colours).

    Args:
        images: Folder of images; or the files themselves, in the order of their labels.
        labels: Folder of label images; or the files.
        num_classes: How many classes there are, the ignored label not among them.
        class_names: One name per class; by default `class 0`, `class 1`, ...
        palette: One RGB colour per class; by default distinct colours.
        ignore_index: The value in the label files that means "ignored"; what the data set returns has 255 there.
        image_suffix: What follows the common name in the files of images, such as `_leftImg8bit`; files without it are
            passed over.
        label_suffix: The same for labels, such as `_mask`, or with its ending, `_mask.png`.
        reduce_zero_label: In the files 0 means "ignored" and class 0 is stored as 1, as in ADE20K.

    Shape:
        As every `SegmentationDataset`.

    Raises:
        DataMissingError: A folder or a label is missing, or a file is a broken link.
        DataError: A folder is empty, holds two files of one name, a loop of links, or what is no regular file.
        ValueError: Names, colours and `num_classes` do not agree, or images and labels are not equally many.
    """

    options = frozenset({"image_suffix", "label_suffix", "class_names", "num_classes", "ignore_index"})

    def __init__(
        self,
        images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        labels: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        num_classes: int,
        *,
        class_names: tuple[str, ...] | None = None,
        palette: Palette | None = None,
        image_suffix: str = "",
        label_suffix: str = "",
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
    ):
        names = tuple(class_names) if class_names else tuple(f"class {index}" for index in range(num_classes))
        if len(names) != num_classes:
            raise ValueError(f"num_classes is {num_classes} but {len(names)} class names came; give one name per class")
        super().__init__(names, tuple(palette) if palette else distinct_colours(num_classes))
        self._first = int(reduce_zero_label)
        self._ignored = (0, ignore_index) if reduce_zero_label else (ignore_index,)
        self.files = _pairs(images, labels, image_suffix, label_suffix)
        self._common = os.path.commonpath([image.parent for image, _ in self.files])

    @classmethod
    @override
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open images/SPLIT and labels/SPLIT of the root, or what SPLIT.txt lists of images and labels.

        `ignore_index` 0 means that the first class is 1.
        """
        root, names, count = config.data_root, config.class_names, config.num_classes
        if root is None:
            raise OptionError(
                "a folder of your own needs data_root, a folder that holds images/train, labels/train, images/val and "
                "labels/val, or images, labels, train.txt and val.txt"
            )
        if not names and count is None:
            raise OptionError("a folder of your own needs class_names, or num_classes with their number")
        if names and count not in (None, len(names)):
            raise OptionError(f"num_classes {count} came with {len(names)} names in class_names; give the names alone")
        pairs = find_split(root, split, image_suffix=config.image_suffix or "", label_suffix=config.label_suffix or "")
        return cls(
            [image for image, _ in pairs],
            [label for _, label in pairs],
            len(names or ()) if count is None else count,
            class_names=names,
            ignore_index=config.ignore_index or 255,
            reduce_zero_label=config.ignore_index == 0,
        )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path of the image file without its ending, in the folder that holds all."""
        return os.path.relpath(self.files[index][0].with_suffix(""), self._common).replace(os.sep, "/")

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where ignored."""
        return read_pair(self.files[index], self.num_classes, first=self._first, ignored=self._ignored)


def _pairs(images: Any, labels: Any, image_suffix: str, label_suffix: str) -> list[Pair]:
    """The pairs of two folders, or of two sequences of files."""
    both = (images, labels)
    folders = [isinstance(x, (str, os.PathLike)) for x in both]
    if all(folders):
        return find_pairs(Path(images), Path(labels), image_end=image_suffix, label_end=label_suffix, report=True)
    if not all(given) or len(images) != len(labels) or not len(images):
        came = [
            f"{len(x)} files" if is_given else f"the folder {x}"
            for x, is_given in zip((images, labels), given, strict=True)
        ]
        raise ValueError(f"images and labels must be two folders, or equally many files; got {came[0]} and {came[1]}")
    return [(Path(image), Path(label)) for image, label in zip(images, labels, strict=True)]
