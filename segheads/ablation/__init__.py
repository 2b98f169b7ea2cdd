"""Grids of trainings: declared as tables, made resumably and side by side, rendered."""

from segheads.ablation.cell import folder_name
from segheads.ablation.config import GridConfig, axis
from segheads.ablation.plot import plot_table
from segheads.ablation.run import parse_shard, run_grid, write_table
from segheads.ablation.table import COLUMNS, MEAN_IOU, Column, Measured, Row, Table, csv_text, markdown

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
