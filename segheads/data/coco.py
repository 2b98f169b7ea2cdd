"""Images whose labels are regions in one JSON file, in the format of COCO."""

import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self, override

from segheads.classes import BACKGROUND, Classes, distinct_colours
from segheads.data.coco_json import COCOContent, drawn, masks_of_pycocotools
from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.folders import IMAGE_SUFFIXES, named, normal
from segheads.data.images import RGB, ImageForm, Picture, fit_label, read_stored, size_of
from segheads.errors import DataError, DataMissingError, ImageFormError

ROBOFLOW = "_annotations.coco.json"
_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
_YEARS = ("2017", "2014", "")
log = logging.getLogger(__name__)


class _Sample(NamedTuple):
    """An image, the file that has its labels, its name there, its size (height, width), and its regions, pickled."""

    image: Path
    label: Path
    name: str
    size: tuple[int, int]
    regions: bytes  # many small objects would be copied into every process that reads


class COCODataset(SegmentationDataset):
    """Polygons and run lengths (RLE) in a JSON file of COCO's format, drawn as one label per pixel.

    [The format](https://cocodataset.org/#format-data) is that of the instances of COCO (Lin et al., ECCV 2014), which
    CVAT, Label Studio and Roboflow export. In a root, each split is found in one of these places:

    ```text
    root/
      annotations/instances_train2017.json    with train2017/a.jpg or images/train2017/a.jpg
      annotations/instances_train.json        with train/a.jpg, images/train/a.jpg, or else images/a.jpg
      annotations/train.json                  with the same
      train/_annotations.coco.json            with train/a.jpg
    ```

    `val` may be `valid`, and 2017 be 2014. Categories become classes in the order of their ids. Where regions overlap,
    the smaller one is seen; those with `iscrowd` 1 are ignored. A warning names images without annotations and image
    files that are not listed. Polygons need pycocotools: `pip install "segheads[coco]"`.

    Args:
        annotations: The JSON file.
        images: The folder from which its file names start.
        background: What pixels are that no annotation covers: `"class"` for a class called background, before all
            others (or the category of that name, if there is one); `"ignore"` for no class.
        image_form: Channels and bit depth of the images, and what their EXIF orientation means; by default RGB of 8
            bit, turned where the JSON has the turned size.

    Shape:
        As every `SegmentationDataset`.

    Raises:
        DataMissingError: A file or a folder is missing, or images that the JSON lists.
        DataError: The JSON is not what it should be; the message names the file, the image and the annotation.
        PackageMissingError: pycocotools is not installed.
        ValueError: `background` is neither.
    """

    usual_root = "data/coco"
    options = frozenset({"background", "in_chans", "bit_depth", "band_mean", "band_std", "exif"})
    labels_share_a_file = True

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        background: Literal["class", "ignore"] = "class",
        image_form: ImageForm = RGB,
    ):
        if background not in ("class", "ignore"):
            raise ValueError(f"background must be 'class' or 'ignore'; got {background!r}")
        masks_of_pycocotools()
        content = COCOContent(Path(annotations))
        adds = background == "class" and BACKGROUND not in content.categories
        names = (BACKGROUND, *content.categories) if adds else content.categories
        colours = distinct_colours(len(content.categories))
        super().__init__(names, ((0, 0, 0), *colours) if adds else colours)
        self.classes = Classes(names, self.palette, has_background=adds)
        self.image_form = image_form
        self.uncovered = names.index(BACKGROUND) if background == "class" else self.ignore_index
        self.files = self._found(content, Path(images), int(adds))

    @classmethod
    @override
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open a split of a folder that has one of the layouts above."""
        annotations, images = find_annotations(cls.find_root(config), split)
        return cls(annotations, images, background=config.background or "class", image_form=config.image_form)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the image's file name in the JSON, without its ending."""
        return os.path.splitext(self.files[index].name)[0]

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the image and its labels `(H, W)`, drawn from the annotations."""
        sample = self.files[index]
        image, orientation = read_stored(sample.image, self.image_form)
        image = fit_label(image, orientation, sample.size, self.image_form, sample.image)
        (rows, columns), (height, width) = size_of(image), sample.size
        if (rows, columns) != (height, width):
            raise ImageFormError(
                f"image {sample.image} is {columns}x{rows}, but {sample.label} says {width}x{height} (width x height); "
                "its annotations were drawn on another size of it",
                "size",
            )
        labels = np.full(sample.size, self.uncovered, np.uint8 if self.num_classes <= 255 else np.int16)
        masks = [(label, _mask(sample, what, region)) for what, label, region in pickle.loads(sample.regions)]
        for label, mask in sorted(masks, key=lambda pair: -np.count_nonzero(pair[1])):
            labels[mask] = label
        return image, torch.from_numpy(labels)

    def _found(self, content: COCOContent, folder: Path, first: int) -> list[_Sample]:
        """The samples, sorted by name; what is left out, or empty, is named in a warning."""
        if not folder.is_dir():
            raise DataMissingError(f"there is no folder {folder}; it should hold the images that {content.path} lists")
        files = _files(content, folder)
        samples = [
            _Sample(
                files[name],
                content.path,
                name,
                content.sizes[name],
                pickle.dumps(
                    [
                        (what, self.ignore_index if place < 0 else place + first, segmentation)
                        for what, place, segmentation in content.regions[name]
                    ]
                ),
            )
            for name in sorted(files)
        ]
        if empty := [name for name in sorted(files) if not content.regions[name]]:
            are = "ignored" if self.uncovered == self.ignore_index else BACKGROUND
            log.warning(
                "%d of %d images in %s have no annotation, and are all %s: %s",
                *(len(empty), len(files), content.path, are, named(empty)),
            )
        return samples


def find_annotations(root: str | os.PathLike[str], split: str) -> tuple[Path, Path]:
    """Find the JSON file of a split, and its folder of images, in the usual places.

    Args:
        root: The folder that holds them.
        split: `"train"`, `"val"` or `"test"`.

    Raises:
        DataMissingError: There is none; the message lists the places.
        DataError: There are two.
        ValueError: The split is unknown.
    """
    check_split(split, tuple(_SPLITS))
    root, places = Path(root), dict[Path, tuple[Path, ...]]()
    for name in _SPLITS[split]:
        for year in _YEARS:
            folders = (root / f"{name}{year}", root / "images" / f"{name}{year}")
            places[root / "annotations" / f"instances_{name}{year}.json"] = folders
        places[root / "annotations" / f"{name}.json"] = folders
        places[root / name / ROBOFLOW] = (root / name,)
    annotations = _only(root, f"annotation file of {split}", list(places), [path for path in places if path.exists()])
    own, shared = places[annotations], root / "images"
    found = [path for path in own if path.is_dir()] or [path for path in (shared,) if path.is_dir()]
    return annotations, _only(root, f"folder of images for {annotations.name}", [*own, shared], found)


def _mask(sample: _Sample, what: str, segmentation: Any) -> NDArray[np.bool_]:
    try:
        return drawn(segmentation, sample.size)
    except ValueError as error:
        raise DataError(f"{sample.label}: {what} {error}") from error


def _only(root: Path, kind: str, places: Sequence[Path], found: Sequence[Path]) -> Path:
    if not found:
        looked = ", ".join(path.relative_to(root).as_posix() for path in places)
        raise DataMissingError(f"there is no {kind} in {root}; looked for {looked}")
    if len(found) > 1:
        raise DataError(
            f"{root} holds more than one {kind}: {' and '.join(path.relative_to(root).as_posix() for path in found)}; "
            "leave one there"
        )
    return found[0]


def _files(content: COCOContent, folder: Path) -> dict[str, Path]:
    """The image file of each name in the JSON, in any Unicode form; others beside them are named in a warning."""
    listings: dict[Path, dict[str, str]] = {}
    files: dict[str, Path] = {}
    names: dict[str, str] = {}
    missing = []
    for name in content.sizes:
        path: Path | None = folder
        for part in PurePosixPath(name.replace("\\", "/")).parts:
            if path is not None and path not in listings:
                listings[path] = {normal(entry): entry for entry in os.listdir(path)} if path.is_dir() else {}
            stored = listings[path].get(normal(part)) if path is not None else None
            path = path / stored if path is not None and stored is not None else None
        if path is None:
            missing.append(name)
            continue
        files[name] = path
        if (other := names.setdefault(os.path.splitext(path)[0], name)) != name:
            raise DataError(f"{content.path} lists both {other} and {name}; keep one file per name")
    if missing:
        raise DataMissingError(
            f"{len(missing)} of {len(content.sizes)} images that {content.path} lists are not in {folder}: "
            f"{named(missing)}; add them, or take them out of the JSON"
        )
    used = set(files.values())
    others = sorted(
        (path / entry).relative_to(folder).as_posix()
        for path, entries in listings.items()
        for entry in entries.values()
        if os.path.splitext(entry)[1].lower() in IMAGE_SUFFIXES and path / entry not in used
    )
    if others:
        log.warning(
            "%d image files in %s are passed over, since %s does not list them: %s",
            *(len(others), folder, content.path.name, named(others)),
        )
    return files
