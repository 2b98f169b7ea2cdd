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
on one core of an AMD EPYC with bf16 instructions. What each is worth on a GPU has not been measured yet.
  --mixed-precision bf16  0.65
  --compile               0.99, after 1.5 minutes of compiling; forward pass and loss are one graph
  --channels-last         of the backbone alone 1.01; on for backbones of convolutions: ResNet-50 0.97, ConvNeXt-T 1.00
  fused optimizer         of the update alone 0.58 with SGD and 0.38 with AdamW; always on, and under 1 % of this step
  --workers 4             enough for 1,300 images/s (340 a core, 2.5 times the published pipeline); a step takes 1.1/s
  streams                 on a GPU, copies and colour distortion run beside the step; nothing waits but the log

Expected mIoU: the thesis reports 31.05 (31.44 for its own Segmenter run) at batch size 1, Segmenter's paper 39.03 for
Seg-Ti/16 at batch size 8. Ours at full length, and hours and memory on a GPU: not yet measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from segheads import SegmentationModel, create_model
from segheads.functional.upsample import Reduction
from segheads.training import DEMO_RUN, TrainingConfig, run_training


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The author's configuration; every other number is TrainingConfig's."""

    output: Path = Path("runs/meanshifter_ade20k")

    # The model
    backbone: str = "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    """Any timm architecture. The default is Segmenter's Ti/16: AugReg, ImageNet-21k, then ImageNet-1k at 384."""
    head: str = "mean_shift"
    shift_layers: int = 1
    """L_ms, for the mean_shift head: the thesis' best; its class defaults to 3 and its configuration to 2."""
    shift_channels: int | None = 192
    """d_ms, for the mean_shift head; None means the backbone's width."""
    decoder: str = "linear"
    """The head after the shift, for the mean_shift head."""
    concat_input: bool = False
    """Give the decoder the unshifted features beside the shifted ones; of the mean_shift head, as what follows."""
    kernel: str = "dot"
    """The thesis' dot, or gaussian, cosine, or another of segheads.functional.kernels.KERNELS."""
    bandwidth: float | None = None
    """Bandwidth in units of the projected tokens; None means the kernel's own."""
    spatial_bandwidth: float | None = None
    """Also weigh tokens by their distance in the map, with this bandwidth in patches; None does not."""
    learn_bandwidth: bool = False
    """Learn the bandwidths."""
    blurring: bool = True
    """Shift the tokens among themselves; --no-blurring shifts them against the original ones."""
    step: float = 1.0
    """How far a shift goes towards the average, as a fraction."""
    learn_step: bool = False
    """Learn the step."""
    drop_path_rate: float = 0.1
    loss_reduction: Reduction = "all"
    """Divide the loss by all pixels, as the author's code does, or by the valid ones."""

    # The optimisation
    batch_size: int = 8
    """Images of one update, over all processes and accumulated batches: Segmenter's 8; the thesis' runs had 1."""
    optimizer: str = "momentum"
    """In timm's words: momentum is the author's SGD, sgd is Segmenter's (with Nesterov), adamw, and the rest."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    """The rate at the end of the decay; Segmenter has 1e-5."""
    power: float = 0.9
    weight_decay: float = 0.0

    # The evaluation
    window: int | None = 512
    stride: int | None = 480


DEMO = Config(output=Path("runs/demo"), backbone="vit_tiny_patch16_224", patch_size=8, depth=4, **DEMO_RUN)


def main(config: Config) -> None:
    """Run the recipe."""
    run_training(config, build_model)


def build_model(config: Config, num_classes: int) -> SegmentationModel:
    """The backbone, with weights or without, and the head."""
    names = ("shift_channels", "decoder", "kernel", "bandwidth", "spatial_bandwidth", "learn_bandwidth", "blurring")
    options = {name: getattr(config, name) for name in (*names, "step", "learn_step", "concat_input")}
    shift = {"num_layers": config.shift_layers, **options}
    return create_model(
        config.backbone,
        config.head,
        num_classes,
        head_kwargs=shift if config.head == "mean_shift" else {},
        **config.model_options(),
    )


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEMO if "--demo" in sys.argv else Config(), description=__doc__))
