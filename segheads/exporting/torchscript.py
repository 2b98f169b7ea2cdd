"""TorchScript: for programs that load nothing newer."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segheads.exporting.exchange import exchanged
from segheads.exporting.program import example_images
from segheads.exporting.registry import Format, Job, Runner


class TorchScript(Format):
    """`torch.jit.trace`; PyTorch no longer develops it, so take another format where there is a choice."""

    suffix = ".pt"
    why_fixed = "tracing to TorchScript keeps the size of its example"

    def write(self, job: Job, path: Path) -> None:
        """Trace all outputs."""
        images = example_images(job.deployed, job.size, job.batch_size)
        with warnings.catch_warnings(), torch.no_grad(), exchanged(job.deployed.model):
            warnings.simplefilter("ignore")  # each size that becomes a constant, and that TorchScript is deprecated
            traced: Any = torch.jit.trace(job.deployed, (images,), check_trace=False)
            torch.jit.save(traced, str(path), _extra_files=dict(job.metadata or {}))

    def load(self, path: Path) -> Runner:
        """The traced module."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: Any = torch.jit.load(str(path))

        def run(images: Tensor) -> list[Tensor]:
            return list(module(images))

        return run
