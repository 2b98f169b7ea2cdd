"""Cityscapes: street scenes of 50 cities, 19 classes."""

import os
from functools import partial
from pathlib import Path

from torch import Tensor

from segheads.classes import Palette
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.images import Picture
from segheads.data.labels import class_table, look_up_classes
from segheads.data.pairs import Pair, find_pairs, read_pair, read_pair_as
from segheads.errors import DataError, DataMissingError

CLASS_NAMES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
PALETTE: Palette = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
# The label ids of the 19 classes among the 34 of the files, 0 to 33; the others do not count in the evaluation.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

_IMAGE, _LABEL_IDS, _TRAIN_IDS = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"
_TABLE = class_table(dict.fromkeys(range(34), 255) | {value: index for index, value in enumerate(LABEL_IDS)})


class Cityscapes(SegmentationDataset):
    """The 19 classes of Cityscapes that count in its evaluation (Cordts et al., CVPR 2016), finely annotated.

    Expects the archives `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip`, unpacked into one folder:

    ```text
    root/
      leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
      gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png
      leftImg8bit/val/frankfurt/...
      gtFine/val/frankfurt/...
    ```

    The ids in `labelIds` become the official train ids, 0 to 18, and 255 for what the evaluation leaves out. A city
    without these files is read from its `labelTrainIds`, which the authors' scripts write. The labels of the test
    images are not public, so there is no such split.

    Args:
        root: The folder that holds `leftImg8bit/` and `gtFine/`.
        split: `"train"` (2975 images) or `"val"` (500).

    Shape:
        As every `SegmentationDataset`; 19 classes.

    Raises:
        DataMissingError: A folder or a label is missing.
        DataError: A folder is empty.
        ValueError: The split is unknown.
    """

    usual_root = "data/cityscapes"
    terms = "https://www.cityscapes-dataset.com/license/"

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, ("train", "val"))
        images, labels = (Path(root) / kind / split for kind in ("leftImg8bit", "gtFine"))
        for folder in (images, labels):
            if not folder.is_dir():
                raise DataMissingError(
                    f"there is no folder {folder}; Cityscapes keeps images in leftImg8bit/{split}/CITY/ and labels in "
                    f"gtFine/{split}/CITY/ below its root, so give that root"
                )
        cities = sorted(entry.name for entry in os.scandir(images) if entry.is_dir() and entry.name[0] != ".")
        if not cities:
            raise DataError(f"{images} holds no folders; it should hold one for each city, such as aachen")
        self.files = [pair for city in cities for pair in _pairs_of_city(images / city, labels / city)]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return city, sequence and frame, such as `aachen_000000_000019`."""
        return self.files[index][0].stem.removesuffix(_IMAGE)

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, train ids, 255 where ignored."""
        pair = self.files[index]
        if pair[1].stem.endswith(_TRAIN_IDS):
            return read_pair(pair, self.num_classes, ignored=(255,), form=self.image_form)
        expected = "label ids of Cityscapes are 0 to 33"
        return read_pair_as(
            pair, partial(look_up_classes, table=_TABLE, expected=expected, path=pair[1]), form=self.image_form
        )


def _pairs_of_city(images: Path, labels: Path) -> list[Pair]:
    kinds = (_LABEL_IDS, _TRAIN_IDS)
    kind = next((end for end in kinds if any(labels.glob(f"*{end}.png"))), _LABEL_IDS)
    return find_pairs(images, labels, image_end=_IMAGE, label_end=kind)
