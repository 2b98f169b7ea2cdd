"""A backbone and a head, from images to logits, loss and label maps."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from segheads.backbones import TimmBackbone
from segheads.classes import Classes, num_labels
from segheads.data.images import ImageForm
from segheads.data.label_map import LabelMap
from segheads.functional import upsample, upsample_argmax
from segheads.functional.binary import with_background
from segheads.functional.shapes import crop
from segheads.functional.uncertainty import Uncertainty, ensemble_uncertainty
from segheads.functional.upsample import Reduction, log_of, probabilities_of
from segheads.heads import FCNHead, Head, find_head
from segheads.heads.registry import DecoderEntry
from segheads.hub_mixin import HubMixin
from segheads.inference.finite import all_finite, check_finite
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.losses import PixelLoss, create_loss
from segheads.modules import evaluating, freeze_unused
from segheads.plan import ModelPlan, wire
from segheads.pyramids import Pyramid, find_pyramid


class SegmentationModel(nn.Module, HubMixin, library_name="segheads", pipeline_tag="image-segmentation"):
    """Backbone, optional pyramid and head; images of any size in, logits, loss or labels of that size out.

    The backbone pads images at the right and bottom to a multiple of its strides. Logits are upsampled to the padded
    size and cropped, as the published Segmenter does; `stretch_logits=True` resizes them straight to the image's size
    without cropping, as MMSegmentation and with it the published MeanShifter do. Both agree where nothing is padded.

    `create_model` builds one from names. This class takes built parts, for parts of your own:
    `SegmentationModel(TimmBackbone("resnet50"), MyHead(2048, 19))`. A model from `create_model` also has
    huggingface_hub's `save_pretrained(folder)` and `push_to_hub("owner/name")`; `from_pretrained` reads both back.

    Args:
        backbone: Images to a list of maps, fine to coarse.
        head: A multi-level head takes all maps; a single-level head the last, or with a pyramid the finest.
        pyramid: Maps to maps, between the two.
        auxiliary_head: A single-level head on the backbone's last map but one (its third stage of four; the only map
            of a plain ViT) that training supervises, too, and nothing else uses.
        auxiliary_weight: Weight of the auxiliary head's loss.
        ignore_index: The label that the loss leaves out.
        loss: A name in `segheads.losses.LOSSES`, or a `PixelLoss` class.
        loss_kwargs: Options of the loss, such as `{"label_smoothing": 0.1}`.
        loss_reduction: `"valid"` or `"all"`, see `segheads.losses.PixelLoss`.
        auxiliary_reduction: The same of the auxiliary head's loss; None means `loss_reduction`.
        stretch_logits: Resize logits over the image without removing the padding.

    Attributes:
        plan: What `create_model` built the model from; None for one that was assembled from parts.
        classes: Names and colours of the classes, which a saved model keeps; the recipes fill it in.
        protocol: How images are shown to the model, which a saved model keeps; the recipes fill it in.
        label_map: Which value, or colour, of its label files was which class, which a saved model keeps; None where
            value i was class i.
        revision: The commit of the Hugging Face hub that it was loaded from; None for any other.

    Raises:
        ValueError: If a part takes other channels than the one before it gives, `ignore_index` is a class, or
            the loss is unknown or refuses the number of classes or an option.

    Examples:
        >>> from segheads import create_model
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
        pyramid: Pyramid | None = None,
        *,
        auxiliary_head: Head | None = None,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        loss: str | Callable[..., PixelLoss] = "ce",
        loss_kwargs: Mapping[str, Any] | None = None,
        loss_reduction: Reduction = "valid",
        auxiliary_reduction: Reduction | None = None,
        stretch_logits: bool = False,
    ) -> None:
        super().__init__()
        channels, strides = list(backbone.channels), [float(stride) for stride in backbone.strides]
        self._auxiliary_level = max(len(channels) - 2, 0)
        self._auxiliary_stride = strides[self._auxiliary_level]
        if auxiliary_head is not None:
            _check_fit(auxiliary_head, channels[self._auxiliary_level], backbone)
        source: Any = backbone
        if pyramid is not None:
            _check_fit(pyramid, channels, backbone)
            source, channels, strides = pyramid, list(pyramid.channels), list(pyramid.output_strides(strides))
        level = 0 if pyramid is not None or head.multi_level else -1
        _check_fit(head, channels if head.multi_level else channels[level], source)
        if head.needs_class_token and not getattr(source, "class_token", False):
            raise ValueError(
                f"{type(head).__name__} was built for maps with the class token behind each cell; build the backbone "
                "with class_token=True, and take no pyramid"
            )
        self.backbone = backbone
        self.pyramid = pyramid
        self.head = head
        self.auxiliary_head = auxiliary_head
        self.auxiliary_weight = auxiliary_weight
        options = {"ignore_index": ignore_index, **(loss_kwargs or {})}
        self.criterion = create_loss(loss, head.num_classes, reduction=loss_reduction, **options)
        self.auxiliary_criterion: PixelLoss | None = None
        if auxiliary_reduction is not None:
            self.auxiliary_criterion = create_loss(loss, head.num_classes, reduction=auxiliary_reduction, **options)
        self.stretch_logits = stretch_logits
        self.plan: ModelPlan | None = None  # what it was built from, if by names
        self.classes: Classes | None = None
        self.protocol: InferenceProtocol = WHOLE
        self.label_map: LabelMap | None = None
        self.revision: str | None = None
        self._pyramid_was_chosen = False
        self._level = level
        self._stride = strides[level] / head.upsampling
        # as whole numbers, for graphs of any size: 4 / 3 has no exact float
        self._ratios = {
            stride: Fraction(stride).limit_denominator(1024).as_integer_ratio()
            for stride in (self._stride, self._auxiliary_stride)
        }

    @property
    def num_classes(self) -> int:
        """Number of classes K, that is of logits for each pixel."""
        return self.head.num_classes

    @property
    def pixels_per_cell(self) -> float:
        """The stride of the logits that the head gives, which may be no whole number."""
        return self._stride

    @property
    def averages_probabilities(self) -> bool:
        """Whether predictions interpolate and average probabilities and not logits, as ensembles do."""
        return self.head.averages_probabilities

    @property
    def ignore_index(self) -> int:
        """The label that the loss leaves out."""
        return self.criterion.ignore_index

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        self.criterion.ignore_index = value
        if self.auxiliary_criterion is not None:
            self.auxiliary_criterion.ignore_index = value

    @property
    def loss_reduction(self) -> Reduction:
        """What the loss divides a sum over pixels by."""
        return self.criterion.reduction

    @loss_reduction.setter
    def loss_reduction(self, value: Reduction) -> None:
        self.criterion.reduction = value

    @property
    def num_labels(self) -> int:
        """How many labels the label maps have: K, or of a single class 2, 0 for its background and 1 for the class."""
        return num_labels(self.num_classes)

    @property
    def data_config(self) -> dict[str, Any]:
        """The backbone's mean, standard deviation and input size, in timm's words; `set_input` changes them."""
        return self.backbone.data_config

    @property
    def image_form(self) -> ImageForm:
        """Channels and bit depth of the images that the model takes."""
        return ImageForm(self.backbone.in_chans, self.data_config.get("bit_depth"))

    def set_input(
        self,
        *,
        bit_depth: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Say what images the model takes, which a saved model keeps; `data_config` has it from now on.

        Args:
            bit_depth: Bits that values use, see `segheads.data.ImageForm`; None means 8.
            mean: Of each channel over the training images, of values divided by the largest of the bit depth; None
                leaves the backbone's.
            std: The same of the standard deviation.

        Raises:
            ValueError: If a number is out of range, or there is not one for each channel.
        """
        ImageForm(self.backbone.in_chans, bit_depth)  # refuses
        for name, values in {"mean": mean, "std": std}.items():
            if values is not None:
                if len(values) != self.backbone.in_chans or (name == "std" and not min(values) > 0):
                    raise ValueError(
                        f"{name} must be a number for each of {self.backbone.in_chans} channels"
                        f"{', above 0' if name == 'std' else ''}; got {list(values)}"
                    )
                self.data_config[name] = list(values)
                self.data_config[f"band_{name}"] = list(values)
        if bit_depth is not None:
            self.data_config["bit_depth"] = bit_depth

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        shares: Tensor | None = None,
        *,
        with_terms: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Logits of images, or with labels the loss, in one call so that it works under DDP and torch.compile.

        The loss is `head.loss` with the model's criterion, by default cross-entropy: as a rule that of the first
        prediction plus the mean over the others, plus `auxiliary_weight` times that of the auxiliary head.

        Args:
            images: Normalised images (see `data_config`).
            labels: Class of each pixel, or `ignore_index`.
            shares: Factors of the loss's terms, `(T,)`, where the images are a part of an update; see `divisors`.
            with_terms: Also return what the loss is made of, without gradients and before their factors, by names such
                as ce and dice of `"ce + 0.5*dice"`, and ensemble, learners (their mean) and auxiliary; empty where the
                loss is one term of one prediction. Terms of parts add up, too.

        Shape:
            images `(B, C, H, W)` float, C being the backbone's `in_chans`, labels `(B, H, W)` integer; logits
            `(B, K, H, W)` or a scalar loss, or with `with_terms` a pair of that and scalars by name.

        Raises:
            ValueError: If images are not floating-point or labels have another size than the images.
        """
        if labels is None:
            return self._upsample(self.logits(images), (images.shape[2], images.shape[3]))
        if labels.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(f"labels of images {tuple(images.shape)} must be (B, H, W); got {tuple(labels.shape)}")
        maps = self._maps(images)
        terms: list[Tensor] | None = [] if with_terms else None  # (T,) for each prediction, the auxiliary head's last
        of_head = None if shares is None else shares[: self.criterion.num_terms]
        criterion = partial(self._loss, stride=self._stride, shares=of_head, terms=terms)
        loss = self.head.loss(self._for_head(maps), labels, criterion)
        if self.auxiliary_head is not None:
            logits = self.auxiliary_head(maps[self._auxiliary_level])
            of_rest = None if shares is None else shares[self.criterion.num_terms :]
            own = self._loss(logits, labels, self._auxiliary_stride, of_rest, self.auxiliary_criterion, terms)
            loss = loss + self.auxiliary_weight * own
        return loss if terms is None else (loss, self._named_terms(terms))

    def _named_terms(self, terms: list[Tensor]) -> dict[str, Tensor]:
        """The first prediction's, the mean over the head's others, the auxiliary head's."""
        count = len(terms) - (self.auxiliary_head is not None)
        first, others = ("ensemble", "learners") if self.head.is_ensemble else ("final", "others")
        groups = {first: terms[:1] if count else [], others: terms[1:count], "auxiliary": terms[count:]}
        groups = {name: group for name, group in groups.items() if group}
        found = {
            "_".join(part for part in (group if len(groups) > 1 else "", name) if part): value
            for group, values in groups.items()
            for name, value in zip(self.criterion.term_names, torch.stack(values).mean(0).unbind(), strict=True)
        }
        return {} if list(found) == [""] else found

    def divisors(self, labels: Tensor) -> Tensor:
        """What each term of the loss, then of the auxiliary loss, divides by, `(T,)`: see `PixelLoss.divisors`.

        Args:
            labels: Class of each pixel, or `ignore_index`, `(B, H, W)`.
        """
        criteria = [self.criterion]
        if self.auxiliary_head is not None:
            criteria.append(self.auxiliary_criterion or self.criterion)
        return torch.cat([criterion.divisors(labels).float() for criterion in criteria])

    def logits(self, images: Tensor) -> Tensor:
        """Logits on the head's grid, `(B, K, h, w)`, before the upsampling."""
        return self.head(self._for_head(self._maps(images)))

    def low_resolution(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`logits` and the size, in pixels, to which they are to be upsampled and from which to be cropped.

        It is the padded images' size, or with `stretch_logits` the images' own. `segheads.inference` works from these.
        """
        logits = self.logits(images)
        return logits, self._covered_size(logits, (images.shape[2], images.shape[3]), self._stride)

    def predictions(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """What `head.predictions` gives on the head's grid, each `(B, K, h, w)`, and the size as of `low_resolution`.

        The first is the final one; an ensemble's others are its learners'.
        """
        logits, *others = self.head.predictions(self._for_head(self._maps(images)))
        covered = self._covered_size(logits, (images.shape[2], images.shape[3]), self._stride)
        return [logits, *others], covered

    @overload
    def predict(self, images: Tensor, *, return_uncertainty: Literal[False] = False) -> Tensor: ...

    @overload
    def predict(self, images: Tensor, *, return_uncertainty: Literal[True]) -> tuple[Tensor, Uncertainty]: ...

    @torch.no_grad()
    def predict(self, images: Tensor, *, return_uncertainty: bool = False) -> Tensor | tuple[Tensor, Uncertainty]:
        """Label map of images, in evaluation mode (the mode is restored afterwards) and without gradients.

        For windows, scales and flips see `segheads.inference`. Of a single class the label is 1 where its probability
        is above `protocol.threshold`, and 0 elsewhere.

        Args:
            images: Normalised images (see `data_config`).
            return_uncertainty: Also return how sure an ensemble is: predictive entropy, mutual information between its
                learners and disagreement of their votes, each in nats, measured on the head's grid and upsampled.

        Shape:
            `(B, 3, H, W)` to `(B, H, W)`, int64; and an `Uncertainty` of three maps `(B, H, W)`, float32.

        Raises:
            ValueError: If uncertainty is asked of a head that is no ensemble.
            ScoresError: If logits are NaN or infinite.
        """
        if return_uncertainty and not self.head.is_ensemble:
            raise ValueError(
                f"return_uncertainty needs a head with learners, such as senformer; got {type(self.head).__name__}"
            )
        with evaluating(self):
            H, W = images.shape[2:]
            if not return_uncertainty:
                logits, covered = self.low_resolution(images)
                check_finite([all_finite(logits)])
                return upsample_argmax(self._comparable(logits), covered)[:, :H, :W]
            (logits, *learners), covered = self.predictions(images)
            check_finite([all_finite(x) for x in (logits, *learners)])
            labels = upsample_argmax(self._comparable(logits), covered)[:, :H, :W]
            maps = torch.stack(ensemble_uncertainty(logits, learners), dim=1)  # (B, 3, h, w)
            return labels, Uncertainty(*upsample(maps, covered)[:, :, :H, :W].unbind(1))

    def extra_repr(self) -> str:
        """Adds the way from backbone to logits, with the pyramid that was chosen."""
        parts = [f"{self.backbone.name} (strides {_listed(self.backbone.strides)})"]
        if self.pyramid is not None:
            strides = self.pyramid.output_strides(self.backbone.strides)
            parts.append(f"{type(self.pyramid).__name__} (strides {_listed(strides)})")
        level = "all maps" if self.head.multi_level else ("the finest map", "the last map")[self._level]
        parts.append(f"{type(self.head).__name__} on {level} (logits at stride {self._stride:g})")
        chosen = ", pyramid chosen by create_model" if self._pyramid_was_chosen else ""
        return " -> ".join(parts) + chosen

    def _maps(self, images: Tensor) -> list[Tensor]:
        if not images.is_floating_point():
            raise ValueError(f"images must be floating-point and normalised (data_config); got {images.dtype}")
        return self.backbone(images)

    def _for_head(self, maps: list[Tensor]) -> Any:
        maps = maps if self.pyramid is None else self.pyramid(maps)
        return maps if self.head.multi_level else maps[self._level]

    def _freeze_unneeded(self) -> None:
        """Freeze what no prediction depends on, such as a pyramid's outputs without a learner: DDP stops there."""

        def predictions() -> list[Tensor]:
            maps = self._maps(torch.zeros(1, self.backbone.in_chans, *self.backbone.small_size()))
            auxiliary = [] if self.auxiliary_head is None else [self.auxiliary_head(maps[self._auxiliary_level])]
            return [*self.head.predictions(self._for_head(maps)), *auxiliary]

        freeze_unused(self, predictions)

    def _covered_size(self, logits: Tensor, size: tuple[int, int], stride: float) -> tuple[int, int]:
        """Pixels that a grid of logits lies over: the padded image, or the image where logits are stretched."""
        if self.stretch_logits:
            return size
        above, below = self._ratios[stride]  # a stride of 3.5 has grids of an even number of cells
        return logits.shape[2] * above // below, logits.shape[3] * above // below

    def _upsample(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        scores = upsample(self._averaged(logits), self._covered_size(logits, size, self._stride))
        scores = crop(scores, *size)
        return log_of(scores) if self.averages_probabilities else scores

    def _averaged(self, logits: Tensor) -> Tensor:
        """What predictions interpolate: logits, or the probabilities whose logarithms they are."""
        return probabilities_of(logits) if self.averages_probabilities else logits

    def _comparable(self, logits: Tensor) -> Tensor:
        """What predictions interpolate to choose the pixel's label, that of the highest."""
        scores = self._averaged(logits)
        if self.num_classes > 1:
            return scores
        threshold = self.protocol.threshold
        if self.averages_probabilities:
            return torch.cat([torch.full_like(scores, threshold), scores], dim=1)
        return with_background(scores, threshold)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        stride: float,
        shares: Tensor | None = None,
        criterion: PixelLoss | None = None,
        terms: list[Tensor] | None = None,
    ) -> Tensor:
        """The loss of one prediction; its terms go to the list."""
        covered = self._covered_size(logits, (labels.shape[1], labels.shape[2]), stride)
        criterion = self.criterion if criterion is None else criterion
        values = criterion.terms_of(logits, labels, covered)
        if terms is not None:
            own = torch.stack([value.detach() for value in values])
            terms.append(own if shares is None else own * shares)
        return criterion.joined(values, shares)

    def weights_of_classes(self) -> list[str]:
        """Names of the weights whose shape depends on the number of classes, such as a classifier's.

        Raises:
            ValueError: If the model was assembled from parts.
        """
        if self.plan is None:
            raise ValueError("weights_of_classes needs a model from create_model; this one was assembled from parts")
        other = type(self).from_plan(self.plan.with_classes(self.num_classes + 1)).state_dict()
        return [key for key, x in self.state_dict().items() if key not in other or other[key].shape != x.shape]

    @classmethod
    def from_plan(cls, plan: ModelPlan, backbone: TimmBackbone | None = None) -> "SegmentationModel":
        """Build what a plan says, on a backbone that is there or on one of random weights.

        Args:
            plan: What was decided.
            backbone: `plan.backbone`, built with `plan.backbone_options()`; fewer of its levels may be left afterwards.

        Raises:
            ValueError: If parts do not fit.
        """
        if backbone is None:
            backbone = TimmBackbone(plan.backbone, pretrained=False, **plan.backbone_options())
        wiring = wire(plan, backbone.strides)
        if wiring.keep is not None:
            backbone.keep_coarsest(wiring.keep)
        pyramid = None
        if plan.pyramid is not None:
            pyramid = find_pyramid(plan.pyramid)(backbone.channels, **wiring.pyramid_kwargs)
        channels: Any = list(backbone.channels if pyramid is None else pyramid.channels)
        kind, strides = find_head(plan.head), backbone.strides
        options = {}
        if isinstance(kind, DecoderEntry):
            options = kind.options_for(strides if pyramid is None else pyramid.output_strides(strides))
        auxiliary = None
        if plan.auxiliary_weight:
            auxiliary = FCNHead(backbone.channels[-2:][0], plan.num_classes, **plan.auxiliary_kwargs)
        model = cls(
            backbone,
            kind(
                channels if wiring.level is None else channels[wiring.level],
                plan.num_classes,
                **{**options, **plan.head_kwargs},
            ),
            pyramid,
            auxiliary_head=auxiliary,
            auxiliary_weight=plan.auxiliary_weight,
            ignore_index=plan.ignore_index,
            loss=plan.loss,
            loss_kwargs=plan.loss_kwargs,
            loss_reduction=plan.loss_reduction,
            auxiliary_reduction=plan.auxiliary_reduction,
            stretch_logits=plan.stretch_logits,
        )
        model._freeze_unneeded()
        if plan.freeze_backbone or plan.freeze_stages:
            backbone.freeze(plan.freeze_stages or None)
        model.plan = plan
        return model


def _check_fit(part: Any, channels: Any, source: nn.Module) -> None:
    if part.in_channels != channels:
        raise ValueError(
            f"{type(part).__name__} was built for {part.in_channels} channels; what {type(source).__name__} hands to "
            f"it has {channels}"
        )


def _listed(strides: Any) -> str:
    return ", ".join(f"{stride:g}" for stride in strides)
