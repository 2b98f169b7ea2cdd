"""What an exported file says of itself: text by name."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from torch import nn

from segheads.classes import Classes
from segheads.exporting.deployed import Deployed
from segheads.exporting.program import smallest_side
from segheads.version import VERSION


def describe(
    deployed: Deployed,
    outputs: Sequence[str],
    *,
    size: tuple[int, int] | None,
    reason: str | None,
    precision: str,
    format: str,
) -> dict[str, str]:
    """The metadata of a file; every value is text, and JSON where it is no word.

    Args:
        deployed: What is exported.
        outputs: What the file gives.
        size: Height and width of the images; None means any.
        reason: Why the size is fixed.
        precision: Of the network.
        format: Name of the format.
    """
    model = deployed.model
    classes = model.classes or Classes.numbered(model.num_classes)
    form = model.image_form
    values = {
        "segheads": VERSION,
        "format": format,
        "task": "semantic-segmentation",
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        "num_classes": model.num_classes,
        "protocol": model.protocol.as_json(),
        "model": None if model.plan is None else dataclasses.asdict(model.plan),
        "channels": form.channels,
        "bit_depth": form.bit_depth or 8,
        "input": str(deployed.input_dtype).removeprefix("torch."),
        "outputs": list(outputs),
        "size": None if size is None else list(size),
        "size_is_fixed_because": reason,
        "smallest_side": smallest_side(deployed) if size is None else None,
        "precision": precision,
        "weights_sha256": hash_of(model),
        "licence_of_backbone": model.backbone.licence,
    }
    return {name: x if isinstance(x, str) else json.dumps(x) for name, x in values.items() if x is not None}


def hash_of(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers: of names, shapes and bytes, in the order of the names.

    Args:
        model: Any module, whose weights are on the CPU.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
