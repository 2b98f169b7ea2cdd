"""Pictures of tables."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segheads.ablation.table import Measured, Results, Row, Table, values_of
from segheads.drawing import LINE_COLOURS
from segheads.evaluation.tables import DASH

LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"))


def plot_table(table: Table, results: Results) -> Figure:
    """Draw a table: lines along `table.x`, or a point for each row; bars are standard deviations over seeds.

    Args:
        table: The table.
        results: What was measured for each row and seed.
    """
    figure = _draw_rows(table, results) if table.x is None else _draw_lines(table, results)
    figure.suptitle(table.title, fontsize=11)
    return figure


def _draw_rows(table: Table, results: Results) -> Figure:
    """A point for each row, beneath each other; small ones for its seeds, a hollow one for the paper's."""
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(table.rows)), layout="constrained")
    axis = figure.subplots()
    names = {column.key: column.header for column in table.columns}
    for number, key in enumerate(table.drawn):
        colour, shift = LINE_COLOURS[number % len(LINE_COLOURS)], 0.2 * (number - (len(table.drawn) - 1) / 2)
        for y, (row, values) in enumerate(zip(table.rows, results, strict=True)):
            if key in row.paper:
                axis.plot(row.paper[key], y + shift, "D", color=colour, fillstyle="none", label=f"{names[key]}, paper")
            if own := values_of(values, key):
                axis.plot(own, [y + shift] * len(own), "|", color=colour, alpha=0.7)
                style: Any = {"fmt": "o", "capsize": 3, "color": colour, "label": names[key]}
                axis.errorbar(statistics.mean(own), y + shift, xerr=_spread(own), **style)
    axis.set_yticks(range(len(table.rows)), [row.name for row in table.rows])
    axis.set(ylim=(len(table.rows) - 0.5, -0.5), xlabel=_unit(table))
    axis.grid(axis="x", alpha=0.3)
    _legend(figure, [axis])
    return figure


def _draw_lines(table: Table, results: Results) -> Figure:
    """Lines along x, a plot for each panel."""
    x, panel, pairs = str(table.x), table.panel, list(zip(table.rows, results, strict=True))
    styles = _line_styles(table)
    panels = list(dict.fromkeys(row.axes[panel] for row in table.rows if panel in row.axes)) if panel else [None]
    figure = Figure(figsize=(max(6.5, 1.5 + 3.8 * len(panels)), 5), layout="constrained")
    plots = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for plot, value in zip(plots, panels, strict=True):
        lines: dict[str, list[tuple[Row, Sequence[Measured | None]]]] = {label: [] for label in styles}
        for row, measured in pairs:
            if x not in row.axes:
                _draw_level(plot, row.name, values_of(measured, table.drawn[0]), row.paper.get(table.drawn[0]))
            elif panel is None or row.axes.get(panel) == value:
                lines[_label(table, row)].append((row, measured))
        for label, line in lines.items():
            _draw_line(plot, table, line, {"label": label, **styles[label]})
        ticks = sorted({row.axes[x] for row in table.rows if x in row.axes})
        plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        plot.set(xlabel=x, title="" if panel is None else _named(panel, value))
        plot.grid(alpha=0.3)
    plots[0].set_ylabel(_unit(table))
    _legend(figure, plots)
    return figure


def _draw_line(plot: Axes, table: Table, line: Sequence[tuple[Row, Sequence[Measured | None]]], style: Any) -> None:
    x, key = str(table.x), table.drawn[0]
    points = [(row.axes[x], values_of(measured, key)) for row, measured in line]
    if known := sorted((at, statistics.mean(own), _spread(own)) for at, own in points if own):
        at, mean, spread = zip(*known, strict=True)
        plot.errorbar(at, mean, yerr=spread, capsize=3, ms=5, **style)
    if paper := sorted((row.axes[x], row.paper[key]) for row, _ in line if key in row.paper):
        plot.plot(*zip(*paper, strict=True), "D--", lw=0.8, color="grey", fillstyle="none", label="paper")


def _draw_level(plot: Axes, name: str, own: Sequence[float], paper: float | None) -> None:
    """What all lines are to be compared with."""
    if own:
        mean, spread = statistics.mean(own), _spread(own)
        plot.axhline(mean, color="grey", lw=1, label=name)
        plot.axhspan(mean - spread, mean + spread, color="grey", alpha=0.15)
    if paper is not None:
        plot.axhline(paper, color="grey", lw=0.8, ls=":", label=f"{name}, paper")


def _line_styles(table: Table) -> dict[str, dict[str, Any]]:
    """For each line's label, the colour of its first axis and the dashes and marker of its other ones."""
    lines = {_label(table, row): row for row in table.rows if table.x in row.axes}
    names = _line_axes(table)
    first = list(dict.fromkeys(str([row.axes.get(n) for n in names[:1]]) for row in lines.values()))
    rest = list(dict.fromkeys(str([row.axes.get(n) for n in names[1:]]) for row in lines.values()))
    styles = {}
    for label, row in lines.items():
        colour = LINE_COLOURS[first.index(str([row.axes.get(n) for n in names[:1]])) % len(LINE_COLOURS)]
        dashes, marker = LINES[rest.index(str([row.axes.get(n) for n in names[1:]])) % len(LINES)]
        styles[label] = {"color": colour, "ls": dashes, "marker": marker}
    return styles


def _line_axes(table: Table) -> list[str]:
    """Axes on which lines differ."""
    names = dict.fromkeys(name for row in table.rows for name in row.axes)
    differ = [name for name in names if len({str(row.axes[name]) for row in table.rows if name in row.axes}) > 1]
    return [name for name in differ if name not in (table.x, table.panel)]


def _label(table: Table, row: Row) -> str:
    return ", ".join(_named(name, row.axes.get(name)) for name in _line_axes(table)) or "ours"


def _legend(figure: Figure, plots: Sequence[Axes]) -> None:
    labelled: dict[str, Any] = {}
    for plot in plots:
        for handle, label in zip(*plot.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    inches = 0.6 + 0.07 * max(map(len, labelled), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labelled) / columns))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _unit(table: Table) -> str:
    return f"{'mIoU' if len(table.drawn) > 1 else table.drawn[0]}, percent"


def _named(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {DASH if value is None else value}"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
