"""Ranges of options, beside the fields that they are of: `workers: Annotated[int, Range(0)] = 4`."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from typing_extensions import is_typeddict

from segheads.errors import OptionError

SEED_LIMIT = 2**32 - 1  # what NumPy's global generator takes


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have, each of them where it has several; None is not looked at.

    Args:
        low: The lowest.
        high: The highest.
        above: `low` itself is too low.
        below: `high` itself is too high.
        infinite: Infinity is a number here.

    Examples:
        >>> Range(0, 1, below=True)
        0 or more and below 1
        >>> Range(0, 1, below=True).holds(1)
        False
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range; NaN is in none.

        Args:
            value: The number.
        """
        if not math.isfinite(value) and not (self.infinite and value > self.low):
            return False
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_high_enough and (value < self.high if self.below else value <= self.high)

    def __repr__(self) -> str:
        low = None if self.low == -math.inf else f"above {self.low:g}" if self.above else f"{_plain(self.low)} or more"
        high = None if self.high == math.inf else f"{'below' if self.below else 'at most'} {_plain(self.high)}"
        if low and high and not (self.above or self.below):
            return f"{_plain(self.low)} to {_plain(self.high)}"
        return " and ".join(words for words in (low, high) if words) or "a finite number"


def find_ranges(config: type) -> dict[str, Range | None]:
    """The range of each numeric field of a dataclass or `TypedDict`, the fields of its parts apart; None: it has none.

    A subclass that gives a field another default keeps its range.

    Args:
        config: The class.
    """
    hints, own = get_type_hints(config, include_extras=True), get_type_hints(config)
    numeric = [name for name, hint in own.items() if _is_numeric(hint)]
    if is_typeddict(config):
        return {name: _range_in(hints[name]) for name in numeric}
    known: dict[str, Range | None] = dict.fromkeys(numeric)
    for kind in reversed(config.__mro__):
        for name, hint in inspect.get_annotations(kind, eval_str=True).items():
            if name in known and (found := _range_in(hint)) is not None:
                known[name] = found
    return known


def check_ranges(config: Any) -> None:
    """Refuse a configuration in which a number of a field, or of a field of a part, is out of its range.

    Args:
        config: A dataclass; fields that are dataclasses or of a `TypedDict` are its parts.

    Raises:
        OptionError: Names the field, what it must be and what it is.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif value and is_typeddict(hints[field.name]):
            for name, known in find_ranges(hints[field.name]).items():
                _check(name, known, value.get(name))
    for name, known in find_ranges(type(config)).items():
        _check(name, known, getattr(config, name))


def _check(name: str, known: Range | None, value: Any) -> None:
    if known is not None and not all(known.holds(number) for number in _numbers(value)):
        raise OptionError(f"{name} must be {known}; got {value}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a value; words and truth values are none."""
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _is_numeric(hint: Any) -> bool:
    return hint in (int, float) or any(_is_numeric(part) for part in get_args(hint))


def _range_in(hint: Any) -> Range | None:
    parts = (*getattr(hint, "__metadata__", ()), *get_args(hint))
    found = (part if isinstance(part, Range) else _range_in(part) for part in parts)
    return next((known for known in found if known is not None), None)


def _plain(number: float) -> str:
    return f"{number:.0f}" if number == int(number) else f"{number:g}"
