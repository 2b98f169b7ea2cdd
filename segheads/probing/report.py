"""The table of many heads: Markdown, CSV, JSON, and a picture of their curves."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from segheads.drawing import LINE_COLOURS, picture_or_warning, save_figure
from segheads.evaluation.complexity import count_parameters
from segheads.evaluation.report import left_out_line
from segheads.evaluation.tables import DASH, markdown_table
from segheads.files import whole_file, write_json, write_text
from segheads.probing.probes import Probe

SCORES = ("mIoU", "aAcc", "mAcc")
COLOURS = LINE_COLOURS[:-1]  # without black; then again with other lines and marks
LINES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D")


def probe_rows(probes: Sequence[Probe], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each head and learning rate: what it is, what it costs, its scores, and whether its rate is the best.

    Args:
        probes: The heads.
        results: mIoU, aAcc and mAcc of each, as fractions, and the names of the classes that mIoU leaves out, as
            `segheads.evaluation.score_record` gives them.

    Returns:
        Rows of `head`, `learning_rate`, `parameters` (of pyramid and head), `mIoU`, `aAcc` and `mAcc` in percent,
        `best`, `diverged_at`, `classes` (the number of all) and `absent_classes` (names of those
        that mIoU leaves out); scores are None where training diverged.
    """
    rows: list[dict[str, Any]] = []
    for probe, result in zip(probes, results, strict=True):
        diverged = probe.diverged_at is not None
        scores = {name: None if diverged or math.isnan(result[name]) else 100 * result[name] for name in SCORES}
        rows.append(
            {
                "head": str(probe.choice),
                "learning_rate": probe.learning_rate,
                "parameters": count_parameters(probe.model),
                **scores,
                "best": False,
                "diverged_at": probe.diverged_at,
                "folder": probe.slug,
                "classes": probe.model.num_classes,
                "absent_classes": [] if diverged else list(result.get("absent_classes", [])),
            }
        )
    for head in dict.fromkeys(row["head"] for row in rows):
        trained = [row for row in rows if row["head"] == head and row["mIoU"] is not None]
        if trained:
            max(trained, key=lambda row: row["mIoU"])["best"] = True
    return rows


def probe_markdown(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Heads at their best rate, the best head first; and where there is more, every rate, the best of each in bold.

    Args:
        rows: What `probe_rows` gave.
        title: A line above them.
    """
    best = sorted((row for row in rows if row["best"]), key=lambda row: -row["mIoU"])
    chosen = "Each head at the learning rate whose mIoU is highest on these images:"
    parts = [title, chosen, _table(best, bold=False)]
    if len(best) < len(rows):
        parts += ["All learning rates, the best of each head in bold:", _table(rows, bold=True)]
    parts += _left_out(rows)
    return "\n\n".join(parts) + "\n"


def _left_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which classes mIoU leaves out, once where it is so for all heads; a line for each other one."""
    scored = [row for row in rows if row["mIoU"] is not None]
    lines = [left_out_line(row["absent_classes"], row["classes"]) for row in scored]
    if len(set(lines)) == 1:
        return [line for line in lines[:1] if line]
    named = zip(scored, lines, strict=True)
    return [f"`{row['head']}` at {row['learning_rate']:g}: {line}" for row, line in named if line]


def _table(rows: Sequence[Mapping[str, Any]], bold: bool) -> str:
    lines = []
    for row in rows:
        numbers = [DASH if row[name] is None else f"{row[name]:.2f}" for name in SCORES]
        if row["diverged_at"] is not None:
            numbers[0] = f"diverged at iteration {row['diverged_at']}"
        if bold and row["best"]:
            numbers = [f"**{number}**" for number in numbers]
        lines.append([f"`{row['head']}`", f"{row['learning_rate']:g}", *numbers, f"{row['parameters'] / 1e6:.3f}"])
    return markdown_table(["head", "learning rate", *SCORES, "parameters, M"], lines)


def write_probe_report(
    folder: str | Path, rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Write heads.md, heads.csv, heads.json and curves.png.

    Args:
        folder: Where to.
        rows: What `probe_rows` gave.
        records: The lines of `metrics.jsonl`.
        title: A line above the tables and the picture.
    """
    folder = Path(folder)
    write_text(folder / "heads.md", probe_markdown(rows, title))
    write_json(folder / "heads.json", list(rows))
    with whole_file(folder / "heads.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "absent_classes": "; ".join(row["absent_classes"])} for row in rows)
    with picture_or_warning(folder / "curves.png"):
        save_figure(plot_probes(rows, records, title), folder / "curves.png")


def plot_probes(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the loss of each head at its best rate over the iterations, and its mIoU against the learning rate.

    Args:
        rows: What `probe_rows` gave.
        records: The lines of `metrics.jsonl`.
        title: A line above the picture.
    """
    heads = list(dict.fromkeys(row["head"] for row in rows))
    columns = max(1, min(4, 120 // (max(map(len, heads)) + 8)))  # of the legend
    figure = Figure(figsize=(10, 4 + 0.2 * math.ceil(len(heads) / columns)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    handles = []
    for number, head in enumerate(heads):
        repeat = number // len(COLOURS)
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[repeat % len(LINES)]}
        own = [row for row in rows if row["head"] == head]
        for row in own:
            if row["best"]:
                name = f"{head} at {row['learning_rate']:g}"
                points = [(r["iteration"], r["loss"][name]) for r in records if name in r.get("loss", {})]
                left.plot(*zip(*points, strict=True), **style) if points else None
        scored = sorted((row["learning_rate"], row["mIoU"]) for row in own if row["mIoU"] is not None)
        mark = {"marker": MARKS[repeat % len(MARKS)], "markersize": 5}
        handles += right.plot([x for x, _ in scored], [y for _, y in scored], **style, **mark, label=head)
    left.set(xlabel="iteration", ylabel="training loss (nats per pixel)", title="at each head's best rate")
    right.set(xlabel="learning rate", ylabel="mIoU (percent)", xscale="log", title="every rate, after training")
    rates = sorted({row["learning_rate"] for row in rows})
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.minorticks_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)
    return figure
