"""AOTInductor: machine code for this kind of processor, which C++ and Python run without compiling."""

from pathlib import Path

import torch
from torch import Tensor

from segheads.exporting.program import export_program
from segheads.exporting.registry import Format, Job, Runner


class Aoti(Format):
    """`torch._inductor.aoti_compile_and_package`; it needs a C++ compiler, and `aoti_load_package` reads it."""

    suffix = ".pt2"

    def write(self, job: Job, path: Path) -> None:
        """Compile a graph of all outputs."""
        program = export_program(job.deployed, job.size, job.batch_size)
        about = {"aot_inductor.metadata": dict(job.metadata or {})}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=about)

    def load(self, path: Path) -> Runner:
        """The compiled graph."""
        module = torch._inductor.aoti_load_package(str(path))

        def run(images: Tensor) -> list[Tensor]:
            return list(module(images))

        return run
