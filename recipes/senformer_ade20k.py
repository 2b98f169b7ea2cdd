"""Train, evaluate and picture a SenFormer: one learner for each level of a pyramid, their predictions merged.

    accelerate launch recipes/senformer_ade20k.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/senformer_ade20k.py --backbone swin_tiny_patch4_window7_224.ms_in1k
    accelerate launch recipes/senformer_ade20k.py --demo

Needs ADE20K (`--download` fetches it, about 1 GB) and the backbone's weights from the hub (`--backbone-weights PATH`
or `--no-pretrained` without a network); the demo needs neither. Every field below is an option; `--help` lists them.

The defaults are SenFormer's protocol (https://arxiv.org/abs/2111.13280, https://github.com/WalBouss/SenFormer): AdamW,
batch size 16, 160k iterations, linear decay after a warm-up, FPNT with 512 channels, one block repeated six times in
each learner, an auxiliary head, whole images in the evaluation, batch norms that processes on GPUs share. Options that
default to None take the value that the protocol has for the backbone: ResNets have one, Swin and all others another.

It departs from the published configurations in that biases and the ResNet's own norms are not decayed; the ResNet
has its usual stem (`--backbone resnet50c.gluon_in1k` has the published one, of three convolutions); and gradients are
clipped at 3 (ResNets) and 1, where the repository has 0.1 for ResNet-50 and Swin-T and 1 for Swin-B.

What makes a step quicker: its seconds with, over its seconds without, measured with 2 images of 256 and ResNet-50 on
one core of an AMD EPYC with bf16 instructions. On an H100, 8 images of 512: bf16 0.33, channels-last 0.98, both 0.26.
  --mixed-precision bf16  0.47
  --compile               not measured; forward pass and loss are one graph
  --channels-last         0.95; on by itself for backbones of convolutions, off for a Swin or ViT
  fused optimizer         of the update alone 0.28 with AdamW; always on, and about 1 % of this step
  --workers 4             enough for 1,300 images/s (340 a core, 2.5 times the published pipeline); a step takes 0.3/s
  streams                 on a GPU, copies and colour distortion run beside the step; nothing waits but the log

Expected mIoU, one scale (the repository's README): 44.38 with ResNet-50, 44.6 with --no-shared-block, 46.0 with Swin-T.
Ours at full length: not yet measured. On an H100 a step of 8 images of 512 takes 415 ms and 14 GB, 108 ms and 9 GB in
bf16 with channels-last.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm

from segheads import SegmentationModel, create_model
from segheads.cli.run import run
from segheads.functional.upsample import Reduction
from segheads.heads.senformer import Share
from segheads.mean_shift import StepOptions, default_step
from segheads.ranges import Range
from segheads.training import (
    DEMO_RUN,
    LoopConfig,
    MachineConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
    changed,
    flat,
    run_training,
)


@dataclass(frozen=True, kw_only=True)
class Model(ModelConfig):
    """The backbone, the head and the loss."""

    drop_path_rate: float | None = None  # type: ignore[assignment]  # main fills it in, as all that may be None here
    """Stochastic depth of the backbone. None: 0 for ResNets, 0.3 for others."""


@dataclass(frozen=True, kw_only=True)
class Optimization(OptimizationConfig):
    """Optimizer and learning rate."""

    learning_rate: float | None = None  # type: ignore[assignment]  # as above
    """The rate at the start of the decay. None: 1e-4 for ResNets, 6e-5 for others."""
    backbone_lr_scale: float | None = None  # type: ignore[assignment]  # as above
    """The backbone's rate over that of the rest. None: 0.1 for ResNets, 1 for others."""
    weight_decay: float | None = None  # type: ignore[assignment]  # as above
    """Decay of all but norms, biases, position tables and class embeddings. None: 1e-4 for ResNets, 0.01 for others."""
    max_grad_norm: float | None = None
    """Clip the norm of the gradient; inf does not. None: 3 for ResNets, 1 for others."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """SenFormer's protocol; every other number is TrainingConfig's."""

    output: Path = Path("runs/senformer_ade20k")
    model: Model = Model(
        backbone="resnet50.tv_in1k",  # torchvision's first ResNet-50, trained on ImageNet-1k alone
        head="senformer",
        loss_reduction="valid",
    )
    """Backbone, head and loss."""
    learner: str = "class_attention"
    """The senformer head's learners: any single-level head."""
    num_layers: Annotated[int, Range(1)] = 6
    """Blocks of a class_attention learner (or head), or of the feature_fusion head."""
    shared_block: bool = True
    """Repeat one block so often, as the paper does, or build a block for each."""
    merge: str = "average"
    """How predictions are merged: a name in segheads.merges.MERGES."""
    share: Share = "none"
    """What learners have in common: nothing, all but the class embeddings, or the class embeddings alone."""
    mean_shift_layers: Annotated[int, Range(0)] = 0
    """How often each level's tokens are shifted before their learner."""
    shift: StepOptions = field(default_factory=default_step)
    """How they are shifted."""
    levels: Annotated[tuple[int, ...] | None, Range(0)] = None
    """Which levels have a learner, 0 the finest; None means all."""
    learners_per_level: Annotated[int, Range(1)] = 1
    """Learners on each level."""
    pyramid: str = "auto"
    """Between backbone and head, a name in segheads.pyramids.PYRAMIDS or none; auto is what the head prefers (fpnt
    here), and simple with a plain ViT."""
    width: Annotated[int, Range(1)] = 512
    """Channels (d) of the pyramid before senformer and feature_fusion or given by name, and of uper and sen_uper."""
    auxiliary_weight: Annotated[float, Range(0)] = 0.4
    """Weight in training of an FCN head, as wide as the pyramid, on the backbone's third stage; 0 builds none."""
    auxiliary_reduction: Reduction = "all"
    """Divide the auxiliary loss by all pixels, as published, or by the valid ones."""
    optimization: Optimization = Optimization(
        optimizer="adamw", min_learning_rate=0.0, power=1.0, warmup_iterations=1500
    )
    """Optimizer and learning rate."""
    loop: LoopConfig = LoopConfig(batch_size=16)
    """Length, evaluations, checkpoints, log."""
    machine: MachineConfig = MachineConfig(sync_batchnorm=True)  # as published
    """Precision, memory format, processes."""


# By the family of the backbone; the Swin values are those of the repository's Swin-T configuration.
RESNET = {
    "learning_rate": 1e-4,
    "backbone_lr_scale": 0.1,
    "weight_decay": 1e-4,
    "max_grad_norm": 3.0,
    "drop_path_rate": 0.0,
}
OTHERS = {
    "learning_rate": 6e-5,
    "backbone_lr_scale": 1.0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "drop_path_rate": 0.3,
}

DEMO = changed(
    Config(),
    output=Path("runs/demo_senformer"),
    backbone="test_resnet",
    backbone_lr_scale=1.0,  # nothing is pretrained
    num_layers=2,
    width=64,
    **DEMO_RUN,
)


def main(config: Config) -> None:
    """Run the recipe."""
    run_training(resolve(config), build_model)


def resolve(config: Config) -> Config:
    """Give the options that are None the protocol's values for the backbone."""
    protocol, given = RESNET if is_resnet(config.model.backbone) else OTHERS, flat(config)
    chosen: dict[str, Any] = {name: value for name, value in protocol.items() if given[name] is None}
    return changed(config, **chosen)


def is_resnet(backbone: str) -> bool:
    """Whether timm builds the backbone as a ResNet; of names that it cannot look up it does not."""
    return timm.is_model(backbone) and timm.model_entrypoint(backbone).__module__ == "timm.models.resnet"


def build_model(config: Config, num_classes: int) -> SegmentationModel:
    """The backbone, with weights or without, the pyramid, the head and the auxiliary head."""
    has_width = config.pyramid not in ("auto", "none")
    has_width |= config.pyramid == "auto" and config.model.head in ("senformer", "feature_fusion")
    return create_model(
        config.model.backbone,
        config.model.head,
        num_classes,
        pyramid=None if config.pyramid == "none" else config.pyramid,
        pyramid_kwargs={"out_channels": config.width} if has_width else {},
        head_kwargs=head_options(config),
        auxiliary_weight=config.auxiliary_weight,
        auxiliary_kwargs={"channels": config.width, "init": "published"},
        auxiliary_reduction=config.auxiliary_reduction,
        **config.model_options(num_classes),
    )


def head_options(config: Config) -> dict[str, Any]:
    """What the options above mean for the head; heads that are not named here have their own defaults."""
    blocks = {"num_layers": config.num_layers, "shared_block": config.shared_block}
    shift = {"num_layers": config.mean_shift_layers, **config.shift}
    levels = config.levels if config.levels is None else list(config.levels)
    options: dict[str, dict[str, Any]] = {
        "senformer": {
            "learner": config.learner,
            "learner_kwargs": blocks if config.learner == "class_attention" else {},
            "merge": config.merge,
            "share": config.share,
            "shift": shift if config.mean_shift_layers else None,
            "levels": levels,
            "learners_per_level": config.learners_per_level,
        },
        "class_attention": blocks,
        "feature_fusion": {"decoder_kwargs": blocks},
        "uper": {"channels": config.width, "init": "published"},
        "sen_uper": {"channels": config.width, "init": "published", "merge": config.merge, "levels": levels},
    }
    return options.get(config.model.head, {})


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
