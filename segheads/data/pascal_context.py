"""PASCAL Context: everyday photos of PASCAL VOC 2010, labelled whole, 59 classes and background."""

import os
from pathlib import Path

from torch import Tensor
from typing_extensions import Self, override

from segheads.classes import Palette
from segheads.data import ade20k
from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.images import Picture
from segheads.data.pairs import listed_pairs, read_pair
from segheads.errors import DataMissingError

# The 59 most frequent of the 459 names, in the order of these, which is the alphabet's.
_NAMES = """
background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car,
cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse,
keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves,
sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
"""
CLASS_NAMES = tuple(name.strip() for name in _NAMES.replace("\n", " ").split(","))
PALETTE: Palette = ade20k.PALETTE[: len(CLASS_NAMES)]  # the data set has none; this is what MMSegmentation draws


class PascalContext(SegmentationDataset):
    """PASCAL Context (Mottaghi et al., CVPR 2014) with 59 classes, or with background as one more.

    Expects VOC 2010 with the labels and lists that MMSegmentation's converter writes:

    ```text
    VOCdevkit/VOC2010/
      JPEGImages/2008_000002.jpg
      SegmentationClassContext/2008_000002.png
      ImageSets/SegmentationContext/train.txt
      ImageSets/SegmentationContext/val.txt
    ```

    In the files 0 is background, which stands for the other 400 names of the data set, and 1 to 59 are the classes in
    the order of the alphabet, aeroplane to wood. Label files in another order, such as that of the authors'
    `59_labels.txt` with the twenty classes of VOC first, look the same and would get wrong names. The data set has no
    colours of its own: these are ADE20K's first 60, as in MMSegmentation.

    Args:
        root: The folder `VOC2010`, or `VOCdevkit`, or the one that holds it.
        split: `"train"` (4998 images) or `"val"` (5105).
        num_classes: With 60, background is class 0; with 59, it is ignored and aeroplane is class 0.

    Shape:
        As every `SegmentationDataset`; 60 or 59 classes.

    Raises:
        DataMissingError: A folder, a list, an image or a label is missing.
        DataError: A list names nothing or something twice.
        ValueError: The split or the number of classes is unknown.
    """

    usual_root = "data/VOCdevkit"
    terms = "https://cs.stanford.edu/~roozbeh/pascal-context/"
    options = frozenset({"num_classes"})

    def __init__(self, root: str | os.PathLike[str], split: str = "train", *, num_classes: int = 60):
        if num_classes not in (59, 60):
            raise ValueError(f"num_classes must be 59, or 60 with background, not {num_classes}")
        super().__init__(CLASS_NAMES[-num_classes:], PALETTE[-num_classes:])
        check_split(split, ("train", "val"))
        root = Path(root)
        base = next((path for path in (root / "VOCdevkit/VOC2010", root / "VOC2010") if path.is_dir()), root)
        listing = base / "ImageSets" / "SegmentationContext" / f"{split}.txt"
        images, labels = base / "JPEGImages", base / "SegmentationClassContext"
        for path in (images, labels, listing):
            if not path.exists():
                raise DataMissingError(
                    f"there is no {path}; PascalContext needs JPEGImages/, SegmentationClassContext/ and "
                    f"ImageSets/SegmentationContext/{split}.txt in the folder VOC2010, which may be {root} or lie in it"
                )
        self.files = listed_pairs(listing, images, labels)

    @classmethod
    @override
    def open(cls, config: DataConfig, split: str, *, seed: int = 0) -> Self:
        """Open one split, with background unless `num_classes` is 59."""
        num_classes = 60 if config.num_classes is None else config.num_classes
        return cls(cls.find_root(config), split, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the stem of the image file."""
        return self.files[index][0].stem

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where ignored."""
        if self.num_classes == 60:
            return read_pair(self.files[index], 60, ignored=(255,), form=self.image_form)
        return read_pair(self.files[index], 59, first=1, ignored=(0, 255), form=self.image_form)
