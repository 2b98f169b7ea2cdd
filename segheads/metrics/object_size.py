"""mIoU of small, medium and large objects, where labels tell classes but no objects."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.maps import class_maps, count_classes

SIZES = ("small", "medium", "large")
SMALL_BELOW, LARGE_ABOVE = 32**2, 96**2  # pixels; COCO's


class ObjectSizeIoU(SegmentationMetric):
    """IoU and mIoU of small (below 32² pixels), medium, and large (above 96² pixels) segments, over a whole data set.

    A segment is a connected region of one class in the true label map: pixels that touch by a side or a corner. Its
    pixels are true or false negative pixels of its size. A false positive pixel has no segment, and is counted as COCO
    counts detections: it belongs to a connected region of the *predicted* map, which has the size of the true segment
    of its class that it covers most of (of two equal ones the first in reading order), and its own size where it covers
    none. So each pixel counts at one size, and the counts of the three sizes add up to those of `SegmentationMetrics`:

        IoU(class, size) = TP / (TP + FN + FP), each summed over all images before the division

    mIoU of a size is the mean over the classes that have a true segment of that size; as in COCO, where false positives
    alone are no entry. Segmenter (https://arxiv.org/abs/2105.05633, Table 4) reports such numbers, but its code cannot
    make them, so how it counts is not known. Other rules: Cityscapes' iIoU counts all false positives at every object;
    mIoU^K of Wang et al. 2023 (https://arxiv.org/abs/2310.19252) spreads those of an image over its segments by area,
    and drops them where the class has none. COCO counts an area of just 32² as small and as medium; here 32² and 96²
    are medium.

    Ignored pixels are dropped from both maps before regions are sought, so they separate them. Each image must reach
    one process only, as with `SegmentationMetrics`. `update` waits for the device some twenty times.

    Args:
        num_classes: K; labels are 0..K-1.
        ignore_index: the label of pixels that do not count.

    Shape:
        `update(preds, labels)`: integer maps of one shape, (B, H, W) or (H, W). `compute()`: a dict of tensors on the
        CPU, for each size: 0-d float64 `"mIoU_small"`, a fraction (NaN without such a segment); (K,) float64
        `"IoU_small"`, NaN where a class has no such segment; (K,) int64 `"segments_small"` and `"pixels_small"`, the
        number of true segments and of their pixels.

    Raises:
        ValueError: for a label that is neither a class nor `ignore_index`; `update` then counts nothing.

    Examples:
        >>> labels = torch.zeros(100, 200, dtype=torch.long)
        >>> labels[40:50, 40:50] = 1  # 100 pixels: small
        >>> metric = ObjectSizeIoU(num_classes=2)
        >>> metric.update(torch.zeros_like(labels), labels)
        >>> {name: round(float(value), 3) for name, value in metric.compute().items() if value.ndim == 0}
        {'mIoU_small': 0.0, 'mIoU_medium': nan, 'mIoU_large': 0.995}
    """

    scores: ClassVar[Mapping[str, str]] = {f"mIoU_{size}": "" for size in SIZES}  # the report has a table by size
    class_scores: ClassVar[Mapping[str, str]] = {f"{name}_{size}": "" for size in SIZES for name in ("IoU", "segments")}
    waits: ClassVar[bool] = True
    higher_is_better = True
    correct: Tensor
    false: Tensor
    pixels: Tensor
    segments: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(num_classes, ignore_index, **kwargs)
        for name in ("correct", "false", "pixels", "segments"):
            counts = torch.zeros(len(SIZES), num_classes, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum", persistent=True)

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Count one batch of predicted and true label maps."""
        preds, labels = class_maps(preds, labels, self.num_classes, self.ignore_index)
        if not labels.numel():
            return
        true, predicted = (_Regions(x, outside=self.num_classes) for x in (labels, preds))
        # From here on pieces of rows in which nothing changes, some thousands, and not pixels
        first = (true.starts | predicted.starts).nonzero()[:, 0]
        length = torch.diff(first, append=first.new_tensor([len(true.classes)]))
        label, region = true.classes[first].long(), true.at(first)
        pred, guess = predicted.classes[first].long(), predicted.at(first)
        true_area, predicted_area = (
            first.new_zeros(len(true.classes)).scatter_add_(0, which, length) for which in (region, guess)
        )
        right = label == pred
        counterpart = _covered_most(guess[right], region[right], length[right], len(true_area))[guess[~right]]
        area = torch.where(counterpart < 0, predicted_area[guess[~right]], true_area[counterpart])  # -1: not taken
        self.pixels = self.pixels + self._count(label, true_area[region], length)
        self.correct = self.correct + self._count(label[right], true_area[region[right]], length[right])
        self.false = self.false + self._count(pred[~right], area, length[~right])
        regions = true_area.nonzero()[:, 0]
        self.segments = self.segments + self._count(true.classes[regions].long(), true_area[regions])

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything counted so far, in all processes."""
        correct, false, pixels, segments = (x.cpu() for x in (self.correct, self.false, self.pixels, self.segments))
        iou = torch.where(segments > 0, correct.double() / (pixels + false), torch.nan)
        results: dict[str, Tensor] = {}
        for size, name in enumerate(SIZES):
            results |= {f"mIoU_{name}": iou[size].nanmean(), f"IoU_{name}": iou[size]}
            results |= {f"segments_{name}": segments[size], f"pixels_{name}": pixels[size]}
        return results

    def _count(self, classes: Tensor, area: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum of weights for each size and class `(3, K)`; class K is dropped."""
        sizes = (area >= SMALL_BELOW).long() + (area > LARGE_ABOVE).long()
        cells = torch.where(classes < self.num_classes, sizes * self.num_classes + classes, self.segments.numel())
        return count_classes(cells, self.segments.numel(), weights).view(len(SIZES), -1)


def connected_regions(classes: Tensor) -> Tensor:
    """Label the connected regions of equal values in a batch of maps; pixels touch by a side or a corner.

    Runs of equal pixels in a row are the nodes, and a forest of them is hooked and flattened until it stands still
    (Shiloach and Vishkin 1982): a handful of rounds of whole-tensor operations for all classes and images at once, on
    any device. It waits for the device.

    Args:
        classes: Integers from 0 on that fit into int16.

    Shape:
        (B, H, W) -> (B, H, W), int64: the regions are numbered from 0 on in reading order of their first pixels.

    Examples:
        >>> connected_regions(torch.tensor([[[7, 7, 0], [0, 0, 7], [7, 0, 0]]]))
        tensor([[[0, 0, 1],
                 [1, 1, 0],
                 [2, 1, 1]]])
    """
    B, H, W = classes.shape
    regions = _Regions(classes, outside=-1)
    padded = regions.at(torch.arange(len(regions.classes), device=classes.device)).view(B, H + 1, W + 1)
    return torch.unique(padded[:, :-1, :-1], return_inverse=True)[1]


class _Regions:
    """The connected regions of maps (B, H, W), laid out in one row with a pixel of `outside` around each.

    `at(pixels)` gives the region of each pixel, named by its first pixel.
    """

    def __init__(self, classes: Tensor, outside: int) -> None:
        # A column on the right and a row below keep rows and images apart, so that neighbours are fixed steps away
        self.classes = F.pad(classes.to(torch.int16), (0, 1, 0, 1), value=outside).flatten()
        self.starts = torch.ones_like(self.classes, dtype=torch.bool)  # of runs of equal pixels
        torch.ne(self.classes[1:], self.classes[:-1], out=self.starts[1:])
        self.run = self.starts.cumsum(0).sub_(1)
        self.first = self.starts.nonzero()[:, 0]
        below, one, other = classes.shape[-1] + 1, [], []
        for step in (below - 1, below, below + 1):
            touch = self.classes[:-step] == self.classes[step:]
            touch &= self.starts[:-step] | self.starts[step:]  # two runs touch first where one of them starts
            pixels = touch.nonzero()[:, 0]
            one.append(self.run[pixels])
            other.append(self.run[pixels + step])
        self.parent = _lowest(len(self.first), torch.cat(one), torch.cat(other))

    def at(self, pixels: Tensor) -> Tensor:
        return self.first[self.parent[self.run[pixels]]]


def _lowest(count: int, one: Tensor, other: Tensor) -> Tensor:
    """The lowest node that each of `count` nodes is connected with, by edges from `one` to `other`."""
    parent = torch.arange(count, device=one.device)
    while True:
        a, b = parent[one], parent[other]
        if torch.equal(a, b):
            return parent
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(grandparent := parent[parent], parent):
            parent = grandparent


def _covered_most(guess: Tensor, region: Tensor, length: Tensor, count: int) -> Tensor:
    """For each predicted region the true one of which it covers most pixels, -1 for none, from pieces of rows."""
    pairs, which = torch.unique(guess * count + region, return_inverse=True)
    overlap = torch.zeros_like(pairs).scatter_add_(0, which, length)
    guess, region = pairs // count, pairs % count
    most = guess.new_zeros(count).scatter_reduce_(0, guess, overlap, "amax")
    winner = overlap == most[guess]
    found = guess.new_full((count,), count).scatter_reduce_(0, guess[winner], region[winner], "amin")
    return torch.where(found < count, found, -1)
