"""PASCAL VOC 2012: everyday photos, 20 classes of objects and background."""

import os
from pathlib import Path

from torch import Tensor

from segheads.classes import Palette
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.images import Picture
from segheads.data.pairs import Pair, listed_pairs, read_pair
from segheads.errors import DataMissingError

_NAMES = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
person, pottedplant, sheep, sofa, train, tvmonitor
"""
CLASS_NAMES = tuple(name.strip() for name in _NAMES.replace("\n", " ").split(","))


def _colour(index: int) -> tuple[int, int, int]:
    """The development kit's: every third bit of the index is a channel's, from its highest on."""
    red, green, blue = (sum((index >> (3 * k + c) & 1) << (7 - k) for k in range(3)) for c in range(3))
    return red, green, blue


PALETTE: Palette = tuple(map(_colour, range(len(CLASS_NAMES))))


class VOC2012(SegmentationDataset):
    """PASCAL VOC 2012 (Everingham et al., IJCV 2015), segmentation: 20 classes of objects and background.

    Expects `VOCtrainval_11-May-2012.tar` as it is:

    ```text
    VOCdevkit/VOC2012/
      JPEGImages/2007_000032.jpg
      SegmentationClass/2007_000032.png
      ImageSets/Segmentation/train.txt
      ImageSets/Segmentation/val.txt
      ImageSets/Segmentation/trainval.txt
    ```

    The borders of objects, and what is hard to tell, are 255 in the files and ignored.

    Args:
        root: The folder `VOC2012`, or `VOCdevkit`, or the one that holds it.
        split: `"train"` (1464 images), `"val"` (1449) or `"trainval"` (both).

    Shape:
        As every `SegmentationDataset`; 21 classes.

    Raises:
        DataMissingError: A folder, a list, an image or a label is missing.
        DataError: A list names nothing or something twice.
        ValueError: The split is unknown.
    """

    usual_root = "data/VOCdevkit"
    terms = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, ("train", "val", "trainval"))
        root = Path(root)
        self._base = next((path for path in (root / "VOCdevkit/VOC2012", root / "VOC2012") if path.is_dir()), root)
        self.files = self._find(split)

    def _find(self, split: str) -> list[Pair]:
        return self._listed(split, "SegmentationClass")

    def _listed(self, listing: str, labels: str) -> list[Pair]:
        """The pairs of a list; labels of all its names lie in one folder."""
        paths = (self._base / "JPEGImages", self._base / labels, self._base / f"ImageSets/Segmentation/{listing}.txt")
        for path in paths:
            if not path.exists():
                raise DataMissingError(
                    f"there is no {path}; {type(self).__name__} needs JPEGImages/, {labels}/ and "
                    f"ImageSets/Segmentation/{listing}.txt in VOC2012, which may be {self._base} or lie in it"
                )
        return listed_pairs(paths[2], *paths[:2])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the stem of the image file."""
        return self.files[index][0].stem

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where ignored."""
        return read_pair(self.files[index], self.num_classes, ignored=(255,), form=self.image_form)


class VOC2012Aug(VOC2012):
    """PASCAL VOC 2012 with the labels of SBD (Hariharan et al., ICCV 2011) beside its own for training.

    Expects, beside what `VOC2012` needs for `"val"`, the folder `SegmentationClassAug` and the names of the images:
    `ImageSets/Segmentation/train_aug.txt` or `trainaug.txt`, whose labels are all in that folder; or `aug.txt`, as
    MMSegmentation's converter writes it, for those that come on top of `train.txt`.

    Args:
        root: As `VOC2012`.
        split: `"train"` (10,582 images) or `"val"` (1449, VOC's own).

    Shape:
        As every `SegmentationDataset`; 21 classes.

    Raises:
        DataMissingError: A folder, a list, an image or a label is missing.
        DataError: A list names nothing or something twice.
        ValueError: The split is unknown.
    """

    def _find(self, split: str) -> list[Pair]:
        check_split(split, ("train", "val"))
        if split == "val":
            return super()._find(split)
        lists = self._base / "ImageSets" / "Segmentation"
        for name in ("train_aug", "trainaug"):
            if (lists / f"{name}.txt").exists():
                return self._listed(name, "SegmentationClassAug")
        more = self._listed("aug", "SegmentationClassAug")
        known = {image for image, _ in more}
        return sorted([*more, *(pair for pair in super()._find("train") if pair[0] not in known)])
