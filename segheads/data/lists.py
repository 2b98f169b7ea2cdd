"""Images and labels that a list of names names: which files are of a split where folders do not tell."""

from collections.abc import Sequence
from pathlib import Path

from segheads.data.folders import Listing, check_file, common_name, list_images, named, normal
from segheads.data.pairs import Pair, find_pairs
from segheads.errors import DataError, DataMissingError

MISSING = 10  # lines named in a message


def find_split(root: Path, split: str, *, image_suffix: str = "", label_suffix: str = "") -> list[Pair]:
    """Find the pairs of one split in a folder of one's own, sorted by name.

    They are all that `images/SPLIT` and `labels/SPLIT` hold, or else what `SPLIT.txt` lists of `images` and `labels`.

    Args:
        root: The folder.
        split: Name of the split.
        image_suffix: What follows the common name in the stems of images.
        label_suffix: The same for labels.

    Raises:
        DataMissingError: A folder, an image or a label is missing.
        DataError: A file or a folder is not what it should be.
    """
    images, labels, listing = root / "images", root / "labels", root / f"{split}.txt"
    if (images / split).is_dir():
        return find_pairs(images / split, labels / split, image_end=image_suffix, label_end=label_suffix, report=True)
    if not listing.exists():
        raise DataMissingError(
            f"there is no folder {images / split}, no list {listing.name} beside {images}, and no table {split}.csv or "
            f"{split}.parquet; one of them should tell the images"
        )
    return named_pairs(listing, images, labels, image_suffix=image_suffix, label_suffix=label_suffix)


def named_pairs(
    listing: Path, images: Path, labels: Path, *, image_suffix: str = "", label_suffix: str = ""
) -> list[Pair]:
    """Pair the images and labels that a text file names, sorted by name.

    Args:
        listing: One image a line: its path in the folder of images, or from the place of the list on, with or without
            suffix and ending.
        images: Folder of images.
        labels: Folder of labels; sub-folders as those of the images.
        image_suffix: What follows the common name in the stems of images.
        label_suffix: The same for labels.

    Raises:
        DataMissingError: A folder, or an image or a label of the list, is missing; the message has the lines.
        DataError: The list is no text, or names nothing or something twice; a file is no regular one.
    """
    image_files, label_files = list_images(images, image_suffix), list_images(labels, label_suffix)
    prefix = images.relative_to(listing.parent).as_posix() + "/" if images.is_relative_to(listing.parent) else ""
    by_file = {normal(path.relative_to(images).as_posix()): name for name, path in image_files.files.items()}
    lines: dict[str, int] = {}
    missing, unlabelled = [], []
    for number, text in read_lines(listing):
        name = _find(text, image_files, by_file, prefix, image_suffix)
        if name is None:
            missing.append(f"{text} (line {number})")
        elif name in lines:
            raise DataError(f"{listing} names {text} in line {number}, and before in line {lines[name]}; keep one")
        else:
            lines[name] = number
            if name not in label_files.files:
                unlabelled.append(f"{text} (line {number})")
    for names, folder, kind in ((missing, images, "image"), (unlabelled, labels, "label")):
        if names:
            raise DataMissingError(
                f"{len(names)} of {len(lines) + len(missing)} names in {listing} have no {kind} in {folder}: "
                f"{named(names, MISSING)}; add the {kind}s or take the names out"
            )
    if not lines:
        raise DataError(f"{listing} names no images; it should hold one name a line")
    _check_odd(image_files, lines, "an image file")
    _check_odd(label_files, lines, "a label file")
    return [(path, label_files.files[name]) for name, path in image_files.files.items() if name in lines]


def read_text(path: Path, content: str) -> str:
    """Read a text file in UTF-8.

    Args:
        path: The file.
        content: What it should hold, for the message.

    Raises:
        DataMissingError: It is not there.
        DataError: It is no regular file, or no text.
    """
    check_file(path, content)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}; it should be {content}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers from 1 on.

    Args:
        path: The file.

    Raises:
        DataMissingError: It is not there.
        DataError: It is no regular file, or no text.
    """
    lines = read_text(path, "a list of names, one a line").split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _find(text: str, images: Listing, by_file: dict[str, str], prefix: str, suffix: str) -> str | None:
    """The name of the image that a line means."""
    text = normal(text)
    for way in (text, text.replace("\\", "/")):
        for place in (way.removeprefix("./"), way.removeprefix("./").removeprefix(prefix)):
            if place in by_file:
                return by_file[place]
            for name in (place, common_name(f"{place}.", suffix)):
                if name in images.files:
                    return name
    return None


def _check_odd(listing: Listing, names: Sequence[str] | dict[str, int], kind: str) -> None:
    for name in listing.odd:
        if name in names:
            check_file(listing.files[name], kind)
