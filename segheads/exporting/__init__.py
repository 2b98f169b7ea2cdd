"""Models as files for other runtimes: images as they are stored in, label maps out."""

from segheads.exporting.aoti import Aoti
from segheads.exporting.check import Agreement
from segheads.exporting.deployed import Deployed
from segheads.exporting.exported import Exported, export
from segheads.exporting.onnx import Onnx
from segheads.exporting.openvino import OpenVino
from segheads.exporting.registry import FORMATS, Format, Job, find_format
from segheads.exporting.torch_export import TorchExport
from segheads.exporting.torchscript import TorchScript

FORMATS |= {
    "onnx": Onnx(),
    "torch-export": TorchExport(),
    "aoti": Aoti(),
    "openvino": OpenVino(),
    "torchscript": TorchScript(),
}

__all__ = [
    "FORMATS",
    "Agreement",
    "Aoti",
    "Deployed",
    "Exported",
    "Format",
    "Job",
    "Onnx",
    "OpenVino",
    "TorchExport",
    "TorchScript",
    "export",
    "find_format",
]
