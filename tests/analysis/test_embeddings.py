"""Class embeddings, their plane and their angles."""

import math

import numpy as np
import pytest
import torch

from segheads import create_model
from segheads.analysis import class_embeddings, cosine_similarity, project


def test_embeddings_of_each_kind_of_head():
    linear = create_model("test_vit", "linear", 7, pretrained=False)
    torch.testing.assert_close(class_embeddings(linear), {"head": linear.head.classifier.weight.detach()})
    for head, options in [("mask_transformer", {"embed_dim": 32}), ("class_attention", {})]:
        model = create_model("test_vit", head, 7, pretrained=False, head_kwargs=options)
        torch.nn.init.normal_(model.head.class_embeddings)
        found = class_embeddings(model)
        torch.testing.assert_close(found, {"head": model.head.class_embeddings[0].detach()})
        assert not found["head"].requires_grad


@pytest.mark.parametrize(("share", "count"), [("none", 4), ("decoder", 4), ("class_embeddings", 1)])
def test_every_learner_has_its_own(share, count):
    options = {"pyramid_kwargs": {"out_channels": 16}, "head_kwargs": {"share": share}}
    model = create_model("test_resnet", "senformer", 7, pretrained=False, **options)
    for learner in model.head.learners:
        torch.nn.init.normal_(learner.class_embeddings)
    found = class_embeddings(model)
    assert list(found) == [f"head.learners.{n}" for n in range(count)]
    for n, vectors in enumerate(found.values()):
        torch.testing.assert_close(vectors, model.head.learners[n].class_embeddings[0].detach())


def test_a_head_without_embeddings_is_named():
    model = create_model("test_vit", "fcn", 7, pretrained=False)
    with pytest.raises(ValueError, match="ClassAttentionHead; FCNHead holds none of them"):
        class_embeddings(model)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("shape", [(11, 6), (3, 4, 5, 6), (2, 40)])
def test_projection_equals_eigenvectors(centre, shape):
    generator = torch.Generator().manual_seed(len(shape))
    vectors = torch.randn(shape, generator=generator) * torch.linspace(1, 3, shape[-1]) + 2
    points, explained, centred = project(vectors, centre=centre)
    assert points.shape == (*shape[:-1], 2)
    assert centred == centre
    flat = vectors.reshape(-1, shape[-1]).double().numpy()
    flat = flat - flat.mean(0) if centre else flat
    values, axes = np.linalg.eigh(flat.T @ flat)
    expected = flat @ axes[:, [-1, -2]]
    expected *= np.where(np.abs(expected.max(0)) >= np.abs(expected.min(0)), 1, -1)
    if centre and len(flat) == 2:  # two centred points lie as far on either side: a sign of either kind
        expected *= np.sign(expected[0]) * np.sign(points[0].numpy())
        expected[:, 1] = 0
    torch.testing.assert_close(points.reshape(-1, 2).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(explained.numpy(), np.float32(values[[-1, -2]] / values.sum()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_axes_that_are_not_there_are_zero(shape):
    points, explained, _ = project(torch.arange(1.0, 1 + math.prod(shape)).reshape(shape), centre=False)
    assert points.shape == (shape[0], 2)
    assert (points[:, 1] == 0).all()
    torch.testing.assert_close(explained, torch.tensor([1.0, 0.0]))


def test_equal_vectors_have_no_variance():
    points, explained, _ = project(torch.ones(5, 3))
    torch.testing.assert_close(points, torch.zeros(5, 2))
    torch.testing.assert_close(explained, torch.zeros(2))


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(5), r"vectors must be \(..., D\) with at least one; got \(5,\)"),
        (torch.ones(0, 5), r"got \(0, 5\)"),
        (torch.tensor([[1.0, math.nan], [1, 2]]), "vectors must be finite; 1 of 2 are not"),
    ],
)
def test_vectors_that_cannot_be_projected(vectors, message):
    with pytest.raises(ValueError, match=message):
        project(vectors)


def test_similarity_equals_slow_reference():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    vectors[2] = 0
    found = cosine_similarity(vectors)
    for i in range(6):
        for j in range(6):
            norms = math.hypot(*vectors[i].tolist()) * math.hypot(*vectors[j].tolist())
            expected = sum(a * b for a, b in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True)) / (norms or 1)
            assert found[i, j].item() == pytest.approx(expected, abs=1e-6)
    assert found.abs().max() <= 1
    with pytest.raises(ValueError, match=r"vectors must be \(K, D\); got \(2, 3, 4\)"):
        cosine_similarity(torch.ones(2, 3, 4))
