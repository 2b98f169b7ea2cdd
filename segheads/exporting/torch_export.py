"""torch.export: a graph that PyTorch loads without the code of the model."""

from pathlib import Path

import torch
from torch import Tensor

from segheads.exporting.program import export_program
from segheads.exporting.registry import Format, Job, Runner


class TorchExport(Format):
    """`torch.export.save`; `torch.export.load(path, extra_files={"classes": ""})` reads it, and the metadata named."""

    suffix = ".pt2"

    def write(self, job: Job, path: Path) -> None:
        """Write a graph of all outputs."""
        program = export_program(job.deployed, job.size, job.batch_size)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files=dict(job.metadata or {}))

    def load(self, path: Path) -> Runner:
        """The graph as a module."""
        module = torch.export.load(str(path)).module()

        def run(images: Tensor) -> list[Tensor]:
            return list(module(images))

        return run
