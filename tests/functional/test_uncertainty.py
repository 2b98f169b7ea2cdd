import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segheads.functional.uncertainty import Uncertainty, boundary_ratio, ensemble_uncertainty
from segheads.merges import average, majority_vote, product


def noise(M: int, K: int, scale: float = 3, size: tuple[int, int] = (3, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(M + K)
    return [scale * torch.randn(2, K, *size, generator=generator) for _ in range(M)]


def slow_entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)


def slow_uncertainty(merged: Tensor, learners: list[Tensor]) -> Uncertainty:
    """The definitions, one pixel at a time."""
    B, _, h, w = merged.shape
    maps = Uncertainty(*torch.zeros(3, B, h, w, dtype=torch.float64))
    for b, y, x in ((b, y, x) for b in range(B) for y in range(h) for x in range(w)):
        each = [logits[b, :, y, x].double().softmax(0).tolist() for logits in learners]
        mean = [sum(p) / len(each) for p in zip(*each, strict=True)]
        votes = Counter(p.index(max(p)) for p in each)
        maps.entropy[b, y, x] = slow_entropy(merged[b, :, y, x].double().exp().tolist())
        maps.mutual_information[b, y, x] = slow_entropy(mean) - sum(map(slow_entropy, each)) / len(each)
        maps.disagreement[b, y, x] = slow_entropy([count / len(each) for count in votes.values()])
    return maps


@pytest.mark.parametrize("merge", [average, product, majority_vote])
@pytest.mark.parametrize(("M", "K"), [(2, 2), (4, 7), (5, 3)])
def test_equals_slow_reference(merge, M, K):
    learners = noise(M, K)
    merged = merge(learners)
    actual, expected = ensemble_uncertainty(merged, learners), slow_uncertainty(merged, learners)
    for name in Uncertainty._fields:
        values = getattr(actual, name)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, getattr(expected, name).float(), rtol=1e-5, atol=1e-6)
    if merge is average:  # then entropy is the sum of what learners share and what they do not
        own = torch.stack([-(x.softmax(1) * x.log_softmax(1)).sum(1) for x in learners]).mean(0)
        torch.testing.assert_close(actual.entropy, actual.mutual_information + own)


def sure_of(k: int, K: int, scale: float) -> Tensor:
    logits = torch.full((1, K, 1, 1), -scale)
    logits[:, k] = scale
    return logits


@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_learners_sure_of_different_classes(scale):
    learners = [sure_of(k, 4, scale) for k in (0, 1, 2, 3)]
    for maps in ensemble_uncertainty(average(learners), learners):
        torch.testing.assert_close(maps.item(), math.log(4))
    two_to_one = [sure_of(k, 4, scale) for k in (0, 2, 0)]
    expected = slow_entropy([2 / 3, 1 / 3])
    for maps in ensemble_uncertainty(average(two_to_one), two_to_one):
        torch.testing.assert_close(maps.item(), expected, rtol=1e-6, atol=0)


def test_learners_unsure_alike_share_all_uncertainty():
    learners = [torch.zeros(1, 6, 2, 2)] * 3
    entropy, mutual_information, disagreement = ensemble_uncertainty(average(learners), learners)
    torch.testing.assert_close(entropy, torch.full((1, 2, 2), math.log(6)))
    torch.testing.assert_close(mutual_information, torch.zeros(1, 2, 2), atol=1e-6, rtol=0)
    assert (disagreement == 0).all()


@pytest.mark.parametrize("merge", [average, product, majority_vote])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_bounds_hold_exactly(merge, scale):
    learners = noise(3, 5, scale, (40, 40))
    entropy, mutual_information, disagreement = ensemble_uncertainty(merge(learners), learners)
    for values, most in ((entropy, math.log(5)), (mutual_information, math.log(3)), (disagreement, math.log(3))):
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert values.max() <= most + 1e-6


def test_a_single_learner_agrees_with_itself():
    (learner,) = noise(1, 5)
    entropy, mutual_information, disagreement = ensemble_uncertainty(average([learner]), [learner])
    assert entropy.min() > 0
    assert (mutual_information == 0).all()
    assert (disagreement == 0).all()


def test_a_single_class_is_one_of_two():
    logits = torch.tensor([[[[0.0, 2.0, 1e4, -1e4]]]])
    p = torch.tensor([0.5, 1 / (1 + math.exp(-2)), 1.0, 0.0])
    expected = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    values = ensemble_uncertainty(logits, [logits, logits])
    torch.testing.assert_close(values.entropy[0, 0], expected)
    assert values.mutual_information.abs().max() < 1e-6
    assert not values.disagreement.any()
    rounded_up = torch.full((1, 2, 1, 1), 1e-6)  # probabilities of 1.000001
    assert ensemble_uncertainty(rounded_up, [rounded_up]).entropy == 0


def test_a_class_of_probability_zero_adds_nothing():
    merged = torch.tensor([0.5, 0.5, 0.0]).log().view(1, 3, 1, 1)  # -inf
    entropy = ensemble_uncertainty(merged, [torch.zeros(1, 3, 1, 1)]).entropy
    torch.testing.assert_close(entropy.item(), math.log(2), rtol=1e-6, atol=0)


def test_arguments_stay_as_they_were_and_low_precision_is_widened():
    learners = [x.bfloat16().requires_grad_() for x in noise(2, 4)]
    merged = average(learners)
    copies = [x.detach().clone() for x in (merged, *learners)]
    uncertainty = ensemble_uncertainty(merged, learners)
    for actual, expected in zip((merged, *learners), copies, strict=True):
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=0)
    for actual, expected in zip(uncertainty, slow_uncertainty(merged.detach(), copies[1:]), strict=True):
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


class LargeTensors(TorchDispatchMode):
    """Counts storages of at least some size that operations make, the most of them alive at once."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.most = numel, 0
        self.made: list[torch.multiprocessing.reductions.StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.numel() >= self.numel:
            storage = result.untyped_storage()
            if storage._cdata not in known:
                self.made.append(torch.multiprocessing.reductions.StorageWeakRef(storage))
        self.made = [x for x in self.made if not x.expired()]
        self.most = max(self.most, len({x.cdata for x in self.made}))
        return result


def test_memory_does_not_grow_with_learners():
    learners = noise(6, 50)
    merged = average(learners)
    with LargeTensors(merged.numel()) as memory:
        ensemble_uncertainty(merged, learners)
    assert memory.most == 2


@pytest.mark.parametrize(
    ("merged", "learners", "message"),
    [
        ((1, 5, 4, 4), [], r"one learner or more .* got \(1, 5, 4, 4\) and \[\]"),
        ((5, 4, 4), [(5, 4, 4)], r"\(B, K, h, w\) .* got \(5, 4, 4\) and \[\(5, 4, 4\)\]"),
        ((1, 5, 4, 4), [(1, 5, 4, 4), (1, 5, 2, 2)], r"got \(1, 5, 4, 4\) and \[\(1, 5, 4, 4\), \(1, 5, 2, 2\)\]"),
        ((1, 6, 4, 4), [(1, 5, 4, 4)], r"of that shape; got \(1, 6, 4, 4\) and \[\(1, 5, 4, 4\)\]"),
    ],
)
def test_shapes_that_do_not_fit(merged, learners, message):
    with pytest.raises(ValueError, match=message):
        ensemble_uncertainty(torch.zeros(merged), [torch.zeros(shape) for shape in learners])


def slow_ratio(values: Tensor, labels: Tensor, radius: int) -> float:
    near, elsewhere = [], []
    H, W = labels.shape
    for y, x in ((y, x) for y in range(H) for x in range(W) if labels[y, x] != 255):
        around = labels[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
        is_near = any(k not in (255, labels[y, x].item()) for k in around.flatten().tolist())
        (near if is_near else elsewhere).append(values[y, x].item())
    return (sum(near) / len(near)) / (sum(elsewhere) / len(elsewhere))


@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_boundary_ratio_equals_slow_reference(radius, dtype):
    generator = torch.Generator().manual_seed(radius)
    labels = torch.zeros(20, 30, dtype=dtype)
    labels[4:8, 5:11], labels[12:, 20:], labels[:3, 24:] = 3, 1, 255
    labels[9, 5:11] = 255
    values = torch.rand(20, 30, generator=generator)
    expected = slow_ratio(values, labels, radius)
    assert boundary_ratio(values, labels, radius=radius) == pytest.approx(expected, rel=1e-6)
    batch = boundary_ratio(torch.stack([values, values]), torch.stack([labels, labels]), radius=radius)
    assert batch == pytest.approx(expected, rel=1e-6)
    ignored = torch.where(labels == 255, 9, labels.long())
    assert boundary_ratio(values, ignored, radius=radius, ignore_index=9) == pytest.approx(expected, rel=1e-6)


def test_boundary_ratio_of_doubt_on_boundaries_alone():
    labels = torch.zeros(12, 12, dtype=torch.long)
    labels[:, 6:] = 1
    values = torch.full((12, 12), 0.1)
    values[:, 5:7] = 0.3
    assert boundary_ratio(values, labels, radius=1) == pytest.approx(3)
    assert boundary_ratio(values, labels, radius=2) == pytest.approx(2)
    assert boundary_ratio(torch.ones(12, 12), labels) == 1
    assert boundary_ratio((values > 0.2).float(), labels) == math.inf
    assert math.isnan(boundary_ratio(values, torch.zeros(12, 12)))


def test_boundary_ratio_explains_what_does_not_fit():
    with pytest.raises(ValueError, match=r"one shape, .* got \(1, 4, 4\) and \(4, 4\)"):
        boundary_ratio(torch.zeros(1, 4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"got \(1, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        boundary_ratio(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="radius must be 1 pixel or more; got 0"):
        boundary_ratio(torch.zeros(4, 4), torch.zeros(4, 4), radius=0)
