"""COCO-Stuff, 10K and 164K: photos of COCO, labelled whole, 80 classes of things and 91 of stuff."""

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from segheads.classes import Palette
from segheads.data.dataset import SegmentationDataset, check_split
from segheads.data.images import Picture
from segheads.data.labels import class_table, look_up_classes
from segheads.data.pairs import find_pairs, listed_pairs, read_pair, read_pair_as
from segheads.errors import DataError, DataMissingError, PackageMissingError

# The authors' list of labels, without the eleven that COCO itself took out.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other,
hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea,
shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other,
towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood,
water-other, waterdrops, window-blind, window-other, wood
"""
# The authors shuffle a colour map in MATLAB and publish no table; these are MMSegmentation's (162 different ones).
_COLOURS = """
00c040 00c040 004060 80c0c0 004040 00c0e0 00c0c0 80c040 00c060 80c040 8020c0 0000e0 000040 00a0c0 800060 8000c0 0020c0
8080e0 0000c0 80a0c0 808000 800020 802000 800080 408020 00a000 000000 c080a0 002000 008080 4080a0 80a000 008000 c08020
806080 000080 400020 00e080 800000 c000a0 006080 808080 4000a0 80e080 808040 c00020 806000 8000c0 008020 40e000 000040
8080a0 406000 0080c0 0080a0 c0e000 008040 808020 c02080 0040c0 000020 40a080 804040 8000a0 402080 80c0c0 0000a0 c0a080
80c000 800060 c02000 804080 408060 40a000 004000 c080e0 402000 00c080 4080e0 c0a000 00c000 c08060 c06080 004080 400060
40e080 804000 c000e0 406080 80c080 4000e0 c0e080 80c040 c00060 c06000 8040c0 008060 00e000 404040 8080e0 006000 40c0c0
0080e0 80e000 40c040 808060 802080 4000c0 004060 00a080 c00040 8040e0 002080 c080c0 0040e0 80a080 c08000 804020 802040
c00080 40c020 00a040 400000 c0c0a0 002040 408080 40c0a0 80a040 408000 c0c020 8060c0 400080 404020 00e0c0 c00000 c040a0
0060c0 c08080 4040a0 80e0c0 c08040 c04020 806040 c000c0 00c020 40e040 400040 80c0a0 406040 4080c0 00c0a0 c0e040 408040
80c020 c020c0 4040c0 004020 40a0c0 c04040 8040a0 4020c0 c0c0c0 0040a0 c0a0c0 c0c000 804060 c02040 c04080 40c060 40a040
404000
"""
CLASS_NAMES = tuple(name.strip() for name in _NAMES.replace("\n", " ").split(","))
PALETTE: Palette = tuple((red, green, blue) for red, green, blue in map(bytes.fromhex, _COLOURS.split()))
# Ids in the .mat files are 1 to 182, of which COCO took these out.
REMOVED_IDS = frozenset([12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91])
LABEL_IDS = tuple(value for value in range(1, 183) if value not in REMOVED_IDS)

_EXPECTED = f"without {', '.join(map(str, sorted(REMOVED_IDS)))}"

FOLDER = "cocostuff-10k-v1.1"
TERMS = "https://github.com/nightrome/cocostuff"
_SPLITS = {"train": "train", "val": "test", "test": "test"}
_TABLE = class_table({0: 255} | {value: index for index, value in enumerate(LABEL_IDS)})
_PIXELS = class_table({255: 255} | {value - 1: index for index, value in enumerate(LABEL_IDS)})  # of 164K


class COCOStuff10K(SegmentationDataset):
    """The 171 classes of COCO-Stuff 10K, version 1.1 (Caesar et al., CVPR 2018).

    Expects the archive `cocostuff-10k-v1.1.zip` as it is, whose labels need SciPy (`pip install scipy`):

    ```text
    root/
      imageLists/train.txt
      imageLists/test.txt
      images/COCO_train2014_000000000077.jpg
      annotations/COCO_train2014_000000000077.mat
    ```

    or what MMSegmentation's converter makes of it, which wins where both are there and reads faster:

    ```text
    root/
      images/train2014/COCO_train2014_000000000077.jpg
      annotations/train2014/COCO_train2014_000000000077_labelTrainIds.png
      images/test2014/...
      annotations/test2014/...
    ```

    In the `.mat` files 0 is unlabelled and 1 to 182 are the authors' ids, of which eleven are never used; in the
    converted files 1 to 171 are the classes. The authors publish no table of colours: these are MMSegmentation's.

    Args:
        root: The folder that holds `images/` and `annotations/`, or the one that holds it as `cocostuff-10k-v1.1/`.
        split: `"train"` (9000 images) or `"test"` (1000), for which `"val"` is another name.

    Shape:
        As every `SegmentationDataset`; 171 classes.

    Raises:
        DataMissingError: A folder, a list, an image or a label is missing.
        PackageMissingError: The labels are `.mat` files and SciPy is not installed.
        DataError: A folder is empty, a list names nothing or something twice, or the labels are of version 1.0, which
            has other ids.
        ValueError: The split is unknown.
    """

    usual_root = "data/coco_stuff10k"
    terms = TERMS

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, tuple(_SPLITS))
        root, split = Path(root), _SPLITS[split]
        base = root / FOLDER if (root / FOLDER).is_dir() else root
        images, labels, listing = base / "images", base / "annotations", base / "imageLists" / f"{split}.txt"
        if (labels / f"{split}2014").is_dir():
            self.files = find_pairs(images / f"{split}2014", labels / f"{split}2014", label_end="_labelTrainIds")
            return
        for path in (images, labels, listing):
            if not path.exists():
                raise DataMissingError(
                    f"there is no {path}; COCOStuff10K needs images/, annotations/ and imageLists/{split}.txt, or the "
                    f"converted images/{split}2014/ and annotations/{split}2014/, in {root} or {root / FOLDER}"
                )
        self.files = listed_pairs(listing, images, labels, label_suffix=".mat")
        _check_version(self.files[0][1])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the stem of the image file."""
        return self.files[index][0].stem

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where unlabelled."""
        pair = self.files[index]
        if pair[1].suffix != ".mat":
            return read_pair(pair, self.num_classes, first=1, ignored=(0, 255), form=self.image_form)
        expected = f"COCO-Stuff's ids are 0 to 182 {_EXPECTED}"
        to_classes = partial(look_up_classes, table=_TABLE, expected=expected, path=pair[1])
        return read_pair_as(pair, to_classes, read=_read_mat, form=self.image_form)


class COCOStuff164K(SegmentationDataset):
    """The 171 classes of COCO-Stuff 164K, all images of COCO 2017 (Caesar et al., CVPR 2018).

    Expects COCO's images and the authors' `stuffthingmaps_trainval2017.zip`:

    ```text
    root/
      train2017/000000000009.jpg                  or images/train2017/...
      val2017/...
      stuffthingmaps_trainval2017/train2017/000000000009.png
      stuffthingmaps_trainval2017/val2017/...     or annotations/val2017/...
    ```

    In these files a value is the authors' id less 1 (0 to 181, of which eleven are never used), and 255 is unlabelled.
    Where the folder of labels also holds what MMSegmentation's converter makes of them,
    `000000000009_labelTrainIds.png` with 0 to 170 and 255, these are read.

    Args:
        root: The folder that holds images and labels.
        split: `"train"` (118,287 images) or `"val"` (5000).

    Shape:
        As every `SegmentationDataset`; 171 classes.

    Raises:
        DataMissingError: A folder or a label is missing.
        DataError: A folder is empty.
        ValueError: The split is unknown.
    """

    usual_root = "data/coco_stuff164k"
    terms = TERMS

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        super().__init__(CLASS_NAMES, PALETTE)
        check_split(split, ("train", "val"))
        root, part = Path(root), f"{split}2017"
        images, labels = (
            next((path for path in (root / place / part for place in places) if path.is_dir()), None)
            for places in (("", "images"), ("stuffthingmaps_trainval2017", "annotations"))
        )
        if images is None or labels is None:
            missing = root / (part if images is None else f"annotations/{part}")
            raise DataMissingError(
                f"there is no {missing}; COCOStuff164K needs {part}/ or images/{part}/, and "
                f"stuffthingmaps_trainval2017/{part}/ or annotations/{part}/, in {root}"
            )
        self._is_converted = next(labels.glob("*_labelTrainIds.png"), None) is not None
        self.files = find_pairs(images, labels, label_end="_labelTrainIds" if self._is_converted else "")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the stem of the image file."""
        return self.files[index][0].stem

    def read(self, index: int) -> tuple[Picture, Tensor]:
        """Return the RGB image and its uint8 labels `(H, W)`, 255 where unlabelled."""
        pair = self.files[index]
        if self._is_converted:
            return read_pair(pair, self.num_classes, ignored=(255,), form=self.image_form)
        expected = f"COCO-Stuff's values are 255 and its ids less 1, which are 1 to 182 {_EXPECTED}"
        to_classes = partial(look_up_classes, table=_PIXELS, expected=expected, path=pair[1])
        return read_pair_as(pair, to_classes, form=self.image_form)


def _read_mat(path: Path) -> NDArray[np.integer]:
    """The label map `S` of a .mat file; MATLAB may have stored its integers as floats."""
    io = _scipy_io()
    if not path.exists():
        raise DataMissingError(f"there is no {path}, which should be a .mat file of labels")
    with open(path, "rb") as file:
        try:
            values = io.loadmat(file, variable_names=["S"]).get("S")
        except Exception as error:  # a damaged file leads SciPy to errors of many kinds
            size = os.fstat(file.fileno()).st_size
            raise DataError(
                f"{path} ({size} bytes) cannot be read as a .mat file: {error}; replace the damaged file or take its "
                "name out of the list"
            ) from error
    if values is None or values.ndim != 2 or values.dtype.kind not in "uif" or (values % 1).any():
        found = "no S" if values is None else f"an S of shape {values.shape} and type {values.dtype}"
        raise DataError(f"{path} should hold integers S of shape (height, width), but it holds {found}")
    integers: NDArray[np.integer] = values if values.dtype.kind in "ui" else values.astype(np.int64)
    return integers


def _check_version(path: Path) -> None:
    """Refuse version 1.0, where 1 is unlabelled and every class has another id."""
    io = _scipy_io()
    try:
        sizes = {name: max(shape) for name, shape, _ in io.whosmat(path)}
    except Exception:  # `read` says what is wrong with this file
        return
    if sizes.get("names") == 172:
        raise DataError(
            f"{path} holds 172 names, as in version 1.0 of COCO-Stuff 10K, whose ids differ; "
            "version 1.1, which is read here, has 182: get cocostuff-10k-v1.1.zip"
        )


def _scipy_io() -> Any:
    try:
        return import_module("scipy.io")
    except ModuleNotFoundError as error:
        raise PackageMissingError(
            "the .mat labels of COCO-Stuff 10K need SciPy, which is not installed: pip install scipy "
            "(or convert them with MMSegmentation's coco_stuff10k.py)"
        ) from error
