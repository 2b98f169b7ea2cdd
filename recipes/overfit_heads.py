"""Whether heads learn at all: four images by heart, by each head on the same tiny backbone, beside what linear reaches.

    python recipes/overfit_heads.py --data-root data/camvid
    python recipes/overfit_heads.py --data-root data/camvid --heads linear "smp:deeplabv3(decoder_aspp_dropout=0.0)"
    python recipes/overfit_heads.py --demo

Prints a Markdown table, and writes it to `--output`. A head that stays far below linear starts badly, learns slowly or
cannot show what it learned; three columns tell which:

- `exact BN`: mIoU once batch norms have the statistics of these images instead of their running averages.
- `grid`: mIoU of logits that are free numbers on the head's grid, without any network: what its stride allows.
- `loss`: of the last ten updates, in training mode: with what is dropped there.

An update of all heads takes about 2 s of one CPU core.
"""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segheads import SegmentationModel, create_model
from segheads.cli.run import run
from segheads.data import DataConfig, SubsetDataset, open_dataset
from segheads.data.crop import RandomScaleCrop
from segheads.data.photometric import PhotometricNormalize
from segheads.errors import options_become_parts
from segheads.evaluation.tables import DASH, markdown_table, percent
from segheads.files import write_text
from segheads.functional.upsample import upsample_argmax
from segheads.heads import list_heads
from segheads.metrics.confusion import SegmentationMetrics
from segheads.plan import HeadChoice, parse_head
from segheads.ranges import SEED_LIMIT, Range
from segheads.training.optimization import create_optimizer

FPN, FPNT = "@ fpn(out_channels=64)", "@ fpnt(out_channels=64)"
# Narrow where the default takes a second for each update; dpt is for a plain ViT unless strides are said
NARROW = {
    **{head: f"{head} {FPN}" for head in ("linear", "mask_transformer", "mean_shift", "class_attention")},
    "senformer": f"senformer {FPNT}",
    "feature_fusion": f"feature_fusion(channels=64) {FPNT}",
    "uper": "uper(channels=64)",
    "sen_uper": "sen_uper(channels=64)",
    "fcn": f"fcn(channels=64) {FPN}",
    "smp:upernet": "smp:upernet(decoder_channels=64)",
    "smp:dpt": "smp:dpt(decoder_fusion_channels=64, decoder_intermediate_channels=[64, 64, 128, 128])",
}
REFERENCE = "linear"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned by heart, and how."""

    demo: bool = False
    """Four drawn scenes, two heads and 20 updates, in seconds."""
    heads: tuple[str, ...] = tuple(NARROW.get(head, head) for head in list_heads())
    """Each NAME, NAME(option=value, ...), or either with @ PYRAMID(option=value, ...)."""
    output: Path = Path("runs/overfit_heads.md")
    """The table's file."""
    data: DataConfig = DataConfig(dataset="camvid")
    """Where images come from: evenly spaced ones of the training set."""
    images: Annotated[int, Range(1)] = 4
    """How many, all of them in every update."""
    size: Annotated[tuple[int, int], Range(1)] = (96, 128)
    """Height and width, pixels."""
    backbone: str = "test_resnet"
    """Any timm architecture, from random weights."""
    iterations: Annotated[int, Range(1)] = 300
    """Updates."""
    learning_rate: Annotated[float, Range(0, above=True)] = 1e-3
    """Of AdamW, the same in all updates."""
    seed: Annotated[int, Range(0, SEED_LIMIT)] = 0
    """Of the initial weights and what is dropped."""
    threads: Annotated[int, Range(1)] = 1
    """Of the CPU."""


DEMO = Config(
    demo=True,
    heads=("linear", "fcn"),
    output=Path("runs/demo_overfit.md"),
    data=DataConfig(dataset="scenes", scenes_size=96),
    iterations=20,
)


class Row(NamedTuple):
    """What a head reached; fractions."""

    choice: HeadChoice
    score: float
    exact: float  # with exact statistics
    grid: tuple[int, int]
    ceiling: float  # of free logits on the grid
    loss: float
    parameters: int


def main(config: Config) -> None:
    """Train every head, print and keep the table."""
    torch.set_num_threads(config.threads)
    with options_become_parts():
        choices = [parse_head(word) for word in config.heads]
    images, labels, num_classes = read(config)
    rows: list[Row] = []
    ceilings: dict[tuple[int, int], float] = {}
    for choice in choices:
        began = time.perf_counter()
        torch.manual_seed(config.seed)
        with options_become_parts():
            model = create_model(config.backbone, choice.head, num_classes, pretrained=False, **choice.create_kwargs())
        loss = learn(model, images, labels, config)
        score = miou(model.predict(images), labels, num_classes)
        exact = miou(with_exact_statistics(model, images).predict(images), labels, num_classes)
        h, w = model.eval().low_resolution(images)[0].shape[2:]
        if (h, w) not in ceilings:
            ceilings[h, w] = free_logits(model, images, labels)
        count = sum(p.numel() for p in model.parameters())
        rows.append(Row(choice, score, exact, (h, w), ceilings[h, w], loss, count))
        print(f"{choice}: mIoU {percent(score)} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        write_text(config.output, table(rows) + "\n")  # as far as it goes
    print(table(rows))


def read(config: Config) -> tuple[Tensor, Tensor, int]:
    """Images `(B, 3, H, W)`, normalised, labels `(B, H, W)`, and the number of classes."""
    dataset = open_dataset(config.data, "train")
    subset = SubsetDataset.spaced(dataset, config.images)
    crop = RandomScaleCrop(
        config.size,
        scale=(max(config.size), min(config.size)),
        ratio_range=(1.0, 1.0),
        max_class_ratio=1.0,
        flip_probability=0.0,
        ignore_index=dataset.ignore_index,
    )
    crops = [crop(*subset.read(index), np.random.default_rng(0)) for index in range(len(subset))]
    pixels = torch.stack([image for image, _, _ in crops])
    valid = torch.tensor([size for _, _, size in crops])
    prepare = PhotometricNormalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    labels = torch.stack([labels for _, labels, _ in crops]).long()
    labels[labels == dataset.ignore_index] = 255
    return prepare(pixels, None, valid), labels, dataset.num_classes


def learn(model: SegmentationModel, images: Tensor, labels: Tensor, config: Config) -> float:
    """Train on all images in every update; returns the mean loss of the last ten."""
    model.train()
    optimizer = create_optimizer(model, "adamw", learning_rate=config.learning_rate, weight_decay=0.0, momentum=0.9)
    losses = []
    for _ in range(config.iterations):
        loss = model(images, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def with_exact_statistics(model: SegmentationModel, images: Tensor) -> SegmentationModel:
    """A copy whose batch norms have the statistics of these images; nothing is dropped meanwhile."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a mean over all batches, of which there is one
            module.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def free_logits(model: SegmentationModel, images: Tensor, labels: Tensor) -> float:
    """The mIoU of logits that are free numbers on the model's grid."""
    with torch.no_grad():
        shown, covered = model.low_resolution(images)
    logits = torch.zeros_like(shown).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        model.criterion(logits, labels, covered).backward()
        optimizer.step()
    H, W = labels.shape[1:]
    return miou(upsample_argmax(logits.detach(), covered)[:, :H, :W], labels, model.num_classes)


def miou(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """The mIoU over all images, a fraction."""
    metrics = SegmentationMetrics(num_classes)
    metrics.update(predicted, labels)
    return float(metrics.compute()["mIoU"])


def table(rows: Sequence[Row]) -> str:
    """Markdown, the best head first; shares are of the linear head's mIoU, where that is among them."""
    whole = next((row.score for row in rows if row.choice.head == REFERENCE), float("nan"))
    lines = []
    for row in sorted(rows, key=lambda row: -row.score):
        share = DASH if whole != whole else f"{100 * row.score / whole:.0f}"
        grid = f"{percent(row.ceiling)} ({row.grid[0]} x {row.grid[1]})"
        numbers = [
            percent(row.score),
            share,
            percent(row.exact),
            grid,
            f"{row.loss:.3f}",
            f"{row.parameters / 1e6:.2f}",
        ]
        lines.append([f"`{row.choice}`", *numbers])
    return markdown_table(["head", "mIoU", "% of linear", "exact BN", "grid", "loss", "parameters, M"], lines)


if __name__ == "__main__":
    run(main, Config, demo=DEMO, description=__doc__)
