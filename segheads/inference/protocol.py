"""How an image is shown to a model: resized, whole or in windows, at several scales, mirrored."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from segheads.ranges import Range

SmallImages = Literal["shrink_window", "enlarge"]
Size = int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class InferenceProtocol:
    """How an image is shown to a model, as papers report it beside a score.

    Lists, as JSON has them, become tuples.

    Args:
        scale: Limits of the longer and the shorter side that the image is resized into, up or down; None leaves it.
        window: Side of the sliding window, or its height and width, pixels; None shows the whole image.
        stride: Pixels between windows, at most `window`; None means `window`, without overlap.
        scales: The image's sides are multiplied by each, and probabilities averaged.
        flip: Every scale also left to right.
        small_images: `"shrink_window"` to an image below its size (MMSegmentation), or `"enlarge"` that (Segmenter).
        threshold: Of a model of one class: the label is 1 where the probability of the class is above it, else 0.

    Raises:
        ValueError: For sizes and scales that are not positive, a stride without a window or above it, a threshold that
            is not between 0 and 1.

    Examples:
        >>> InferenceProtocol(window=512, stride=384, scales=(0.75, 1.0, 1.25), flip=True).as_json()["scales"]
        [0.75, 1.0, 1.25]
    """

    scale: Annotated[tuple[int, int] | None, Range(1)] = None
    window: Annotated[Size | None, Range(1)] = None
    stride: Annotated[Size | None, Range(1)] = None
    scales: Annotated[tuple[float, ...], Range(0, above=True)] = (1.0,)
    flip: bool = False
    small_images: SmallImages = "shrink_window"
    threshold: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5

    def __post_init__(self) -> None:
        for name in ("scale", "window", "stride", "scales"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.scale is not None and (not isinstance(self.scale, tuple) or len(self.scale) != 2):
            raise ValueError(f"scale must be two sides in pixels, got {self.scale!r}; give the longer and the shorter")
        for name in ("scale", "window", "stride"):
            if getattr(self, name) is not None:
                _sides(name, getattr(self, name))
        if not self.scales:
            raise ValueError("scales must be one number or more, got none; give at least one scale")
        for scale in self.scales:
            if not scale > 0:
                raise ValueError(f"scale must be positive, got {scale}; give a number above 0")
        if self.small_images not in get_args(SmallImages):
            known = ", ".join(get_args(SmallImages))
            raise ValueError(f"small_images must be one of {known}, got {self.small_images!r}; choose one")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}; 0.5 is the more probable label")
        if self.stride is None:
            return
        if self.window is None:
            raise ValueError(f"a stride needs a window, got stride {self.stride} and window None; give both or neither")
        window, stride = _sides("window", self.window), _sides("stride", self.stride)
        if stride[0] > window[0] or stride[1] > window[1]:
            raise ValueError(f"stride must be at most the window {window}, got {stride}; a larger one leaves gaps")

    def as_json(self) -> dict[str, Any]:
        """JSON values from which `InferenceProtocol(**values)` is the same again."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(self).items()}

    def in_words(self, *, is_single: bool) -> dict[str, Any]:
        """Options and values as tables beside scores show them: JSON values.

        Args:
            is_single: Whether the model is of one class, which alone has a threshold.
        """
        return {
            "resized into": self.scale or "no",
            "window": self.window or "whole image",
            "stride": self.stride or "none",
            "scales": list(self.scales),
            "flip": self.flip,
            "images below the window": self.small_images,
            **({"threshold": self.threshold} if is_single else {}),
        }

    def check_threshold(self, num_classes: int) -> None:
        """Refuse a threshold of its own where several classes are told apart, of which the most probable is taken.

        Args:
            num_classes: Number of classes K of a model.

        Raises:
            ValueError: If there are several, and the threshold is not 0.5.
        """
        if num_classes > 1 and self.threshold != 0.5:
            raise ValueError(
                f"a threshold is for models of one class, and this one has {num_classes}, of which the most probable "
                f"is taken; got threshold {self.threshold}: leave it out"
            )

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of an image after it is resized into `scale`, by the rule of `segheads.data.resize.rescaled_size`.

        Args:
            height: Of the image, in pixels.
            width: Of the image, in pixels.

        Examples:
            >>> InferenceProtocol(scale=(2048, 512)).scaled_size(300, 3000)
            (205, 2048)
        """
        if self.scale is None:
            return height, width
        factor = min(max(self.scale) / max(height, width), min(self.scale) / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def _sides(name: str, value: Size) -> tuple[int, int]:
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be one side or height and width, got {value}; give pixels")
    for side in sides:
        if not side > 0:
            raise ValueError(f"{name} must be positive, got {side}; give a number above 0")
    return sides


WHOLE = InferenceProtocol()
