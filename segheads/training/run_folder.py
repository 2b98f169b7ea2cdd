"""The folder of a run: configuration, log, and checkpoints that are whole or not there."""

import json
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from segheads.data.config import in_new_words
from segheads.errors import OptionError, RunError, RunExistsError
from segheads.files import INCOMPLETE, read_json, read_lines, write_json, write_text

CONFIG, LOG, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"


class RunFolder:
    """Keeps what a training run must not lose, so that a run killed at any moment can go on.

    `config.json` holds the configuration, `metrics.jsonl` one record a line, and `checkpoints/` the last few states
    of Accelerate (weights, optimizer, random states), each written under another name and then renamed.

    Args:
        path: The folder; made if need be.
        config: The run's configuration, of JSON values.
        resume: Go on with the run that the folder holds; with none there, a new one starts.
        may_differ: Names in `config` that a resumed run may change.
        defaults: What a name stands for that the config.json of an older version lacks; None where it says nothing.
        keep: How many checkpoints to keep.

    Raises:
        RunExistsError: If the folder holds a run and `resume` is False.
        OptionError: If a resumed run was started with another configuration; the message shows both values.

    Examples:
        >>> import tempfile
        >>> run = RunFolder(Path(tempfile.mkdtemp()) / "run", {"seed": 0})
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
        self.path = Path(path)
        self.keep = keep
        if (self.path / CONFIG).is_file():
            if not resume:
                raise RunExistsError(f"{self.path} holds a run (iteration {self.latest()}); resume it, or use another")
            _check_config(self.path / CONFIG, _as_read(config), _as_read(defaults or {}), may_differ)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / CHECKPOINTS

    def start(self, config: Mapping[str, Any]) -> int:
        """Write the configuration and forget records after the last checkpoint; to be called by one process.

        Returns:
            The iteration to go on from.
        """
        iteration = self.latest()
        write_json(self.path / CONFIG, config)
        kept = [record for record in self.records() if record["iteration"] <= iteration]
        write_text(self.path / LOG, "".join(json.dumps(record) + "\n" for record in kept))
        return iteration

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl`; NaN, which JSON lacks, becomes null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off by a kill is left out."""
        path = self.path / LOG
        return read_lines(path, "the records of a run", RunError) if path.is_file() else []

    def latest(self) -> int:
        """The iteration of the last whole checkpoint, or 0."""
        return max(self._iterations(), default=0)

    def save(self, accelerator: Accelerator, iteration: int) -> None:
        """Write a checkpoint; to be called by every process."""
        folder = self.checkpoints
        incomplete = folder / f"{INCOMPLETE}{iteration:08d}"
        if accelerator.is_main_process:
            for leftover in folder.glob(f"{INCOMPLETE}*"):
                shutil.rmtree(leftover)
            incomplete.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(incomplete))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            incomplete.rename(folder / f"{iteration:08d}")
            for old in sorted(self._iterations())[: -self.keep]:
                shutil.rmtree(folder / f"{old:08d}")
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator, iteration: int) -> None:
        """Restore a checkpoint; to be called by every process.

        Raises:
            RunError: If the checkpoint does not fit what was prepared.
        """
        folder = self.checkpoints / f"{iteration:08d}"
        try:
            accelerator.load_state(str(folder))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"checkpoint {folder} does not fit this model and optimizer: {reason}") from error

    def _iterations(self) -> list[int]:
        return [int(path.name) for path in (self.checkpoints).glob("[0-9]*")]


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples are lists."""
    read: dict[str, Any] = json.loads(json.dumps(values))
    return read


def _check_config(
    path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    known = {name: default for name, default in defaults.items() if name in config}
    before = {**known, **in_new_words(read_json(path, "the configuration of a run", RunError))}
    changed = [
        f"{key} was {before.get(key)!r} and is {config.get(key)!r}"
        for key in sorted(before.keys() | config.keys())
        if key not in may_differ and before.get(key) != config.get(key)
    ]
    if changed:
        raise OptionError(f"{path} is of a run with another configuration: {'; '.join(changed)}")
