"""How an ensemble's learners become one prediction.

Every merge takes the learners' logits, a list of `(B, K, h, w)` on one grid, and gives log-probabilities of that shape,
in fp32 or wider. Nothing under- or overflows: all products and sums of probabilities are made in log space.

Equations are those of SenFormer (Bousselham et al., BMVC 2022, https://arxiv.org/abs/2111.13280).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOTE_FLOOR = 1e-6  # share of the average in a majority vote: breaks ties, and gives classes without a vote a logarithm


def average(logits: Sequence[Tensor]) -> Tensor:
    """Mean of the learners' probabilities (Eq. 3), the default.

    The published code sums them instead, which differs by a constant in the logarithm and in nothing else.

    Args:
        logits: Each learner's class scores, on one grid.

    Shape:
        A list of `(B, K, h, w)` to `(B, K, h, w)`, log-probabilities.

    Raises:
        ValueError: If the list is empty or shapes differ.

    Examples:
        >>> average([torch.tensor([[[[0.0]], [[0.0]]]]), torch.tensor([[[[9.0]], [[0.0]]]])]).exp().flatten()
        tensor([0.7499, 0.2501])
    """
    return torch.stack(_log_probabilities(logits)).logsumexp(0) - math.log(len(logits))


def product(logits: Sequence[Tensor]) -> Tensor:
    """Normalised product of the learners' probabilities (Eq. 4): each learner can veto a class.

    Args:
        logits: Each learner's class scores, on one grid; two learners or more.

    Shape:
        A list of `(B, K, h, w)` to `(B, K, h, w)`, log-probabilities.

    Raises:
        ValueError: If there are fewer than two learners or shapes differ.

    Examples:
        >>> product([torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[2.0]], [[0.0]]]])]).exp().flatten()
        tensor([0.9526, 0.0474])
    """
    check_count("product", len(logits))
    # The normalisations cancel, so that the plain sum of logits would do; in this order large logits lose no digits.
    total = _log_probabilities(logits)
    return F.log_softmax(sum(total[1:], total[0]), dim=1)


def majority_vote(logits: Sequence[Tensor]) -> Tensor:
    """Each learner votes for its best class with the weight of its confidence, its highest probability (Eq. 5).

    The shares of the votes are the probabilities. A millionth of the average is mixed in: a class without a vote so has
    a finite logarithm, and where votes tie the average decides. Only confidences have gradients.

    Args:
        logits: Each learner's class scores, on one grid.

    Shape:
        A list of `(B, K, h, w)` to `(B, K, h, w)`, log-probabilities.

    Raises:
        ValueError: If the list is empty or shapes differ.

    Examples:
        >>> votes = [torch.tensor([[[[4.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[1.0]]]])]
        >>> majority_vote(votes).exp().flatten()
        tensor([0.5732, 0.4268])
    """
    each = _log_probabilities(logits)
    confidences, votes = zip(*(x.max(1, keepdim=True) for x in each), strict=True)
    shares = torch.stack(confidences).softmax(0)  # confidence over the sum of confidences
    counted = torch.zeros_like(each[0])
    for share, vote in zip(shares, votes, strict=True):
        counted = counted.scatter_add(1, vote, share)
    tiny = torch.finfo(counted.dtype).tiny  # a class without a vote: its logarithm is the floor's
    mean = torch.stack(each).logsumexp(0) - math.log(len(each))
    return torch.logaddexp(counted.clamp(min=tiny).log() + math.log1p(-VOTE_FLOOR), mean + math.log(VOTE_FLOOR))


class HierarchicalAttention(nn.Module):
    """Learned: from coarse to fine, each learner is blended with what was merged before (Tao et al. 2020).

    Hierarchical multi-scale attention (https://arxiv.org/abs/2005.10821) on the learners' logits, which the paper found
    better than on their features: `merged = a * merged + (1 - a) * logits`, with `a` of each position predicted from
    both by the paper's module (Sec. 3.2): twice a 3x3 convolution, batch norm and ReLU, then a 1x1 convolution and a
    sigmoid. Of our own are its width, and that attention starts where all learners count the same.

    Args:
        num_learners: Learners to merge; two or more.
        num_classes: Number of classes K.
        hidden_channels: Width of the layers that predict the attention.

    Shape:
        A list of `(B, K, h, w)`, fine to coarse, to `(B, K, h, w)`, log-probabilities.

    Raises:
        ValueError: If there are fewer than two learners, or `forward` gets another number of them.
    """

    light: ClassVar[bool] = False

    def __init__(self, num_learners: int, num_classes: int, hidden_channels: int = 64) -> None:
        super().__init__()
        check_count("hierarchical_attention", num_learners)
        self.num_learners = num_learners
        self.steps = nn.ModuleList(
            _attention(2 * num_classes, hidden_channels, [math.log(merged)], light=self.light)
            for merged in range(1, num_learners)
        )

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of the learners' logits, fine to coarse."""
        self._check(logits)
        *finer, merged = logits
        for step, scores in zip(self.steps, reversed(finer), strict=True):
            a = step(torch.cat([scores, merged], dim=1)).sigmoid()  # (B, 1, h, w)
            merged = a * merged + (1 - a) * scores
        return F.log_softmax(_wide(merged), dim=1)

    def _check(self, logits: Sequence[Tensor]) -> None:
        if len(logits) != self.num_learners:
            raise ValueError(f"{type(self).__name__} was built for {self.num_learners} learners; got {len(logits)}")


class ExplicitAttention(nn.Module):
    """Learned: one set of weights over all learners for each position (Chen et al. 2016).

    Attention to scale (https://arxiv.org/abs/1511.03339) on the learners' logits, which the paper found better than on
    their features: weights are a softmax over learners, predicted from all their logits by the paper's module (see
    `HierarchicalAttention`), and the merged logits are the weighted sum. Attention starts where all learners count the
    same.

    Args:
        num_learners: Learners to merge; two or more.
        num_classes: Number of classes K.
        hidden_channels: Width of the layers that predict the attention.

    Shape:
        A list of `(B, K, h, w)` to `(B, K, h, w)`, log-probabilities.

    Raises:
        ValueError: If there are fewer than two learners, or `forward` gets another number of them.
    """

    light: ClassVar[bool] = False

    def __init__(self, num_learners: int, num_classes: int, hidden_channels: int = 64) -> None:
        super().__init__()
        check_count("explicit_attention", num_learners)
        self.num_learners = num_learners
        self.attention = _attention(num_learners * num_classes, hidden_channels, [0.0] * num_learners, light=self.light)

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of the learners' logits."""
        if len(logits) != self.num_learners:
            raise ValueError(f"{type(self).__name__} was built for {self.num_learners} learners; got {len(logits)}")
        weights = self.attention(torch.cat(list(logits), dim=1)).softmax(1).split(1, dim=1)  # M x (B, 1, h, w)
        merged = sum((w * scores for w, scores in zip(weights, logits, strict=True)), torch.zeros_like(logits[0]))
        return F.log_softmax(_wide(merged), dim=1)


class LightHierarchicalAttention(HierarchicalAttention):
    """`HierarchicalAttention` as in version 0.1.0: one 3x3 convolution and ReLU in place of two with batch norms."""

    light = True


class LightExplicitAttention(ExplicitAttention):
    """`ExplicitAttention` as in version 0.1.0: one 3x3 convolution and ReLU in place of two with batch norms."""

    light = True


LEARNED_OF_0_1_0 = {name: f"light_{name}" for name in ("hierarchical_attention", "explicit_attention")}

MERGES: dict[str, Any] = {  # functions of the logits, and modules that are such
    "average": average,
    "product": product,
    "majority_vote": majority_vote,
    "hierarchical_attention": HierarchicalAttention,
    "explicit_attention": ExplicitAttention,
    "light_hierarchical_attention": LightHierarchicalAttention,
    "light_explicit_attention": LightExplicitAttention,
}
"""The merges by the names that `SenFormerHead` takes; a name of your own may be added."""


def check_count(merge: str, num_learners: int) -> None:
    """Refuse to merge a single learner by a rule that needs more.

    Raises:
        ValueError: If a product or a learned merge gets fewer than two learners.
    """
    if num_learners < 2 and (merge == "product" or isinstance(MERGES.get(merge), type)):
        raise ValueError(f"merge {merge!r} needs two learners or more; got {num_learners}")


def _attention(in_channels: int, hidden_channels: int, start: list[float], *, light: bool) -> nn.Sequential:
    """Scores to attention, which starts at the same values everywhere."""
    last = nn.Conv2d(hidden_channels, len(start), 1)
    nn.init.zeros_(last.weight)
    last.bias = nn.Parameter(torch.tensor(start))
    if light:
        return nn.Sequential(nn.Conv2d(in_channels, hidden_channels, 3, padding=1), nn.ReLU(), last)
    layers: list[nn.Module] = []
    for channels in (in_channels, hidden_channels):  # the norm has a bias
        convolution = nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(hidden_channels), nn.ReLU()]
    return nn.Sequential(*layers, last)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_probabilities(logits: Sequence[Tensor]) -> list[Tensor]:
    shapes = [tuple(x.shape) for x in logits]
    if not shapes or len(shapes[0]) != 4 or any(shape != shapes[0] for shape in shapes[1:]):
        raise ValueError(f"a merge takes the logits (B, K, h, w) of one learner or more on one grid; got {shapes}")
    return [F.log_softmax(_wide(x), dim=1) for x in logits]
