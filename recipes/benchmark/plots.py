"""Plots of `recipes/benchmark`'s results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from report import MEASURES, Record, ratios

COLOURS = {"plain": "#D55E00", "compiled": "#E69F00", "ours": "#0072B2"}  # Okabe and Ito's, for every kind of sight
LINES: dict[str, dict[str, Any]] = {
    "loss": {"linestyle": "-", "marker": "o"},
    "label map": {"linestyle": "--", "marker": "s"},
    "mean shift": {"linestyle": "-", "marker": "^"},
}
AXES = {
    "classes": "classes (512 x 512 pixels, one image)",
    "resolution": "side of the image, pixels (150 classes, one image)",
    "batch": "images (150 classes, 512 x 512 pixels)",
    "tokens": "tokens (192 channels, one image)",
}
TICKS = (1.0, 3.0)  # in each decade
UNITS = {"seconds": ("time of a call, seconds", 1.0), "extra": ("extra memory, MB", 1e6)}


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw what there is: for each device and dtype scaling and ratios."""
    written = []
    for device, dtype in dict.fromkeys((record["device"], record["dtype"]) for record in records):
        there = [record for record in records if (record["device"], record["dtype"]) == (device, dtype)]
        for name, plot in (("scaling", plot_scaling), ("ratios", plot_ratios)):
            path = folder / f"{name}_{device.replace(':', '')}_{dtype}.png"
            if plot(there, path):
                written.append(path)
    return written


def plot_scaling(records: Sequence[Record], path: Path) -> bool:
    """Time and memory of both sides over each axis, on logarithmic scales; False where no point was measured."""
    points = [record for record in records if record["point"] is not None]
    axes = [axis for axis in AXES if any(record["point"][0] == axis for record in points)]
    if not axes:
        return False
    figure = Figure(figsize=(4 * len(axes), 7.5), layout="constrained")
    grid = figure.subplots(len(UNITS), len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        for row, (measure, (label, unit)) in enumerate(UNITS.items()):
            ax = grid[row][column]
            _lines(ax, [record for record in points if record["point"][0] == axis], measure, unit)
            values = sorted({record["point"][2] for record in points if record["point"][0] == axis})
            ax.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=label)
            ax.set_xticks(values, [f"{value:,g}" for value in values])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_major_locator(LogLocator(subs=TICKS))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            ax.grid(True, which="major", color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
    kinds = dict.fromkeys(record["point"][1] for record in points)
    shown = [Line2D([], [], color=COLOURS[side], label=side, linewidth=3) for side in ("plain", "ours")]
    shown += [Line2D([], [], color="0.3", label=kind, **LINES[kind]) for kind in kinds]
    figure.legend(handles=shown, loc="outside upper center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _lines(ax: Any, records: Sequence[Record], measure: str, unit: float) -> None:
    for kind in dict.fromkeys(record["point"][1] for record in records):
        for side in ("plain", "ours"):
            found = sorted(
                (record["point"][2], _middle(record[measure][side]) / unit)
                for record in records
                if record["point"][1] == kind and side in record[measure]
            )
            ax.plot(*zip(*found, strict=True), color=COLOURS[side], **LINES[kind]) if found else None


def _middle(value: Any) -> float:
    return statistics.median(value) if isinstance(value, list) else max(value, 1e4)  # 0 has no logarithm


def plot_ratios(records: Sequence[Record], path: Path) -> bool:
    """Ours over plain of every row, with the lowest and highest turn, and the goals; False where there is none."""
    rows = [record for record in records if record["point"] is None]
    found = {
        measure: [record for record in rows if ratios(record, measure, "plain")] for measure in ("seconds", "extra")
    }
    found = {measure: there for measure, there in found.items() if there}
    if not found:
        return False
    figure = Figure(figsize=(7.5 * len(found), 1.6 + 0.36 * max(map(len, found.values()))), layout="constrained")
    for ax, (measure, there) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for place, record in enumerate(there):
            for side, offset in (("plain", 0.0), ("compiled", 0.25)):
                values = ratios(record, measure, side)
                if values:
                    ax.plot([min(values), max(values)], [place + offset] * 2, color=COLOURS[side], linewidth=2)
                    ax.plot(statistics.median(values), place + offset, "os"[side != "plain"], color=COLOURS[side])
            for goal in record["goals"]:
                if (goal["measure"], goal["against"]) == (measure, "plain"):
                    ax.plot(goal["limit"], place, "|", color="black", markersize=15, markeredgewidth=2)
        ax.axvline(1, color="0.6", linewidth=1)
        ax.set(xscale="log", xlabel=f"{MEASURES[measure]}, ratio (left of 1: ours is better)")
        ax.set_yticks(range(len(there)), [record["name"] for record in there])
        ax.invert_yaxis()
        ax.xaxis.set_major_locator(LogLocator(subs=TICKS))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(True, axis="x", color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    marks = [
        Line2D([], [], color=COLOURS["plain"], marker="o", label="ours / plain"),
        Line2D([], [], color=COLOURS["compiled"], marker="s", label="ours / plain, compiled"),
        Line2D([], [], color="black", marker="|", markersize=15, markeredgewidth=2, linestyle="", label="goal"),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    return True
