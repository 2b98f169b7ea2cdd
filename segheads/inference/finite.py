"""Scores must be finite: of NaN no class is the best, though a comparison would name one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from segheads.errors import ScoresError

NOT_FINITE = (
    "the model's scores are NaN or infinite, so they name no class; its weights are damaged, or numbers overflow in "
    "this precision (fp16: take bf16 or no mixed precision)"
)

_KEPT: ContextVar[list[Tensor] | None] = ContextVar("kept", default=None)


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
    """Refuse scores of which not all are finite; waits for the device once, or not at all within `checks_later`.

    Infinite ones are refused, too: where they are blended with their neighbours, or a softmax is taken, they become
    NaN.

    Args:
        flags: What `all_finite` gave, of each part of one image's scores.

    Raises:
        ScoresError: If one is False.
    """
    flag, kept = torch.stack(tuple(flags)).all(), _KEPT.get()
    if kept is not None:
        kept.append(flag)
    elif not flag:
        raise ScoresError(NOT_FINITE)


@contextmanager
def checks_later() -> Iterator[list[Tensor]]:
    """Keep what `check_finite` would look at, one 0-d bool a call, for the caller to look at: nothing waits."""
    kept: list[Tensor] = []
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)
