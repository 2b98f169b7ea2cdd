"""int8 by onnxruntime's static quantisation: weights and activations, with ranges measured on given images."""

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from segheads.exporting.deployed import INPUT

LEAST_WEIGHTS = 512  # numbers of a layer: below, as in the upsampling's few, there is nothing to gain
LAYERS = ("Conv", "MatMul", "Gemm")


def quantised(model: Any, images: Sequence[Tensor], folder: Path) -> Any:
    """The graph with layers in int8: convolutions and products with weights; all else stays in fp32.

    Args:
        model: An `onnx.ModelProto`.
        images: Each `(B, C, H, W)`, such as the model will see.
        folder: Where there is room for two copies of the model for a while.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        """The images, one after the other."""

        def __init__(self) -> None:
            self.images: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            """The next image, or None at the end."""
            image = next(self.images, None)
            return None if image is None else {INPUT: image.numpy()}

    with tempfile.TemporaryDirectory(dir=folder) as place, warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        source, target = Path(place) / "fp32.onnx", Path(place) / "int8.onnx"
        source.write_bytes(model.SerializeToString())
        quantization.quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            nodes_to_quantize=layers_with_weights(model.graph),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load(str(target))


def layers_with_weights(graph: Any) -> list[str]:
    """Names of the nodes that multiply with a layer's weights, and not two activations with each other.

    Args:
        graph: An `onnx.GraphProto`.
    """
    sizes = {x.name: (len(x.dims), math.prod(x.dims)) for x in graph.initializer}
    found = []
    for node in graph.node:
        axes, count = sizes.get(node.input[1], (0, 0)) if node.op_type in LAYERS else (0, 0)
        if count >= LEAST_WEIGHTS and (node.op_type == "Conv" or axes == 2):
            found.append(node.name)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to optimise the graph before, which does not know sizes that are free."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
