"""The losses by name. The table itself is in `segheads/losses/__init__.py`, which imports every loss."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from segheads.losses.base import PixelLoss

LOSSES: dict[str, Callable[..., PixelLoss]] = {}
"""The losses by the names that `create_model` and `--loss` take; a name of your own may be added."""


def find_loss(name: str) -> Callable[..., PixelLoss]:
    """What builds a registered loss.

    Args:
        name: A name in `LOSSES`.

    Raises:
        ValueError: If no loss has that name; the message lists the known ones.
    """
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no loss is called {name!r}; known: {', '.join(LOSSES)}{hint}")
    return LOSSES[name]


def build_loss(
    loss: str | Callable[..., PixelLoss], num_classes: int, common: dict[str, Any], options: dict[str, Any]
) -> PixelLoss:
    """Build one loss.

    Args:
        loss: A name in `LOSSES`, or what builds one.
        num_classes: Number of classes K.
        common: `ignore_index` and `reduction`.
        options: The loss's own.

    Raises:
        ValueError: As `create_loss` does.
    """
    build = find_loss(loss) if isinstance(loss, str) else loss
    own = own_options(build)
    wrong = [] if own is None else [name for name in options if name not in own]
    if wrong:
        raise ValueError(
            f"loss {_name(loss)} takes no {', '.join(wrong)}; its options: {', '.join(own or []) or 'none'}"
        )
    return build(num_classes, **common, **options)


def own_options(build: Callable[..., PixelLoss]) -> list[str] | None:
    """The names of a loss's own options; None if it takes any."""
    known = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return None
    return [name for name in known if name not in ("num_classes", "ignore_index", "reduction")]


def _name(loss: str | Callable[..., PixelLoss]) -> str:
    return repr(loss) if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
