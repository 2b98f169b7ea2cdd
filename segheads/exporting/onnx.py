"""ONNX: one file for onnxruntime and what else reads it."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from segheads.errors import ExportError
from segheads.exporting.deployed import INPUT
from segheads.exporting.program import export_program
from segheads.exporting.registry import Format, Job, Precision, Runner

LARGEST_FILE = 2**31 - 2**20  # bytes of a single ONNX file
AXES = {0: "batch", 2: "height", 3: "width"}  # of the images


class Onnx(Format):
    """`torch.onnx.export` of the program; int8 by onnxruntime's static quantisation."""

    suffix = ".onnx"
    packages = ("onnx", "onnxruntime", "onnxscript")
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "fp16", "int8")

    def write(self, job: Job, path: Path) -> None:
        """Write a graph of all outputs."""
        model = onnx_model(job)
        if job.precision == "int8":
            from segheads.exporting.quantise import quantised

            model = quantised(model, job.calibration, path.parent)
        save(model, path, job.metadata or {})

    def load(self, path: Path) -> Runner:
        """A session of onnxruntime on the CPU."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(x) for x in session.run(None, {INPUT: images.numpy()})]

        return run

    def narrow(self, job: Job, path: Path) -> None:
        """Take outputs away, and the nodes that only they need."""
        import onnx

        model: Any = onnx.load(str(path))
        kept = [x for name in job.deployed.outputs for x in model.graph.output if x.name == name]
        del model.graph.output[:]
        model.graph.output.extend(kept)
        remove_unused(model.graph)
        save(model, path, job.metadata or {})


def onnx_model(job: Job) -> Any:
    """The graph as an `onnx.ModelProto`, without metadata.

    Args:
        job: What to write.

    Raises:
        ExportError: If it does not fit into one file.
    """
    weights = sum(x.nbytes for x in job.deployed.state_dict().values())
    if weights > LARGEST_FILE:
        raise ExportError(f"the weights take {weights / 2**30:.1f} GiB, and an ONNX file holds 2; take precision fp16")
    program = export_program(job.deployed, job.size, job.batch_size)
    with warnings.catch_warnings():  # of what torch and onnxscript do inside
        warnings.simplefilter("ignore")
        found: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(job.deployed.outputs),
            opset_version=job.opset,
            verbose=False,
            optimize=True,
        )
    model = found.model_proto  # made anew each time it is asked for
    _name_axes(model.graph)
    return model


def _name_axes(graph: Any) -> None:
    """Give free axes words, in which torch numbers them: s34 is the height."""
    (images,) = (x for x in graph.input if x.name == INPUT)
    dims = images.type.tensor_type.shape.dim
    words = {dims[i].dim_param: AXES[i] for i in AXES if dims[i].dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: words.get(found[0], found[0]), dim.dim_param)


def save(model: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a model with metadata.

    Args:
        model: An `onnx.ModelProto`.
        path: The file.
        metadata: Names and values.
    """
    import onnx

    for node in model.graph.node:  # traces of the Python code, with the paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name = "segheads"
    path.write_bytes(model.SerializeToString())


def remove_unused(graph: Any) -> None:
    """Remove the nodes and the weights that no output needs.

    Args:
        graph: An `onnx.GraphProto`.
    """
    needed = {x.name for x in graph.output}
    kept = []
    for node in reversed(graph.node):  # sorted: what a node needs stands before it
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [x for x in graph.initializer if x.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    infos = [x for x in graph.value_info if x.name in needed]
    del graph.value_info[:]
    graph.value_info.extend(infos)
