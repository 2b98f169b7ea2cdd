"""Heads: feature maps in, class logits out."""

import difflib

from segheads.heads.base import Head
from segheads.heads.linear import LinearHead
from segheads.heads.mask_transformer import MaskTransformerHead
from segheads.heads.mean_shift import MeanShift, MeanShiftHead

__all__ = [
    "HEADS",
    "Head",
    "LinearHead",
    "MaskTransformerHead",
    "MeanShift",
    "MeanShiftHead",
    "find_head",
    "list_heads",
]

HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "mask_transformer": MaskTransformerHead,
    "mean_shift": MeanShiftHead,
}


def list_heads() -> list[str]:
    """Names that `create_model` and the recipes' `--head` accept.

    Examples:
        >>> list_heads()
        ['linear', 'mask_transformer', 'mean_shift']
    """
    return list(HEADS)


def find_head(name: str) -> type[Head]:
    """The class of a registered head.

    Raises:
        ValueError: If no head has that name; the message lists the known ones.
    """
    if name not in HEADS:
        close = difflib.get_close_matches(name, HEADS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no head is called {name!r}; known: {', '.join(HEADS)}{hint}")
    return HEADS[name]
