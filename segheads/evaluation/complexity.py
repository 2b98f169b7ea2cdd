"""What a model costs: parameters and multiply-adds."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segheads.model import SegmentationModel

aten = torch.ops.aten


def count_parameters(model: nn.Module) -> int:
    """Number of weights; shared ones count once, frozen ones too."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: SegmentationModel, size: tuple[int, int], *, layers_only: bool = False) -> int:
    """Multiply-adds of one image's logits, before the upsampling to the image's size.

    Counted by `torch.utils.flop_counter` on a copy without memory (the meta device), in evaluation mode: convolutions
    and matrix products, those inside attention included; norms, activations and resizing are not. Two floating-point
    operations make one multiply-add, which most papers call a FLOP.

    Args:
        model: Any model.
        size: Height and width of the image, pixels.
        layers_only: Leave out products of two activations, such as attention's, as the counter of mmcv does, from
            which the papers' numbers come.

    Examples:
        >>> from segheads import create_model
        >>> count_multiply_adds(create_model("test_vit", "linear", 5, pretrained=False), (160, 160))
        37603328
    """
    plan, model.plan = model.plan, None
    try:
        shadow = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    finally:
        model.plan = plan
    counter = FlopCounterMode(display=False)
    images = torch.zeros(1, model.backbone.in_chans, *size, device="meta")
    with counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels of the CPU are not counted
        shadow.logits(images)
    by_operator = counter.get_flop_counts()["Global"]
    activations = sum(n for operator, n in by_operator.items() if operator in (aten.bmm, aten.baddbmm))
    return (counter.get_total_flops() - (activations if layers_only else 0)) // 2
