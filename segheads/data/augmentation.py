"""What may happen to training crops beyond the published pipelines, as plain values."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from segheads.data.images import RGB, ImageForm
from segheads.errors import OptionError
from segheads.ranges import Range, check_ranges

JITTERED = ("brightness", "contrast", "saturation", "hue")
MOST_HUE = 0.5  # turns


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What happens to training crops beyond the published resize, crop, flip and distortion: nothing by default.

    `Augment` does it, `mix_neighbours` mixes, and `RareClasses` draws images.

    Examples:
        >>> AugmentationConfig(rotation=10, classmix=0.5).mixes
        True
    """

    distortion: bool = True
    """Distort the colours of crops of 3 channels as published."""
    rotation: Annotated[float, Range(0, 180)] = 0.0
    """Turn crops by up to so many degrees, 0 to 180, to either side. What is uncovered gets the mean pixel and no
    class."""
    rotation_share: Annotated[float, Range(0, 1)] = 0.5
    """Share of crops that rotation turns."""
    jitter: Annotated[tuple[float, float, float, float], Range(0, 1)] = (0.0, 0.0, 0.0, 0.0)
    """Change brightness, contrast and saturation by factors of 1 - x to 1 + x (x 0 to 1) and the hue by up to x turns
    (0 to 0.5), in random order, such as 0.4 0.4 0.4 0.1. Saturation and hue need 3 channels of 8 to 16 bit."""
    jitter_share: Annotated[float, Range(0, 1)] = 0.8
    """Share of crops that jitter changes."""
    grey: Annotated[float, Range(0, 1)] = 0.0
    """Share of crops that lose their colours; needs 3 channels of 8 to 16 bit."""
    blur: Annotated[float, Range(0, 1)] = 0.0
    """Share of crops that are blurred."""
    blur_sigma: Annotated[tuple[float, float], Range(0, above=True)] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, pixels, above 0."""
    erasing: Annotated[float, Range(0, 1)] = 0.0
    """Share of crops in which a rectangle gets the mean pixel."""
    erasing_area: Annotated[tuple[float, float], Range(0, 1, above=True, below=True)] = (0.02, 0.33)
    """Least and largest share of the crop that is erased, above 0 and below 1."""
    erased_labels: Literal["keep", "ignore"] = "keep"
    """Whether erased pixels keep their class, to be guessed from what is around, or are of no class."""
    cutmix: Annotated[float, Range(0, 1)] = 0.0
    """Share of crops that get a rectangle of their neighbour in the batch."""
    classmix: Annotated[float, Range(0, 1)] = 0.0
    """Share of crops that get half of the classes of their neighbour in the batch."""
    rare_class_temperature: Annotated[float | None, Range(0, above=True)] = None
    """Draw images by their classes, the rarer the more often: softmax((1 - share of pixels) / temperature), above 0;
    0.01 as published. None takes each image once an epoch."""
    rare_class_pixels: Annotated[int, Range(0)] = 3000
    """How many pixels of the class an image must have more of to be drawn for it."""
    rare_class_crop: Annotated[float, Range(0)] = 0.5
    """Share of those pixels that a crop must have more of; after 10 tries any crop is taken. 0 takes the first."""

    @property
    def mixes(self) -> bool:
        """Whether crops are mixed with their neighbours."""
        return self.cutmix + self.classmix > 0

    @property
    def changes_crops(self) -> bool:
        """Whether there is anything for `Augment` to do."""
        return self.mixes or bool(self.rotation or any(self.jitter) or self.grey or self.blur or self.erasing)

    def check(self, form: ImageForm = RGB) -> None:
        """Refuse numbers out of range, and changes of colours for images that have none.

        Args:
            form: What the images hold.

        Raises:
            OptionError: Says which.
        """
        if len(self.jitter) != len(JITTERED):
            raise OptionError(f"jitter has 4 numbers, {' '.join(JITTERED)}; got {self.jitter}")
        check_ranges(self)
        if self.jitter[3] > MOST_HUE:
            raise OptionError(f"the hue of jitter must be 0 to {MOST_HUE}, in turns; got {self.jitter[3]}")
        for name in ("blur_sigma", "erasing_area"):
            low, high = getattr(self, name)
            if low > high:
                raise OptionError(f"{name} must be two numbers, the smaller first; got {low} {high}")
        if self.erased_labels not in ("keep", "ignore"):
            raise OptionError(f"erased_labels must be keep or ignore; got {self.erased_labels!r}")
        if self.cutmix + self.classmix > 1:
            both = f"{self.cutmix} and {self.classmix}"
            raise OptionError(f"a crop is mixed in one way: cutmix and classmix must be 1 or less in sum; got {both}")
        colours = {"grey": self.grey, "the saturation of jitter": self.jitter[2], "the hue of jitter": self.jitter[3]}
        for name, value in colours.items():
            if value and not form.has_colours:
                raise OptionError(f"{name} is of colours, 3 channels of 8 to 16 bit; got {value} for images of {form}")

    def changed_values(self) -> dict[str, Any]:
        """The fields that are not as by default, by name."""
        return {
            name: value for name, value in vars(self).items() if value != type(self).__dataclass_fields__[name].default
        }
