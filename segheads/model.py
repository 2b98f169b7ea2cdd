"""A backbone and a head, from images to logits, loss and label maps."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segheads.backbones import TimmBackbone
from segheads.functional import upsample, upsample_argmax, upsample_cross_entropy
from segheads.functional.upsample import Reduction
from segheads.heads import Head, find_head
from segheads.pretrained import why_hub_is_out_of_reach

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class SegmentationModel(nn.Module, ModelHubMixin, library_name="segheads", pipeline_tag="image-segmentation"):
    """Backbone, optional pyramid and head; images of any size in, logits, loss or labels of that size out.

    The backbone pads images at the right and bottom to a multiple of its strides. Logits are upsampled to the padded
    size and cropped, as the published Segmenter does; `stretch_logits=True` resizes them straight to the image's size
    without cropping, as MMSegmentation and with it the published MeanShifter do. Both agree where nothing is padded.

    `create_model` builds one from names. This class takes built parts, for parts of your own:
    `SegmentationModel(TimmBackbone("resnet50"), MyHead(2048, 19))`. A model from `create_model` also has
    huggingface_hub's `save_pretrained(folder)` and `push_to_hub("owner/name")`; `from_pretrained` reads both back.

    Args:
        backbone: Images to a list of maps, fine to coarse.
        head: The last map (with a pyramid: its finest) to class logits.
        pyramid: Maps to maps, between the two; a module with `channels` and `strides`.
        ignore_index: The label that the loss leaves out.
        loss_reduction: `"valid"` or `"all"`, see `segheads.functional.upsample_cross_entropy`.
        stretch_logits: Resize logits over the image without removing the padding.

    Raises:
        ValueError: If the head takes other channels than the backbone (or pyramid) gives.

    Examples:
        >>> model = create_model("test_vit", "mean_shift", num_classes=5, pretrained=False)
        >>> images = torch.randn(2, 3, 50, 75)
        >>> model(images).shape, model.predict(images).shape
        (torch.Size([2, 5, 50, 75]), torch.Size([2, 50, 75]))
        >>> model(images, torch.zeros(2, 50, 75, dtype=torch.long)).shape
        torch.Size([])
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        head: Head,
        pyramid: nn.Module | None = None,
        *,
        ignore_index: int = 255,
        loss_reduction: Reduction = "valid",
        stretch_logits: bool = False,
    ) -> None:
        super().__init__()
        source: Any = backbone if pyramid is None else pyramid
        level = -1 if pyramid is None else 0
        if head.in_channels != source.channels[level]:
            raise ValueError(
                f"{type(head).__name__} was built for {head.in_channels} channels; the map that "
                f"{type(source).__name__} hands to it has {source.channels[level]}"
            )
        self.backbone = backbone
        self.pyramid = pyramid
        self.head = head
        self.ignore_index = ignore_index
        self.loss_reduction = loss_reduction
        self.stretch_logits = stretch_logits
        self.config: dict[str, Any] | None = None  # what create_model was called with
        self._level = level
        self._stride = int(source.strides[level])

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.head.num_classes

    @property
    def data_config(self) -> dict[str, Any]:
        """The backbone's mean, standard deviation and input size, in timm's words."""
        return self.backbone.data_config

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of images, or with labels the loss, in one call so that it works under DDP and torch.compile.

        The loss is cross-entropy on the head's first prediction plus the mean over its others.

        Args:
            images: Normalised images (see `data_config`).
            labels: Class of each pixel, or `ignore_index`.

        Shape:
            images `(B, 3, H, W)` float, labels `(B, H, W)` integer; logits `(B, K, H, W)` or a scalar loss.

        Raises:
            ValueError: If images are not floating-point or labels have another size than the images.
        """
        if labels is None:
            return self._upsample(self.logits(images), (images.shape[2], images.shape[3]))
        if labels.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(f"labels of images {tuple(images.shape)} must be (B, H, W); got {tuple(labels.shape)}")
        first, *rest = self.head.predictions(self._features(images))
        loss = self._loss(first, labels)
        return loss + sum(self._loss(logits, labels) for logits in rest) / len(rest) if rest else loss

    def logits(self, images: Tensor) -> Tensor:
        """Logits on the head's grid, `(B, K, h, w)`, before the upsampling."""
        return self.head(self._features(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Label map of images, in evaluation mode (the mode is restored afterwards) and without gradients.

        For windows, scales and flips see `segheads.inference`.

        Args:
            images: Normalised images (see `data_config`).

        Shape:
            `(B, 3, H, W)` to `(B, H, W)`, int64.
        """
        was_training = self.training
        self.eval()
        try:
            logits, (H, W) = self.logits(images), images.shape[2:]
            return upsample_argmax(logits, self._covered_size(logits, (H, W)))[:, :H, :W]
        finally:
            self.train(was_training)

    def _features(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point and normalised (data_config); got {images.dtype}")
        features = self.backbone(images)
        return (features if self.pyramid is None else self.pyramid(features))[self._level]

    def _covered_size(self, logits: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        """Pixels that the head's grid lies over: the padded image, or the image where logits are stretched."""
        if self.stretch_logits:
            return size
        return logits.shape[2] * self._stride, logits.shape[3] * self._stride

    def _upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return upsample(logits, self._covered_size(logits, size))[:, :, : size[0], : size[1]]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        H, W = labels.shape[1:]
        covered = self._covered_size(logits, (H, W))
        padded = F.pad(labels, (0, covered[1] - W, 0, covered[0] - H), value=self.ignore_index)
        loss = upsample_cross_entropy(logits, padded, ignore_index=self.ignore_index, reduction=self.loss_reduction)
        if self.loss_reduction == "all":  # all pixels of the image, not of its padding
            loss = loss * (covered[0] * covered[1] / (H * W))
        return loss

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.config is None:
            raise ValueError(
                "save_pretrained needs a model from create_model, which can be rebuilt from its arguments; this one "
                "was assembled from parts, so save its state_dict() and assemble it again"
            )
        try:
            text = json.dumps({"model": self.config, "settings": self.head.settings()}, indent=2)
        except TypeError as error:
            raise ValueError(f"the arguments of create_model must be JSON values to be saved: {error}") from error
        state = {
            key: value.cpu().contiguous().clone() for key, value in self.state_dict().items()
        }  # shared memory, too
        save_file(state, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})
        (save_directory / CONFIG_FILE).write_text(text + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options: Any) -> "SegmentationModel":
        """Load what `save_pretrained` or `push_to_hub` wrote; the model comes back in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: A local folder, or a model's name on the Hugging Face hub.
            **hub_options: huggingface_hub's `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            FileNotFoundError: If the folder lacks one of the files, or there is neither such a folder nor, as far as
                can be told, such a model on the hub.
            ValueError: If the weights do not fit the model that the configuration describes.
        """
        where, cause = str(pretrained_model_name_or_path), None
        if Path(where).is_dir():
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if not (Path(where) / name).is_file():
                    raise FileNotFoundError(f"{where} holds no {name}; expected a folder that save_pretrained wrote")
        elif not hub_options.get("local_files_only"):
            cause = why_hub_is_out_of_reach()
            hub_options["local_files_only"] = cause is not None  # the cache may have it
        try:
            return super().from_pretrained(where, **hub_options)
        except (OSError, HFValidationError) as error:  # huggingface_hub's errors of network and look-up are OSErrors
            raise FileNotFoundError(
                f"{where!r} is no local folder, and could not be had from the Hugging Face hub: "
                f"{cause or str(error).splitlines()[0]}"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **hub_options: Any) -> "SegmentationModel":
        files = [Path(model_id) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
        if not Path(model_id).is_dir():
            files = [Path(hf_hub_download(model_id, file.name, **hub_options)) for file in files]
        config = json.loads(files[0].read_text())
        model = create_model(**config["model"], pretrained=False)
        load_weights(model, files[1])
        for name, value in config["settings"].items():
            setattr(model.head, name, value)
        return model.eval()


def create_model(
    backbone: str,
    head: str,
    num_classes: int,
    *,
    pretrained: bool | str | Path = True,
    backbone_kwargs: dict[str, Any] | None = None,
    head_kwargs: dict[str, Any] | None = None,
    ignore_index: int = 255,
    loss_reduction: Reduction = "valid",
    stretch_logits: bool = False,
) -> SegmentationModel:
    """Build a model from names, in timm's manner.

    Args:
        backbone: Any name of `timm.list_models()`, with or without a pretrained tag.
        head: A name of `list_heads()`.
        num_classes: Number of classes K.
        pretrained: timm's pretrained backbone weights (True), none (False), or the path of a checkpoint.
        backbone_kwargs: Further arguments of `TimmBackbone`.
        head_kwargs: Further arguments of the head.
        ignore_index: The label that the loss leaves out.
        loss_reduction: `"valid"` or `"all"`, see `segheads.functional.upsample_cross_entropy`.
        stretch_logits: See `SegmentationModel`.

    Raises:
        ValueError: If a name is unknown, or `num_classes` is below 1.
        PretrainedWeightsError: If pretrained weights cannot be had.

    Examples:
        >>> model = create_model("test_vit", "linear", num_classes=19, pretrained=False)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 19, 64, 96])
    """
    head_class = find_head(head)  # before any weights are loaded
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more; got {num_classes}")
    built = TimmBackbone(backbone, pretrained=pretrained, **{"levels": 1, **(backbone_kwargs or {})})
    model = SegmentationModel(
        built,
        head_class(built.channels[-1], num_classes, **(head_kwargs or {})),
        ignore_index=ignore_index,
        loss_reduction=loss_reduction,
        stretch_logits=stretch_logits,
    )
    model.config = {
        "backbone": backbone,
        "head": head,
        "num_classes": num_classes,
        "backbone_kwargs": backbone_kwargs or {},
        "head_kwargs": head_kwargs or {},
        "ignore_index": ignore_index,
        "loss_reduction": loss_reduction,
        "stretch_logits": stretch_logits,
    }
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model that it fits exactly.

    Args:
        model: The model to load into.
        path: A `model.safetensors` that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If names or shapes differ; the message names the file and shows the first differences.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; expected a safetensors file that save_pretrained wrote")
    state, expected = load_file(path), model.state_dict()
    differences = [f"{key} is missing" for key in expected if key not in state]
    differences += [f"{key} is not expected" for key in state if key not in expected]
    differences += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(differences[:3])}{more}")
    model.load_state_dict(state)
