"""Train, evaluate and picture a MeanShifter: any head on any timm backbone.

    accelerate launch recipes/meanshifter_ade20k.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/meanshifter_ade20k.py --demo

Needs ADE20K (`--download` fetches it, about 1 GB) and the backbone's weights from the hub (`--backbone-weights PATH`
or `--no-pretrained` without a network); the demo needs neither. Every field below is an option; `--help` lists them.

Results go to `--output`: the model (for `SegmentationModel.from_pretrained`), config.json, metrics.jsonl, results.json,
per_class.md, curves.png, predictions.png, TensorBoard files, and the last checkpoints, from which `--resume` goes on.

The defaults are the author's configuration (ViT-Ti/16, one shift, d_ms 192, SGD, 160k iterations, loss over all pixels)
at Segmenter's batch size of 8. The thesis' own runs had one image on one GPU: `--batch-size 1`.

What makes a step quicker: its seconds with, over its seconds without, measured with 2 images of 512
on one core of an AMD EPYC with bf16 instructions. On an H100, 8 images: bf16 1.08 (memory 0.59), channels-last 1.02.
  --mixed-precision bf16  0.65
  --compile               0.99, after 1.5 minutes of compiling; forward pass and loss are one graph
  --channels-last         of the backbone alone 1.01; on for backbones of convolutions: ResNet-50 0.97, ConvNeXt-T 1.00
  fused optimizer         of the update alone 0.58 with SGD and 0.38 with AdamW; always on, and under 1 % of this step
  --workers 4             enough for 1,300 images/s (340 a core, 2.5 times the published pipeline); a step takes 1.1/s
  streams                 on a GPU, copies and colour distortion run beside the step; nothing waits but the log

Expected mIoU: the thesis reports 31.05 (31.44 for its own Segmenter run) at batch size 1, Segmenter's paper 39.03 for
Seg-Ti/16 at batch size 8. Ours at full length: not yet measured.
A step of 8 images takes 27 ms and 1.3 GB on an H100: about 1.2 hours for 160k, if images load as fast.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from segheads import SegmentationModel, create_model
from segheads.cli.run import run
from segheads.inference import InferenceProtocol
from segheads.mean_shift import StepOptions, default_step
from segheads.ranges import Range
from segheads.training import (
    DEMO_RUN,
    LoopConfig,
    ModelConfig,
    OptimizationConfig,
    TrainingConfig,
    changed,
    run_training,
)


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The author's configuration; every other number is TrainingConfig's."""

    output: Path = Path("runs/meanshifter_ade20k")
    model: ModelConfig = ModelConfig(
        backbone="vit_tiny_patch16_384.augreg_in21k_ft_in1k",  # Segmenter's Ti/16: ImageNet-21k, then 1k at 384
        head="mean_shift",
        drop_path_rate=0.1,
        loss_reduction="all",  # as the author's code
    )
    """Backbone, head and loss."""
    shift_layers: Annotated[int, Range(0)] = 1
    """L_ms, for the mean_shift head: the thesis' best; its class defaults to 3 and its configuration to 2."""
    decoder: str = "linear"
    """The head after the shift, for the mean_shift head."""
    concat_input: bool = False
    """Give the decoder the unshifted features beside the shifted ones, for the mean_shift head."""
    shift: StepOptions = field(default_factory=partial(default_step, shift_channels=192))
    """How the mean_shift head shifts."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="momentum",  # the author's SGD; Segmenter's is sgd, with Nesterov
        learning_rate=1e-3,
        min_learning_rate=1e-4,  # Segmenter has 1e-5
        power=0.9,
        weight_decay=0.0,
    )
    """Optimizer and learning rate."""
    loop: LoopConfig = LoopConfig(batch_size=8)  # Segmenter's; the thesis' runs had 1
    """Length, evaluations, checkpoints, log."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512), window=512, stride=480)
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""


DEMO = changed(Config(), output=Path("runs/demo"), backbone="vit_tiny_patch16_224", patch_size=8, depth=4, **DEMO_RUN)


def main(config: Config) -> None:
    """Run the recipe."""
    run_training(config, build_model)


def build_model(config: Config, num_classes: int) -> SegmentationModel:
    """The backbone, with weights or without, and the head."""
    shift = {"num_layers": config.shift_layers, "decoder": config.decoder, "concat_input": config.concat_input}
    return create_model(
        config.model.backbone,
        config.model.head,
        num_classes,
        head_kwargs={**shift, **config.shift} if config.model.head == "mean_shift" else {},
        **config.model_options(num_classes),
    )


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
