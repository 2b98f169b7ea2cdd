"""UPerNet and FCN of MMSegmentation, and transformers' UPerNet, which has the same modules under other names."""

import re
from typing import Any

from torch import Tensor

from segheads.build import create_model
from segheads.convert.backbones import Backbone, read_backbone
from segheads.convert.states import State, count, load_model, rename, without_prefix
from segheads.model import SegmentationModel

UPER = [
    (r"^psp_modules\.(\d)\.1\.", r"decoder.psp.blocks.\1.1."),
    (r"^bottleneck\.", "decoder.psp.out_conv."),
    (r"^fpn_bottleneck\.", "decoder.fusion_block."),
]
CLASSIFIER = [(r"^(?:conv_seg|classifier)\.", "classifier.")]
FCN = [(r"^convs\.(\d+)\.", r"layers.\1."), (r"^conv_cat\.", "concat.")]
SEQUENCE = [(r"\.conv\.", ".0."), (r"\.(?:bn|batch_norm)\.", ".1.")]  # a convolution and its norm
POOLS = 4  # sizes 1, 2, 3 and 6


def is_decoder(state: State) -> bool:
    """Whether a head's state is one that `from_mmseg` reads."""
    return any(key.startswith(("psp_modules.", "convs.")) for key in state)


def from_mmseg(state: State, source: str, output_stride: int | None = None) -> SegmentationModel:
    """A model with an `UPerHead` or an `FCNHead`; its auxiliary head is left out.

    Args:
        state: Names that begin with `backbone.` and `decode_head.`.
        source: For messages.
        output_stride: Of a ResNet, see `segheads.from_reference`.

    Raises:
        ValueError: If the head is another one, or the state does not fit.
    """
    head = without_prefix(state, "decode_head.")
    if any(key.startswith("lateral_convs.") for key in head):
        name, kwargs, found = _uper(head, source)
    elif any(key.startswith("convs.") for key in head) and not any(key.startswith("psp_modules.") for key in head):
        name, kwargs, found = _fcn(head)
    else:
        raise ValueError(
            f"a {source} head must be Segmenter's, UPerNet's or FCN's to be converted; got {sorted(head)[:4]}"
        )
    default = 8 if name == "fcn" else 32  # as MMSegmentation's configurations have them
    backbone = read_backbone(without_prefix(state, "backbone."), source, output_stride or default)
    if name == "fcn":
        backbone.kwargs["levels"] = 1
    model = build(backbone, name, found["classifier.weight"].shape[0], head_kwargs=kwargs)
    return load_model(model, backbone.state, found, source)


def build(backbone: Backbone, head: str, num_classes: int, **options: Any) -> SegmentationModel:
    """A model that resizes and loses as MMSegmentation's."""
    options = {"pyramid": None, "loss_reduction": "all", "stretch_logits": True} | options
    return create_model(backbone.name, head, num_classes, pretrained=False, backbone_kwargs=backbone.kwargs, **options)


def _uper(state: State, source: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if (pools := count(state, r"psp_modules\.(\d+)\.")) != POOLS:
        raise ValueError(f"a {source} UPerNet with {pools} pooled maps cannot be converted, only with the published 4")
    levels = count(state, r"lateral_convs\.(\d+)\.")
    found = {}
    for key, value in rename(state, [*UPER, *CLASSIFIER, *SEQUENCE]).items():
        if match := re.match(r"(lateral|fpn)_convs\.(\d+)\.(.*)", key):  # coarse to fine here, fine to coarse there
            block = levels - 1 - int(match[2])
            middle = f"lateral_blocks.{block}.conv_norm_relu" if match[1] == "lateral" else f"conv_blocks.{block}"
            found[f"decoder.fpn_{middle}.{match[3]}"] = value
        else:
            found[key] = value
    return "uper", {"channels": found["decoder.fusion_block.0.weight"].shape[0], "normalize": False}, found


def _fcn(state: State) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    found = rename(state, [*FCN, *CLASSIFIER, *SEQUENCE])
    first = found["layers.0.0.weight"]
    kwargs = {
        "channels": first.shape[0],
        "num_layers": count(found, r"layers\.(\d+)\."),
        "kernel_size": first.shape[-1],
        "concat_input": "concat.0.weight" in found,
    }
    return "fcn", kwargs, found
