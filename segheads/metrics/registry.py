"""Metrics by name. The table itself is in `segheads/metrics/__init__.py`, which imports every metric."""

import difflib

from segheads.metrics.base import SegmentationMetric

METRICS: dict[str, type[SegmentationMetric]] = {}
"""The metrics by the names that `evaluate` and `--metrics` take, in the order of tables; add one of your own."""


def find_metric(name: str) -> type[SegmentationMetric]:
    """The class of a metric: `find_metric(name)(num_classes, ignore_index=255)`.

    Args:
        name: A key of `METRICS`.

    Raises:
        ValueError: If no metric has that name; the message lists the known ones.

    Examples:
        >>> list(find_metric("iou").scores)
        ['aAcc', 'mAcc', 'mIoU']
    """
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no metric is called {name!r}; known: {', '.join(METRICS)}{hint}")
    return METRICS[name]
