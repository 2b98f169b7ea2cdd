"""The folder of a run: configuration, log, and checkpoints that are whole or not there."""

import json
import logging
import math
import pickle
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from segheads.data.config import in_new_words
from segheads.errors import OptionError, RunEndedError, RunError, RunExistsError
from segheads.files import (
    INCOMPLETE,
    clear_leftovers,
    place_folder,
    read_json,
    read_lines,
    remove_folder,
    sync,
    write_json,
    write_text,
)
from segheads.training.checkpoints import find_damage, processes_of, random_state, write_manifest

CONFIG, LOG, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"
DAMAGED = "damaged-"  # before the name of a checkpoint that was found to be so
log = logging.getLogger(__name__)


class RunFolder:
    """Keeps what a training run must not lose, so that a run killed at any moment can go on.

    `config.json` holds the configuration, `metrics.jsonl` one record a line, and `checkpoints/` the last few states
    of Accelerate (weights, optimizer, random states), each written under another name, synced to the disk and then
    renamed. A manifest in it has the SHA-256 of each file: a run goes on from the newest that is as it was written.

    Args:
        path: The folder; made if need be.
        config: The run's configuration, of JSON values.
        resume: Go on with the run that the folder holds; with none there, a new one starts.
        may_differ: Names in `config` that a resumed run may change.
        defaults: What a name stands for that the config.json of an older version lacks; None where it says nothing.
        keep: How many checkpoints to keep, 1 or more.

    Raises:
        RunExistsError: If the folder holds a run and `resume` is False.
        RunError: If it holds checkpoints, and no `config.json` or a damaged one that would say of what.
        OptionError: If a resumed run was started with another configuration; the message shows both values.
        ValueError: If no checkpoint is to be kept.

    Examples:
        >>> import tempfile
        >>> run = RunFolder(Path(tempfile.mkdtemp()) / "run", {"seed": 0})
        >>> run.start({"seed": 0})
        0
        >>> run.log({"iteration": 10, "loss": 0.5})
        >>> run.records()
        [{'iteration': 10, 'loss': 0.5}]
        >>> run.latest()
        0
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        may_differ: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
        keep: int = 3,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be 1 checkpoint or more; got {keep}")
        self.path = Path(path)
        self.keep = keep
        self._found: int | None = None  # where to go on from
        if (self.path / CONFIG).is_file() or self.latest():
            if not resume:
                raise RunExistsError(f"{self.path} holds a run (iteration {self.latest()}); resume it, or use another")
            _check_config(self.path / CONFIG, _as_read(config), _as_read(defaults or {}), may_differ)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / CHECKPOINTS

    def find_start(self) -> int:
        """The iteration of the newest checkpoint that is whole, 0 where there is none; files are read once.

        What is newer and damaged is said in a warning.

        Raises:
            RunError: If there are checkpoints, and none of them is whole.
        """
        if self._found is not None:
            return self._found
        numbers, damage = sorted(self._iterations(), reverse=True), ""
        for number in numbers:
            folder = self.checkpoints / f"{number:08d}"
            if (wrong := find_damage(folder)) is None:
                self._found = number
                return number
            damage = damage or f"{folder}: {wrong}"
            log.warning("checkpoint %s is damaged: %s; the one before is taken", folder, wrong)
        if numbers:
            raise RunError(
                f"none of the {len(numbers)} checkpoints of {self.path} is whole ({damage}); bring one back, or delete "
                f"{self.checkpoints} to begin anew"
            )
        self._found = 0
        return 0

    def start(self, config: Mapping[str, Any]) -> int:
        """Write the configuration and forget records after the checkpoint to go on from; to be called by one process.

        Returns:
            The iteration to go on from.

        Raises:
            RunError: As `find_start` does, or if the folder cannot be written to.
        """
        iteration = self.find_start()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.path)
            write_json(self.path / CONFIG, config)
            kept = [record for record in self.records() if record["iteration"] <= iteration]
            write_text(self.path / LOG, "".join(json.dumps(record) + "\n" for record in kept))
            for number in self._iterations():
                if number > iteration:  # damaged; its place may be needed
                    folder = self.checkpoints / f"{number:08d}"
                    shutil.rmtree(folder.with_name(f"{DAMAGED}{folder.name}"), ignore_errors=True)
                    folder.rename(folder.with_name(f"{DAMAGED}{folder.name}"))
        except OSError as error:
            raise RunError(f"{self.path} cannot be written to: {error}; give another folder, or make room") from error
        return iteration

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl`; NaN, which JSON lacks, becomes null.

        Raises:
            RunEndedError: If it cannot be written, because the disk is full or the folder is gone.
        """
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        said = self._said(f"the log of iteration {record.get('iteration')}")
        with said, (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off by a kill is left out."""
        path = self.path / LOG
        return read_lines(path, "the records of a run", RunError) if path.is_file() else []

    def latest(self) -> int:
        """The iteration of the newest checkpoint, or 0; its files are not read, as `find_start` does."""
        return max(self._iterations(), default=0)

    def left(self) -> str:
        """What a run can go on from, in words."""
        latest = self.latest()
        return f"the last checkpoint is of iteration {latest}, in {self.checkpoints}" if latest else "no checkpoint yet"

    def save(self, accelerator: Accelerator, iteration: int) -> None:
        """Write a checkpoint; to be called by every process.

        Raises:
            RunEndedError: If it cannot be written; those before are as they were.
        """
        folder = self.checkpoints / f"{iteration:08d}"
        incomplete = folder.with_name(f"{INCOMPLETE}{folder.name}")
        with self._said(f"the checkpoint of iteration {iteration}", incomplete):
            if accelerator.is_main_process:
                if not self.path.is_dir():
                    raise FileNotFoundError(f"{self.path} is gone")
                self.checkpoints.mkdir(exist_ok=True)
                clear_leftovers(self.checkpoints)
                incomplete.mkdir()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(incomplete))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_manifest(incomplete, accelerator.num_processes)
                if (self.path / LOG).is_file():
                    sync(self.path / LOG)  # a checkpoint's records are on the disk before it is
                place_folder(incomplete, folder)
                for old in sorted(self._iterations())[: -self.keep]:
                    remove_folder(self.checkpoints / f"{old:08d}")
                for damaged in self.checkpoints.glob(f"{DAMAGED}*"):
                    shutil.rmtree(damaged)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, iteration: int) -> None:
        """Restore a checkpoint; to be called by every process.

        Raises:
            RunError: If the checkpoint does not fit what was prepared.
        """
        folder = self.checkpoints / f"{iteration:08d}"
        processes, own = processes_of(folder), random_state(folder, accelerator.process_index)
        if processes not in (None, accelerator.num_processes) or not own.is_file():
            log.warning(
                "checkpoint %s is of %s process(es), and this run has %d: what is dropped is another draw than it "
                "would have been",
                *(folder, processes or "fewer", accelerator.num_processes),
            )
        try:
            accelerator.load_state(str(folder))
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, SafetensorError, pickle.PickleError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"checkpoint {folder} does not fit this model and optimizer: {reason}") from error

    @contextmanager
    def _said(self, what: str, unfinished: Path | None = None) -> Iterator[None]:
        """Say in one line what could not be written, and what is left."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)  # its room may be what is missing
            if "DataLoader worker" in str(error):  # torch says so wherever the process is
                raise
            gone = "" if self.path.is_dir() else f"{self.path} is gone: "
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise RunEndedError(f"{what} could not be written ({gone}{reason}); {self.left()}") from error

    def _iterations(self) -> list[int]:
        return [int(path.name) for path in self.checkpoints.glob("[0-9]*") if path.name.isdecimal()]


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples are lists."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def _check_config(
    path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    known = {name: default for name, default in defaults.items() if name in config}
    said = "what says of which run the checkpoints beside it are: bring it back, or use another folder"
    try:
        before = {**known, **in_new_words(read_json(path, said, RunError))}
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; expected {said}") from error
    changed = [
        f"{key} was {before.get(key)!r} and is {config.get(key)!r}"
        for key in sorted(before.keys() | config.keys())
        if key not in may_differ and before.get(key) != config.get(key)
    ]
    if changed:
        raise OptionError(f"{path} is of a run with another configuration: {'; '.join(changed)}")
