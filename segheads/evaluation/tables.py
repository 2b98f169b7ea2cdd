"""Tables and numbers as Markdown shows them."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

DASH = "–"
SHOWN = 5  # names in a line of a log


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    r"""A Markdown table.

    Args:
        head: What stands above the columns.
        rows: The cells of each row; a vertical bar in one is escaped and, where it is no code, `<` and `$`.
        left: How many columns, from the first on, are set left; the others, of numbers, are set right.

    Examples:
        >>> print(markdown_table(["class", "IoU"], [["a|b", "50.00"]]))
        | class | IoU |
        |---|--:|
        | a\|b | 50.00 |
    """
    line = "|" + "---|" * left + "--:|" * (len(head) - left)
    return "\n".join([_line(head), line, *(_line(row) for row in rows)])


def percent(fraction: float) -> str:
    """Two digits after the point, or a dash for NaN."""
    return DASH if fraction != fraction else f"{100 * fraction:.2f}"  # only NaN differs from itself


def words(value: Any) -> str:
    """A value of an option as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(x) for x in value) if isinstance(value, (list, tuple)) else str(value)


def named(names: Sequence[str], shown: int | None = None) -> str:
    """Names in a row, the first so many and the number of the others; None shows all."""
    more = "" if shown is None or len(names) <= shown else f" and {len(names) - shown} more"
    return ", ".join(names[:shown]) + more


def listed(values: Tensor) -> list[Any]:
    """The numbers of one column, None for NaN, which JSON lacks."""
    numbers = values.reshape(-1).tolist()  # torchmetrics squeezes (1,) to ()
    return [None if x != x else x for x in numbers]


def _line(cells: Sequence[str]) -> str:
    escaped = [" ".join(cell.split("\n")).replace("|", "\\|") for cell in cells]
    escaped = [cell if "`" in cell else re.sub(r"[<$]", r"\\\g<0>", cell) for cell in escaped]
    return f"| {' | '.join(escaped).lstrip()} |"
