"""Gradient checkpointing: activations inside a backbone's blocks are computed twice instead of kept."""

import math

import torch
from torch import Tensor, nn

from segheads.backbones import TimmBackbone
from segheads.modules import evaluating


def start_grad_checkpointing(backbone: TimmBackbone) -> None:
    """Turn timm's gradient checkpointing on, having looked whether it saves anything.

    Batch norms in blocks that are computed twice would also move their statistics twice; their momentum becomes what
    moves them as far as once.

    Args:
        backbone: On its device.

    Raises:
        ValueError: If the backbone is frozen and keeps nothing, or the architecture has no checkpointing.
    """
    kept, _ = _look(backbone)
    if not kept:
        raise ValueError(f"grad_checkpointing saves nothing where {backbone.name} is frozen; leave it out")
    try:
        backbone.model.set_grad_checkpointing(True)
        left, twice = _look(backbone)
    except (AssertionError, AttributeError, TypeError):
        left, twice = kept, []
    if left >= kept:
        raise ValueError(f"grad_checkpointing needs an architecture that has it; timm's {backbone.name} has none")
    for norm in twice:
        if norm.momentum is not None:
            norm.momentum = 1 - math.sqrt(1 - norm.momentum)


def _look(backbone: TimmBackbone) -> tuple[int, list[nn.modules.batchnorm._BatchNorm]]:
    """How many numbers one run keeps for its gradients, and the batch norms that run twice."""
    kept, calls = 0, dict.fromkeys((m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)), 0)

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    def count(norm: nn.Module, *_: object) -> None:
        calls[norm] += 1  # type: ignore[index]  # hooked on these alone

    handles = [norm.register_forward_hook(count) for norm in calls]
    learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    images = torch.zeros(1, backbone.in_chans, *backbone.small_size(), device=next(backbone.parameters()).device)
    try:
        with evaluating(backbone, grad=True), torch.random.fork_rng(devices=[]):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                total = sum(x.sum() for x in backbone(images))
            once = dict(calls)
            if isinstance(total, Tensor) and total.requires_grad:
                torch.autograd.grad(total, learning, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return kept, [norm for norm, number in calls.items() if number > once[norm]]
