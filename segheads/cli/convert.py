"""Turn a published checkpoint into the folder of a model that every other command takes.

    segheads convert seg_tiny_mask.pth --from segmenter --output models/segmenter --dataset ade20k
    segheads convert upernet_swin_tiny_ade20k.pth --from mmseg --output models/upernet
    segheads convert my_smp_model --from smp --output models/unet --class-names road building sky
    segheads convert upernet-convnext-tiny --from hf --output models/convnext

What can be converted: Segmenter; Segmenter, UPerNet and FCN of MMSegmentation; MeanShifter; SenFormer; what
segmentation-models-pytorch saved, on encoders of timm; UPerNet and DPT of transformers.
Nothing that a checkpoint holds is run: it must hold tensors and plain values. Keys that fit nowhere are an error.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from segheads.classes import Classes
from segheads.convert import convert_checkpoint
from segheads.convert.checkpoint import FOLDERS
from segheads.data import ade20k, camvid, cityscapes, coco_stuff, voc
from segheads.errors import OptionError, options_become_parts
from segheads.files import whole_folder
from segheads.model import SegmentationModel
from segheads.plan import ModelPlan
from segheads.ranges import Range

NAMED = {"ade20k": ade20k, "camvid": camvid, "cityscapes": cityscapes, "coco_stuff": coco_stuff, "voc2012": voc}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is converted, and where the model goes."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A .pth or .safetensors file; for smp and hf the folder with config.json."""
    source: Annotated[
        Literal["segmenter", "mmseg", "meanshifter", "senformer", "smp", "hf"], tyro.conf.arg(name="from")
    ]
    """Whose checkpoint it is."""
    output: Path
    """Folder of the model; made if need be."""
    num_heads: Annotated[int | None, Range(1)] = None
    """Attention heads of the backbone; None: a head for 64 channels. Of SenFormer's learners; None: 8."""
    decoder_num_heads: Annotated[int | None, Range(1)] = None
    """Attention heads of a mask decoder where they differ from the backbone's."""
    img_size: Annotated[tuple[int, int] | None, Range(1)] = None
    """Height and width in pixels of the position embeddings' grid; needed where it is not square."""
    num_layers: Annotated[int | None, Range(0)] = None
    """How often the mean shift runs, or a SenFormer learner's one shared block; None: once."""
    output_stride: Literal[8, 16, 32] | None = None
    """Pixels per cell of the last map of a dilated ResNet; None: 8 for FCN, 32 for others."""
    dataset: Literal["ade20k", "camvid", "cityscapes", "coco_stuff", "voc2012"] | None = None
    """Data set whose classes the model knows, where the checkpoint does not name them."""
    class_names: tuple[str, ...] = ()
    """The names of the classes in their order, likewise."""


def main(config: Config) -> None:
    """Run the command."""
    if config.dataset and config.class_names:
        raise OptionError("dataset and class_names both name the classes; give one of them")
    options = ("num_heads", "decoder_num_heads", "img_size", "num_layers", "output_stride")
    with options_become_parts():
        model = convert_checkpoint(
            config.checkpoint, config.source, **{name: getattr(config, name) for name in options}
        )
    _name_classes(model, config)
    with whole_folder(config.output) as temporary:
        model.save_pretrained(temporary)
    assert model.plan is not None
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    unnamed = "" if model.classes else " without names (--dataset or --class-names says them)"
    what = f"{model.plan.head} on {model.plan.backbone}, {model.num_classes} classes{unnamed}"
    log.info("%s, %.1f M parameters: %s", what, parameters, config.output)
    if assumed := _assumed(model.plan, config):
        log.info("no weight tells, so it was taken to be as published: %s; give it if it is not", ", ".join(assumed))
    mean, std = (tuple(round(x, 3) for x in model.data_config[name]) for name in ("mean", "std"))
    log.info("images are normalised by mean %s and std %s, and shown whole", mean, std)


def _assumed(plan: ModelPlan, config: Config) -> list[str]:
    """Options that were not given and that change the result; a folder's config.json tells them all."""
    if config.source in FOLDERS:
        return []
    backbone = plan.backbone_kwargs.get("model_kwargs", {})
    shown = {
        "num_heads": None if "stem_type" in backbone or "window_size" in backbone else backbone.get("num_heads"),
        "num_layers": plan.head_kwargs.get("num_layers") if plan.head == "mean_shift" else None,
        "output_stride": backbone.get("output_stride"),
    }
    learner = plan.head_kwargs.get("learner_kwargs", {})
    if learner.get("shared_block"):
        shown["num_layers"] = learner["num_layers"]
    if learner and learner.get("num_heads") is None:
        shown["num_heads"] = 8
    if plan.head == "mask_transformer":
        shown["decoder_num_heads"] = plan.head_kwargs["num_heads"]
    return [
        f"--{name.replace('_', '-')} {value}"
        for name, value in shown.items()
        if value is not None and getattr(config, name) is None
    ]


def _name_classes(model: SegmentationModel, config: Config) -> None:
    if config.dataset is not None:
        known = NAMED[config.dataset]
        model.classes = Classes(known.CLASS_NAMES, known.PALETTE)
    if config.class_names:
        model.classes = Classes(config.class_names)
    if model.classes is not None and len(model.classes) != model.num_labels:
        raise OptionError(f"{len(model.classes)} classes were named, but the model has {model.num_labels}")
