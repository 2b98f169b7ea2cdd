"""Which data a run reads, as plain values: what a command line or a config.json says of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from segheads.data.images import FLOATS, ImageForm
from segheads.errors import OptionError, options_become_parts
from segheads.files import readable
from segheads.ranges import Range


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set by its name, where it lies, and its options; `open_dataset` opens it.

    Examples:
        >>> DataConfig.from_json({"dataset": "folder", "data_root": "mine", "class_names": ["a", "b"], "head": "fcn"})
        ... # doctest: +NORMALIZE_WHITESPACE
        DataConfig(dataset='folder', data_root=PosixPath('mine'), image_suffix=None, label_suffix=None,
                   class_names=('a', 'b'), num_classes=None, ignore_index=None, label_values=None, label_map=None,
                   label_colours=None, reduce_zero_label=False, flip_pairs=None, in_chans=None, bit_depth=None,
                   band_mean=None, band_std=None, exif=None, background=None, max_pixels=None, scenes_size=128,
                   train_images=None, download=False)
    """

    dataset: str = "ade20k"
    """Any of segheads.data.DATASETS: a published data set, scenes drawn by the code, or a folder of your own."""
    data_root: Path | None = None
    """Where the data set lies; None means its usual place below data/, such as data/ADEChallengeData2016. Your own
    holds images/train, labels/train, images/val and labels/val; or images, labels, train.txt and val.txt; or is, or
    holds as train.csv and val.csv, a table (.csv, .parquet) with columns image and label, and split if it is one."""
    image_suffix: str | None = None
    """What follows the common name in the files of your own images, such as _leftImg8bit."""
    label_suffix: str | None = None
    """What follows it in those of your own labels, such as _mask or _gtFine_labelIds."""
    class_names: tuple[str, ...] | None = None
    """The classes of your own folder, in the order of the values in its label files; those of no class have no name.
    One name is that of label 1, and label 0 is its background."""
    num_classes: Annotated[int | None, Range(1)] = None
    """How many classes your own folder has, in place of their names; or 59 for pascal_context without background."""
    ignore_index: Annotated[int | tuple[int, ...] | None, Range(-(2**31), 2**31 - 1)] = None
    """The values in your own label files that mean no class, one or several; None means 255."""
    label_values: Annotated[tuple[int, ...] | None, Range(0, 2**31 - 1)] = None
    """The value of each class in your own label files, such as 0 255, if they are not 0, 1, 2 and so on."""
    label_map: Path | None = None
    """A JSON file of value to class in your own label files, {"0": "grass", "255": 1, "7": "ignore"}."""
    label_colours: Path | None = None
    """The same for labels that are colours, {"#ff0000": "grass"}."""
    reduce_zero_label: bool = False
    """In your own label files 0 means no class and 1 is the first class, as in ADE20K."""
    flip_pairs: tuple[str, ...] | None = None
    """Names of classes, two by two, that become each other in the mirror: "left arm" "right arm"."""
    in_chans: Annotated[int | None, Range(1)] = None
    """Channels of your own images, such as the bands of a satellite; None means 3."""
    bit_depth: Annotated[int | None, Range(8, 32)] = None
    """Bits that the values of your own images use, 8 to 16, also where the files have room for more; 32 for floats;
    None means 8."""
    band_mean: Annotated[tuple[float, ...] | None, Range()] = None
    """Mean of each channel over your own images, of values divided by the largest of the bit depth (of floats: as they
    are); None means the backbone's. segheads check-data measures it."""
    band_std: Annotated[tuple[float, ...] | None, Range(0, above=True)] = None
    """Standard deviation of each channel, in the same scale."""
    exif: Literal["apply", "ignore"] | None = None
    """Whether your own labels are drawn on images turned by their EXIF orientation, or on the pixels as stored; None
    goes by the label's size, and refuses a pair where both fit."""
    background: Literal["class", "ignore"] | None = None
    """What pixels are that no annotation of a COCO JSON covers: of a class background, before all others, or of no
    class; None means class."""
    max_pixels: Annotated[int | None, Range(1)] = None
    """The most pixels of an image or a label file that are decoded; None means 1,000,000,000."""
    scenes_size: Annotated[int, Range(1)] = 128
    """Side of the drawn scenes, pixels."""
    train_images: Annotated[int | None, Range(1)] = None
    """Train on so many images of the data set, drawn by the seed; None takes all."""
    download: bool = False
    """Fetch the data set into the data root if it is not there; ADE20K can be fetched."""

    def __post_init__(self) -> None:
        for name in ("class_names", "flip_pairs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(map(readable, getattr(self, name))))
        if self.max_pixels is not None and self.max_pixels < 1:
            raise OptionError(f"max_pixels must be 1 or more; got {self.max_pixels}")
        if isinstance(self.ignore_index, tuple) and len(self.ignore_index) == 1:
            object.__setattr__(self, "ignore_index", self.ignore_index[0])  # one way to say one value

    @property
    def image_form(self) -> ImageForm:
        """What the images hold.

        Raises:
            OptionError: A number is out of range, or mean and std do not fit the channels.
        """
        with options_become_parts():
            form = ImageForm(3 if self.in_chans is None else self.in_chans, self.bit_depth, self.exif)
        given = {name: getattr(self, name) for name in ("band_mean", "band_std")}
        if len({values is None for values in given.values()}) > 1:
            raise OptionError("band_mean and band_std go together; give both, or neither for the backbone's")
        for name, values in given.items():
            if values is not None and len(values) != form.channels:
                raise OptionError(f"{name} has {len(values)} values for {form.channels} channels (in_chans)")
        if any(not value > 0 for value in self.band_std or ()):
            raise OptionError(f"band_std must be above 0; got {self.band_std}")
        if any(not abs(value) <= 1 for value in self.band_mean or ()) and form.bit_depth != FLOATS:
            raise OptionError(
                f"band_mean is of values divided by {form.full_scale:g}, the largest of the bit depth, so at most 1; "
                f"got {self.band_mean}"
            )
        return form

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataConfig":
        """Pick the fields of this class out of JSON values, such as a run's config.json; others are passed over.

        Args:
            values: Fields by name, also those of an older version. Lists become tuples, and paths paths; a field that
                is missing or None has its default.
        """
        values = in_new_words(values)
        names = [field.name for field in dataclasses.fields(cls)]
        own = {name: values[name] for name in names if values.get(name) is not None}
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
        own |= {name: Path(own[name]) for name in PATHS if name in own}
        return cls(**own)


PATHS = ("data_root", "label_map", "label_colours")


def in_new_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of any version in the fields of this one: in 0.1.0 `ignore_index` 0 meant that class 0 is 1.

    Args:
        values: Its values by name; what has no `scenes_size` is no whole configuration and stays as it is.
    """
    if "reduce_zero_label" in values or "scenes_size" not in values:
        return dict(values)
    is_reduced = values.get("ignore_index") == 0
    return {**values, "reduce_zero_label": is_reduced, **({"ignore_index": None} if is_reduced else {})}
