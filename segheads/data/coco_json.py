"""A JSON file of COCO's format: what it lists, checked, and its regions drawn."""

import json
import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segheads.data.folders import named
from segheads.data.lists import read_text
from segheads.errors import DataError, PackageMissingError

CONTENT = "annotations in COCO's format"
KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id"),
}
Size = tuple[int, int]


class COCOContent:
    """What a JSON file of COCO's format lists.

    Args:
        path: The file.

    Attributes:
        categories: The names of the categories, in the order of their ids.
        sizes: Height and width of each image, pixels, by file name.
        regions: For each image by file name, a triple for each annotation: what messages call it, the place of its
            category in `categories` (-1 for a crowd), its segmentation.

    Raises:
        DataMissingError: There is no such file.
        DataError: It is not of the format, or a value in it is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = self._content()
        ids = self._categories(content["categories"])
        files = self._images(content["images"])
        self.regions: dict[str, list[tuple[str, int, Any]]] = {name: [] for name in self.sizes}
        boxes, largest = [], 0.0
        for place, entry in enumerate(content["annotations"]):
            name, label = self._owner(place, entry, files, ids)
            what = f"annotation {entry.get('id', f'number {place}')} of {name}"
            segmentation = entry.get("segmentation")
            if not segmentation:
                boxes.append(what)
                continue
            if problem := _problem(segmentation, self.sizes[name]):
                raise DataError(f"{path}: {what} {problem}")
            if largest <= 1:  # after that all has been said
                largest = max(map(max, segmentation)) if isinstance(segmentation, list) else math.inf
            self.regions[name].append((what, label, segmentation))
        self._check_whole(boxes, largest, len(content["annotations"]))

    def _content(self) -> dict[str, list[dict[str, Any]]]:
        text = read_text(self.path, CONTENT)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # the first also of numbers of thousands of digits
            raise DataError(f"{self.path} is no JSON: {error}; it should be {CONTENT}") from error
        found = content if isinstance(content, dict) else {}
        lacking = [key for key in KEYS if key not in found]
        if lacking:
            holds = f"the keys {named(list(found), 6)}" if found else f"no keys ({type(content).__name__})"
            raise DataError(f"{self.path} should be {CONTENT}, but it lacks {' and '.join(lacking)}; it has {holds}")
        for kind, keys in KEYS.items():
            if not isinstance(found[kind], list) or not found[kind]:
                raise DataError(f"{self.path}: {kind} should be a list of one or more; got {_short(found[kind])}")
            for place, entry in enumerate(found[kind]):
                missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else keys
                if missing:
                    which = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
                    raise DataError(f"{self.path}: {kind}[{place}]{which} lacks {' and '.join(missing)}")
        return found

    def _categories(self, entries: list[dict[str, Any]]) -> dict[int, int]:
        """Fill `categories`; the place of each category by its id."""
        by_id: dict[int, str] = {}
        for place, entry in enumerate(entries):
            index, name = entry["id"], entry["name"]
            if not isinstance(index, int) or not isinstance(name, str) or not name.strip():
                raise DataError(
                    f"{self.path}: categories[{place}] should have a whole number as id and a name; got {_short(entry)}"
                )
            if index in by_id or name in by_id.values():
                raise DataError(
                    f"{self.path}: categories[{place}], {name!r} of id {index}, has the id or the name of another one"
                )
            by_id[index] = name
        ordered = sorted(by_id)
        self.categories = tuple(by_id[index] for index in ordered)
        return {index: place for place, index in enumerate(ordered)}

    def _images(self, entries: list[dict[str, Any]]) -> dict[Any, str]:
        """Fill `sizes`; the file name of each image by its id."""
        self.sizes: dict[str, Size] = {}
        files: dict[Any, str] = {}
        for place, entry in enumerate(entries):
            index, name, height, width = (entry[key] for key in ("id", "file_name", "height", "width"))
            if not isinstance(index, int | str) or not isinstance(name, str) or not name:
                raise DataError(f"{self.path}: images[{place}] should have an id and a file_name; got {_short(entry)}")
            if not all(isinstance(side, int | float) and side == side // 1 >= 1 for side in (height, width)):
                raise DataError(
                    f"{self.path}: image {name} should have height and width in pixels; got height {height!r}, "
                    f"width {width!r}"
                )
            if index in files:
                raise DataError(f"{self.path}: images {files[index]} and {name} have the same id {index!r}")
            if name in self.sizes:
                raise DataError(f"{self.path} lists the image {name} twice; keep one entry per file")
            files[index], self.sizes[name] = name, (int(height), int(width))
        return files

    def _owner(
        self, place: int, entry: Mapping[str, Any], files: Mapping[Any, str], ids: Mapping[int, int]
    ) -> tuple[str, int]:
        """The file name and the label of an annotation."""
        image, category, crowd = entry["image_id"], entry["category_id"], entry.get("iscrowd") or 0
        what = f"annotation {entry.get('id', f'number {place}')}"
        if not isinstance(image, int | str) or image not in files:
            raise DataError(f"{self.path}: {what} is of image {_short(image)}, an id that no image has")
        if not isinstance(category, int) or category not in ids:
            raise DataError(
                f"{self.path}: {what} of {files[image]} is of category {_short(category)}; the ids of categories are "
                f"{named(list(map(str, ids)), 8)}"
            )
        if crowd not in (0, 1):
            raise DataError(f"{self.path}: {what} of {files[image]} has iscrowd {_short(crowd)}; it should be 0 or 1")
        return files[image], -1 if crowd else ids[category]

    def _check_whole(self, boxes: list[str], largest: float, count: int) -> None:
        if boxes:
            raise DataError(
                f"{len(boxes)} of {count} annotations in {self.path} have no segmentation, at most a box: "
                f"{named(boxes)}; a box does not say which pixels are of a class: draw regions, or take these out"
            )
        if largest <= 1:
            raise DataError(
                f"{self.path}: no coordinate of its polygons is above 1, so they seem to be shares of the image's "
                "size; they should be pixels"
            )


def drawn(segmentation: Any, size: Size) -> NDArray[np.bool_]:
    """The pixels `(H, W)` of one annotation.

    Args:
        segmentation: Polygons, a list of `[x, y, x, y, ...]` in pixels; or run lengths, `{"size": ..., "counts": ...}`.
        size: Height and width of the image, pixels.

    Raises:
        ValueError: The run lengths are not of as many pixels as the image has.
        PackageMissingError: pycocotools is not installed.

    Examples:
        >>> drawn({"size": [2, 3], "counts": [1, 3, 2]}, (2, 3)).astype(int)
        array([[0, 1, 0],
               [1, 1, 0]])
    """
    height, width = size
    if isinstance(segmentation, list):
        masks = masks_of_pycocotools()
        counts = masks.merge(masks.frPyObjects(segmentation, height, width))["counts"].decode()
    else:
        counts = segmentation["counts"]
    # not masks.decode, which gives whatever lies in memory where runs end too early
    runs = run_lengths(counts) if isinstance(counts, str) else counts
    if problem := _problem_of_sum(runs, size):
        raise ValueError(problem)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T  # column by column


def run_lengths(text: str) -> list[int]:
    """The run lengths in COCO's compressed form: 5 bits a character, differences to the last but one from the 4th on.

    Args:
        text: The characters, those of codes 48 to 111.

    Raises:
        ValueError: Another character is among them, or the last number is cut off.

    Examples:
        >>> run_lengths("34=")
        [3, 4, 13]
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"has the character {character!r} in its compressed run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift or not runs:
        raise ValueError("has compressed run lengths that are cut off")
    return runs


def masks_of_pycocotools() -> Any:
    """The module that draws polygons.

    Raises:
        PackageMissingError: It is not installed.
    """
    try:
        return import_module("pycocotools.mask")
    except ModuleNotFoundError as error:
        raise PackageMissingError(
            f"{CONTENT} need pycocotools, which is not installed: pip install 'segheads[coco]'"
        ) from error


def _problem(segmentation: Any, size: Size) -> str:
    """What is wrong with a segmentation, for a message; empty for nothing."""
    if isinstance(segmentation, dict):
        return _problem_of_runs(segmentation, size)
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation):
        return f"should have a list of polygons, or size and counts, as segmentation; got {_short(segmentation)}"
    for place, part in enumerate(segmentation):
        which = f"has a polygon (number {place}) of {len(part)} numbers"
        if len(part) % 2:
            return f"{which}, an odd number; they should be x, y, x, y, ..."
        if len(part) < 6:
            return f"{which}; three points or more make one, so 6 numbers"
        if not all(isinstance(value, int | float) for value in part) or not math.isfinite(sum(part)):
            return f"{which}, not all of which are finite numbers"
    return "".join(_outside(segmentation, size))


def _outside(polygons: list[list[float]], size: Size) -> Iterator[str]:
    for axis, side, word in ((0, size[1], "x"), (1, size[0], "y")):
        low = min(min(part[axis::2]) for part in polygons)
        high = max(max(part[axis::2]) for part in polygons)
        if low > side or high < 0:
            yield (
                f"lies outside of the image: {word} is {low:g} to {high:g}, and the image is {size[1]}x{size[0]} "
                "(width x height)"
            )
            return


def _problem_of_runs(segmentation: Mapping[str, Any], size: Size) -> str:
    found, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(found, list) or tuple(found) != size:
        return f"has run lengths of size {_short(found)} (height, width), and its image is {list(size)}"
    if isinstance(counts, list):
        if not all(isinstance(run, int) for run in counts) or not counts:
            return f"should have whole numbers as counts; got {_short(counts)}"
        return _problem_of_sum(counts, size)
    if not isinstance(counts, str):
        return f"should have run lengths or their compressed text as counts; got {_short(counts)}"
    return ""


def _problem_of_sum(runs: list[int], size: Size) -> str:
    if min(runs) < 0:
        return f"has a run length of {min(runs)} pixels"
    pixels = size[0] * size[1]
    return "" if sum(runs) == pixels else f"has run lengths of {sum(runs)} pixels, and its image has {pixels}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
