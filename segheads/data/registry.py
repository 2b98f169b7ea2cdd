"""The data set that a configuration names."""

from collections.abc import Callable
from pathlib import Path

from segheads.data import (
    ADE20K,
    CamVid,
    Cityscapes,
    COCOStuff10K,
    FolderDataset,
    PascalContext,
    Scenes,
    SegmentationDataset,
)
from segheads.training.config import TrainingConfig

# How each is opened, and where it lies unless --data-root says otherwise: MMSegmentation's places.
_PUBLISHED: dict[str, tuple[Callable[[Path, str], SegmentationDataset], str]] = {
    "ade20k": (ADE20K, "data/ADEChallengeData2016"),
    "camvid": (CamVid, "data/camvid"),
    "cityscapes": (Cityscapes, "data/cityscapes"),
    "coco_stuff_10k": (COCOStuff10K, "data/coco_stuff10k"),
    "pascal_context": (PascalContext, "data/VOCdevkit"),
}


def data_root(config: TrainingConfig) -> Path:
    """Where the data set lies: what the configuration says, or the usual place."""
    return config.data_root or Path(_PUBLISHED[config.dataset][1])


def check_data_options(config: TrainingConfig) -> None:
    """Refuse options of the data that the data set has no use for, or that leave open what its classes are.

    Args:
        config: The configuration of a run.

    Raises:
        ValueError: In the words of the command line.
    """
    name, names, count = config.dataset, config.class_names, config.num_classes
    if name != "folder":
        options = {"--class-names": names, "--ignore-index": config.ignore_index, "--num-classes": count}
        if name == "pascal_context":
            del options["--num-classes"]
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} can be given for a folder of your own, but --dataset is {name}, which has its "
                "classes; leave that out"
            )
        return
    if config.data_root is None:
        raise ValueError(
            "--dataset folder needs --data-root PATH, a folder that holds images/train, labels/train, images/val and "
            "labels/val"
        )
    if not names and count is None:
        raise ValueError("--dataset folder needs --class-names NAME NAME ..., or --num-classes with their number")
    if names and count not in (None, len(names)):
        raise ValueError(f"--num-classes {count} came with {len(names)} names in --class-names; give the names alone")


def open_dataset(config: TrainingConfig, split: str) -> SegmentationDataset:
    """Open the training or the validation set that the configuration names.

    Args:
        config: The configuration of a run.
        split: `"train"` or `"val"`.

    Raises:
        ImportError: The files need a package that is not installed.
        FileNotFoundError: A folder or a file is missing.
        ValueError: A folder is empty, or options of the configuration do not fit.
    """
    check_data_options(config)
    if config.dataset == "scenes":
        length = {"length": 100} if split == "val" else {}
        return Scenes(split, size=(config.scenes_size, config.scenes_size), seed=config.seed, **length)
    root = data_root(config)
    if config.dataset == "folder":
        names, count = config.class_names, config.num_classes
        return FolderDataset(
            root / "images" / split,
            root / "labels" / split,
            len(names or ()) if count is None else count,
            class_names=names,
            ignore_index=config.ignore_index or 255,
            reduce_zero_label=config.ignore_index == 0,
        )
    if config.dataset == "pascal_context" and config.num_classes is not None:
        return PascalContext(root, split, num_classes=config.num_classes)
    return _PUBLISHED[config.dataset][0](root, split)
