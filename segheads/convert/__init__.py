"""Checkpoints of the published implementations as heads and models of this library."""

from segheads.convert.checkpoint import convert_checkpoint
from segheads.convert.reference import from_reference

__all__ = ["convert_checkpoint", "from_reference"]
