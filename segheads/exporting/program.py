"""`torch.export` of a model, for images of any size or of one: what every format is made from."""

import math
from typing import Any

import torch
from torch import Tensor

from segheads.exporting.deployed import Deployed
from segheads.exporting.exchange import exchanged

LARGEST = 8192  # pixels along a side of a graph for any size
MOST = 1024  # images of a batch


def coarsest_cell(deployed: Deployed) -> int:
    """Pixels along a side of a cell of the coarsest map.

    Args:
        deployed: What is exported.
    """
    model = deployed.model
    strides = [float(stride) for stride in model.backbone.strides]
    if model.pyramid is not None:
        strides += model.pyramid.output_strides(strides)
    return max(math.ceil(max(strides)), model.backbone.smallest)


def smallest_side(deployed: Deployed) -> int:
    """The least height and width for a graph of any size: more than a cell of the coarsest map, to which it would bind.

    Args:
        deployed: What is exported.
    """
    return coarsest_cell(deployed) + 1


def example_images(deployed: Deployed, size: tuple[int, int] | None, batch_size: int | None) -> Tensor:
    """What a graph is traced with; where any size is taken, of several windows of any block.

    Args:
        deployed: What is exported.
        size: Height and width; None means any.
        batch_size: How many images; None means any number.
    """
    cell = coarsest_cell(deployed)
    height, width = size or (9 * cell + 3, 10 * cell + 5)
    shape = (2 if batch_size is None else batch_size, deployed.model.backbone.in_chans, height, width)
    return torch.zeros(shape, dtype=deployed.input_dtype)


def export_program(
    deployed: Deployed, size: tuple[int, int] | None = None, batch_size: int | None = None
) -> torch.export.ExportedProgram:
    """The graph.

    Args:
        deployed: What is exported.
        size: Height and width of the images; None means any.
        batch_size: How many images at a time; None means any number.
    """
    backbone, least = deployed.model.backbone, smallest_side(deployed)
    dims: dict[int, Any] = {}
    if batch_size is None:
        dims[0] = torch.export.Dim("batch", min=1, max=MOST)
    if size is None:
        dims[2], dims[3] = (torch.export.Dim(name, min=least, max=LARGEST) for name in ("height", "width"))
    backbone.is_exact = backbone.gives_exact_grids()
    try:
        with torch.no_grad(), exchanged(deployed.model):
            program = torch.export.export(
                deployed,
                (example_images(deployed, size, batch_size),),
                dynamic_shapes=(dims or None,),
                prefer_deferred_runtime_asserts_over_guards=True,  # true of every size; torch cannot prove it
            )
    finally:
        backbone.is_exact = False
    _drop_assertions(program.graph)
    program.graph_module.recompile()
    return program


def _drop_assertions(graph: torch.fx.Graph) -> None:
    """Drop what would refuse sizes at run time.

    The example has several images, cells and windows, and torch asserts that there is not one of each, though a graph
    of functions of tensors gives the same for one. Whether it does is looked at after writing.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
