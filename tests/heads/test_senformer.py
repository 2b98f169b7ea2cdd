"""SenFormerHead: any learner, merges and levels on a trained head, sharing, mean shift inside, and the errors."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from segheads import ClassAttentionHead, LinearHead, MeanShift, SenFormerHead
from segheads.functional import upsample
from segheads.merges import average, product

SIZES = [(8, 11), (4, 6), (2, 3), (1, 2)]


def features(C=16, count=4, B=2):
    torch.manual_seed(1)
    return [torch.randn(B, C, *size) for size in SIZES[:count]]


def randomised(head):
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval()


def test_each_level_has_a_learner_and_the_merged_comes_first():
    head, x = randomised(SenFormerHead([16] * 4, 5)), features()
    expected = [upsample(learner(level), (8, 11)) for learner, level in zip(head.learners, x, strict=True)]
    merged, *logits = head.predictions(x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(merged, average(expected))
    torch.testing.assert_close(head(x), merged)
    assert all(isinstance(learner, ClassAttentionHead) for learner in head.learners)


@pytest.mark.parametrize("learner", ["linear", "mask_transformer", "mean_shift", "class_attention", "fcn"])
@pytest.mark.parametrize("mean_shift_layers", [0, 2])
def test_any_single_level_head_is_a_learner(learner, mean_shift_layers):
    shift = {"num_layers": mean_shift_layers, "shift_channels": 4} if mean_shift_layers else None
    head = SenFormerHead([16, 24, 8], 5, learner=learner, shift=shift)
    x = [torch.randn(2, C, *size, requires_grad=True) for C, size in zip((16, 24, 8), SIZES, strict=False)]
    torch.manual_seed(0)  # stochastic depth may drop a block; not with this seed
    sum(prediction.square().sum() for prediction in head.predictions(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(level.grad is not None for level in x)


def test_learners_by_callable_and_by_keyword():
    named = SenFormerHead([16, 16], 5, learner="class_attention", learner_kwargs={"num_layers": 2, "num_heads": 4})
    called = SenFormerHead([16, 16], 5, learner=partial(ClassAttentionHead, num_layers=2, num_heads=4))
    assert repr(named.learners) == repr(called.learners)
    assert [learner.num_layers for learner in called.learners] == [2, 2]


def test_merge_can_be_swapped_on_a_trained_head():
    head, x = randomised(SenFormerHead([16] * 4, 5)), features()
    logits = head.learner_logits(x)
    head.merge = "product"
    torch.testing.assert_close(head(x), product(logits))
    head.merge = "average"
    torch.testing.assert_close(head(x), average(logits))


def test_a_learned_merge_is_kept_while_another_is_in_use():
    head, x = randomised(SenFormerHead([16] * 4, 5, merge="explicit_attention")), features()
    learned = head(x)
    head.merge = "majority_vote"
    assert not torch.allclose(head(x), learned)
    head.merge = "explicit_attention"
    torch.testing.assert_close(head(x), learned)
    head.merge = "average"
    with pytest.raises(ValueError, match="'hierarchical_attention' has weights that must be trained; build the head"):
        head.merge = "hierarchical_attention"
    assert head.merge == "average"


def test_levels_choose_who_votes_afterwards():
    head, x = randomised(SenFormerHead([16] * 4, 5)), features()
    everyone = head.learner_logits(x)
    head.levels = [3, 1]
    merged, *logits = head.predictions(x)
    assert head.levels == [1, 3]
    torch.testing.assert_close(logits, [everyone[1], everyone[3]])
    torch.testing.assert_close(merged, average(logits))
    head.levels = None
    torch.testing.assert_close(head.learner_logits(x), everyone)


def test_levels_at_construction_build_those_learners_alone():
    head, x = SenFormerHead([16] * 4, 5, levels=[2]).eval(), features()
    assert len(head.learners) == 1
    torch.testing.assert_close(head(x), F.log_softmax(upsample(head.learners[0](x[2]), (8, 11)), 1))
    with pytest.raises(ValueError, match=r"levels must be some of \[2\], which have learners, each once; got \[0\]"):
        head.levels = [0]


def test_several_learners_per_level():
    head, x = randomised(SenFormerHead([16] * 2, 5, learners_per_level=3, shift={"num_layers": 1})), features(count=2)
    assert len(head.learners) == 6
    assert len(head.shifts) == 2
    logits = head.learner_logits(x)
    torch.testing.assert_close(logits[4], upsample(head.learners[4](head.shifts[1](x[1])), (8, 11)))
    head.levels = [1]
    torch.testing.assert_close(head.learner_logits(x), logits[3:])


@pytest.mark.parametrize("learner", ["class_attention", "mask_transformer"])
def test_shared_class_embeddings(learner):
    head = SenFormerHead([16] * 3, 5, learner=learner, share="class_embeddings")
    first, *others = head.learners
    assert all(other.class_embeddings is first.class_embeddings for other in others)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in others[0].parameters()}
    assert len(shared) == 1


def test_shared_decoder_leaves_the_class_embeddings():
    head = SenFormerHead([16] * 3, 5, share="decoder")
    alone = sum(p.numel() for p in ClassAttentionHead(16, 5).parameters())
    assert sum(p.numel() for p in head.parameters()) == alone + 2 * 5 * 16
    x = features(count=3)
    torch.nn.init.normal_(head.learners[1].class_embeddings)
    before = head.eval().learner_logits(x)
    torch.nn.init.normal_(head.learners[0].blocks[0].mlp.fc1.weight)
    assert not torch.allclose(head.learner_logits(x)[1], before[1])


def test_shared_heads_without_class_embeddings_are_one():
    head = SenFormerHead([16] * 3, 5, learner="linear", share="decoder")
    assert sum(p.numel() for p in head.parameters()) == 16 * 5 + 5


def test_mean_shift_stands_before_the_learners_and_its_depth_may_change():
    head, x = randomised(SenFormerHead([16] * 4, 5, shift={"num_layers": 1, "shift_channels": 4})), features()
    assert all(isinstance(shift, MeanShift) and shift.projection.out_features == 4 for shift in head.shifts)
    shifted = [upsample(n(s(level)), (8, 11)) for n, s, level in zip(head.learners, head.shifts, x, strict=True)]
    torch.testing.assert_close(head.learner_logits(x), shifted)
    head.mean_shift_layers = 0
    plain = [upsample(learner(level), (8, 11)) for learner, level in zip(head.learners, x, strict=True)]
    torch.testing.assert_close(head.learner_logits(x), plain)
    head.mean_shift_layers = 3
    assert [shift.num_layers for shift in head.shifts] == [3] * 4
    joint = SenFormerHead([16] * 4, 5, shift={"num_layers": 2, "spatial_bandwidth": 1.5, "step": 0.5})
    assert [(shift.spatial_bandwidth, shift.step, shift.num_layers) for shift in joint.shifts] == [(1.5, 0.5, 2)] * 4
    with pytest.raises(ValueError, match="mean_shift_layers cannot become 1: the head was built without a shift"):
        SenFormerHead([16] * 4, 5).mean_shift_layers = 1
    with pytest.raises(ValueError, match="num_layers must be an integer of 0 or more; got -1"):
        SenFormerHead([16] * 4, 5, shift={"num_layers": -1})


def test_extreme_logits_stay_finite():
    head = SenFormerHead([16] * 4, 5, learner="linear")
    for learner in head.learners:
        torch.nn.init.normal_(learner.classifier.weight, std=1e4)
    for merge in ("average", "product", "majority_vote"):
        head.merge = merge
        assert all(prediction.isfinite().all() for prediction in head.predictions(features()))


BAD = [
    ({"learner": "class_atention"}, "no head is called 'class_atention'.*did you mean 'class_attention'"),
    ({"learner": "senformer"}, "a learner must be a single-level head; 'senformer' takes a list of maps"),
    ({"learner": lambda C, K: torch.nn.Conv2d(C, K, 1)}, "a learner must be a single-level head; got a Conv2d"),
    ({"learner": lambda C, K: LinearHead(C, K + 1)}, "of 16 channels and 5 classes .* got a LinearHead of 16 and 6"),
    ({"learner": LinearHead, "learner_kwargs": {"a": 1}}, "learner_kwargs belong to a learner given by name"),
    ({"merge": "mean"}, "no merge is called 'mean'; known: average, product, majority_vote"),
    ({"merge": "product", "levels": [0]}, "merge 'product' needs two learners or more; got 1"),
    ({"merge": "explicit_attention", "levels": [0]}, "merge 'explicit_attention' needs two learners or more; got 1"),
    ({"levels": [0, 4]}, r"levels must be some of \[0, 1, 2, 3\], which there are, each once; got \[0, 4\]"),
    ({"levels": []}, r"each once; got \[\]"),
    ({"levels": [1, 1]}, r"each once; got \[1, 1\]"),
    ({"learners_per_level": 0}, "learners_per_level must be 1 or more; got 0"),
    ({"share": "all"}, "share must be one of none, decoder, class_embeddings; got 'all'"),
    ({"share": "class_embeddings", "learner": "linear"}, "needs a learner that has some; LinearHead has none"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        SenFormerHead([16] * 4, 5, **options)


def test_levels_of_different_widths_cannot_share():
    for share in ("decoder", "class_embeddings"):
        with pytest.raises(ValueError, match=rf"share='{share}' needs levels of the same channels.*got \[16, 24\]"):
            SenFormerHead([16, 24], 5, share=share)


def test_single_voters_and_learned_merges_afterwards():
    head = SenFormerHead([16] * 4, 5, merge="product")
    with pytest.raises(ValueError, match="merge 'product' needs two learners or more; got 1"):
        head.levels = [0]
    assert head.levels == [0, 1, 2, 3]
    head = SenFormerHead([16] * 4, 5, merge="hierarchical_attention")
    with pytest.raises(ValueError, match=r"was built for levels \[0, 1, 2, 3\]; got \[0, 1\]"):
        head.levels = [0, 1]


def test_maps_that_do_not_fit_are_named():
    head = SenFormerHead([16] * 4, 5)
    with pytest.raises(ValueError, match=r"of channels \[16, 16, 16, 16\]; got \[\(2, 16, 8, 11\), \(2, 16, 4, 6\)\]"):
        head(features(count=2))
    with pytest.raises(ValueError, match=r"takes a list of maps .*; got \(2, 16, 8, 11\)"):
        head(features()[0])
    with pytest.raises(ValueError, match="in_channels must list their channels; got 16"):
        SenFormerHead(16, 5)
    with pytest.raises(ValueError, match=r"takes one map: in_channels must be an integer; got \[16, 16\]"):
        ClassAttentionHead([16, 16], 5)
