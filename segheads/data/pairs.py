"""Image files and the label files that belong to them: found by name, read together."""

import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segheads.data.folders import Listing, check_file, common_name, list_images, named
from segheads.data.images import RGB, ImageForm, Picture, fit_label, read_stored, size_of
from segheads.data.labels import read_labels, to_class_indices
from segheads.errors import DataError, DataMissingError

Pair = tuple[Path, Path]

log = logging.getLogger(__name__)


def find_pairs(
    images: Path, labels: Path, *, image_end: str = "", label_end: str = "", report: bool = False
) -> list[Pair]:
    """Pair every image of one folder with the label of the same name in another, sorted by name.

    Each folder is listed once, with its sub-folders: `city/a.jpg` belongs to `city/a.png`. Any Unicode normal form will
    do. Files that are no images by their suffix are passed over, and so are labels without an image.

    Args:
        images: Folder of images, in any format that Pillow reads.
        labels: Folder of label images.
        image_end: What follows the common name in the stems of images; others are passed over.
        label_end: The same for labels.
        report: Log a warning of one line for each folder that names what is passed over.

    Raises:
        DataMissingError: A folder is missing, an image has no label, or a file is a broken link.
        DataError: A folder holds no image files, two of the same name, or one that is no regular file.
    """
    image_files = list_images(images, image_end)
    for name in image_files.odd:
        check_file(image_files.files[name], "an image file")
    label_files = list_images(labels, label_end)
    missing = [name for name in image_files.files if name not in label_files.files]
    if missing:
        raise DataMissingError(_no_labels(image_files, labels, missing, label_end))
    for name in label_files.odd:
        if name in image_files.files:
            check_file(label_files.files[name], "a label file")
    if report:
        _report(image_files, label_files)
    return [(path, label_files.files[name]) for name, path in image_files.files.items()]


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


def read_pair(
    pair: Pair, num_classes: int, *, first: int = 0, ignored: tuple[int, ...], form: ImageForm = RGB
) -> tuple[Picture, Tensor]:
    """Read an image and its labels as classes `(H, W)`, `ignored_label(num_classes)` where ignored.

    Args:
        pair: The image file and the label file.
        num_classes: How many classes there are.
        first: The label value that means class 0.
        ignored: The label values that mean "no class".
        form: What the image holds.

    Raises:
        DataError: A file is damaged, the sizes differ, a label value is out of range, or the image has another form.
    """
    return read_pair_as(
        pair,
        lambda values: to_class_indices(values, num_classes, first=first, ignored=ignored, path=pair[1]),
        form=form,
    )


def read_pair_as(
    pair: Pair,
    to_classes: Callable[[NDArray[np.integer]], NDArray[np.integer]],
    read: Callable[[Path], NDArray[np.integer]] = read_labels,
    form: ImageForm = RGB,
) -> tuple[Picture, Tensor]:
    """Read an image and its labels as classes `(H, W)`, where these are not numbers in a row.

    The image is turned by its EXIF orientation where the label has the turned size.

    Args:
        pair: The image file and the label file.
        to_classes: Turns the values of the label file into classes, and those of "no class" into the ignored label.
        read: Reads the label file.
        form: What the image holds.

    Raises:
        DataError: A file is damaged, the sizes differ, `to_classes` meets a value that is no class, or the image has
            another form.
    """
    (image, orientation), values = read_stored(pair[0], form), read(pair[1])
    height, width = values.shape
    image = fit_label(image, orientation, (height, width), form, pair[0])
    if size_of(image) != (height, width):
        rows, columns = size_of(image)
        raise DataError(
            f"label {pair[1]} is {width}x{height} but its image {pair[0]} is {columns}x{rows} "
            "(width x height); make them the same size"
        )
    return image, torch.from_numpy(to_classes(values))


def _no_labels(found: Listing, labels: Path, missing: list[str], label_end: str) -> str:
    """Which images lack a label, and the suffixes with which names would match."""
    count, first = len(found.files), found.files[missing[0]]
    remedy = _suffixes(found.folder, labels, first) or "add the labels or take the images out"
    return (
        f"{len(missing)} of {count} images in {found.folder} have no label: "
        f"{first.relative_to(found.folder).as_posix()} needs {labels / missing[0]}{label_end}.png; {remedy}"
    )


def _suffixes(images: Path, labels: Path, image: Path) -> str:
    """Say with which suffixes an image without a label, and most others, would match; empty if with none."""
    try:
        ours, theirs = (list(list_images(folder).files) for folder in (images, labels))
    except DataError:
        return ""
    first = common_name(image.relative_to(images).as_posix(), "") or ""
    known, counts = set(theirs), dict[tuple[str, str], int]()
    lengths = {name: _common_length(first, name) for name in theirs}
    longest = max(lengths.values())
    for name in (name for name in theirs if 0 < lengths[name] == longest):
        ends = _ends(first, name, lengths[name])
        counts[ends] = counts.get(ends) or sum(
            x.endswith(ends[0]) and x[: len(x) - len(ends[0])] + ends[1] in known for x in ours
        )
    most = max(counts.values(), default=0)
    if 2 * most < len(ours):
        return ""
    best = [ends for ends, count in counts.items() if count == most]
    words = " or ".join(
        " and ".join(f"{kind}_suffix {end}" for kind, end in zip(("image", "label"), ends, strict=True) if end)
        for ends in best[:3]
    )
    return f"{'all' if most == len(ours) else most} match with {words}"


def _common_length(first: str, second: str) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _ends(first: str, second: str, length: int) -> tuple[str, str]:
    """What follows the common beginning of two names, from a separator on unless one name is all of it."""
    if length < len(first):
        cut = max(first.rfind(mark, 0, length) for mark in "_-. ")
        length = cut if cut > first.rfind("/") + 1 else length
    return first[length:], second[length:]


def _report(images: Listing, labels: Listing) -> None:
    """Name what is passed over, in one line for each folder."""
    used = {path for name, path in images.files.items()} | {labels.files[name] for name in images.files}
    others = [path.relative_to(labels.folder).as_posix() for path in labels.files.values() if path not in used]
    kinds = {"label without an image": others}
    for listing, more in ((images, {}), (labels, kinds)):
        passed = {
            reason: [name for name in names if listing.folder / name not in used]
            for reason, names in {**listing.passed_over, **more}.items()
        }
        passed = {reason: sorted(names) for reason, names in passed.items() if names}
        if passed:
            count = sum(map(len, passed.values()))
            words = "; ".join(f"{named(names)} ({reason})" for reason, names in passed.items())
            log.warning("%d file%s passed over in %s: %s", count, "" if count == 1 else "s", listing.folder, words)
