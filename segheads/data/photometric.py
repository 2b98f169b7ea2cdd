"""Photometric distortion and normalisation, batched, on whatever device the images are on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from segheads.data.images import ImageForm

_STRIP = 128  # rows that are worked on at a time on the CPU
_STEEP = 1000.0


@dataclass(frozen=True)
class PhotometricDistortion:
    """Draws how one sample is distorted; `PhotometricNormalize` does it.

    Each of the four is left out with probability 1/2, and contrast comes first or last with equal probability, as in
    MMSegmentation's `PhotoMetricDistortion` (after SSD, https://arxiv.org/abs/1512.02325).

    Args:
        brightness: Largest shift, in grey levels of 255.
        contrast: Smallest and largest factor on the values.
        saturation: Smallest and largest factor on the saturation (of HSV).
        hue: Largest rotation, in steps of 2 degrees (OpenCV's unit), up to 30; as published, the upper end is not
            drawn.

    Shape:
        Called with a generator, returns `(5,)`, float32: brightness shift, contrast before, contrast after, saturation,
        hue in degrees.

    Examples:
        >>> PhotometricDistortion()(np.random.default_rng(0)).shape
        torch.Size([5])
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Draw the parameters of one sample."""
        use = rng.random(4) < 0.5
        brightness = rng.uniform(-self.brightness, self.brightness) if use[0] else 0.0
        contrast = rng.uniform(*self.contrast) if use[1] else 1.0
        saturation = rng.uniform(*self.saturation) if use[2] else 1.0
        hue = 2 * int(rng.integers(-self.hue, self.hue)) if use[3] and self.hue else 0
        before, after = (contrast, 1.0) if rng.random() < 0.5 else (1.0, contrast)
        return torch.from_numpy(np.array([brightness, before, after, saturation, hue], dtype=np.float32))


class PhotometricNormalize(nn.Module):
    """Images to distorted, normalised floats, with zeros where padded.

    Images of other than 3 channels, and floats, whose range is not known, are normalised alone: their colours are not
    changed.

    The published code goes back to 8 bit after each of its steps; here all steps are floats, clipped where it clips, so
    results differ by a few grey levels at most. Saturation and hue are changed in closed form: in HSV the largest
    channel stays, and the others move with the chroma and the hue.

    Args:
        mean: Per channel, for values in [0, 1]; the backbone's `data_config` knows it.
        std: Per channel, likewise.
        bit_depth: Of the values, see `segheads.data.ImageForm`; None means 8.

    Shape:
        Images `(B, C, H, W)`, uint8 or float32 in the stored values' scale; distortion `(B, 5)`, as
        `PhotometricDistortion` draws it, or None; valid `(B, 2)`, the height and width that are not padding, or None.
        Returns `(B, C, H, W)`, float32.

    Examples:
        >>> prepare = PhotometricNormalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> prepare(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
        tensor([1.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, bit_depth: int | None = None):
        super().__init__()
        form = ImageForm(len(mean), bit_depth)
        self.has_colours = form.has_colours
        self.to_grey_levels = 255 / form.full_scale if form.has_colours else 1.0  # of 255, the distortion's unit
        spread = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        full = form.full_scale * self.to_grey_levels
        self.register_buffer("scale", 1 / (full * spread), persistent=False)
        shift = -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / spread
        self.register_buffer("shift", shift, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor, distortion: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Return the images as the backbone wants them."""
        if self.to_grey_levels != 1:
            images = images.float() * self.to_grey_levels
        if not self.has_colours:
            distortion = None
        if images.device.type == "cpu":
            x = self._on_cpu(images, distortion)
        else:
            x = images.contiguous().float()
            if distortion is not None:
                x = _distort(x, distortion.to(x.device))
            x = x.mul_(self.scale).add_(self.shift)
        return x if valid is None else _zero_padding(x, valid)

    def _on_cpu(self, images: Tensor, distortion: Tensor | None) -> Tensor:
        """Do the same strip by strip, which stays in the cache, without the steps that change nothing."""
        x = torch.empty(images.shape, dtype=torch.float32)
        steps = [None] * len(x) if distortion is None else distortion.tolist()
        for image, target, values in zip(images, x, steps, strict=True):
            for pixels, out in zip(image.split(_STRIP, dim=1), target.split(_STRIP, dim=1), strict=True):
                strip = out.copy_(pixels) if values is None else _distort_strip(out.copy_(pixels), *values)
                torch.mul(strip, self.scale, out=out).add_(self.shift)
        return x


def _distort(x: Tensor, distortion: Tensor) -> Tensor:
    """Distort a batch with values 0 to 255, without a look at the numbers drawn: a GPU need not wait for the host."""
    brightness, before, after, saturation, hue = distortion.view(-1, 5, 1, 1, 1).unbind(1)
    x = x.add_(brightness).clamp_(0, 255).mul_(before).clamp_(0, 255)
    x = _rotate_hue(_saturate(x, saturation), hue)
    return x.mul_(after).clamp_(0, 255)


def _distort_strip(x: Tensor, brightness: float, before: float, after: float, saturation: float, hue: float) -> Tensor:
    if brightness:
        x = x.add_(brightness).clamp_(0, 255)
    if before != 1:
        x = x.mul_(before).clamp_(0, 255)
    if saturation != 1:
        x = _saturate(x, saturation)
    if hue:
        x = _rotate_hue(x, hue)
    return x if after == 1 else x.mul_(after).clamp_(0, 255)


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = x.split(1, dim=-3)
    return torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)


def _saturate(x: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply the saturation of HSV, `(high - low) / high`, and clip it to 1; `high` stays."""
    high, low = _extremes(x)
    largest = high / (high - low).clamp_(min=1e-3)  # grey is left alone whatever the factor
    weight = largest.clamp_(max=factor)
    return torch.lerp(high, x, weight)


def _rotate_hue(x: Tensor, degrees: Tensor | float) -> Tensor:
    """Rotate the hue of HSV by at most 60 degrees; `high` and `low` stay.

    In HSV a channel is a trapezium over the hue: `low + chroma * clamp(q - 1, 0, 1)`, where q is the distance, in units
    of 60 degrees, between the hue and the opposite of the channel. For the red channel
    `q = (2 red + high + chroma - red - green - blue) / chroma`, and the hue lies beyond the opposite where blue is
    above green. A rotation adds to the signed distance. All is multiplied by chroma here, so that nothing is divided.
    The sign comes from a steep ramp (`_STEEP`), which costs less than copysign and is right wherever the sign matters.
    """
    high, low = _extremes(x)
    chroma = high - low
    limit = (chroma * (degrees / (60 * _STEEP))).abs_()
    direction = degrees.sign() if isinstance(degrees, Tensor) else math.copysign(1.0, degrees)
    red, green, blue = x.split(1, dim=-3)
    base = (high + chroma).sub_(red).sub_(green).sub_(blue)
    lower, floor = -limit, low - chroma
    rotated = torch.empty_like(x)
    turns = ((red, green, blue), (green, blue, red), (blue, red, green))
    for out, (own, following, preceding) in zip(rotated.split(1, dim=-3), turns, strict=True):
        torch.sub(preceding, following, out=out).mul_(direction)
        side = torch.clamp(out, lower, limit)
        torch.add(base, own, alpha=2, out=out).add_(side, alpha=_STEEP).abs_().add_(floor)
        torch.clamp(out, low, high, out=out)
    return rotated


def _zero_padding(x: Tensor, valid: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if x.device.type == "cpu" and bool((valid == torch.tensor([height, width])).all()):
        return x
    valid = valid.to(x.device).view(-1, 2, 1, 1, 1)
    inside_height = torch.arange(height, device=x.device).view(-1, 1) < valid[:, 0]
    inside_width = torch.arange(width, device=x.device) < valid[:, 1]
    return x.masked_fill_(~(inside_height & inside_width), 0)  # mask (B, 1, H, W)
