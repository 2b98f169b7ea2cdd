"""Time and memory of everything that segheads made fast, against what the published implementations do.

    python recipes/benchmark
    python recipes/benchmark --only loss label_map step/mean_shift
    python recipes/benchmark --device cuda
    python recipes/benchmark --render

Writes benchmark.md, benchmark.json and plots to `--output`. Rows that were measured before stay there: a later run adds
to them or replaces them, Ctrl-C loses one row at most, and `--render` writes table and plots again from the JSON.

The sides take turns in one process; what is compiled and each measurement of memory has its own. The plain side is in
plain.py; for it to be compiled, torch.compile needs a C++ compiler. All rows take one to two hours on two
cores; SenFormer's plain step needs 10 GB. The input pipeline needs `pip install opencv-python-headless`. On a GPU,
where starting processes takes longer than measuring, `--one-process` does without them.
"""

import dataclasses
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jobs import Job, JobError, in_own_process, in_this_process
from measure import machine
from plots import write_plots
from report import markdown, ratios
from rows import Row, choose, rows
from work import Setup

from segheads.cli.run import run as run_command
from segheads.ranges import Range


@dataclass(frozen=True)
class Config:
    """What to measure, and how."""

    only: tuple[str, ...] = ()
    """Groups or rows, such as `loss` or `head_step/linear`; `--list` prints them."""
    output: Path = Path("runs/benchmark")
    turns: Annotated[int, Range(1)] = 7
    device: str = "cpu"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the tensors; models run under autocast where it is narrower than fp32."""
    threads: Annotated[int | None, Range(1)] = None
    """Of the CPU; None means all."""
    compile: bool = True
    """Also measure the plain side under torch.compile; not for the points of the scaling plots."""
    compile_models: bool = False
    """The same for whole models, ours too, which takes minutes for each."""
    gpu_memory: Annotated[float | None, Range(0, above=True)] = None
    """GB of a GPU that the largest batch may take; None means all."""
    one_process: bool = False
    """Measure everything in one process: quick, and exact on a GPU, where the allocator counts memory."""
    plots: bool = True
    quick: bool = False
    """Tiny sizes, to see that everything runs."""
    render: bool = False
    """Measure nothing; write table and plots from the JSON."""
    list: bool = False
    """Print the names of the rows."""


def main(config: Config) -> None:
    """Measure row by row, keep each, write tables and plots."""
    if config.list:
        print("\n".join(f"{row.name:36}{row.title}" for row in rows(config.quick)))
        return
    if not config.render:
        try:
            measure_all(config, choose(rows(config.quick), config.only, config.device))
        except KeyboardInterrupt:
            raise SystemExit(f"stopped; what was measured is in {config.output}, --render writes its table") from None
        except ValueError as error:
            raise SystemExit(str(error)) from error
    records = read(config.output)
    if not records:
        raise SystemExit(f"nothing to write: {config.output / 'benchmark.json'} has no results")
    text = markdown(list(records.values()))
    (config.output / "benchmark.md").write_text(text, encoding="utf-8")
    if config.plots:
        write_plots(list(records.values()), config.output)
    print(text)


def measure_all(config: Config, chosen: list[Row]) -> None:
    """Measure rows and add each to the JSON as soon as it is known.

    Raises:
        ValueError: If the device is not there.
    """
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {config.device} is asked for, and PyTorch finds no GPU; use --device cpu")
    config.output.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(chosen, 1):
        start = time.perf_counter()
        print(f"{number}/{len(chosen)} {row.name} ... ", end="", file=sys.stderr, flush=True)
        try:
            record = measure(config, row)
        except JobError as error:
            print(f"failed: {error}", file=sys.stderr)
            continue
        keep(config.output, record)
        found = {name: ratios(record, name, "plain") for name in ("seconds", "extra", "largest")}
        told = ", ".join(f"{name} {sorted(values)[len(values) // 2]:.3g}" for name, values in found.items() if values)
        print(f"ours / plain: {told or '-'} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)


def measure(config: Config, row: Row) -> dict[str, Any]:
    """The record of one row.

    Raises:
        JobError: If the time, or a side's memory, cannot be measured.
    """
    setup = Setup(config.device, config.dtype, config.quick, config.gpu_memory)
    run = in_this_process if config.one_process else in_own_process
    compiles = config.compile and (config.compile_models or not row.is_model) and row.point is None
    job = Job(row.name, "seconds", setup, turns=config.turns, threads=config.threads)
    record: dict[str, Any] = {
        "name": row.name,
        "title": row.title,
        "device": config.device,
        "dtype": row.dtype or config.dtype,
        "quick": config.quick,
        "turns": config.turns,
        "is_model": row.is_model,
        "point": row.point,
        "goals": [asdict(goal) for goal in (row.cpu if torch.device(config.device).type == "cpu" else row.cuda)],
    }
    if row.largest is not None:
        found = {side: run(dataclasses.replace(job, measure="largest", side=side)) for side in ("plain", "ours")}
        largest = {side: result["largest"] for side, result in found.items()}
        notes = {side: result["note"] for side, result in found.items()}
        threads = config.threads or torch.get_num_threads()
        return {**record, "largest": largest, "machine": machine(config.device), "threads": threads, "notes": notes}
    record.update(run(job), extra={}, whole={})
    if row.build is not None and compiles and "plain" in record["seconds"]:
        compiled = run(dataclasses.replace(job, compiles=True))
        record["seconds"] |= compiled["seconds"]
        record["notes"] |= compiled["notes"]
    if row.build is not None:
        for side in record["seconds"]:
            for name, count in run(dataclasses.replace(job, measure="memory", side=side)).items():
                record[name][side] = count
    return record


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to the folder's JSON, in the order of the rows; a crash leaves the old file or the new one."""
    records = {**read(folder), _key(record): record}
    order = {row.name: place for place, row in enumerate(rows(record["quick"]))}
    found = sorted(records.values(), key=lambda record: order.get(record["name"], len(order)))
    path = folder / "benchmark.json"
    path.with_suffix(".new").write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)


def read(folder: Path) -> dict[tuple, dict[str, Any]]:
    """The records of a folder's JSON; none where there is no such file."""
    path = folder / "benchmark.json"
    if not path.exists():
        return {}
    return {_key(record): record for record in json.loads(path.read_text(encoding="utf-8"))["rows"]}


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in ("name", "device", "dtype", "quick"))


if __name__ == "__main__":
    run_command(main, Config)
