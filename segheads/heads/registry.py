"""Heads by name. The table itself is in `segheads/heads/__init__.py`, which imports every head."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from segheads.heads.base import Head

HEADS: dict[str, type[Head]] = {}
"""The heads by the names that `create_model` and `--head` take; a name of your own may be added."""


@dataclass(frozen=True)
class DecoderEntry:
    """A decoder of segmentation-models-pytorch as `find_head` gives it: called and asked as a head's class is.

    Args:
        head: The head's class, which takes `decoder`.
        decoder: Name of the decoder.
        max_levels: How many of the backbone's levels it uses.
        num_blocks: How many blocks of a plain ViT it takes as maps of one stride; None for a pyramid.
        strides_option: The option by which it is told the strides of maps that halve; None if it needs no telling.
    """

    head: type[Head]
    decoder: str
    max_levels: int
    num_blocks: int | None = None
    strides_option: str | None = None
    multi_level: ClassVar[bool] = True
    preferred_pyramid: ClassVar[None] = None

    def options_for(self, strides: Sequence[float]) -> dict[str, Any]:
        """What tells it the strides of its maps, in powers of 2, where they halve and it needs telling.

        Args:
            strides: Of the maps, fine to coarse.
        """
        if self.strides_option is None or len(set(strides)) == 1:
            return {}
        return {self.strides_option: [2 ** round(math.log2(stride)) for stride in strides]}

    def __call__(self, in_channels: Any, num_classes: int, **options: Any) -> Head:
        """Build the head, as its class does."""
        build: Any = self.head
        return build(in_channels, num_classes, decoder=self.decoder, **options)


DECODERS: dict[str, DecoderEntry] = {}
"""The decoders of segmentation-models-pytorch, `smp:unet` and so on."""


def list_heads() -> list[str]:
    """Names that `create_model` and the recipes' `--head` accept.

    Those that start with `smp:` are the decoders of segmentation-models-pytorch.

    Examples:
        >>> list_heads()[:3], list_heads()[-1]
        (['linear', 'mask_transformer', 'mean_shift'], 'smp:dpt')
    """
    return [*HEADS, *DECODERS]


def find_head(name: str) -> Any:
    """What builds a head: `find_head(name)(in_channels, num_classes, **options)`.

    Returns:
        The registered class, or a `DecoderEntry`; either has the class attributes of `Head`, such as `multi_level`.

    Raises:
        ValueError: If no head has that name; the message lists the known ones.
    """
    entries: Mapping[str, Any] = {**HEADS, **DECODERS}
    if name not in entries:
        close = difflib.get_close_matches(name, list_heads(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no head is called {name!r}; known: {', '.join(list_heads())}{hint}")
    return entries[name]
