"""`create_model`: from names to a plan, and from the plan to a model."""

import dataclasses
from pathlib import Path
from typing import Any

from segheads.backbones import TimmBackbone
from segheads.functional.upsample import Reduction
from segheads.model import SegmentationModel
from segheads.plan import ModelPlan, choose_pyramid


def create_model(
    backbone: str,
    head: str,
    num_classes: int,
    *,
    pretrained: bool | str | Path = True,
    pyramid: str | None = "auto",
    backbone_kwargs: dict[str, Any] | None = None,
    pyramid_kwargs: dict[str, Any] | None = None,
    head_kwargs: dict[str, Any] | None = None,
    auxiliary_weight: float = 0.0,
    auxiliary_kwargs: dict[str, Any] | None = None,
    ignore_index: int = 255,
    loss: str = "ce",
    loss_kwargs: dict[str, Any] | None = None,
    loss_reduction: Reduction = "valid",
    auxiliary_reduction: Reduction | None = None,
    stretch_logits: bool = False,
    freeze_backbone: bool = False,
    freeze_stages: int = 0,
) -> SegmentationModel:
    """Build a model from names, in timm's manner.

    The pyramid is chosen to fit, and shown by `print(model)`:

    | backbone | single-level head | `senformer`, `feature_fusion` | `uper`, `sen_uper`, `smp:*` |
    |---|---|---|---|
    | one map (plain ViT) | none: that map | `"simple"` | `"simple"` |
    | several strides | `"fpn"`: its finest map | `"fpnt"` | none: the backbone's maps |

    `smp:dpt` takes four blocks of a plain ViT.
    Of a backbone's levels the coarsest four are used (`smp:*`: five), or as many as there are.

    Args:
        backbone: Any name of `timm.list_models()`, with or without a pretrained tag; or timm's `hf-hub:OWNER/NAME`,
            whose architecture, arguments, mean and std the model keeps, so that it can be loaded without the hub.
        head: A name of `list_heads()`.
        num_classes: Number of classes K. 1, with `loss="bce"`, is one class and its background: one logit for each
            pixel, whose sigmoid is the probability of the class; labels are 0 and 1, and so are predicted ones.
        pretrained: timm's pretrained backbone weights (True), none (False), or the path of a checkpoint.
        pyramid: `"auto"`, a name in `segheads.pyramids.PYRAMIDS`, or None for the backbone's maps as they are.
        backbone_kwargs: Further arguments of `TimmBackbone`.
        pyramid_kwargs: Further arguments of the pyramid, such as `{"out_channels": 128}`.
        head_kwargs: Further arguments of the head.
        auxiliary_weight: Weight of an auxiliary `FCNHead` on the backbone's third stage in training (SenFormer and
            UPerNet: 0.4); 0 builds none.
        auxiliary_kwargs: Further arguments of the auxiliary head; SenFormer's has `{"channels": 512}`.
        ignore_index: The label that the loss leaves out; no class, so above 255 classes -1, say.
        loss: A name in `segheads.losses.LOSSES`; `"bce"` with `num_classes=1`.
        loss_kwargs: Options of the loss, such as `{"label_smoothing": 0.1}`.
        loss_reduction: `"valid"` or `"all"`, see `segheads.losses.PixelLoss`.
        auxiliary_reduction: The same of the auxiliary head's loss; None means `loss_reduction`, SenFormer has `"all"`.
        stretch_logits: See `SegmentationModel`.
        freeze_backbone: The backbone learns nothing: no gradients, and evaluation mode for good (statistics of batch
            norms, drop path, dropout), which a saved model keeps.
        freeze_stages: The same of the backbone's stem and first stages alone (blocks of a plain ViT), 0 to
            `model.backbone.num_stages`; see `TimmBackbone.freeze`.

    Raises:
        ValueError: If a name is unknown, `num_classes` is below 1, `ignore_index` is a class, parts do not fit, the
            backbone has fewer stages than `freeze_stages`, or the loss refuses the number of classes (one of a softmax,
            several of a sigmoid) or an option.
        PretrainedWeightsError: If pretrained weights cannot be had.

    Examples:
        >>> import torch
        >>> model = create_model("test_vit", "linear", num_classes=19, pretrained=False)
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 19, 64, 96])
    """
    plan = ModelPlan(
        backbone=backbone,
        head=head,
        num_classes=num_classes,
        pyramid=pyramid,
        backbone_kwargs=backbone_kwargs or {},
        pyramid_kwargs=pyramid_kwargs or {},
        head_kwargs=head_kwargs or {},
        auxiliary_weight=auxiliary_weight,
        auxiliary_kwargs=auxiliary_kwargs or {},
        ignore_index=ignore_index,
        loss=loss,
        loss_kwargs=loss_kwargs or {},
        loss_reduction=loss_reduction,
        auxiliary_reduction=auxiliary_reduction,
        stretch_logits=stretch_logits,
        freeze_backbone=freeze_backbone,
        freeze_stages=freeze_stages,
    )
    built = TimmBackbone(backbone, pretrained=pretrained, **plan.backbone_options())
    if pyramid == "auto":
        plan = dataclasses.replace(plan, pyramid=choose_pyramid(head, built.strides))
    if ":" in backbone:
        plan = _by_architecture(plan, built)
    model = SegmentationModel.from_plan(plan, built)
    if ":" in backbone:
        model.set_input(mean=built.data_config["mean"], std=built.data_config["std"])
    model._pyramid_was_chosen = pyramid == "auto" and plan.pyramid is not None
    return model


def _by_architecture(plan: ModelPlan, built: TimmBackbone) -> ModelPlan:
    """The plan with what the name of a place stands for: who loads a saved model asks neither hub nor folder."""
    known = {"num_classes", "in_chans", "dynamic_img_size", *plan.backbone_kwargs}
    arguments = {key: value for key, value in built.model._model_args.items() if key not in known}
    own = plan.backbone_kwargs.get("model_kwargs") or {}
    options = {**plan.backbone_kwargs, "model_kwargs": {**arguments, **own}}
    return dataclasses.replace(plan, backbone=built.model.pretrained_cfg["architecture"], backbone_kwargs=options)
