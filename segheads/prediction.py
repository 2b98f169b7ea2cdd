"""What a model sees in one image: labels at its own size, and what people want of them: pictures, files, shares."""

import base64
import html
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from segheads.classes import Classes
from segheads.files import whole_file
from segheads.functional.uncertainty import Uncertainty

PALETTE_SIZE, GREY_SIZE = 256, 65536  # values of a PNG with a palette, and of one of 16 bit
MOST_SHOWN = 24  # classes in a legend
MOST_NAMED = 4  # classes in one line
NOTEBOOK_SIDE = 1024  # pixels of the longer side of a notebook's picture


class Area(NamedTuple):
    """How much of an image a class covers.

    Attributes:
        label: The class.
        name: Its name.
        pixels: How many are of it.
        share: Of all pixels, 0 to 1.
    """

    label: int
    name: str
    pixels: int
    share: float


@dataclass(frozen=True, repr=False)
class Prediction:
    """What a model sees in one image, at the image's own size. A notebook shows it as overlay and legend.

    Attributes:
        image: The image, RGB; of more bands the first three, stretched to what the eye can see.
        labels: Class of each pixel, `(H, W)`, int64.
        classes: Names and colours.
        confidence: The probability of each pixel's label, `(H, W)`; None unless it was asked for.
        probability: That of every class, `(K, H, W)`, for a model of one class `(1, H, W)`; None unless asked for.
        uncertainty: Entropy of each pixel's probabilities, nats, `(H, W)`, and for an ensemble what its learners
            disagree on, which is 0 for other heads; None unless asked for.
    """

    image: Image.Image
    labels: Tensor
    classes: Classes
    confidence: Tensor | None = None
    probability: Tensor | None = None
    uncertainty: Uncertainty | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes that occur, in the order of their labels."""
        return tuple(self.classes.names[k] for k in self.labels.unique().tolist())

    @property
    def areas(self) -> tuple[Area, ...]:
        """The classes that occur, the largest first, with their pixels and shares."""
        counts = self.labels.flatten().bincount(minlength=len(self.classes)).tolist()
        total = self.labels.numel()
        found = [Area(k, self.classes.names[k], count, count / total) for k, count in enumerate(counts) if count]
        return tuple(sorted(found, key=lambda area: -area.pixels))

    def colours(self) -> Image.Image:
        """The labels in the colours of their classes."""
        table = np.array(self.classes.palette, dtype=np.uint8)
        return Image.fromarray(table[self.labels.numpy()])

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image under the colours of its classes; a background, see `Classes`, is left unpainted.

        Args:
            opacity: Of the colours: 0 shows the image alone, 1 the colours alone.

        Raises:
            ValueError: If `opacity` is not from 0 to 1.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must be from 0 to 1; got {opacity}")
        painted = Image.blend(self.image, self.colours(), opacity)
        if self.classes.has_background:
            painted.paste(self.image, mask=Image.fromarray((self.labels == 0).numpy().astype(np.uint8) * 255))
        return painted

    def save(self, path: str | Path) -> None:
        """Write the labels as a PNG whose pixels are class indices, shown in the classes' colours; whole or not at all.

        Above 256 classes, which no palette holds, the PNG is grey, of 16 bit.

        Args:
            path: A file that ends in `.png`: other formats would change the values. Its folder is made if need be.

        Raises:
            ValueError: If the path has another ending, or there are more than 65,536 classes.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"labels are saved as PNG, which keeps every value; got {str(path)!r}")
        if len(self.classes) > GREY_SIZE:
            raise ValueError(f"a PNG holds {GREY_SIZE} classes; got {len(self.classes)}: save .labels as an array")
        if len(self.classes) > PALETTE_SIZE:
            indexed = Image.fromarray(self.labels.numpy().astype(np.uint16))
        else:
            indexed = Image.fromarray(self.labels.numpy().astype(np.uint8)).convert("P")
            indexed.putpalette(np.array(self.classes.palette, dtype=np.uint8).tobytes())
        with whole_file(path) as temporary:
            indexed.save(temporary)

    def __repr__(self) -> str:
        """Size and largest classes, in one line."""
        height, width = self.labels.shape
        shown = ", ".join(f"{area.name} {area.share:.1%}" for area in self.areas[:MOST_NAMED])
        others = len(self.areas) - MOST_NAMED
        return f"Prediction({width} x {height}: {shown}{f' and {others} more' if others > 0 else ''})"

    def _repr_png_(self) -> bytes:
        """The overlay, for notebooks."""
        picture = self.overlay()
        picture.thumbnail((NOTEBOOK_SIDE, NOTEBOOK_SIDE))
        file = BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    def _repr_html_(self) -> str:
        """The overlay and a legend with shares, for notebooks."""
        picture = base64.b64encode(self._repr_png_()).decode("ascii")
        entries = [
            f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:.9em;'
            f"height:.9em;margin-right:.3em;border:1px solid #888;background:rgb{self.classes.palette[area.label]}"
            f'"></span>{html.escape(area.name)} {area.share:.1%}</span>'
            for area in self.areas[:MOST_SHOWN]
        ]
        if (others := len(self.areas) - MOST_SHOWN) > 0:
            entries.append(f"<span>and {others} more</span>")
        return (
            f'<div><img alt="overlay" style="max-width:100%" src="data:image/png;base64,{picture}"/>'
            f'<div style="line-height:1.6">{" ".join(entries)}</div></div>'
        )
