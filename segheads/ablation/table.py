"""The tables of a grid of trainings: what stands in them, as Markdown and as CSV."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from segheads.evaluation.tables import DASH, markdown_table

# What one reading gave, by name: scores in percent, parameters in millions, multiply-adds in billions; None: no number
Measured = dict[str, float | None]

Results = Sequence[Sequence[Measured | None]]  # by row and seed; None: nothing yet

BROKE_DOWN: Measured = {"mIoU": None}  # what a training gave whose loss was no longer finite

ABSENT = "absent_classes"  # how many classes mIoU leaves out, where it leaves out any


@dataclass(frozen=True)
class Column:
    """A number that tables show.

    Args:
        key: Its name among what was measured.
        header: What stands above it.
        digits: Digits after the point.
    """

    key: str
    header: str
    digits: int = 1


MEAN_IOU = Column("mIoU", "mIoU", 2)
COLUMNS = (
    MEAN_IOU,
    Column("aAcc", "aAcc"),
    Column("mAcc", "mAcc"),
    Column("parameters", "parameters, M"),
    Column("multiply_adds", "multiply-adds, G"),
)


@dataclass(frozen=True)
class Row:
    """One line of a table: what to train, what to change in the trained model, and what the paper has for it.

    Args:
        name: What stands in the first column.
        training: Fields of the configuration that this training changes. Rows with the same read from one training.
        settings: Attributes of the trained model's head to set before it is evaluated (again).
        evaluation: Further options of `segheads.evaluation.evaluate`, for what a run does not measure by itself;
            `class_variance`, if true, also takes `segheads.evaluation.variance.class_variance`, in percent.
        paper: The paper's numbers, by column.
        axes: Where the row is on the axes of a plot, by name.
        seeds: From how many seeds the row is trained.
    """

    name: str
    training: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1

    @property
    def reading(self) -> str:
        """What the row reads from its training, as a key: equal where one measurement serves several rows."""
        return json.dumps({"settings": self.settings, "evaluation": self.evaluation}, sort_keys=True)


@dataclass(frozen=True)
class Table:
    """Rows, and how they are shown.

    Args:
        title: What stands above the table.
        rows: The lines.
        columns: The numbers that are shown.
        drawn: Keys of the columns that the plot shows, all of one unit.
        x: The axis, of numbers, along which the plot draws lines, one for each combination of the other axes; rows that
            have no such axis become level lines. None draws a point for each row.
        panel: The axis of which each value has a plot of its own, side by side.
        note: What stands beneath the title.
        from_paper: Show a column for the paper's numbers even where none is known.
    """

    title: str
    rows: Sequence[Row]
    columns: Sequence[Column] = COLUMNS
    drawn: Sequence[str] = ("mIoU",)
    x: str | None = None
    panel: str | None = None
    note: str = ""
    from_paper: bool = True


def markdown(table: Table, results: Results) -> str:
    """The table in Markdown: mean and standard deviation over seeds, the paper's numbers before ours.

    Args:
        table: The table.
        results: What was measured for each row and seed.

    Examples:
        >>> table = Table("Shifts", [Row("1", paper={"mIoU": 31.05}, seeds=2), Row("2")], columns=[MEAN_IOU])
        >>> print(markdown(table, [[{"mIoU": 30.0}, {"mIoU": 31.0}], [None]]))
        Shifts
        <BLANKLINE>
        | | mIoU, paper | mIoU | seeds |
        |---|--:|--:|--:|
        | 1 | 31.05 | 30.50 ± 0.71 | 2 |
        | 2 | – | not yet | 0 of 1 |
    """
    published = {key for row in table.rows for key in row.paper} | ({table.drawn[0]} if table.from_paper else set())
    several = any(row.seeds > 1 for row in table.rows) or any(None in row for row in results)
    headers = [""]
    for column in table.columns:
        headers += [f"{column.header}, paper"] if column.key in published else []
        headers.append(column.header)
    headers += ["seeds"] if several else []
    lines = []
    for row, values in zip(table.rows, results, strict=True):
        cells = [row.name]
        for column in table.columns:
            if column.key in published:
                cells.append(f"{row.paper[column.key]:g}" if column.key in row.paper else DASH)
            cells.append(_cell(column, values, table.drawn[0]))
        done = sum(value is not None for value in values)
        cells += [f"{done}" if done == row.seeds else f"{done} of {row.seeds}"] if several else []
        lines.append(cells)
    parts = [table.title, table.note, markdown_table(headers, lines), _left_out(table, results)]
    return "\n\n".join(part for part in parts if part)


def csv_text(table: Table, results: Results) -> str:
    """The table as CSV: one line for each row and seed, axes and the paper's numbers included, all digits.

    Args:
        table: The table.
        results: What was measured for each row and seed.
    """
    axes = list(dict.fromkeys(name for row in table.rows for name in row.axes))
    keys = [column.key for column in table.columns]
    published = [key for key in keys if any(key in row.paper for row in table.rows)]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", *axes, "seed", *keys, *(f"paper_{key}" for key in published)])
    for row, values in zip(table.rows, results, strict=True):
        for seed, value in enumerate(values):
            numbers = [(value or {}).get(key) for key in keys]
            paper = [row.paper.get(key) for key in published]
            writer.writerow([row.name, *(row.axes.get(name) for name in axes), seed, *numbers, *paper])
    return text.getvalue()


def values_of(measured: Sequence[Measured | None], key: str) -> list[float]:
    """One number from each seed that has it.

    Args:
        measured: What was measured, by seed.
        key: The number's name.
    """
    found = [(value or {}).get(key) for value in measured]
    return [number for number in found if number is not None]


def _left_out(table: Table, results: Results) -> str:
    """A line that says how many classes mIoU leaves out, where it leaves out any."""
    most = {
        row.name: max(values_of(values, ABSENT), default=0) for row, values in zip(table.rows, results, strict=True)
    }
    found = [f"{name} {count:.0f}" for name, count in most.items() if count]
    return f"Absent classes, which mIoU leaves out: {', '.join(found)}" if found else ""


def _cell(column: Column, measured: Sequence[Measured | None], score: str) -> str:
    """Mean and spread of one number, or in the column of the score why there is none."""
    own = values_of(measured, column.key)
    text = f"{statistics.mean(own):.{column.digits}f}" if own else DASH
    if len(set(own)) > 1:
        text += f" ± {statistics.stdev(own):.{column.digits}f}"
    if column.key != score:
        return text
    there = [value for value in measured if value is not None]
    broken = there.count(BROKE_DOWN)
    if not there or not broken:
        return text if there else "not yet"
    return f"{text} ({broken} of {len(there)} not finite)" if own else "not finite"
