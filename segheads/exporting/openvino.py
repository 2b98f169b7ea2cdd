"""OpenVINO: an .xml and a .bin of the same name."""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from segheads.exporting.onnx import onnx_model, save
from segheads.exporting.registry import Format, Job, Runner


class OpenVino(Format):
    """What OpenVINO makes of the ONNX graph; weights stay in their precision."""

    suffix = ".xml"
    beside: ClassVar[tuple[str, ...]] = (".bin",)
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"

    def write(self, job: Job, path: Path) -> None:
        """Write a graph of all outputs."""
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "model.onnx"
            save(onnx_model(job), graph, {})
            model: Any = openvino.convert_model(str(graph))
            for name, value in (job.metadata or {}).items():
                model.set_rt_info(value, ["segheads", name])
            openvino.save_model(model, str(path), compress_to_fp16=False)

    def narrow(self, job: Job, path: Path) -> None:
        """Take outputs away."""
        import openvino

        model: Any = openvino.Core().read_model(str(path))
        for result in list(model.get_results()):
            if not set(job.deployed.outputs) & result.input_value(0).get_names():
                model.remove_result(result)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # what is read stays mapped into memory
            fewer = Path(folder) / path.name
            openvino.save_model(model, str(fewer), compress_to_fp16=False)
            for suffix in (self.suffix, *self.beside):
                os.replace(fewer.with_suffix(suffix), path.with_suffix(suffix))

    def load(self, path: Path) -> Runner:
        """The model on the CPU, in the precision in which it is written."""
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16, where the processor has it
        model: Any = openvino.Core().compile_model(openvino.Core().read_model(str(path)), "CPU", options)

        def run(images: Tensor) -> list[Tensor]:
            found = model([images.numpy()])
            return [torch.from_numpy(found[port].copy()) for port in model.outputs]

        return run
