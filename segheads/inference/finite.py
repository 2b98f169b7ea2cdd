"""Scores must be finite: of NaN no class is the best, though a comparison would name one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segheads.errors import ScoresError

NOT_FINITE = (
    "the model's scores are NaN or infinite, so they name no class; its weights are damaged, or numbers overflow in "
    "this precision (fp16: take bf16 or no mixed precision)"
)


def all_finite(scores: Tensor) -> Tensor:
    """Whether all scores are finite: a 0-d bool on their device, for which nothing waits.

    Args:
        scores: Of any shape.

    Examples:
        >>> all_finite(torch.tensor([1.0, torch.nan]))
        tensor(False)
    """
    lowest, highest = scores.detach().aminmax()  # NaN reaches both; one pass, and no mask as large as the scores
    return lowest.isfinite() & highest.isfinite()


def check_finite(flags: Sequence[Tensor]) -> None:
    """Refuse scores of which not all are finite; waits for the device once.

    Infinite ones are refused, too: where they are blended with their neighbours, or a softmax is taken, they become
    NaN.

    Args:
        flags: What `all_finite` gave, of each part of one image's scores.

    Raises:
        ScoresError: If one is False.
    """
    if not torch.stack(tuple(flags)).all():
        raise ScoresError(NOT_FINITE)
