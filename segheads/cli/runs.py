"""List the runs below a folder, their scores side by side.

    segheads runs runs
    segheads runs runs --json > runs.json

A run is a folder with a config.json and a metrics.jsonl. Prints a table in percent, the runs in the order of their
names, and writes it to runs.md in the folder: how far each is, its backbone and head, and the scores of results.json. A
run that has none yet shows those of its last evaluation, marked with *.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from segheads.errors import RunError, SavedModelMissingError
from segheads.evaluation.tables import markdown_table, percent
from segheads.files import read_json, read_lines, write_text
from segheads.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which runs, and how they are shown."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with the runs, at any depth."""
    json: bool = False
    """Print JSON, for programs, and write no file."""


def main(config: Config) -> None:
    """Run the command."""
    runs = find_runs(config.folder)
    if config.json:
        print(json.dumps(runs))
        return
    table = runs_markdown(runs)
    print(table)
    write_text(config.folder / "runs.md", f"# Runs\n\nAll scores in percent.\n\n{table}\n")


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """What there is to say of each run below a folder: JSON values, scores as fractions.

    Args:
        folder: Where to look.

    Raises:
        SavedModelMissingError: There is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise SavedModelMissingError(f"{folder} is no folder; give one that has runs in it")
    logs = sorted(path for path in folder.rglob("metrics.jsonl") if path.with_name("config.json").is_file())
    if not logs:
        raise SavedModelMissingError(f"{folder} holds no run: no folder in it has both config.json and metrics.jsonl")
    return [_run(path.parent, path.parent.relative_to(folder).as_posix()) for path in logs]


def runs_markdown(runs: list[dict[str, Any]]) -> str:
    """The table.

    Args:
        runs: What `find_runs` gave.
    """
    found = {key for run in runs for key in run["scores"]}
    titles = {key: title for metric in METRICS.values() for key, title in metric.scores.items()}
    names = {key: title for key, title in titles.items() if key in found and title}
    rows = []
    for run in runs:
        mark = "" if run["finished"] else "*"
        of_scores = [percent(run["scores"][key]) + mark if key in run["scores"] else "–" for key in names]
        done = f"{run['iteration']} of {run['iterations']}"
        rows.append([run["name"], str(run["backbone"]), str(run["head"]), done, *of_scores])
    return markdown_table(["run", "backbone", "head", "iterations", *names.values()], rows, left=3)


def _run(path: Path, name: str) -> dict[str, Any]:
    options = read_json(path / "config.json", "the configuration of a run", RunError)
    records = read_lines(path / "metrics.jsonl", "the records of a run", RunError)
    results = path / "results.json"
    keys = [key for metric in METRICS.values() for key in metric.scores]
    measured = [read_json(results, "the results of a run", RunError)] if results.is_file() else records
    scores = next(
        (found for one in reversed(measured) if (found := {key: one[key] for key in keys if one.get(key) is not None})),
        {},
    )
    done = max((record["iteration"] for record in records), default=0)
    return {
        "name": name,
        "backbone": options.get("backbone"),
        "head": options.get("head"),
        "iteration": done,
        "iterations": options.get("iterations"),
        "finished": results.is_file() and not _goes_on(options, done),
        "scores": scores,
    }


def _goes_on(options: dict[str, Any], done: int) -> bool:
    """Whether results are of the end of a run that has become longer since."""
    return bool(options.get("extend")) and not options.get("patience") and done < options["iterations"]
