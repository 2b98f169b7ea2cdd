"""From images as people have them to labels at their own size."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, overload

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
    read_encoded,
    read_image,
    size_of,
    to_rgb,
)
from segheads.data.resize import resize_keep_ratio, to_input
from segheads.errors import DataError, ImageFormError, ScoresError
from segheads.functional.uncertainty import Uncertainty
from segheads.inference import WHOLE, InferenceProtocol, predict_uncertainty
from segheads.inference.predict import maps_of, views_of_images
from segheads.inference.windows import Grid, check_positive
from segheads.model import SegmentationModel
from segheads.prediction import Prediction
from segheads.run_config import read_run_config

Given: TypeAlias = str | Path | bytes | Image.Image | NDArray[Any] | Tensor
"""One image in any of the ways to give it."""
Precision = Literal["no", "bf16", "fp16"]

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of one image with the model's view of it; of several together memory may be short, where each alone has enough
FAILURES = (ValueError, MemoryError, RuntimeError)  # the last is PyTorch's word for no memory, too
MOST_VALUES = 1 << 26  # of images in one group, 256 MB


class _Input(NamedTuple):
    """An image that was read."""

    picture: Image.Image  # for people
    x: Tensor  # for the model, (C, h, w)
    size: tuple[int, int]
    name: str  # of its file, if it has one


class _Wanted(NamedTuple):
    """What is asked for beside labels."""

    confidence: bool
    probability: bool
    uncertainty: bool


class Predictor:
    """A trained model that takes images as people have them: files, bytes, PIL images, arrays, tensors, or a list.

    Each image is resized and shown to the model as its protocol says, and the labels come back at its own size. Files
    and PIL images are turned upright as their EXIF orientation says, and so are the labels. Of several images the
    model sees windows of one size together, and whole images where those are of one size.

    Args:
        model: A trained model. Every part keeps its mode.
        classes: Names and colours; None takes the model's own, or numbers where it has none.
        protocol: How images are shown to the model; None takes the model's own, or whole images as they are.
        device: Where the model is moved; None leaves it where it is.
        mixed_precision: `"bf16"` or `"fp16"`: the precision of the forward pass; `"no"` is the model's own.
        batch_size: How many windows, or whole images, the model sees at once.

    Raises:
        ValueError: If the model has another number of classes, `mixed_precision` is unknown or `batch_size` below 1.

    Examples:
        >>> from segheads import create_model
        >>> predictor = Predictor(create_model("test_vit", "linear", 3, pretrained=False))
        >>> prediction = predictor(np.zeros((40, 60, 3), dtype=np.uint8))
        >>> prediction.labels.shape, prediction.overlay().size
        (torch.Size([40, 60]), (60, 40))
        >>> [found.labels.shape for found in predictor([prediction.image, torch.zeros(3, 20, 30)])]
        [torch.Size([40, 60]), torch.Size([20, 30])]
    """

    def __init__(
        self,
        model: SegmentationModel,
        *,
        classes: Classes | None = None,
        protocol: InferenceProtocol | None = None,
        device: str | torch.device | None = None,
        mixed_precision: Precision = "no",
        batch_size: int = 8,
    ) -> None:
        self.model = model if device is None else model.to(device)
        self.classes = classes or model.classes or Classes.numbered(model.num_classes)
        self.protocol = protocol or model.protocol
        self.mixed_precision = mixed_precision
        self.batch_size = batch_size
        if len(self.classes) != model.num_labels:
            raise ValueError(f"the model has {model.num_labels} classes; got {len(self.classes)} names")
        self.protocol.check_threshold(model.num_classes)
        if mixed_precision not in AUTOCAST:
            raise ValueError(f"mixed_precision must be one of {', '.join(AUTOCAST)}; got {mixed_precision!r}")
        check_positive("batch_size", batch_size)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        device: str | torch.device = "cpu",
        protocol: InferenceProtocol | None = None,
        mixed_precision: Precision = "no",
        batch_size: int = 8,
        **hub_options: Any,
    ) -> "Predictor":
        """Load a model for prediction.

        Args:
            place: The folder of a run, a folder that `save_pretrained` wrote, or a model's name on the hub.
            device: Where the model runs.
            protocol: How images are shown to the model; None takes the model's own.
            mixed_precision: Of the forward pass.
            batch_size: How many windows, or whole images, the model sees at once.
            **hub_options: See `SegmentationModel.from_pretrained`.

        Raises:
            SavedModelMissingError: If there is no such model.
            SavedModelError: If it is damaged.
            RunError: If the run's config.json is.
        """
        run = Path(place)
        folder = run / "model"
        model = SegmentationModel.from_pretrained(folder if folder.is_dir() else place, **hub_options)
        own = model.protocol
        if own == WHOLE and folder.is_dir() and (run / "config.json").is_file():  # as 0.1.0 kept it
            config = read_run_config(run)
            views: dict[str, Any] = {name: config.get(name) for name in ("scale", "window", "stride")}
            own = InferenceProtocol(**views)
        return cls(
            model,
            protocol=protocol or own,
            device=device,
            mixed_precision=mixed_precision,
            batch_size=batch_size,
        )

    @overload
    def __call__(
        self, image: Given, *, confidence: bool = False, probability: bool = False, uncertainty: bool = False
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        image: list[Any] | tuple[Any, ...],
        *,
        confidence: bool = False,
        probability: bool = False,
        uncertainty: bool = False,
    ) -> list[Prediction]: ...

    def __call__(
        self,
        image: Given | list[Any] | tuple[Any, ...],
        *,
        confidence: bool = False,
        probability: bool = False,
        uncertainty: bool = False,
    ) -> Prediction | list[Prediction]:
        """Labels of one image, at its own size, or of each in a list.

        Args:
            image: A file; its bytes; a PIL image; an array `(H, W, 3)`, uint8; or a tensor `(3, H, W)`, uint8 or
                float in [0, 1], which is rounded to 8 bit. For a model of other channels or more bits: a file that
                holds them, an array `(H, W, C)`, or a tensor `(C, H, W)` of the same, stored values. Or a list or a
                tuple of any of these.
            confidence: Also give the probability of each pixel's label.
            probability: Also give that of every class, `(K, H, W)`.
            uncertainty: Also give how sure the model is of each pixel; an ensemble runs once more for it.

        Raises:
            DataError: If a file is no image, damaged, or of other channels or bits than the model takes; a missing one
                is a FileNotFoundError.
            ValueError: If an array or a tensor is of another shape, type or range.
            ScoresError: If the model's scores are NaN or infinite.
        """
        wanted = _Wanted(confidence, probability, uncertainty)
        if isinstance(image, (list, tuple)):
            return [_raised(found) for found in self._stream(image, wanted)]
        return _raised(next(self._finished([self._read(image)], wanted)))

    def stream(
        self,
        images: Iterable[Given],
        *,
        confidence: bool = False,
        probability: bool = False,
        uncertainty: bool = False,
        workers: int = 2,
    ) -> Iterator[Prediction | Exception]:
        """Labels of any number of images, one after the other, while the next ones are read.

        Args:
            images: Each as it may be given when the predictor is called.
            confidence: As when it is called, and so are the next two.
            probability: See there.
            uncertainty: See there.
            workers: Threads that read images; 0 reads when the model waits.

        Yields:
            A `Prediction` for each image, in their order; or the error with which it failed, which stops no other.

        Examples:
            >>> from segheads import create_model
            >>> predictor = Predictor(create_model("test_vit", "linear", 3, pretrained=False))
            >>> for found in predictor.stream([torch.zeros(3, 20, 30), "no file"]):
            ...     print("failed" if isinstance(found, Exception) else tuple(found.labels.shape))
            (20, 30)
            failed
        """
        return self._stream(images, _Wanted(confidence, probability, uncertainty), workers)

    def _stream(self, images: Iterable[Any], wanted: _Wanted, workers: int = 0) -> Iterator[Prediction | Exception]:
        """A prediction or an error for each image, in groups that the model sees together."""
        group: list[_Input | Exception] = []
        values = 0
        for one in _ahead(self._read, images, workers, self.batch_size):
            own = one.x.numel() if isinstance(one, _Input) else 0
            if group and (len(group) == self.batch_size or values + own > MOST_VALUES):
                yield from self._finished(group, wanted)
                group, values = [], 0
            group.append(one)
            values += own
        yield from self._finished(group, wanted)

    def _read(self, image: Any, number: int | None = None) -> _Input | Exception:
        """The image for people and for the model; or why there is none, whatever a decoder stumbled over."""
        form = dataclasses.replace(self.model.image_form, exif="apply")
        name = str(image) if isinstance(image, (str, Path)) else "" if number is None else f"image {number}"
        try:
            picture = _picture(image, form)
            config = self.model.data_config
            shown = picture if self.protocol.scale is None else resize_keep_ratio(picture, self.protocol.scale)
            x = to_input(shown, config["mean"], config["std"], bit_depth=form.bit_depth)
            return _Input(to_rgb(picture), x, size_of(picture), name)
        except Exception as error:
            return error if not name or isinstance(image, (str, Path)) else _named(error, name)

    def _finished(self, group: Sequence[_Input | Exception], wanted: _Wanted) -> Iterator[Prediction | Exception]:
        """The prediction, or the error, of each image of a group."""
        views = iter(self._views([one for one in group if isinstance(one, _Input)]))
        for one in group:
            if isinstance(one, Exception):
                yield one
                continue
            found = next(views)
            try:
                yield found if isinstance(found, Exception) else self._prediction(one, found, wanted)
            except ScoresError as error:
                yield ScoresError(f"{one.name}: {error}") if one.name else error
            except FAILURES as error:
                yield error

    def _views(self, inputs: Sequence[_Input]) -> list[list[Grid] | Exception]:
        """What the model says of each image on its own grid; of several that fail together, one by one."""
        parameter = next(self.model.parameters())
        try:
            with self._precision():
                images = [one.x[None].to(parameter.device, parameter.dtype) for one in inputs]
                sizes = [one.size for one in inputs]
                found = views_of_images(self.model, images, sizes, self.protocol, batch_size=self.batch_size)
            return [*found]
        except FAILURES as error:
            if len(inputs) == 1:
                return [error]
        return [found for one in inputs for found in self._views([one])]

    def _prediction(self, one: _Input, views: Sequence[Grid], wanted: _Wanted) -> Prediction:
        is_ensemble = self.model.head.is_ensemble
        with self._precision():
            maps = maps_of(
                views,
                one.size,
                self.protocol,
                confidence=wanted.confidence,
                probability=wanted.probability,
                entropy=wanted.uncertainty and not is_ensemble,
            )
            doubt = None
            if wanted.uncertainty and is_ensemble:
                parameter = next(self.model.parameters())
                x = one.x.to(parameter.device, parameter.dtype)
                doubt = predict_uncertainty(self.model, x, self.protocol, size=one.size, batch_size=self.batch_size)
        if maps.entropy is not None:
            nothing = torch.zeros_like(maps.entropy)
            doubt = Uncertainty(maps.entropy, nothing, nothing)
        return Prediction(
            one.picture,
            maps.labels.cpu(),
            self.classes,
            None if maps.confidence is None else maps.confidence.cpu(),
            None if maps.probability is None else maps.probability.cpu(),
            None if doubt is None else Uncertainty(*(x.cpu() for x in doubt)),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _precision(self) -> torch.autocast:
        dtype = AUTOCAST[self.mixed_precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def _named(error: Exception, name: str) -> Exception:
    """The same error with the number of the image, which has no path to be known by."""
    if isinstance(error, ImageFormError):
        return ImageFormError(f"{name}: {error}", error.kind)
    return type(error)(f"{name}: {error}") if type(error) in (ValueError, DataError) else error


def _raised(found: Prediction | Exception) -> Prediction:
    """The prediction; an error is raised."""
    if isinstance(found, Exception):
        raise found
    return found


def _ahead(
    read: Callable[[Any, int], _Input | Exception], images: Iterable[Any], workers: int, ahead: int
) -> Iterator[_Input | Exception]:
    """Each image and its number read, so many ahead of the one that is asked for, in threads."""
    if not workers:
        yield from (read(image, number) for number, image in enumerate(images))
        return
    pool = ThreadPoolExecutor(workers, "segheads-read")
    waiting: deque[Future[_Input | Exception]] = deque()
    try:
        for number, image in enumerate(images):
            waiting.append(pool.submit(copy_context().run, read, image, number))  # a limit of pixels goes with it
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _picture(image: Any, form: ImageForm) -> Picture:
    """Any of the ways to give an image, in the form that the model takes."""
    if isinstance(image, (str, Path)):
        return read_image(image, form)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return read_encoded(bytes(image), form)
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
        raise ValueError(
            f"an image must be a path, bytes, a PIL image, an array (H, W, 3) of uint8 or a tensor; got {got}"
        )
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
