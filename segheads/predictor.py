"""From an image as people have it to labels at its own size."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segheads.classes import Classes
from segheads.data.images import (
    ImageForm,
    Picture,
    as_form,
    from_pillow,
    read_image,
    size_of,
    to_rgb,
)
from segheads.data.resize import resize_keep_ratio, to_input
from segheads.errors import ScoresError
from segheads.files import whole_file
from segheads.inference import WHOLE, InferenceProtocol, predict_labels, predict_with_confidence
from segheads.model import SegmentationModel
from segheads.run_config import read_run_config

PALETTE_SIZE = 256  # entries of a PNG's palette


@dataclass(frozen=True)
class Prediction:
    """What a model sees in one image, at the image's own size.

    Attributes:
        image: The image, RGB; of more bands the first three, stretched to what the eye can see.
        labels: Class of each pixel, `(H, W)`, int64.
        classes: Names and colours.
        confidence: The probability of each pixel's label, `(H, W)`; None unless it was asked for.
    """

    image: Image.Image
    labels: Tensor
    classes: Classes
    confidence: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes that occur, in the order of their labels."""
        return tuple(self.classes.names[k] for k in self.labels.unique().tolist())

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
        """Write the labels as a PNG whose pixels are class indices, shown in the classes' colours.

        Args:
            path: A file that ends in `.png`: other formats would change the values.

        Raises:
            ValueError: If the path has another ending, or there are more than 256 classes.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"labels are saved as PNG, which keeps every value; got {str(path)!r}")
        if len(self.classes) > PALETTE_SIZE:
            raise ValueError(
                f"a palette PNG holds {PALETTE_SIZE} classes; got {len(self.classes)}: save .labels as an array"
            )
        indexed = Image.fromarray(self.labels.numpy().astype(np.uint8)).convert("P")
        indexed.putpalette(np.array(self.classes.palette, dtype=np.uint8).tobytes())
        with whole_file(path) as temporary:
            indexed.save(temporary)


class Predictor:
    """A trained model that takes images as people have them: a file, a PIL image, an array or a tensor.

    The image is resized and shown to the model as its protocol says, and the labels come back at its own size. Files
    and PIL images are turned upright as their EXIF orientation says, and so are the labels.

    Args:
        model: A trained model. It stays on its device, and every part keeps its mode.
        classes: Names and colours; None takes the model's own, or numbers where it has none.
        protocol: How images are shown to the model; None takes the model's own, or whole images as they are.

    Raises:
        ValueError: If the model has another number of classes.

    Examples:
        >>> from segheads import create_model
        >>> predictor = Predictor(create_model("test_vit", "linear", 3, pretrained=False))
        >>> prediction = predictor(np.zeros((40, 60, 3), dtype=np.uint8))
        >>> prediction.labels.shape, prediction.overlay().size
        (torch.Size([40, 60]), (60, 40))
    """

    def __init__(
        self, model: SegmentationModel, *, classes: Classes | None = None, protocol: InferenceProtocol | None = None
    ) -> None:
        self.model = model
        self.classes = classes or model.classes or Classes.numbered(model.num_classes)
        self.protocol = protocol or model.protocol
        if len(self.classes) != model.num_labels:
            raise ValueError(f"the model has {model.num_labels} classes; got {len(self.classes)} names")
        self.protocol.check_threshold(model.num_classes)

    @classmethod
    def from_pretrained(
        cls, place: str | Path, *, device: str | torch.device = "cpu", **hub_options: Any
    ) -> "Predictor":
        """Load a model for prediction.

        Args:
            place: The folder of a run, a folder that `save_pretrained` wrote, or a model's name on the hub.
            device: Where the model runs.
            **hub_options: See `SegmentationModel.from_pretrained`.

        Raises:
            SavedModelMissingError: If there is no such model.
            SavedModelError: If it is damaged.
            RunError: If the run's config.json is.
        """
        run = Path(place)
        folder = run / "model"
        model = SegmentationModel.from_pretrained(folder if folder.is_dir() else place, **hub_options).to(device)
        protocol = model.protocol
        if protocol == WHOLE and folder.is_dir():  # as 0.1.0 kept it
            config = read_run_config(run)
            views: dict[str, Any] = {name: config.get(name) for name in ("scale", "window", "stride")}
            protocol = InferenceProtocol(**views)
        return cls(model, protocol=protocol)

    def __call__(
        self, image: str | Path | Image.Image | NDArray[Any] | Tensor, *, confidence: bool = False
    ) -> Prediction:
        """Labels of one image, at its own size.

        Args:
            image: A file; a PIL image; an array `(H, W, 3)`, uint8; or a tensor `(3, H, W)`, uint8 or
                float in [0, 1], which is rounded to 8 bit. For a model of other channels or more bits: a file that
                holds them, an array `(H, W, C)`, or a tensor `(C, H, W)` of the same, stored values.
            confidence: Also give the probability of each pixel's label.

        Raises:
            DataError: If a file is no image, damaged, or of other channels or bits than the model takes; a missing one
                is a FileNotFoundError.
            ValueError: If an array or a tensor is of another shape, type or range.
            ScoresError: If the model's scores are NaN or infinite.
        """
        form = dataclasses.replace(self.model.image_form, exif="apply")
        picture = _picture(image, form)
        config = self.model.data_config
        shown = picture if self.protocol.scale is None else resize_keep_ratio(picture, self.protocol.scale)
        device = next(self.model.parameters()).device
        x = to_input(shown, config["mean"], config["std"], bit_depth=form.bit_depth).to(device)
        size, picture = size_of(picture), to_rgb(picture)
        try:
            if confidence:
                labels, sure = predict_with_confidence(self.model, x, self.protocol, size=size)
                return Prediction(picture, labels.cpu(), self.classes, sure.cpu())
            return Prediction(picture, predict_labels(self.model, x, self.protocol, size=size).cpu(), self.classes)
        except ScoresError as error:
            if isinstance(image, (str, Path)):
                raise ScoresError(f"{image}: {error}") from error
            raise


def _picture(image: Any, form: ImageForm) -> Picture:
    """Any of the ways to give an image, in the form that the model takes."""
    if isinstance(image, (str, Path)):
        return read_image(image, form)
    if isinstance(image, Image.Image):
        return from_pillow(image, form)
    if not form.is_rgb:
        return _bands(image, form)
    if isinstance(image, Tensor):
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(f"a tensor must be (3, H, W); got {tuple(image.shape)}")
        if image.is_floating_point():
            lowest, highest = (float(x) for x in image.aminmax())
            if not (lowest >= 0 and highest <= 1):
                raise ValueError(
                    f"a float tensor must be in [0, 1], not normalised; got values from {lowest:.3g} to {highest:.3g}"
                )
            image = (image * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).cpu().numpy()  # (3, H, W) -> (H, W, 3)
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a path, a PIL image, an array (H, W, 3) of uint8 or a tensor; got {got}")
    return Image.fromarray(np.ascontiguousarray(image))


def _bands(image: Any, form: ImageForm) -> Picture:
    """An array or a tensor of stored values."""
    if isinstance(image, Tensor) and image.ndim == 3:
        image = image.permute(1, 2, 0).cpu().numpy()  # (C, H, W) -> (H, W, C)
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != form.channels:
        got = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"the model takes {form}: a path, an array (H, W, {form.channels}) or a tensor ({form.channels}, H, W) of "
            f"stored values; got {got}"
        )
    return as_form(image, form, "array")
