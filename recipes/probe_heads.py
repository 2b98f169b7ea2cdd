"""Train many heads at once on one frozen backbone: the table of N heads for about the time of one.

    accelerate launch recipes/probe_heads.py --data-root data/ADEChallengeData2016
    accelerate launch recipes/probe_heads.py --heads linear "senformer @ simple(out_channels=128)"
    accelerate launch recipes/probe_heads.py --heads all --dataset camvid --data-root data/camvid
    accelerate launch recipes/probe_heads.py --distinct-batches 200 --cache features --cache-gb 50
    accelerate launch recipes/probe_heads.py --demo

The backbone runs once for each batch, in evaluation mode and without gradients, and every head at every learning rate
learns from its maps; on one CPU process each ends up with the same bits as in a run of its own. With `--cache` the
backbone runs once for each different batch, in this run and in all later ones.

`--output` ends up with heads.md, heads.csv and heads.json (mIoU, aAcc, mAcc, parameters; the best rate of each head is
marked), curves.png, and every head: `models/HEAD` for `SegmentationModel.from_pretrained`, at its best rate, and
`heads/HEAD_at_RATE` for `segheads.probing.join_head`.

Hours and scores on ADE20K: not yet measured.
"""

from dataclasses import dataclass
from pathlib import Path

from segheads.cli.run import run
from segheads.inference import InferenceProtocol
from segheads.probing import ProbeConfig, run_probing
from segheads.training import DEMO_RUN, LoopConfig, ModelConfig, OptimizationConfig, changed


@dataclass(frozen=True, kw_only=True)
class Config(ProbeConfig):
    """AdamW on frozen features; what `TrainingConfig` says of the backbone's training does not apply."""

    heads: tuple[str, ...] = ("linear", "fcn", "mean_shift", "class_attention", "mask_transformer")
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...); or all, that fit."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The rates that every head learns with."""
    output: Path = Path("runs/probe_heads")
    model: ModelConfig = ModelConfig(
        backbone="vit_small_patch16_224", head="all", drop_path_rate=0.0, loss_reduction="valid"
    )
    """Backbone and loss; --heads says the heads, and a frozen backbone drops no path."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="adamw",
        learning_rate=0.0,
        min_learning_rate=0.0,
        power=0.9,
        warmup_iterations=500,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    """Optimizer and decay; --learning-rates says the rates."""
    loop: LoopConfig = LoopConfig(iterations=20_000, batch_size=16, evaluate_every=0)
    """Length, evaluations, checkpoints, log."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512), window=512, stride=512)
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""


DEMO = changed(
    Config(),
    output=Path("runs/demo_probe"),
    heads=tuple(f"{head} @ fpn(out_channels=32)" for head in ("linear", "mean_shift", "mask_transformer", "senformer")),
    backbone="test_convnext",
    learning_rates=(1e-3, 3e-3),
    **{**DEMO_RUN, "learning_rate": 0.0, "iterations": 80, "batch_size": 8, "warmup_iterations": 10, "tracker": "none"},
)


def main(config: Config) -> None:
    """Run the recipe."""
    run_probing(config)


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
