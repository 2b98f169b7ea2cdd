"""What may happen to training crops beyond the published pipelines, as plain values."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from segheads.data.images import RGB, ImageForm
from segheads.errors import OptionError

JITTERED = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}  # and the most of each; hues in turns
SHARES = ("rotation_share", "jitter_share", "grey", "blur", "erasing", "cutmix", "classmix")


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
    rotation: float = 0.0
    """Turn crops by up to so many degrees, 0 to 180, to either side. What is uncovered gets the mean pixel and no
    class."""
    rotation_share: float = 0.5
    """Share of crops that rotation turns."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Change brightness, contrast and saturation by factors of 1 - x to 1 + x (x 0 to 1) and the hue by up to x turns
    (0 to 0.5), in random order, such as 0.4 0.4 0.4 0.1. Saturation and hue need 3 channels of 8 to 16 bit."""
    jitter_share: float = 0.8
    """Share of crops that jitter changes."""
    grey: float = 0.0
    """Share of crops that lose their colours; needs 3 channels of 8 to 16 bit."""
    blur: float = 0.0
    """Share of crops that are blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and largest standard deviation of the blur, pixels, above 0."""
    erasing: float = 0.0
    """Share of crops in which a rectangle gets the mean pixel."""
    erasing_area: tuple[float, float] = (0.02, 0.33)
    """Least and largest share of the crop that is erased, above 0 and below 1."""
    erased_labels: Literal["keep", "ignore"] = "keep"
    """Whether erased pixels keep their class, to be guessed from what is around, or are of no class."""
    cutmix: float = 0.0
    """Share of crops that get a rectangle of their neighbour in the batch."""
    classmix: float = 0.0
    """Share of crops that get half of the classes of their neighbour in the batch."""
    rare_class_temperature: float | None = None
    """Draw images by their classes, the rarer the more often: softmax((1 - share of pixels) / temperature), above 0;
    0.01 as published. None takes each image once an epoch."""
    rare_class_pixels: int = 3000
    """How many pixels of the class an image must have more of to be drawn for it."""
    rare_class_crop: float = 0.5
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
            raise OptionError(f"jitter has 4 numbers, brightness contrast saturation hue; got {self.jitter}")
        jitter = zip(JITTERED, self.jitter, JITTERED.values(), strict=True)
        for name, value, most in (
            ("rotation", self.rotation, 180),
            *((f"the {what} of jitter", value, most) for what, value, most in jitter),
            *((name, getattr(self, name), 1) for name in SHARES),
        ):
            if not 0 <= value <= most:
                raise OptionError(f"{name} must be 0 to {most:g}; got {value}")
        for name, (low, high), most, above in (
            ("blur_sigma", self.blur_sigma, math.inf, "above 0"),
            ("erasing_area", self.erasing_area, 1, "above 0 and below 1"),
        ):
            if not 0 < low <= high < most:
                raise OptionError(f"{name} must be two numbers {above}, the smaller first; got {low} {high}")
        if self.erased_labels not in ("keep", "ignore"):
            raise OptionError(f"erased_labels must be keep or ignore; got {self.erased_labels!r}")
        if self.cutmix + self.classmix > 1:
            both = f"{self.cutmix} and {self.classmix}"
            raise OptionError(f"a crop is mixed in one way: cutmix and classmix must be 1 or less in sum; got {both}")
        if self.rare_class_temperature is not None and not 0 < self.rare_class_temperature < math.inf:
            raise OptionError(f"rare_class_temperature must be above 0; got {self.rare_class_temperature}")
        for name in ("rare_class_pixels", "rare_class_crop"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be 0 or more; got {getattr(self, name)}")
        colours = {"grey": self.grey, "the saturation of jitter": self.jitter[2], "the hue of jitter": self.jitter[3]}
        for name, value in colours.items():
            if value and not form.has_colours:
                raise OptionError(f"{name} is of colours, 3 channels of 8 to 16 bit; got {value} for images of {form}")

    def changed_values(self) -> dict[str, Any]:
        """The fields that are not as by default, by name."""
        return {
            name: value for name, value in vars(self).items() if value != type(self).__dataclass_fields__[name].default
        }
