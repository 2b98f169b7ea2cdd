"""Image files and the label files that belong to them: found by name, read together."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segheads.data.images import read_image
from segheads.data.labels import read_labels, to_class_indices
from segheads.errors import DataError, DataMissingError

Pair = tuple[Path, Path]

# A literal list: asking Pillow loads all its plugins, and then every Image.open tries more of them.
# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
])
# fmt: on


def find_pairs(images: Path, labels: Path, *, image_end: str = "", label_end: str = "") -> list[Pair]:
    """Pair every image of one folder with the label of the same stem in another, sorted by name.

    Each folder is listed once. Files that are no images by their suffix are passed over, and so are labels without an
    image.

    Args:
        images: Folder of images, in any format that Pillow reads.
        labels: Folder of label images.
        image_end: What follows the common name in the stems of images; others are passed over.
        label_end: The same for labels.

    Raises:
        DataMissingError: A folder is missing, or an image has no label.
        DataError: A folder holds no image files, or two of the same stem.
    """
    image_files, label_files = _files_by_name(images, image_end), _files_by_name(labels, label_end)
    missing = sorted(image_files.keys() - label_files.keys())
    if missing:
        raise DataMissingError(
            f"{len(missing)} of {len(image_files)} images in {images} have no label: {image_files[missing[0]].name} "
            f"needs {labels / missing[0]}{label_end}.png; add the labels or take the images out"
        )
    return [(image_files[name], label_files[name]) for name in sorted(image_files)]


def listed_pairs(listing: Path, images: Path, labels: Path, *, label_suffix: str = ".png") -> list[Pair]:
    """Pair the images and labels that a text file names, one name a line without suffix, sorted by name.

    Each folder is listed once. Files that the text file does not name are passed over.

    Args:
        listing: The text file.
        images: Folder of the images, `NAME.jpg`.
        labels: Folder of the labels.
        label_suffix: What follows the name in the files of labels.

    Raises:
        DataMissingError: The text file, a folder, an image or a label is missing.
        DataError: The text file is no text, or names nothing or something twice.
    """
    if not listing.is_file():
        raise DataMissingError(f"there is no file {listing}; it should hold the names of the images, one a line")
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{listing} is no text in UTF-8: {error}; it should hold one name a line") from error
    names = sorted(filter(None, map(str.strip, text.splitlines())))
    if not names:
        raise DataError(f"{listing} names no images; it should hold one name a line, without suffix")
    for name, following in itertools.pairwise(names):
        if name == following:
            raise DataError(f"{listing} names {name} twice; keep one line per image")
    for folder, suffix, kind in ((images, ".jpg", "image"), (labels, label_suffix, "label")):
        if not folder.is_dir():
            raise DataMissingError(f"there is no folder {folder}; it should hold files such as {names[0]}{suffix}")
        there = set(os.listdir(folder))
        missing = [name for name in names if name + suffix not in there]
        if missing:
            raise DataMissingError(
                f"{len(missing)} of {len(names)} names in {listing} have no {kind}: {missing[0]} needs "
                f"{folder / missing[0]}{suffix}; add the {kind}s or take the names out"
            )
    return [(images / f"{name}.jpg", labels / f"{name}{label_suffix}") for name in names]


def read_pair(pair: Pair, num_classes: int, *, first: int = 0, ignored: tuple[int, ...]) -> tuple[Image.Image, Tensor]:
    """Read an image as RGB and its labels as classes `(H, W)`, `ignored_label(num_classes)` where ignored.

    Args:
        pair: The image file and the label file.
        num_classes: How many classes there are.
        first: The label value that means class 0.
        ignored: The label values that mean "no class".

    Raises:
        DataError: A file is damaged, the sizes differ, or a label value is out of range.
    """
    return read_pair_as(
        pair,
        lambda values: to_class_indices(values, num_classes, first=first, ignored=ignored, path=pair[1]),
    )


def read_pair_as(
    pair: Pair,
    to_classes: Callable[[NDArray[np.integer]], NDArray[np.integer]],
    read: Callable[[Path], NDArray[np.integer]] = read_labels,
) -> tuple[Image.Image, Tensor]:
    """Read an image as RGB and its labels as classes `(H, W)`, where these are not numbers in a row.

    Args:
        pair: The image file and the label file.
        to_classes: Turns the values of the label file into classes, and those of "no class" into the ignored label.
        read: Reads the label file.

    Raises:
        DataError: A file is damaged, the sizes differ, or `to_classes` meets a value that is no class.
    """
    image, values = read_image(pair[0]), read(pair[1])
    height, width = values.shape
    if image.size != (width, height):
        raise DataError(
            f"label {pair[1]} is {width}x{height} but its image {pair[0]} is {image.width}x{image.height} "
            "(width x height); make them the same size"
        )
    return image, torch.from_numpy(to_classes(values))


def _files_by_name(folder: Path, end: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataMissingError(f"there is no folder {folder}; it should hold image files such as NAME{end}.png")
    files: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in IMAGE_SUFFIXES or stem.startswith(".") or not stem.endswith(end):
                continue
            name = stem.removesuffix(end)
            if name in files:
                raise DataError(f"{folder} holds both {files[name].name} and {entry.name}; keep one file per name")
            files[name] = folder / entry.name
    if not files:
        raise DataError(f"{folder} holds no image files; it should hold files such as NAME{end}.png")
    return files
