"""Merges against the paper's equations written out, at extreme logits, and what the errors show."""

import math

import pytest
import torch
import torch.nn.functional as F
from testers import MergeTester
from torch import nn

from segheads.merges import (
    MERGES,
    ExplicitAttention,
    HierarchicalAttention,
    average,
    check_count,
    majority_vote,
    product,
)

FUNCTIONS = [name for name, merge in MERGES.items() if not isinstance(merge, type)]
LEARNED = [name for name, merge in MERGES.items() if isinstance(merge, type)]
EVEN = ["average", "product", "majority_vote", "hierarchical_attention", "explicit_attention"]  # none has the last word


def some_logits(count=3):
    return MergeTester.logits(count, dtype=torch.float64)


def built(name, count=3, K=5, trained=True):
    """In double precision."""
    merge = MergeTester.build(name, count, K, trained)
    return merge.double() if isinstance(merge, nn.Module) else merge


def probabilities(logits):
    return [x.exp() / x.exp().sum(1, keepdim=True) for x in logits]


@pytest.mark.parametrize("name", list(MERGES))
class TestMerges(MergeTester):
    pass


def test_average_is_equation_3():
    logits = some_logits()
    torch.testing.assert_close(average(logits).exp(), sum(probabilities(logits)) / 3)


def test_product_is_equation_4():
    first, second, third = probabilities(some_logits())
    expected = first * second * third
    torch.testing.assert_close(product(some_logits()).exp(), expected / expected.sum(1, keepdim=True))


def test_majority_vote_is_equation_5():
    logits = some_logits()
    result = majority_vote(logits).exp()
    for b in range(2):
        for i in range(3):
            for j in range(4):
                votes = [0.0] * 5
                for p in probabilities(logits):
                    confidence, winner = p[b, :, i, j].max(0)
                    votes[winner] += confidence.item()
                expected = torch.tensor(votes, dtype=torch.float64) / sum(votes)
                torch.testing.assert_close(result[b, :, i, j], expected, rtol=0, atol=2e-6)


def test_two_unsure_voters_beat_one_sure_one():
    unsure, sure = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1), torch.tensor([0.05, 0.95]).log().view(1, 2, 1, 1)
    assert majority_vote([unsure, unsure, sure]).argmax(1) == 0  # 1.2 against 0.95
    assert average([unsure, unsure, sure]).argmax(1) == 1


def test_a_tie_of_votes_is_decided_by_the_average():
    first = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().view(1, 3, 1, 1)
    second = torch.tensor([0.1, 0.4, 0.5], dtype=torch.float64).log().view(1, 3, 1, 1)
    result = majority_vote([first, second]).squeeze()
    assert result.argmax() == 1  # 0.45 on average, against 0.4
    torch.testing.assert_close(result[1:].exp(), torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*FUNCTIONS, *LEARNED])
def test_opposed_extremes(name):
    """Two learners that are certain of different classes."""
    first = torch.full((1, 3, 1, 1), -1e4)
    second = first.clone()
    first[0, 0], second[0, 1] = 1e4, 1e4
    merge = built(name, 2, 3, trained=False)
    result = (merge.float() if name in LEARNED else merge)([first, second])
    assert result.isfinite().all()
    shares = result.exp()[0, :, 0, 0]
    torch.testing.assert_close(shares[:2].sum(), torch.tensor(1.0))
    if name in EVEN:
        torch.testing.assert_close(shares, torch.tensor([0.5, 0.5, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_merges_start_as_the_mean_of_logits(name):
    logits = some_logits(4)
    expected = F.log_softmax(sum(logits) / 4, dim=1)
    torch.testing.assert_close(built(name, 4, trained=False)(logits), expected)


def test_explicit_attention_is_a_weighted_sum():
    logits, merge = some_logits(), built("explicit_attention")
    weights = merge.attention(torch.cat(logits, dim=1)).softmax(1)
    expected = sum(weights[:, m : m + 1] * logits[m] for m in range(3))
    torch.testing.assert_close(merge(logits), F.log_softmax(expected, dim=1))


def test_hierarchical_attention_goes_from_coarse_to_fine():
    fine, middle, coarse = some_logits()
    merge = built("hierarchical_attention")
    a = merge.steps[0](torch.cat([middle, coarse], dim=1)).sigmoid()
    merged = a * coarse + (1 - a) * middle
    b = merge.steps[1](torch.cat([fine, merged], dim=1)).sigmoid()
    expected = F.log_softmax(b * merged + (1 - b) * fine, dim=1)
    torch.testing.assert_close(merge([fine, middle, coarse]), expected)


def test_learned_merges_have_the_papers_module():
    module = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Conv2d]  # SenFormer, Sec. 3.2, before the sigmoid
    for modules in (ExplicitAttention(3, 5).attention, *HierarchicalAttention(3, 5).steps):
        assert [type(layer) for layer in modules] == module
        assert [layer.kernel_size for layer in modules if isinstance(layer, nn.Conv2d)] == [(3, 3), (3, 3), (1, 1)]


def test_one_learner():
    (x,) = some_logits(1)
    torch.testing.assert_close(average([x]), F.log_softmax(x, 1))
    assert majority_vote([x]).argmax(1).equal(x.argmax(1))
    with pytest.raises(ValueError, match="merge 'product' needs two learners or more; got 1"):
        product([x])
    for kind in (HierarchicalAttention, ExplicitAttention):
        with pytest.raises(ValueError, match="attention' needs two learners or more; got 1"):
            kind(1, 5)


def test_log_two_learners():
    x = torch.zeros(1, 2, 1, 1)
    torch.testing.assert_close(average([x, x]), torch.full((1, 2, 1, 1), -math.log(2)))


def test_a_function_of_ones_own_may_merge_one_learner(monkeypatch):
    monkeypatch.setitem(MERGES, "loudest", average)
    check_count("loudest", 1)
    for name in ("product", *LEARNED):
        with pytest.raises(ValueError, match=f"merge '{name}' needs two learners or more; got 1"):
            check_count(name, 1)


def test_what_does_not_fit_is_named():
    x = torch.zeros(1, 5, 2, 2)
    with pytest.raises(ValueError, match=r"on one grid; got \[\(1, 5, 2, 2\), \(1, 5, 2, 3\)\]"):
        average([x, torch.zeros(1, 5, 2, 3)])
    with pytest.raises(ValueError, match=r"one learner or more on one grid; got \[\]"):
        majority_vote([])
    for name in ("hierarchical_attention", "explicit_attention"):
        with pytest.raises(ValueError, match=r"Attention was built for 3 learners; got 2"):
            built(name)([x.double(), x.double()])
