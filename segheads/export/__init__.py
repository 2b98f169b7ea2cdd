"""Models as files for other runtimes: images as they are stored in, label maps out."""

from segheads.export.aoti import Aoti
from segheads.export.check import Agreement
from segheads.export.deployed import Deployed
from segheads.export.export import Exported, export
from segheads.export.onnx import Onnx
from segheads.export.openvino import OpenVino
from segheads.export.registry import FORMATS, Format, Job, find_format
from segheads.export.torch_export import TorchExport
from segheads.export.torchscript import TorchScript

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
