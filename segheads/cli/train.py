"""Train a model on a folder of your own, or on a published data set: any head on any backbone.

    segheads train --data-root own --class-names grass path house --output runs/own
    segheads train --data-root own --num-classes 3 --head mean_shift --backbone vit_small_patch16_224 --crop-size 224
    accelerate launch -m segheads train --dataset camvid --data-root data/camvid --output runs/camvid
    segheads train --demo

The folder holds images/train, labels/train, images/val and labels/val; docs/own_data.md has the other layouts. All
labels are looked at before the first step. The backbone's weights come from the hub (`--backbone-weights PATH` or
`--no-pretrained` without a network); the demo needs neither data nor weights.

The defaults are for a set of some hundred to some thousand images: AdamW over one cycle, the backbone at a tenth of the
rate, mIoU every thousand iterations, and the model of the best one. They were not tuned; a published protocol is a
recipe's (recipes/). `--head` also takes options and a pyramid: "mean_shift(num_layers=1) @ fpn(out_channels=128)".

`--output` ends up with model, scores, curves and pictures: docs/train.md. After a kill, `--resume` goes on.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segheads.build import create_model
from segheads.data import DataConfig, FolderDataset, open_dataset
from segheads.data.labels import read_labels
from segheads.data.limits import pixel_limit
from segheads.errors import OptionError, SegheadsError, options_become_parts
from segheads.inference.protocol import InferenceProtocol
from segheads.model import SegmentationModel
from segheads.plan import parse_head
from segheads.training import (
    DEMO_RUN,
    KeepingConfig,
    LoopConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
    changed,
    run_training,
)

log = logging.getLogger(__name__)
BACKBONE = "convnext_tiny.fb_in22k_ft_in1k"
MOST_READ, MOST_SHOWN = 500, 12  # label files that are looked at for the values in them, and values in a message


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """What is trained on what; every default is an option."""

    output: Path = Path("runs/own")
    model: ModelConfig = ModelConfig(backbone=BACKBONE, head="linear", drop_path_rate=0.1, loss_reduction="valid")
    """Backbone, head and loss."""
    data: DataConfig = DataConfig(dataset="folder")
    """The data set."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="adamw",
        learning_rate=5e-4,
        backbone_lr_scale=0.1,
        min_learning_rate=0.0,
        power=1.0,
        schedule="one_cycle",  # which rises by itself, whatever the length
        weight_decay=0.05,
        max_grad_norm=1.0,
    )
    """Optimizer and learning rate."""
    loop: LoopConfig = LoopConfig(iterations=10_000, batch_size=8, evaluate_every=1000)
    """Length, evaluations, checkpoints, log."""
    keeping: KeepingConfig = KeepingConfig(best="mIoU")
    """Best model, average of weights, early end."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512))
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""
    tracker: str = "none"
    """A tracker of Accelerate, such as tensorboard, or none."""


DEMO = changed(
    Config(),
    output=Path("runs/demo"),
    backbone="vit_tiny_patch16_224",
    patch_size=8,
    depth=4,
    head="mean_shift(num_layers=1)",
    schedule="poly",
    backbone_lr_scale=1.0,
    best=None,
    **DEMO_RUN,
)


def main(config: Config) -> None:
    """Run the command."""
    with options_become_parts():
        parse_head(config.model.head)
    tell_classes(config.data)
    run_training(config, build_model)
    log.info("%s", what_next(config.output))


def build_model(config: TrainingConfig, num_classes: int) -> SegmentationModel:
    """The backbone, with weights or without, and the head with its options."""
    choice = parse_head(config.model.head)
    options = {**choice.create_kwargs(), **config.model_options(num_classes)}
    return create_model(config.model.backbone, choice.head, num_classes, **options)


def tell_classes(data: DataConfig) -> None:
    """Where a folder comes without classes, say what its label files hold, and how to name that.

    Args:
        data: What was asked for.

    Raises:
        OptionError: There are neither names nor a number of classes.
    """
    if data.dataset != "folder" or data.data_root is None or data.class_names or data.num_classes or data.label_values:
        return
    try:
        asked = changed(data, num_classes=255, label_map=None, label_colours=None, train_images=None)
        dataset = open_dataset(asked, "train")
        files = dataset.files if isinstance(dataset, FolderDataset) else []
        read = [label for _, label in files[:: max(1, -(-len(files) // MOST_READ))]]
        with pixel_limit(data.max_pixels):
            values = sorted({value for label in read for value in np.unique(read_labels(label)).tolist()})
    except SegheadsError:  # files that are missing or of colours: the data set's own words say what is wrong
        if data.label_colours or data.label_map:
            raise OptionError("a folder of your own needs --class-names, or --num-classes with their number") from None
        raise
    shown = ", ".join(map(str, values[:MOST_SHOWN])) + (", ..." if len(values) > MOST_SHOWN else "")
    raise OptionError(
        f"{data.data_root} needs names of its classes; {len(read)} label files hold {shown}: {_mend(values)}; "
        "--ignore-index tells values of no class"
    )


def _mend(values: list[int]) -> str:
    """Options that fit values of label files."""
    if values == [0, 255]:
        return "--class-names NAME --label-values 0 255 --loss bce tells 255 from 0"
    count = max((value for value in values if value != 255), default=0) + 1
    ignored = " (255 is no class)" if 255 in values else ""
    if count == 2:
        return f"give --class-names with the 2 names of 0 and 1, or --num-classes 2{ignored}"
    return f"give --class-names with the {count} names of 0 to {count - 1}, or --num-classes {count}{ignored}"


def what_next(folder: Path) -> str:
    """Commands that use what a run has left.

    Args:
        folder: Of the run.
    """
    return (
        f"next: look at {folder / 'predictions.png'} and {folder / 'per_class.md'}, then\n"
        f"  segheads predict IMAGES --model {folder} --output labels --overlay\n"
        f"  segheads evaluate --model {folder}\n"
        f"  segheads info {folder}\n"
        f"  segheads push {folder} OWNER/NAME"
    )
