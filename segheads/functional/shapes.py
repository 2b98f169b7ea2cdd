"""Padding and cropping in whole-number arithmetic, which torch.export follows for sizes that it does not know.

What is here does in eager mode what a slice or a pad does. In a graph for any size it takes another way, which no
branch on a size binds to the size of the example.
"""

import torch
from torch import Tensor


def whole(n: int, multiple: int, least: int = 1) -> int:
    """The smallest multiple that is n, and `least`, or more; without fractions, about which no compiler can reason.

    Args:
        n: Pixels or cells.
        multiple: Of what the result is a multiple.
        least: What it has to be at least; 1 or below asks for nothing.

    Examples:
        >>> whole(33, 16), whole(32, 16), whole(5, 16, 40)
        (48, 32, 48)
    """
    n = n if least <= 1 else max(n, least)
    return (n + multiple - 1) // multiple * multiple


def is_dynamic(*sizes: int) -> bool:
    """Whether a graph is being exported for any size, so that no branch may depend on one.

    Args:
        *sizes: Of a tensor's axes.
    """
    return torch.compiler.is_exporting() and not all(isinstance(size, int) for size in sizes)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns, `(..., height, width)`.

    A slice is the whole tensor for some sizes, and whether it is becomes part of an exported graph; an index does not.

    Args:
        x: `(..., H, W)`.
        height: At most H.
        width: At most W.
    """
    if not is_dynamic(height, width):
        return x[..., :height, :width]
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    return x.index_select(-2, rows).index_select(-1, columns)


def extend(x: Tensor, height: int, width: int) -> Tensor:
    """Padded at the bottom and the right by the last row and column, to `(..., height, width)`, while exporting.

    Args:
        x: `(..., H, W)`.
        height: At least H.
        width: At least W.
    """
    rows, columns = (
        torch.arange(n, device=x.device).clamp(max=size - 1)
        for n, size in zip((height, width), x.shape[-2:], strict=True)
    )
    return x.index_select(-2, rows).index_select(-1, columns)
