"""Try many heads at once on one frozen backbone, to choose one for your own folder.

    segheads probe --data-root own --class-names grass path house --output runs/probe
    segheads probe --data-root own --num-classes 3 --heads linear fcn "senformer @ simple(out_channels=128)"
    accelerate launch -m segheads probe --dataset camvid --data-root data/camvid --heads all
    segheads probe --demo

The backbone runs once for each batch, and every head at every learning rate learns from its maps: the table of N heads
for about the time of one. `--output` ends up with heads.md, heads.csv, heads.json, curves.png and a model of each head
at its best rate: docs/probe.md. What a frozen backbone tells of heads is not what they reach when it learns, too.
"""

import dataclasses
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segheads.cli.train import BACKBONE, tell_classes
from segheads.data import DataConfig
from segheads.inference.protocol import InferenceProtocol
from segheads.probing import ProbeConfig, run_probing
from segheads.training import DEMO_RUN, LoopConfig, ModelConfig, OptimizationConfig, changed, flat

log = logging.getLogger(__name__)

# Options that the training of the best head takes over, beside its head and backbone
SHARED = {field.name for field in dataclasses.fields(DataConfig)} - {"download"}
SHARED |= {"backbone_weights", "pretrained", "patch_size", "depth", "crop_size", "scale", "window", "stride"}


@dataclass(frozen=True, kw_only=True)
class Config(ProbeConfig):
    """Which heads, on what; every default is an option."""

    heads: tuple[str, ...] = ("linear", "fcn", "mean_shift", "class_attention", "mask_transformer")
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...); or all, that fit."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The rates that every head learns with."""
    output: Path = Path("runs/probe")
    model: ModelConfig = ModelConfig(backbone=BACKBONE, head="all", drop_path_rate=0.0, loss_reduction="valid")
    """Backbone and loss; --heads says the heads, and a frozen backbone drops no path."""
    data: DataConfig = DataConfig(dataset="folder")
    """The data set."""
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="adamw",
        learning_rate=0.0,
        min_learning_rate=0.0,
        power=1.0,
        schedule="one_cycle",
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    """Optimizer and decay; --learning-rates says the rates."""
    loop: LoopConfig = LoopConfig(iterations=2000, batch_size=8, evaluate_every=0)
    """Length, evaluations, checkpoints, log."""
    protocol: InferenceProtocol = InferenceProtocol(scale=(2048, 512))
    """How images are shown to the model in evaluations; training crops are resized about the scale, too."""
    tracker: str = "none"
    """A tracker of Accelerate, such as tensorboard, or none."""


DEMO = changed(
    Config(),
    output=Path("runs/demo_probe"),
    heads=tuple(f"{head} @ fpn(out_channels=32)" for head in ("linear", "mean_shift", "mask_transformer")),
    backbone="test_convnext",
    learning_rates=(1e-3, 3e-3),
    schedule="poly",
    **{**DEMO_RUN, "learning_rate": 0.0, "iterations": 80, "batch_size": 8, "warmup_iterations": 10},
)


def main(config: Config) -> None:
    """Run the command."""
    tell_classes(config.data)
    rows = run_probing(config)
    log.info("%s", what_next(config, rows))


def what_next(config: ProbeConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """The command that trains the best head, with the backbone.

    Args:
        config: Of the probes.
        rows: What `run_probing` gave.
    """
    scored = [row for row in rows if row["best"] and row["mIoU"] is not None]
    if not scored:
        return "no head has a score; give other --learning-rates"
    best = max(scored, key=lambda row: float(row["mIoU"]))
    words = ["--head", best["head"], "--backbone", config.model.backbone]
    usual = flat(Config())
    for name, value in flat(config).items():
        if name in SHARED and value != usual[name]:
            words += _option(name, value)
    return f"next: train the best head, and the backbone with it\n  segheads train {shlex.join(words)}"


def _option(name: str, value: Any) -> list[str]:
    """The words of a command line that give an option a value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
