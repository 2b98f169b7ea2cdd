"""Which data a run reads, as plain values: what a command line or a config.json says of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set by its name, where it lies, and its options; `open_dataset` opens it.

    Examples:
        >>> DataConfig.from_json({"dataset": "folder", "data_root": "mine", "class_names": ["a", "b"], "head": "fcn"})
        ... # doctest: +NORMALIZE_WHITESPACE
        DataConfig(dataset='folder', data_root=PosixPath('mine'), image_suffix=None, label_suffix=None,
                   class_names=('a', 'b'), num_classes=None, ignore_index=None, scenes_size=128, train_images=None,
                   download=False)
    """

    dataset: str = "ade20k"
    """Any of segheads.data.DATASETS: a published data set, scenes drawn by the code, or a folder of your own."""
    data_root: Path | None = None
    """Where the data set lies; None means its usual place below data/, such as data/ADEChallengeData2016. Your own
    holds images/train, labels/train, images/val and labels/val; or images, labels, train.txt and val.txt."""
    image_suffix: str | None = None
    """What follows the common name in the files of your own images, such as _leftImg8bit."""
    label_suffix: str | None = None
    """What follows it in those of your own labels, such as _mask or _gtFine_labelIds."""
    class_names: tuple[str, ...] | None = None
    """The classes of your own folder, in the order of the values in its label files."""
    num_classes: int | None = None
    """How many classes your own folder has, in place of their names; or 59 for pascal_context without background."""
    ignore_index: int | None = None
    """The value in your own label files that means no class; None means 255, and 0 that the first class is 1."""
    scenes_size: int = 128
    """Side of the drawn scenes, pixels."""
    train_images: int | None = None
    """Train on so many images of the data set, drawn by the seed; None takes all."""
    download: bool = False
    """Fetch the data set into the data root if it is not there; ADE20K can be fetched."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataConfig":
        """Pick the fields of this class out of JSON values, such as a run's config.json; others are passed over.

        Args:
            values: Fields by name. Lists become tuples, and the data root a path; a field that is missing or None has
                its default.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        own = {name: values[name] for name in names if values.get(name) is not None}
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
        if "data_root" in own:
            own["data_root"] = Path(own["data_root"])
        return cls(**own)
