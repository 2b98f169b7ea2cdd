"""How sure an ensemble is of each pixel, and whether it doubts where objects meet."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.functional.binary import with_background
from segheads.functional.cross_entropy import is_valid


class Uncertainty(NamedTuple):
    """Three maps `(B, h, w)`, or `(B, H, W)` at the image's size; float32, in nats, 0 where the ensemble is sure.

    Attributes:
        entropy: Of the merged probabilities: all uncertainty, whether learners share it or not. At most log K.
        mutual_information: Between the class and the choice of a learner: what is left of the entropy of the learners'
            mean after the entropy that each has by itself. At most log M for M learners.
        disagreement: Entropy of the learners' votes for their best class. 0 where all agree, log M where no two do.
    """

    entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor


@torch.no_grad()
def ensemble_uncertainty(merged: Tensor, learners: Sequence[Tensor]) -> Uncertainty:
    """Predictive entropy, mutual information between learners, and disagreement of their votes.

    Entropy is that of the merged prediction, as in deep ensembles (Lakshminarayanan et al. 2017,
    https://arxiv.org/abs/1612.01474). Mutual information is `H(mean p) - mean H(p)` over the learners' probabilities
    `p`, as in BALD (Houlsby et al. 2011, https://arxiv.org/abs/1112.5745; Gal et al. 2017,
    https://arxiv.org/abs/1703.02910) and the decomposition of Depeweg et al. (2018, https://arxiv.org/abs/1710.07283):
    high where learners are each sure of another class, 0 where they are unsure alike. Disagreement is the vote entropy
    of query by committee (Dagan and Engelson 1995). With a single learner, the last two are 0.

    The mean is the learners' plain one whatever the merge, so that mutual information is never negative; with
    `merge="average"` its entropy is `entropy`. Memory: two tensors of `merged`'s size in float32, for any number of
    learners.

    Args:
        merged: Log-probabilities of the merged prediction; of a single class, K = 1, its logit.
        learners: Each learner's logits, on the same grid.

    Shape:
        `(B, K, h, w)` and a list of the same to three maps `(B, h, w)`, float32, without gradient.

    Raises:
        ValueError: If there are no learners or shapes differ.

    Examples:
        >>> learners = [torch.tensor([[[[9.0]], [[-9.0]]]]), torch.tensor([[[[-9.0]], [[9.0]]]])]
        >>> merged = torch.tensor([[[[0.5]], [[0.5]]]]).log()
        >>> [round(x.item(), 3) for x in ensemble_uncertainty(merged, learners)]  # log 2: each is sure of another class
        [0.693, 0.693, 0.693]
    """
    shapes = [tuple(x.shape) for x in learners]
    if not shapes or merged.ndim != 4 or set(shapes) != {tuple(merged.shape)}:
        raise ValueError(
            "uncertainty takes the merged prediction (B, K, h, w) and the logits of one learner or more of that shape; "
            f"got {tuple(merged.shape)} and {shapes}"
        )
    if merged.shape[1] == 1:
        merged = with_background(merged.float()).log_softmax(1)
        learners = [with_background(x) for x in learners]
    entropy = _entropy_(merged.float().exp())
    mean = torch.zeros_like(merged, dtype=torch.float32)
    own_entropy = torch.zeros_like(entropy)
    for logits in learners:
        probabilities = logits.softmax(1, dtype=torch.float32)
        mean.add_(probabilities, alpha=1 / len(learners))
        own_entropy += _entropy_(probabilities) / len(learners)
        del probabilities  # before the next learner's are made
    mutual_information = (_entropy_(mean) - own_entropy).clamp_(0, math.log(len(learners)))
    return Uncertainty(entropy, mutual_information, _vote_entropy([x.argmax(1) for x in learners]))


def boundary_ratio(uncertainty: Tensor, labels: Tensor, *, radius: int = 3, ignore_index: int = 255) -> float:
    """Mean uncertainty near the boundaries of labels over the mean elsewhere: above 1 where doubt lies on boundaries.

    A pixel is near a boundary when another class occurs at most `radius` rows and `radius` columns away. Ignored pixels
    neither count nor make a boundary.

    Args:
        uncertainty: One map of an `Uncertainty`, at the labels' size.
        labels: The true classes.
        radius: How far a boundary reaches to either side, pixels.
        ignore_index: The label of pixels that do not count.

    Shape:
        `(H, W)` or `(B, H, W)`, both.

    Returns:
        The ratio; infinite if there is no uncertainty elsewhere, NaN if no pixel is near a boundary, or all are.

    Raises:
        ValueError: If shapes differ or radius is below 1.

    Examples:
        >>> labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
        >>> boundary_ratio(torch.tensor([[0.1, 0.1, 0.4, 0.4, 0.1, 0.1]]), labels, radius=1)
        4.0
    """
    if uncertainty.shape != labels.shape or labels.ndim not in (2, 3):
        raise ValueError(
            "uncertainty and labels must have one shape, (H, W) or (B, H, W); "
            f"got {tuple(uncertainty.shape)} and {tuple(labels.shape)}"
        )
    if radius < 1:
        raise ValueError(f"radius must be 1 pixel or more; got {radius}")
    labelled = is_valid(labels.long(), ignore_index)
    classes = labels.float().view(-1, 1, *labels.shape[-2:])
    highest, lowest = (
        # outside the image the pooling sees -inf, too
        F.max_pool2d(x.masked_fill(~labelled.view_as(x), -math.inf), 2 * radius + 1, stride=1, padding=radius)
        for x in (classes, -classes)
    )
    near = (highest != -lowest).view_as(labels)
    at_boundary, elsewhere = (uncertainty[labelled & where].double().mean() for where in (near, ~near))
    return (at_boundary / elsewhere).item()


def _entropy_(probabilities: Tensor) -> Tensor:
    """Entropy over classes, `(B, K, h, w)` to `(B, h, w)`; overwrites its argument."""
    terms = torch.special.entr(probabilities, out=probabilities)  # -p log p, and 0 at 0
    return terms.sum(1).clamp_(min=0)


def _vote_entropy(votes: Sequence[Tensor]) -> Tensor:
    """`-sum over classes of c/M log(c/M)`, c of M votes: the mean over the voters of `log(M/c)`, c those who agree."""
    total = torch.zeros_like(votes[0], dtype=torch.float32)
    for vote in votes:
        agreeing = torch.stack([other == vote for other in votes]).sum(0)
        total += (len(votes) / agreeing).log()
    return total / len(votes)
