"""How long onnxruntime takes beside `model.predict`, eager and compiled: 512 x 512, ViT-Ti/16, mean shift, CPU.

    python recipes/benchmark/export_speed.py
    python recipes/benchmark/export_speed.py --classes 150 --no-compile --threads 1

The sides take turns in one process; ratios are the medians over turns of seconds over those of the eager side. Weights
are random.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from measure import machine, seconds_in_turns

from segheads import SegmentationModel, create_model, export
from segheads.cli.run import run
from segheads.evaluation.tables import markdown_table
from segheads.exporting import FORMATS, Deployed
from segheads.ranges import Range


@dataclass(frozen=True)
class Config:
    """What to measure."""

    classes: Annotated[tuple[int, ...], Range(1)] = (19, 150)
    """Numbers of classes, a row for each side."""
    size: Annotated[int, Range(1)] = 512
    """Side of the photograph, pixels."""
    turns: Annotated[int, Range(1)] = 15
    """Calls of each side, in turns."""
    threads: Annotated[int, Range(1)] = 2
    """Of the CPU."""
    compile: bool = True
    """Also measure torch.compile of the graph that is exported, which needs a C++ compiler."""
    backbone: str = "vit_tiny_patch16_384"
    """Name in timm."""
    head: str = "mean_shift"
    """Name of the head."""


def main(config: Config) -> None:
    """Measure and print a table."""
    torch.set_num_threads(config.threads)
    print(f"{machine('cpu')}, {config.threads} threads")
    rows = []
    for count in config.classes:
        model = create_model(config.backbone, config.head, count, pretrained=False).eval()
        seconds = seconds_in_turns(sides(model, config), config.turns, "cpu")
        for name, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, seconds["eager"], strict=True))
            rows.append([str(count), name, f"{1000 * statistics.median(own):.0f}", f"{ratio:.2f}"])
    print(markdown_table(["classes", "side", "ms", "ratio to eager"], rows))


def sides(model: SegmentationModel, config: Config) -> dict[str, Callable[[], object]]:
    """The sides, each for one photograph."""
    photograph = torch.randint(0, 256, (1, 3, config.size, config.size), dtype=torch.uint8)
    mean, std = (255 * torch.tensor(model.data_config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    found: dict[str, Callable[[], object]] = {"eager": lambda: model.predict((photograph - mean) / std)}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("onnxruntime", None), ("onnxruntime, fixed size", (config.size, config.size))):
            done = export(model, Path(folder) / "model.onnx", size=size)
            found[name] = partial(FORMATS["onnx"].load(done.path), photograph)
    if config.compile:
        found["compiled"] = torch.no_grad()(partial(torch.compile(Deployed(model)), photograph))
    return found


if __name__ == "__main__":
    run(main, Config, description=__doc__)
