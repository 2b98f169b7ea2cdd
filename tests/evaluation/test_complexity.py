"""Parameters and multiply-adds, by hand and against the published models'."""

import pytest
import torch

from segheads import create_model
from segheads.evaluation import count_multiply_adds, count_parameters


def test_a_linear_model_by_hand():
    model = create_model("test_vit", "linear", 5, pretrained=False)
    D, depth, N = 64, 6, 100  # 160 x 160 pixels, 100 patches and a class token
    tokens = N + 1
    block = tokens * (3 * D * D + D * D + 2 * 3 * D * D) + 2 * tokens * tokens * D  # MLP ratio 3
    layers_only = depth * tokens * 10 * D * D + N * 3 * 16 * 16 * D + N * D * 5
    assert count_multiply_adds(model, (160, 160)) == depth * block + N * 3 * 16 * 16 * D + N * D * 5
    assert count_multiply_adds(model, (160, 160), layers_only=True) == layers_only


def test_the_model_is_left_as_it_was():
    model = create_model("test_vit", "senformer", 5, pretrained=False, pyramid_kwargs={"out_channels": 16}).train()
    plan, images = model.plan, torch.randn(1, 3, 32, 32)
    count_multiply_adds(model, (64, 64))
    assert model.training
    assert model.plan == plan
    assert all(p.device.type == "cpu" for p in model.parameters())
    model(images, torch.zeros(1, 32, 32, dtype=torch.long)).backward()
    assert next(model.head.parameters()).grad is not None


def test_shared_weights_count_once():
    kwargs = {"pretrained": False, "pyramid_kwargs": {"out_channels": 16}}
    apart = create_model("test_vit", "senformer", 5, **kwargs)
    shared = create_model("test_vit", "senformer", 5, head_kwargs={"share": "decoder"}, **kwargs)
    learner = count_parameters(apart.head.learners[0])
    assert count_parameters(apart) - count_parameters(shared) == 3 * (learner - 5 * 16)


def resnet50(head, **options):
    return create_model("resnet50", head, 150, pretrained=False, **options)


SEPARATE = {"head_kwargs": {"learner_kwargs": {"shared_block": False}}}
AUXILIARY = {"auxiliary_weight": 0.4}
WIDE_AUXILIARY = {**AUXILIARY, "auxiliary_kwargs": {"channels": 512}}  # as in SenFormer's configuration
PUBLISHED = [  # millions
    ("senformer", {}, 55),
    ("senformer", SEPARATE, 139),
    ("senformer", {**SEPARATE, **AUXILIARY}, 144),
    ("senformer", {**SEPARATE, **WIDE_AUXILIARY}, 144),
    ("uper", AUXILIARY, 67),
]


@pytest.mark.parametrize(("head", "options", "millions"), PUBLISHED)
def test_parameters_are_the_papers(head, options, millions):
    assert count_parameters(resnet50(head, **options)) == pytest.approx(1e6 * millions, rel=0.02)


def test_multiply_adds_are_the_papers():
    """SenFormer 179G, UPerNet 238G at 512 x 512: of the layers alone, as mmcv counts."""
    size = (512, 512)
    separate = resnet50("senformer", **SEPARATE)
    assert count_multiply_adds(separate, size, layers_only=True) == pytest.approx(179e9, rel=0.02)
    assert count_multiply_adds(resnet50("uper"), size, layers_only=True) == pytest.approx(238e9, rel=0.02)
    # one repeated block: keys and values once instead of six times
    shared = count_multiply_adds(resnet50("senformer"), size, layers_only=True)
    tokens = sum((512 // stride) ** 2 for stride in (4, 8, 16, 32))
    assert count_multiply_adds(separate, size, layers_only=True) - shared == 5 * tokens * 512 * 1024
