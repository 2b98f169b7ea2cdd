"""Checkpoints of the published implementations as heads and models of this library."""

from segheads.convert.reference import from_reference

__all__ = ["from_reference"]
