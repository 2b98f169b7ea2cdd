"""A user's own images and labels."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self, override

from segheads.classes import BACKGROUND, Classes, Palette, distinct_colours, num_labels
from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset
from segheads.data.images import RGB, ImageForm, Picture
from segheads.data.label_map import LabelMap
from segheads.data.lists import find_split
from segheads.data.pairs import Pair, find_pairs, read_pair, read_pair_as
from segheads.data.tables import find_table, table_pairs
from segheads.errors import OptionError
from segheads.files import readable


class FolderDataset(SegmentationDataset):
    """Pairs of files of the same name: `images/a.jpg` with `labels/a.png`, also in sub-folders of the same names.

    A warning names the files that are passed over.

    Images may be of any format that `read_image` reads, all of the same channels and bit depth. Labels are
    single-channel images, as a rule PNG with 1 to 16 bit or a palette (then the indices count, not the colours), or
    colours that a map turns into classes.

    Args:
        images: Folder of images; or the files themselves, in the order of their labels.
        labels: Folder of label images; or the files.
        num_classes: How many classes there are, the ignored label not among them. One is a class and its background:
            labels 1 and 0, so that the data set has two.
        class_names: One name per class; by default `class 0`, `class 1`, ...
        palette: One RGB colour per class; by default distinct colours.
        image_suffix: What follows the common name in the files of images, such as `_leftImg8bit`; files without it are
            passed over.
        label_suffix: The same for labels, such as `_mask`, or with its ending, `_mask.png`.
        ignore_index: The values in the label files that mean "no class", one or several; what the data set returns has
            its own `ignore_index` there. None means 255, unless that is a class. With a map, what it ignores, too.
        reduce_zero_label: In the files 0 means "no class" and class 0 is stored as 1, as in ADE20K.
        label_map: Which value, or which colour, is which class; None means that value i is class i.
        image_form: Channels and bit depth of the images, and what their EXIF orientation means; by default RGB of 8
            bit, turned where the label has the turned size.

    Shape:
        As every `SegmentationDataset`.

    Raises:
        DataMissingError: A folder or a label is missing, or a file is a broken link.
        DataError: A folder is empty, holds two files of one name, a loop of links, or what is no regular file.
        ValueError: Names, colours and `num_classes` do not agree, images and labels are not equally many, or a value
            would be both a class and ignored.
    """

    options = frozenset(
        {
            *("image_suffix", "label_suffix", "class_names", "num_classes", "ignore_index"),
            *("label_values", "label_map", "label_colours", "reduce_zero_label"),
            *("in_chans", "bit_depth", "band_mean", "band_std", "exif"),
        }
    )

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
        ignore_index: int | Sequence[int] | None = None,
        reduce_zero_label: bool = False,
        label_map: LabelMap | None = None,
        image_form: ImageForm = RGB,
    ):
        binary = None
        names = tuple(class_names) if class_names else tuple(f"class {index}" for index in range(num_classes))
        if len(names) != num_classes:
            raise ValueError(f"num_classes is {num_classes} but {len(names)} class names came; give one name per class")
        if num_classes == 1:
            if reduce_zero_label:
                raise ValueError("reduce_zero_label ignores 0, which is the background of a single class; leave it out")
            binary = Classes.binary(names[0], palette[-1] if palette else None) if class_names else Classes.numbered(1)
            names, palette, num_classes = binary.names, binary.palette, 2
        super().__init__(names, tuple(palette) if palette else distinct_colours(num_classes))
        if binary is not None:
            self.classes = binary
        given = _several(ignore_index)
        if label_map is not None and reduce_zero_label:
            raise ValueError("reduce_zero_label and a label map both say what 0 means; leave one out")
        self.label_map = None if label_map is None else label_map.ignoring(given or ())
        if self.label_map is not None:
            self.label_map.check(num_classes)
        self.image_form = image_form
        self._first = int(reduce_zero_label)
        self._ignored = _ignored_values(names, given, self._first) if label_map is None else ()
        self.files = _pairs(images, labels, image_suffix, label_suffix)
        self._common = os.path.commonpath([image.parent for image, _ in self.files])

    @classmethod
    @override
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open images/SPLIT and labels/SPLIT of the root, or what a list SPLIT.txt or a table tells.

        A table is SPLIT.csv or SPLIT.parquet in the root, or the root itself; see `segheads.data.tables`.
        """
        root, names, count = config.data_root, config.class_names, config.num_classes
        if root is None:
            raise OptionError(
                "a folder of your own needs data_root, a folder that holds images/train, labels/train, images/val and "
                "labels/val, or images, labels, train.txt and val.txt; or a table, .csv or .parquet, of image and label"
            )
        if not names and count is None and config.label_values:
            count = len(config.label_values)
        if not names and count is None:
            raise OptionError("a folder of your own needs class_names, or num_classes with their number")
        if names and count not in (None, len(names)):
            raise OptionError(f"num_classes {count} came with {len(names)} names in class_names; give the names alone")
        num_classes = len(names or ()) if count is None else count
        labels = (BACKGROUND, *names) if names and len(names) == 1 else names
        pairs = _of_split(config, root, split)
        return cls(
            [image for image, _ in pairs],
            [label for _, label in pairs],
            num_classes,
            class_names=names,
            ignore_index=config.ignore_index,
            reduce_zero_label=config.reduce_zero_label,
            image_form=config.image_form,
            label_map=_label_map(config, num_labels(num_classes), labels),
        )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path of the image file without its ending, in the folder that holds all."""
        return readable(os.path.relpath(self.files[index][0].with_suffix(""), self._common).replace(os.sep, "/"))

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the image and its labels `(H, W)`, `ignore_index` where ignored."""
        pair = self.files[index]
        if self.label_map is None:
            return read_pair(pair, self.num_classes, first=self._first, ignored=self._ignored, form=self.image_form)
        to_classes = partial(self.label_map.to_classes, num_classes=self.num_classes, path=pair[1])
        return read_pair_as(pair, to_classes, read=self.label_map.read_labels, form=self.image_form)


def _of_split(config: DataConfig, root: Path, split: str) -> list[Pair]:
    """The pairs of a split, by folders, by a list or by a table."""
    table = None if (root / "images" / split).is_dir() else find_table(root, split)
    if table is None:
        return find_split(root, split, image_suffix=config.image_suffix or "", label_suffix=config.label_suffix or "")
    if given := [name for name in ("image_suffix", "label_suffix") if getattr(config, name)]:
        raise OptionError(f"the table {table} has whole names of files; leave out {' and '.join(given)}")
    return table_pairs(table, split)


def _several(ignore_index: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if ignore_index is None:
        return None
    return (ignore_index,) if isinstance(ignore_index, int) else tuple(ignore_index)


def _ignored_values(names: tuple[str, ...], given: tuple[int, ...] | None, first: int) -> tuple[int, ...]:
    """The values in the files that mean no class, none of them a class."""
    last = first + len(names) - 1
    if given is None:
        given = () if first <= 255 <= last else (255,)
    inside = [value for value in given if first <= value <= last]
    if inside:
        name = names[inside[0] - first]
        kept = tuple(value for value in range(first, last + 1) if value not in inside)
        values = ", ".join(map(str, kept[:3])) + (", ..." if len(kept) > 3 else "")
        raise ValueError(
            f"{len(names)} names, {len(kept)} classes: ignore_index {inside[0]} is the value of class {name!r}; leave "
            f"that name out and give the values of the others, label_values ({values})"
            + (", or reduce_zero_label if the first name is of value 1" if inside == [0] else "")
        )
    return tuple(dict.fromkeys((0, *given) if first else given))


def _label_map(config: DataConfig, num_classes: int, names: tuple[str, ...] | None) -> LabelMap | None:
    """What the configuration says of values or colours."""
    given = [name for name in ("label_values", "label_map", "label_colours") if getattr(config, name) is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} say the same thing; give one of them")
    if config.label_values is not None:
        if len(config.label_values) != num_classes:
            raise OptionError(f"label_values has {len(config.label_values)} values for {num_classes} classes")
        return LabelMap.from_values(config.label_values)
    for path, colours in ((config.label_map, False), (config.label_colours, True)):
        if path is not None:
            return LabelMap.read(path, names, colours=colours)
    return None


def _pairs(images: Any, labels: Any, image_suffix: str, label_suffix: str) -> list[Pair]:
    """The pairs of two folders, or of two sequences of files."""
    are_folders = [isinstance(x, (str, os.PathLike)) for x in (images, labels)]
    if all(are_folders):
        return find_pairs(Path(images), Path(labels), image_end=image_suffix, label_end=label_suffix, report=True)
    if any(are_folders) or len(images) != len(labels) or not len(images):
        came = [
            f"the folder {x}" if is_folder else f"{len(x)} files"
            for x, is_folder in zip((images, labels), are_folders, strict=True)
        ]
        raise ValueError(f"images and labels must be two folders, or equally many files; got {came[0]} and {came[1]}")
    return [(Path(image), Path(label)) for image, label in zip(images, labels, strict=True)]
