"""What the page shows of an image: labels and maps as bytes for the browser, pictures to save, messages."""

import base64
import dataclasses
import logging
import math
import re
import zlib
from collections.abc import Collection, Mapping
from io import BytesIO
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segheads.data.limits import pixel_limit
from segheads.errors import OptionError, SegheadsError
from segheads.files import readable
from segheads.page.controls import Choice, changed, check_choice, choose, find_controls
from segheads.prediction import PALETTE_SIZE, Prediction
from segheads.predictor import Predictor

SIDE_SHOWN = 2048  # pixels of the longer side in the browser; what is saved has the image's own size
LEVELS = 255  # of a map of uncertainty in the browser
LABELS, OVERLAY = "labels", "overlay"  # what can be saved
MAPS = {
    "entropy": "Uncertainty (entropy)",
    "mutual_information": "Mutual information of learners",
    "disagreement": "Disagreement of learners",
}
log = logging.getLogger(__name__)


class Viewer:
    """One model for all who look at the page: it is changed for an image under a lock, and changed back.

    Args:
        predictor: The model and how images are shown to it.
        max_pixels: The most pixels of an image that is decoded; None means `segheads.data.limits.MAX_PIXELS`.
    """

    def __init__(self, predictor: Predictor, max_pixels: int | None = None) -> None:
        self.predictor = predictor
        self.max_pixels = max_pixels
        self.controls = find_controls(predictor)
        self._lock = Lock()

    def predict(self, path: Path, choice: Choice) -> Prediction:
        """Labels and uncertainty of an image file, with the model as it is chosen.

        Args:
            path: The file.
            choice: What to change for it.

        Raises:
            OptionError: If the choice is none that the page offers, or its parts do not go together.
            DataError: As `Predictor` does; so are the rest.
        """
        check_choice(choice, self.controls)
        own = self.predictor
        protocol = own.protocol
        if choice.threshold is not None and self.controls.threshold is not None:
            protocol = dataclasses.replace(protocol, threshold=choice.threshold)
        options: Any = {"mixed_precision": own.mixed_precision, "batch_size": own.batch_size}
        with self._lock, pixel_limit(self.max_pixels), changed(own.model, choice):
            predictor = Predictor(own.model, classes=own.classes, protocol=protocol, **options)
            return predictor(path, uncertainty=True)

    def answer(self, path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], Prediction | None]:
        """What the browser is sent, and what its session keeps; after an error a message, and nothing to keep.

        Args:
            path: The image file.
            values: What is set on the page, see `choose`.
        """
        try:
            found = self.predict(path, choose(self.controls, values))
            return shown(found, path.name, self.controls.num_learners), kept(found)
        except Exception as error:  # whatever a file, a setting or a model stumbles over is said on the page
            return {"error": words_of(error, path)}, None


def shown(found: Prediction, name: str, learners: int = 0) -> dict[str, Any]:
    """What the browser needs to draw an image, its labels and its uncertainty: JSON values.

    Labels and maps are bytes, row by row, compressed by zlib, in base64: a browser that guards against fingerprints
    would change the pixels of a picture when it reads them. Above `SIDE_SHOWN` pixels all are sampled.

    Args:
        found: What the model sees, with uncertainty.
        name: Of the image.
        learners: Of an ensemble; 0 where the model is none.
    """
    height, width = found.labels.shape
    factor = min(1.0, SIDE_SHOWN / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    labels = _sampled(found.labels, size)
    return {
        "name": name,
        "size": [width, height],
        "shown": [size[1], size[0]],
        "image": _jpeg(found.image.resize((size[1], size[0])) if factor < 1 else found.image),
        "labels": _packed(labels.astype("<u2" if len(found.classes) > PALETTE_SIZE else np.uint8)),
        "bytes": 2 if len(found.classes) > PALETTE_SIZE else 1,
        "classes": [
            {"label": x.label, "name": x.name, "colour": found.classes.palette[x.label], "share": x.share}
            for x in found.areas
        ],
        "background": 0 if found.classes.has_background else None,
        "maps": _maps(found, size, learners),
    }


def kept(found: Prediction) -> Prediction:
    """What a session keeps of a prediction to save it later: labels in few bytes, no maps.

    Args:
        found: What the model sees.
    """
    kind = torch.uint8 if len(found.classes) <= PALETTE_SIZE else torch.int32
    return dataclasses.replace(found, labels=found.labels.to(kind), uncertainty=None)


def overlay_without(found: Prediction, opacity: float, hidden: Collection[int]) -> Image.Image:
    """The overlay as the page shows it, at the image's own size.

    Args:
        found: What the model sees.
        opacity: Of the colours, 0 to 1.
        hidden: Labels that are left unpainted.

    Raises:
        OptionError: If the opacity is out of range.
    """
    if not 0 <= opacity <= 1:
        raise OptionError(f"opacity must be 0 to 1; got {opacity}")
    painted = found.overlay(opacity)
    if hidden:
        unpainted = np.isin(found.labels.numpy(), list(hidden))
        painted.paste(found.image, mask=Image.fromarray(unpainted.astype(np.uint8) * 255))
    return painted


def save(
    found: Prediction | None, folder: Path, image: str | None, *, kind: str, opacity: float, hidden: Collection[int]
) -> Path:
    """Write what is to be downloaded: the labels as `segheads predict` writes them, or the overlay; a PNG.

    Args:
        found: What a session keeps.
        folder: Where files to download are written, each into a folder of its own.
        image: The image's file, which the PNG is named after.
        kind: `"labels"` or `"overlay"`.
        opacity: Of the overlay's colours.
        hidden: Labels that the overlay leaves unpainted.

    Raises:
        OptionError: If there is no image, or the kind or the opacity is none.
    """
    if found is None or image is None:
        raise OptionError("there is nothing to save; choose an image first")
    if kind not in (LABELS, OVERLAY):
        raise OptionError(f"{LABELS} or {OVERLAY} can be saved; got {kind}")
    path = Path(mkdtemp(dir=folder)) / f"{Path(image).stem}_{kind}.png"
    if kind == LABELS:
        found.save(path)
    else:
        overlay_without(found, opacity, hidden).save(path)
    return path


def words_of(error: Exception, path: Path | None = None) -> str:
    """An error for people in front of the page, in one line and without folders; a bug's traceback goes to the log.

    Args:
        error: What was raised.
        path: The image's file.
    """
    text = readable(" ".join(str(error).split()))
    if path is not None:
        text = re.sub(r" <_io\.\w+ name=[^>]*>", "", text.replace(str(path), path.name))
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return f"The memory does not hold this image ({text or 'out of memory'}); take a smaller one."
    if isinstance(error, (SegheadsError, ValueError, OSError)) and text:
        return text
    log.error("the page met a bug", exc_info=error)
    return "This failed for a reason that the page does not know; the terminal of segheads demo has it."


def _maps(found: Prediction, size: tuple[int, int], learners: int) -> list[dict[str, Any]]:
    if found.uncertainty is None:
        return []
    most = {"entropy": math.log(len(found.classes))}
    if learners > 1:
        most |= dict.fromkeys(("mutual_information", "disagreement"), math.log(learners))
    return [
        {"name": name, "title": MAPS[name], "most": high, "values": _packed(_grey(found.uncertainty, name, high, size))}
        for name, high in most.items()
    ]


def _grey(uncertainty: Any, name: str, most: float, size: tuple[int, int]) -> NDArray[np.uint8]:
    values = _sampled(getattr(uncertainty, name), size)
    return np.rint(values * (LEVELS / most)).clip(0, LEVELS).astype(np.uint8)


def _sampled(values: Tensor, size: tuple[int, int]) -> NDArray[Any]:
    """The value in the middle of each shown pixel."""
    if tuple(values.shape) == size:
        return values.numpy()
    rows, columns = (((np.arange(to) + 0.5) * (of / to)).astype(int) for to, of in zip(size, values.shape, strict=True))
    return values.numpy()[np.ix_(rows, columns)]


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode("ascii")


def _jpeg(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
