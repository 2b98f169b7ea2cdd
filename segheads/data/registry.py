"""The data sets by name. The table itself is in `segheads/data/__init__.py`, which imports every data set."""

import dataclasses
from difflib import get_close_matches

from segheads.data.config import DataConfig
from segheads.data.dataset import SegmentationDataset
from segheads.data.limits import pixel_limit
from segheads.data.subset import SubsetDataset
from segheads.errors import OptionError, options_become_parts

DATASETS: dict[str, type[SegmentationDataset]] = {}
"""The data sets by the names that `DataConfig` and a recipe take; a name of your own may be added."""


def open_dataset(config: DataConfig, split: str, *, seed: int = 0) -> SegmentationDataset:
    """Open a split of the data set that a configuration names; fetch it first where the configuration says so.

    Args:
        config: Name, place and options of the data set.
        split: `"train"`, `"val"`, or what else the data set has. `train_images` counts for `"train"` alone.
        seed: Of drawn scenes to train on, and of the choice of `train_images`.

    Raises:
        DataMissingError: A folder or a file is missing.
        DataError: A folder or a file is not what it should be.
        OptionError: The name is unknown, an option is not of this data set, or does not fit.
        DownloadError: The download failed.
        PackageMissingError: The files need a package that is not installed.

    Examples:
        >>> dataset = open_dataset(DataConfig(dataset="scenes", train_images=5), "train")
        >>> len(dataset), dataset.num_classes
        (5, 12)
    """
    kind = _find(config.dataset)
    _refuse_unheeded(config, kind)
    with options_become_parts():
        if config.download:
            kind.fetch(kind.find_root(config))
        with pixel_limit(config.max_pixels):
            dataset: SegmentationDataset = kind.open(config, split, seed=seed)
        if config.max_pixels is not None:
            dataset.max_pixels = config.max_pixels
        if split == "train" and config.train_images is not None:
            dataset = SubsetDataset(dataset, config.train_images, seed=seed)
        if config.flip_pairs:
            dataset.classes = dataset.classes.with_flip_pairs(config.flip_pairs)
        return dataset


def _find(name: str) -> type[SegmentationDataset]:
    if name in DATASETS:
        return DATASETS[name]
    close = get_close_matches(name, DATASETS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise OptionError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}{hint}")


def _refuse_unheeded(config: DataConfig, kind: type[SegmentationDataset]) -> None:
    """Only of options that are None or False by default can be told whether they were given."""
    takers: dict[str, list[str]] = {}
    for field in dataclasses.fields(config):
        heeding = [name for name, other in DATASETS.items() if field.name in other.options]
        value, default = getattr(config, field.name), field.default  # 0, which equals False, is given
        given = (default is None or default is False) and value is not None and value is not False
        if heeding and given and field.name not in kind.options:
            takers[field.name] = heeding
    if takers:
        others = "; ".join(f"{option} is for {' and '.join(names)}" for option, names in takers.items())
        raise OptionError(f"dataset {config.dataset} takes no {' and no '.join(takers)}; leave that out ({others})")
