"""CamVid: street scenes filmed from a car, 11 classes."""

import os
from pathlib import Path

from torch import Tensor

from segheads.classes import Palette
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.images import Picture
from segheads.data.pairs import find_pairs, read_pair
from segheads.errors import DataMissingError

CLASS_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE: Palette = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
UNLABELLED = 11


class CamVid(SegmentationDataset):
    """The 11-class CamVid of the SegNet tutorial (Brostow et al. 2009; Badrinarayanan et al. 2017).

    Expects `train/ trainannot/ val/ valannot/` (and `test/ testannot/` for that split) below `root`, images as PNG or
    JPEG, labels as PNG of values 0 to 10, and 11 where unlabelled.

    Args:
        root: The folder that holds `train/`, `trainannot/` and so on.
        split: `"train"`, `"val"` or `"test"`.

    Shape:
        As every `SegmentationDataset`; 11 classes.

    Raises:
        DataMissingError: A folder or a label is missing.
        DataError: A folder is empty.
        ValueError: The split is unknown.
    """

    usual_root = "data/camvid"
    terms = "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/"

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, ("train", "val", "test"))
        images, labels = Path(root) / split, Path(root) / f"{split}annot"
        for folder in (images, labels):
            if not folder.is_dir():
                raise DataMissingError(
                    f"there is no folder {folder}; CamVid keeps images in {split}/ and labels in {split}annot/ "
                    "below its root, so give that root"
                )
        self.files = find_pairs(images, labels)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the stem of the image file."""
        return self.files[index][0].stem

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where unlabelled."""
        return read_pair(self.files[index], self.num_classes, ignored=(UNLABELLED,), form=self.image_form)
