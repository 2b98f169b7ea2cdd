"""Many trainings declared as tables: made once each, kept, gone on with after a kill, shared out, rendered."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha1
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from segheads.ablation.cell import Cell, claimed, folder_name
from segheads.ablation.config import GridConfig, merge
from segheads.ablation.plot import plot_table
from segheads.ablation.table import Measured, Results, Row, Table, csv_text, markdown, values_of
from segheads.build import create_model
from segheads.drawing import picture_or_warning, save_figure
from segheads.errors import OptionError
from segheads.files import write_text
from segheads.model import SegmentationModel
from segheads.training.config import as_launched, changed, flat

ConfigT = TypeVar("ConfigT", bound=GridConfig)
log = logging.getLogger(__name__)


def build_from_fields(config: GridConfig, num_classes: int) -> SegmentationModel:
    """The model that a configuration's fields and its `model_kwargs` describe."""
    return create_model(config.model.backbone, config.model.head, num_classes, **config.model_options(num_classes))


def run_grid(
    config: ConfigT,
    tables: Mapping[str, Table],
    build_model: Callable[[ConfigT, int], SegmentationModel] = build_from_fields,
) -> dict[str, list[list[Measured | None]]]:
    """Make the trainings that the tables' rows need, and write the tables as Markdown, CSV and PNG.

    A training is made once, however many rows read from it, in a folder of its own below `config.output` that is named
    after what it changes. What is measured is kept there: a sweep that was killed goes on from the last checkpoint of
    the training that it was in, and more rows or tables ask for what they lack alone. Tables are written after each
    training, as far as they go.

    Processes side by side, each with its `shard`, make independent trainings; under `accelerate launch` each training
    runs on all GPUs. A training whose loss is no longer finite is named in the table, and the sweep goes on.

    Args:
        config: What all trainings share, and which tables to make.
        tables: All tables by name.
        build_model: Called as `build_model(config, num_classes)` with the configuration of one training.

    Returns:
        By table, row and seed, what was measured: scores in percent, parameters in millions, multiply-adds of a crop in
        billions. None where there is nothing yet; mIoU is None where the training broke down.

    Raises:
        OptionError: An unknown table, a shard that is none, or a folder that holds a training of another configuration.
        SegheadsError: As `run_training` does, but for a loss that is not finite.
        ValueError: If a row changes what is no field, or two different trainings would have one folder.

    Examples:
        See the page "Ablate".
    """
    config = as_launched(config)
    chosen = {name: tables[name] for name in _chosen(config.tables, tables)}
    cells = _cells(config, chosen)
    index, count = parse_shard(config.shard)
    started = {name: cell.run.latest() for name, cell in cells.items()}  # all are checked before anything is trained
    accelerator = Accelerator(
        mixed_precision=config.machine.mixed_precision
    )  # as in the trainings: it can be set up but once
    # Shares are drawn by name: in the order of the tables one share would get all of the slow ones
    mixed = sorted(cells, key=lambda name: sha1(name.encode()).digest())
    own = [] if config.render_only else [name for name in cells if mixed.index(name) % count == index]
    for number, name in enumerate(own, 1):
        cell, place = cells[name], f"[{number} of {len(own)}] {name}"
        if cell.is_complete:
            log.info("%s: kept", place)
            continue
        with claimed(cell.folder) as free:
            if not free:
                log.info("%s: another process is at it", place)
                continue
            log.info("%s: iteration %d", place, started[name])
            cell.complete(build_model)
        if accelerator.is_main_process:
            _write(config, chosen, cells)
    if accelerator.is_main_process:
        for name, results in _write(config, chosen, cells).items():
            log.info("\n%s", markdown(chosen[name], results))
        log.info("\ntables as Markdown, CSV and PNG are in %s", config.output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return _results(config, chosen, cells)


def write_table(path: Path, table: Table, results: Results) -> None:
    """Write a table as Markdown, CSV and, where there are numbers, PNG; each file is whole or not there.

    Args:
        path: The files' common name, without an ending.
        table: The table.
        results: What was measured for each row and seed; None where there is nothing yet.
    """
    write_text(path.parent / f"{path.name}.md", f"{markdown(table, results)}\n")
    write_text(path.parent / f"{path.name}.csv", csv_text(table, results))
    if any(values_of(row, key) for row in results for key in table.drawn):
        with picture_or_warning(path.parent / f"{path.name}.png"):
            save_figure(plot_table(table, results), path.parent / f"{path.name}.png", dpi=120)


def parse_shard(shard: str) -> tuple[int, int]:
    """Number and count of a share written as `1/4`.

    Raises:
        OptionError: If it is not of that form, or the number is not below the count.

    Examples:
        >>> parse_shard("1/4")
        (1, 4)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise OptionError(f"shard must be I/N with I from 0 to N - 1, such as 0/4 to 3/4; got {shard!r}")
    return int(match[1]), int(match[2])


def _chosen(names: Sequence[str], tables: Mapping[str, Table]) -> Sequence[str]:
    if unknown := [name for name in names if name not in tables]:
        raise OptionError(f"tables {' '.join(unknown)} must be some of {' '.join(tables)}")
    return names or list(tables)


def _cells(config: GridConfig, tables: Mapping[str, Table]) -> dict[str, Cell]:
    """Every training that the tables need, by its folder."""
    cells: dict[str, Cell] = {}
    for row in (row for table in tables.values() for row in table.rows):
        for seed in range(row.seeds):
            own = _own_config(config, row, seed)
            cell = cells.setdefault(own.output.name, Cell(own))
            if cell.config.as_json() != own.as_json():
                raise ValueError(f"two different trainings would be kept in {own.output}; {row.name!r} is the second")
            if row.reading not in {other.reading for other in cell.readings}:
                cell.readings.append(row)
    return cells


def _own_config(config: GridConfig, row: Row, seed: int) -> GridConfig:
    """The configuration of one training: nothing that is measured depends on its axes."""
    known = flat(config)
    if unknown := sorted(set(row.training) - known.keys()):
        raise ValueError(f"row {row.name!r} changes {unknown}, which {type(config).__name__} does not have")
    changes = {**row.training, "model_kwargs": merge(config.model_kwargs, row.training.get("model_kwargs", {}))}
    changes["seed"] = row.training.get("seed", config.seed) + seed
    folder = config.output / folder_name(row.training, seed)
    return changed(config, **changes, output=folder, resume=True)


def _results(
    config: GridConfig, tables: Mapping[str, Table], cells: Mapping[str, Cell]
) -> dict[str, list[list[Measured | None]]]:
    """What is known for each table, row and seed."""
    known = {name: cell.measured() for name, cell in cells.items()}

    def of(row: Row) -> list[Measured | None]:
        return [known[_own_config(config, row, seed).output.name].get(row.reading) for seed in range(row.seeds)]

    return {name: [of(row) for row in table.rows] for name, table in tables.items()}


def _write(
    config: GridConfig, tables: Mapping[str, Table], cells: Mapping[str, Cell]
) -> dict[str, list[list[Measured | None]]]:
    results = _results(config, tables, cells)
    config.output.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_table(config.output / f"table_{name}", table, results[name])
    return results
