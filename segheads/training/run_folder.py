"""The folder of a run: configuration, log, and checkpoints that are whole or not there."""

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator

CONFIG, LOG, CHECKPOINTS, INCOMPLETE = "config.json", "metrics.jsonl", "checkpoints", ".incomplete-"


class RunFolder:
    """Keeps what a training run must not lose, so that a run killed at any moment can go on.

    `config.json` holds the configuration, `metrics.jsonl` one record a line, and `checkpoints/` the last few states
    of Accelerate (weights, optimizer, random states), each written under another name and then renamed.

    Args:
        path: The folder; made if need be.
        config: The run's configuration, of JSON values.
        resume: Go on with the run that the folder holds; with none there, a new one starts.
        may_differ: Names in `config` that a resumed run may change.
        defaults: What a name counts as that the folder's configuration, of an older version, lacks.
        keep: How many checkpoints to keep.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is False.
        ValueError: If a resumed run was started with another configuration; the message shows both values.

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
        defaults: Mapping[str, Any] = MappingProxyType({}),
        keep: int = 3,
    ) -> None:
        self.path = Path(path)
        self.keep = keep
        if (self.path / CONFIG).is_file():
            if not resume:
                raise FileExistsError(
                    f"{self.path} holds a run (iteration {self.latest()}); give --resume to go on with it, "
                    "or another --output"
                )
            _check_config(self.path / CONFIG, defaults, json.loads(json.dumps(config)), may_differ)

    def start(self, config: Mapping[str, Any]) -> int:
        """Write the configuration and forget records after the last checkpoint; to be called by one process.

        Returns:
            The iteration to go on from.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        iteration = self.latest()
        _write(self.path / CONFIG, json.dumps(config, indent=2) + "\n")
        kept = [record for record in self.records() if record["iteration"] <= iteration]
        _write(self.path / LOG, "".join(json.dumps(record) + "\n" for record in kept))
        return iteration

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl`; NaN, which JSON lacks, becomes null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(clean) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off by a kill is left out."""
        path = self.path / LOG
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def latest(self) -> int:
        """The iteration of the last whole checkpoint, or 0."""
        return max(self._iterations(), default=0)

    def save(self, accelerator: Accelerator, iteration: int) -> None:
        """Write a checkpoint; to be called by every process."""
        folder = self.path / CHECKPOINTS
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
            ValueError: If the checkpoint does not fit what was prepared.
        """
        folder = self.path / CHECKPOINTS / f"{iteration:08d}"
        try:
            accelerator.load_state(str(folder))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"checkpoint {folder} does not fit this model and optimizer: {reason}") from error

    def _iterations(self) -> list[int]:
        return [int(path.name) for path in (self.path / CHECKPOINTS).glob("[0-9]*")]


def check_finite(model: torch.nn.Module, iteration: int) -> None:
    """Refuse weights that no checkpoint should hold.

    Raises:
        FloatingPointError: If a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} is not finite after iteration {iteration}; no checkpoint was written")


def _check_config(
    path: Path, defaults: Mapping[str, Any], config: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    before = json.loads(json.dumps(dict(defaults))) | json.loads(path.read_text())
    changed = [
        f"{key} was {before.get(key)!r} and is {config.get(key)!r}"
        for key in sorted(before.keys() | config.keys())
        if key not in may_differ and before.get(key) != config.get(key)
    ]
    if changed:
        raise ValueError(f"{path} is of a run with another configuration: {'; '.join(changed)}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(text)
    os.replace(temporary, path)
