"""Grids of trainings: declared as tables, made resumably and side by side, rendered."""

from segheads.training.grid.cell import folder_name
from segheads.training.grid.config import GridConfig, axis
from segheads.training.grid.plot import plot_table
from segheads.training.grid.run import parse_shard, run_grid, write_table
from segheads.training.grid.table import COLUMNS, MEAN_IOU, Column, Measured, Row, Table, csv_text, markdown

__all__ = [
    "COLUMNS",
    "MEAN_IOU",
    "Column",
    "GridConfig",
    "Measured",
    "Row",
    "Table",
    "axis",
    "csv_text",
    "folder_name",
    "markdown",
    "parse_shard",
    "plot_table",
    "run_grid",
    "write_table",
]
