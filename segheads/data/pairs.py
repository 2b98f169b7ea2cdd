"""Image files and the label files that belong to them: found by name, read together."""

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from segheads.data.images import DataError, read_image, read_labels, to_class_indices

Pair = tuple[Path, Path]

# A literal list: asking Pillow loads all its plugins, and then every Image.open tries more of them.
# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
])
# fmt: on


def find_pairs(images: Path, labels: Path) -> list[Pair]:
    """Pair every image of one folder with the label of the same stem in another, sorted by name.

    Each folder is listed once. Files that are no images by their suffix are passed over, and so are labels without an
    image.

    Args:
        images: Folder of images, in any format that Pillow reads.
        labels: Folder of label images.

    Raises:
        FileNotFoundError: A folder is missing, or an image has no label.
        ValueError: A folder holds no image files, or two of the same stem.
    """
    image_files, label_files = _files_by_stem(images), _files_by_stem(labels)
    missing = sorted(image_files.keys() - label_files.keys())
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(image_files)} images in {images} have no label: {image_files[missing[0]].name} "
            f"needs {labels / missing[0]}.png; add the labels or take the images out"
        )
    return [(image_files[stem], label_files[stem]) for stem in sorted(image_files)]


def read_pair(pair: Pair, num_classes: int, *, first: int = 0, ignored: tuple[int, ...]) -> tuple[Image.Image, Tensor]:
    """Read an image as RGB and its labels as uint8 `(H, W)` with 255 where ignored.

    Args:
        pair: The image file and the label file.
        num_classes: How many classes there are.
        first: The label value that means class 0.
        ignored: The label values that mean "no class".

    Raises:
        DataError: A file is damaged, the sizes differ, or a label value is out of range.
    """
    image, values = read_image(pair[0]), read_labels(pair[1])
    height, width = values.shape
    if image.size != (width, height):
        raise DataError(
            f"label {pair[1]} is {width}x{height} but its image {pair[0]} is {image.width}x{image.height} "
            "(width x height); make them the same size"
        )
    return image, torch.from_numpy(to_class_indices(values, num_classes, first=first, ignored=ignored, path=pair[1]))


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; it should hold image files such as NAME.png")
    files: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in IMAGE_SUFFIXES or stem.startswith("."):
                continue
            if stem in files:
                raise ValueError(f"{folder} holds both {files[stem].name} and {entry.name}; keep one file per name")
            files[stem] = folder / entry.name
    if not files:
        raise ValueError(f"{folder} holds no image files; it should hold files such as NAME.png")
    return files
