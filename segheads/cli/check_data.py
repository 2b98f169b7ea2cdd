"""Look at the images and labels of a data set before anything is trained on them.

    segheads check-data --dataset folder --data-root own --class-names grass path house
    segheads check-data --dataset camvid --data-root data/camvid --output runs/check
    segheads check-data --dataset folder --data-root own --num-classes 3 --json > scan.json

Reads every image and label of train and val and prints what they hold: classes, ignored pixels, sizes, channels, bit
depths, mean and standard deviation of each channel; the options that say so, unless images are RGB of 8 bit; then all
that is wrong or suspicious, in one line each. With `--output`, writes scan.json and scan.png there.

The exit status is 0 for sound data, 1 for warnings, and 2 for errors, with which no training would begin. Files that
have not changed are not read again: what was read is in ~/.cache/segheads/scans, or below SEGHEADS_CACHE.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from segheads.data import DataConfig, DataScan, Finding, SplitScan, default_cache, find_problems, scan_splits
from segheads.data.dataset import check_same_classes
from segheads.data.images import FLOATS, full_scale, used_bits
from segheads.data.registry import open_dataset
from segheads.drawing import LINE_COLOURS, OTHER, SMALL, save_figure, sheet
from segheads.evaluation.tables import markdown_table, percent
from segheads.files import write_json
from segheads.ranges import SEED_LIMIT, Range

SPLITS = ("train", "val")
STATUS = {"warning": 1, "error": 2}
MOST_SHOWN = 6  # sizes or formats
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which data, and where the results go."""

    data: DataConfig = DataConfig()
    """The data set."""
    seed: Annotated[int, Range(0, SEED_LIMIT)] = 0
    """Of drawn scenes, and of the choice of train_images."""
    output: Path | None = None
    """Folder for scan.json and scan.png; None writes no files."""
    json: bool = False
    """Print JSON, for programs, in place of tables."""
    workers: Annotated[int | None, Range(0)] = None
    """Processes that read files; None takes all cores for many files, 0 reads in one process."""


def main(config: Config) -> None:
    """Run the command."""
    if config.json:
        logging.getLogger("segheads").setLevel(logging.CRITICAL)  # standard output is for the JSON alone
    splits = {split: open_dataset(config.data, split, seed=config.seed) for split in SPLITS}
    check_same_classes(*splits.values())
    scan = scan_splits(splits, workers=config.workers, cache=default_cache())
    findings = find_problems(scan)
    values = {**scan.as_json(), "findings": [dataclasses.asdict(finding) for finding in findings]}
    if config.output is not None:
        write_json(config.output / "scan.json", values)
        plot_scan(scan, config.output / "scan.png")
    print(json.dumps(values) if config.json else described(scan, findings))
    if config.output is not None:
        log.info("scan.json and scan.png are in %s", config.output)
    if status := max((STATUS[finding.severity] for finding in findings), default=0):
        raise SystemExit(status)


def described(scan: DataScan, findings: list[Finding]) -> str:
    """The scan in words: a table of classes, a list for each split, the findings."""
    head = ["class", *(f"{name} {what}" for name in scan.splits for what in ("% of pixels", "images"))]
    rows = [
        [class_name, *(cell for split in scan.splits.values() for cell in _cells(split, index))]
        for index, class_name in enumerate(scan.class_names)
    ]
    parts = [markdown_table(head, rows), *(_summary(name, split) for name, split in scan.splits.items())]
    if options := image_options(scan):
        parts.append(f"options for these images: {options}")
    lines = [f"{finding.severity}: {finding.message}" for finding in findings]
    return "\n\n".join([*parts, "\n".join(lines) or "nothing is wrong, and nothing suspicious"])


def image_options(scan: DataScan) -> str:
    """The options that say what images hold, with what was measured of train; empty for 3 channels of 8 bit."""
    train = next(iter(scan.splits.values()))
    form, largest = train.image_form, max((x.largest or 0 for x in scan.splits.values()), default=0)
    channels, bits = next(iter(train.channels), 3), max(split.bits for split in scan.splits.values())
    if form.is_rgb and channels in (1, 3) and bits == 8:
        return ""
    is_known = form.bit_depth not in (None, 8)
    depth = form.bit_depth if is_known else 8 if bits == 8 else used_bits(int(largest)) if bits == 16 else FLOATS
    words = [f"--in-chans {channels}"] * (channels != 3) + [f"--bit-depth {depth}"] * (depth != 8)
    for name, values in (("mean", train.band_mean), ("std", train.band_std)):
        if values:
            words.append(f"--band-{name} " + " ".join(f"{value / full_scale(depth):.4g}" for value in values))
    return " ".join(words)


def plot_scan(scan: DataScan, path: Path) -> None:
    """Draw each class' share of the pixels as bars, one colour a split, and the share ignored below them.

    Args:
        scan: What to draw.
        path: The picture.
    """
    names = [*scan.class_names, "(ignored)"]
    rows, count = np.arange(len(names)), len(scan.splits)
    figure, (axis,) = sheet(1, 1, (7, 1.2 + 0.22 * len(names)))
    for place, (name, split) in enumerate(scan.splits.items()):
        shares = 100 * np.array([*split.pixels, split.ignored]) / max(1, sum(split.pixels) + split.ignored)
        bars = axis.barh(
            rows + (place - (count - 1) / 2) * 0.8 / count,
            shares,
            0.8 / count,
            color=LINE_COLOURS[place % len(LINE_COLOURS)],
            label=f"{name}: {split.samples} images, {100 * split.ignored_share:.1f} % ignored",
        )
        bars[-1].set(facecolor=OTHER, edgecolor=LINE_COLOURS[place % len(LINE_COLOURS)])
    axis.set_xscale("symlog", linthresh=0.01)
    axis.set_xlim(0, 100)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(rows, names, fontsize=SMALL)
    ticks = (0, 0.01, 0.1, 1, 10, 100)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=SMALL)
    axis.set_xlabel("share of all pixels (%)", fontsize=SMALL + 1)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=count, fontsize=SMALL)
    save_figure(figure, path)


def _cells(split: SplitScan, index: int) -> list[str]:
    return [percent(split.pixels[index] / max(1, sum(split.pixels))), str(split.images[index])]


def _summary(name: str, split: SplitScan) -> str:
    bad = sum(len(files) for files in split.problems.values())
    lines: dict[str, Any] = {
        "images": f"{split.samples}, {bad} of which cannot be used" if bad else split.samples,
        "classes that occur": f"{len(split.class_names) - len(split.absent)} of {len(split.class_names)}",
        "ignored": f"{percent(split.ignored_share)} % of all pixels",
        "values in the label files": _range(sorted(split.values)) or "not known",
        "image sizes": _counts(split.image_sizes),
        "image files": _counts(split.image_kinds),
        "largest value in images": "" if split.largest is None else f"{split.largest:g}",
        "mean of each channel": " ".join(f"{value:.4g}" for value in split.band_mean),
        "standard deviation": " ".join(f"{value:.4g}" for value in split.band_std),
        "label files": _counts(split.label_kinds),
    }
    return "\n".join([f"{name}:", *(f"- {title}: {value}" for title, value in lines.items() if value != "")])


def _counts(counts: Any) -> str:
    shown = [f"{what} ({count})" for what, count in list(counts.items())[:MOST_SHOWN]]
    return "; ".join(shown + ([f"and {len(counts) - MOST_SHOWN} others"] if len(counts) > MOST_SHOWN else []))


def _range(values: list[int]) -> str:
    """Numbers, those in a row by the first and the last."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
