"""Numbers too small to be normal in each head's work, and what they cost: many processors are far slower with them.

    python recipes/benchmark/subnormal.py --data-root data/camvid --weights tf_efficientnet_lite0.safetensors
    python recipes/benchmark/subnormal.py --heads mean_shift senformer --updates 50

Each head is trained for some updates on the features of a pretrained backbone, for what random ones have is not what
real ones have. Then the subnormal numbers are counted that the operations of a training step and of a prediction
return, and both are timed in turns with the processor's flushing of such numbers to zero and without: 1.00 means that
there is nothing to gain. Whether a processor is slow with them at all is told first. One thread.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from measure import machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segheads import SegmentationModel, create_model
from segheads.cli.run import run
from segheads.data import (
    DataConfig,
    PhotometricNormalize,
    RandomScaleCrop,
    SubsetDataset,
    TrainingSamples,
    collate_samples,
    open_dataset,
)
from segheads.errors import options_become_parts
from segheads.evaluation.tables import markdown_table
from segheads.files import write_text
from segheads.heads import list_heads
from segheads.plan import parse_head
from segheads.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is looked at."""

    heads: tuple[str, ...] = tuple(list_heads())
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...)."""
    data: DataConfig = DataConfig(dataset="scenes")
    """Where images come from."""
    backbone: str = "tf_efficientnet_lite0"
    """Any timm architecture."""
    weights: Path | None = None
    """Of the backbone; None means random ones."""
    crop_size: Annotated[int, Range(1)] = 160
    """Pixels."""
    batch_size: Annotated[int, Range(1)] = 8
    """Images of a step."""
    updates: Annotated[int, Range(0)] = 20
    """AdamW at 1e-3 before anything is counted."""
    turns: Annotated[int, Range(1)] = 3
    """Calls of each kind, in turns."""
    output: Path | None = None
    """Also write the table into this file, row by row."""


class Subnormal(TorchDispatchMode):
    """Counts the subnormal numbers of what every operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.count += int(((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).sum())
        return result


def main(config: Config) -> None:
    """Run the benchmark."""
    torch.set_num_threads(1)  # flushing is a thread's own
    print(
        f"{machine('cpu')}; a product of subnormal numbers takes {penalty(config.turns):.0f} times a normal one's time"
    )
    images, labels, num_classes = read(config)
    rows = []
    for word in config.heads:
        with options_become_parts():
            choice = parse_head(word)
            model = create_model(
                config.backbone,
                choice.head,
                num_classes,
                pretrained=config.weights or False,
                **choice.create_kwargs(),
            )
        cells = look(model, images, labels, config)
        rows.append([f"`{choice}`", *cells])
        print(f"{choice}: {', '.join(cells)}", file=sys.stderr, flush=True)
        columns = ["head", "subnormal in a step", "its time / flushed", "in a prediction", "its time / flushed"]
        table = markdown_table(columns, rows)
        if config.output is not None:
            write_text(config.output, table + "\n")
    print(table)


def read(config: Config) -> tuple[Tensor, Tensor, int]:
    """Normalised crops `(B, 3, size, size)`, labels `(B, size, size)`, and the number of classes."""
    dataset = open_dataset(config.data, "train")
    subset = SubsetDataset.spaced(dataset, min(config.batch_size, len(dataset)))
    crop = RandomScaleCrop(config.crop_size, scale=(320, 240), ignore_index=dataset.ignore_index)
    samples = TrainingSamples(subset, crop, seed=0)
    batch = collate_samples([samples[0, index % len(subset)] for index in range(config.batch_size)])
    normalize = PhotometricNormalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    labels = batch["labels"].long()
    labels[labels == dataset.ignore_index] = 255
    return normalize(batch["image"], batch["distortion"], batch["valid"]), labels, dataset.num_classes


def look(model: SegmentationModel, images: Tensor, labels: Tensor, config: Config) -> list[str]:
    """The cells of a row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        model(images, labels).backward()

    def predict() -> Tensor:
        return model.eval().predict(images)

    for _ in range(config.updates):
        step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    cells = []
    for call in (step, predict):
        with Subnormal() as seen:
            call()
        cells += [f"{seen.count:,}", f"{ratio(call, config.turns):.2f}"]
    return cells


def ratio(call: Callable[[], object], turns: int) -> float:
    """CPU time as it is over that with flushing: the median over turns."""

    def flushed() -> None:
        torch.set_flush_denormal(True)
        try:
            call()
        finally:
            torch.set_flush_denormal(False)

    ratios = []
    for _ in range(turns):
        before = time.process_time()  # of this process alone, whatever else the machine does
        call()
        between = time.process_time()
        flushed()
        ratios.append((between - before) / (time.process_time() - between))
    return statistics.median(ratios)


def penalty(turns: int) -> float:
    """Seconds of a matrix product of subnormal numbers over those of the same when they are flushed."""
    tiny, some = torch.full((256, 256), 1e-39), torch.rand(256, 256)
    return ratio(lambda: tiny @ some, turns)


if __name__ == "__main__":
    run(main, Config)
