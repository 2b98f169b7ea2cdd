"""Weights of classes that are rarer than others, counted in a scan or read from a file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from segheads.data.scan import SplitScan
from segheads.errors import DataError, OptionError

BETA = 0.9999  # of the largest data sets in the paper
RULES = ("balanced", "effective")


def class_weights(rule: str, scan: SplitScan) -> tuple[float, ...]:
    """One weight per class for a loss, from what a split holds.

    - `"balanced"`: the reciprocal of the class' share of all pixels, so that all classes weigh the same in sum; a pixel
      weighs 1 on average.
    - `"effective"`: the reciprocal of the effective number of samples, `(1 - b^n) / (1 - b)` with b = 0.9999, of
      [Cui et al., CVPR 2019](https://arxiv.org/abs/1901.05555); the weights are 1 on average, as there. The paper
      counts images. So n is the number of images that show the class: neighbouring pixels are no samples of their own,
      and of millions of them the effective number would be the same for all classes.

    A class that never occurs has weight 1: nothing can be counted of it, and a loss with weight 0 would leave it out of
    trainings on other data, too.

    Args:
        rule: `"balanced"`, `"effective"`, or the path of a JSON file: a list of numbers, or an object of a number for
            each class name.
        scan: Of the training split.

    Raises:
        OptionError: There is no such rule and no such file.
        DataError: The file does not hold one number for each class.

    Examples:
        >>> found = SplitScan(class_names=("a", "b", "c"), samples=4, pixels=(300, 100, 0), images=(4, 1, 0))
        >>> class_weights("balanced", found)
        (0.6667, 2.0, 1.0)
        >>> class_weights("effective", found)
        (0.4, 1.6, 1.0)
    """
    if rule not in RULES:
        return _read(Path(rule), scan.class_names)
    if rule == "balanced":
        there, total = sum(count > 0 for count in scan.pixels), sum(scan.pixels)
        weights = [total / (there * count) if count else None for count in scan.pixels]
    else:
        raw = [(1 - BETA) / (1 - BETA**count) if count else None for count in scan.images]
        known = [weight for weight in raw if weight is not None]
        weights = [None if weight is None else weight * len(known) / sum(known) for weight in raw]
    return tuple(1.0 if weight is None else float(f"{weight:.4g}") for weight in weights)


def _read(path: Path, names: Sequence[str]) -> tuple[float, ...]:
    if not path.is_file():
        raise OptionError(
            f"class_weights must be {', '.join(RULES)} or the path of a JSON file; got {str(path)!r}, and there is no "
            "such file"
        )
    expected = f"it should hold a list of {len(names)} numbers of 0 or more, or an object of one for each class name"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}; {expected}") from error
    if isinstance(found, dict):
        if found.keys() != set(names):
            missing = [name for name in names if name not in found]
            others = [name for name in found if name not in names]
            raise DataError(f"{path} lacks {missing} and has {others}; {expected}")
        found = [found[name] for name in names]
    if not isinstance(found, list) or len(found) != len(names):
        raise DataError(f"{path} holds {_what(found)}; {expected}")
    if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in found) or not any(found):
        raise DataError(f"{path} holds {found}; {expected}")
    return tuple(float(x) for x in found)


def _what(found: object) -> str:
    return f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
