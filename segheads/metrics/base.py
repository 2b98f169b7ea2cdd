"""The abstract metric."""

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

from torchmetrics import Metric

from segheads.classes import check_ignore_index


class SegmentationMetric(Metric, ABC):
    """What one metric counts over a data set, and what its numbers are called.

    Names and titles of the numbers belong to the class, so that tables and files of results need no list of them: a
    metric in `METRICS` is measured by name and has its columns everywhere. An empty title keeps a number out of the
    Markdown tables; results.json has it all the same. The order of the tables is that of `METRICS`.

    A subclass adds its states, integers that are summed, so that neither batches nor processes change the result, and
    has two methods:

    - `update(preds, labels)`, and where `needs_confidence` also `confidence`, counts a batch. `evaluate` passes all by
      name.
    - `compute()` gives a dict of tensors on the CPU, with every key of `scores` and of `class_scores`.

    Args:
        num_classes: K; labels are 0..K-1.
        ignore_index: The label of pixels that do not count.
        **kwargs: torchmetrics' own options; it refuses unknown ones.

    Attributes:
        scores: Key of each 0-d number, a fraction, to its title.
        class_scores: Key of each `(K,)` number, floating-point fractions or integer counts, to its title.
        needs_confidence: Whether `update` also takes the probability of each predicted label.
        waits: Whether `update` makes the host wait for a GPU. There `evaluate` shows it many images at once, to the
            right and below filled up with ignored pixels.

    Shape:
        `preds` and `labels`: integer maps `(B, H, W)` or `(H, W)`; `confidence`: floating-point, of the same shape.

    Raises:
        ValueError: If `num_classes` is below 1, or `ignore_index` is a class.

    Examples:
        See "Write your own parts".
    """

    scores: ClassVar[Mapping[str, str]] = {}
    class_scores: ClassVar[Mapping[str, str]] = {}
    needs_confidence: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    full_state_update = False
    is_differentiable = False

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}; give the number of classes")
        check_ignore_index(ignore_index, num_classes)
        self.num_classes, self.ignore_index = num_classes, ignore_index

    @property
    def update_called(self) -> bool:
        """Always true: empty, merged or loaded counts are a state like any other, not worth torchmetrics' warning."""
        return True
