"""Trajectories, affinities and label maps of mean shift."""

import pytest
import torch
from torch import Tensor

from segheads import create_model
from segheads.analysis import labels_by_shift, project, shift_affinity, shift_trajectories

K = 5


def built(head: str = "mean_shift", **options):
    torch.manual_seed(0)
    model = create_model("test_vit", head, K, pretrained=False, head_kwargs=options)
    for name, parameter in model.head.named_parameters():
        if "projection.weight" in name:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def features_of(model, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval().backbone(image[None])[-1]


def slow_affinity(model, tokens: Tensor) -> Tensor:
    """softmax(r rᵀ / sqrt(D)), one token at a time."""
    weight, bias = model.head.shift.projection.weight.detach(), model.head.shift.projection.bias.detach()
    r = torch.stack([weight @ token + bias for token in tokens])
    return torch.stack([torch.softmax(torch.stack([a @ b for b in r]) / len(r[0]) ** 0.5, 0) for a in r])


@pytest.mark.parametrize(("num_layers", "steps"), [(None, 2), (0, 0), (3, 3)])
@pytest.mark.parametrize("size", [(48, 64), (40, 70)])
def test_trajectories_equal_slow_reference(num_layers, steps, size):
    model, image = built(num_layers=2, shift_channels=24).train(), torch.randn(3, *size)
    (way,) = shift_trajectories(model, image, num_layers)
    assert model.training
    assert model.head.num_layers == 2
    model.eval()
    features = features_of(model, image)
    tokens = [features[0].flatten(1).T]
    for _ in range(steps):
        tokens.append(slow_affinity(model, tokens[-1]) @ tokens[-1])
    expected = project(torch.stack(tokens))  # of all steps together
    assert way.name == "head.shift"
    assert way.cell == (16.0, 16.0)
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    torch.testing.assert_close(way.points, expected.points.unflatten(1, (h, w)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(way.explained, expected.explained, rtol=1e-3, atol=1e-4)
    spread = [((x - x.mean(0)) ** 2).sum(1).mean().sqrt() for x in tokens]
    torch.testing.assert_close(way.spread, torch.stack(spread), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "pixel"), [((48, 64), (0, 0)), ((40, 70), (39, 69)), ((40, 70), (17, 30))])
def test_affinity_equals_slow_reference(size, pixel):
    model, image = built(shift_channels=24), torch.randn(3, *size)
    (row,) = shift_affinity(model, image, pixel)
    w = -(-size[1] // 16)
    index = pixel[0] // 16 * w + pixel[1] // 16
    expected = slow_affinity(model, features_of(model, image)[0].flatten(1).T)[index]
    torch.testing.assert_close(row.weights, expected.reshape(-1, w), rtol=1e-4, atol=1e-6)
    assert not row.weights.requires_grad
    assert row.weights.max() > 2 / row.weights.numel()


def test_label_maps_are_those_of_a_model_set_so():
    model, image = built(num_layers=1).train(), torch.randn(3, 40, 70)
    model.head.decoder.eval()
    found = labels_by_shift(model, image, (0, 1, 3))
    assert model.training
    assert not model.head.decoder.training
    assert (model.head.num_layers, found.trained, found.num_layers) == (1, 1, (0, 1, 3))
    for count, labels in zip((0, 1, 3), found.labels, strict=True):
        model.head.num_layers = count
        assert torch.equal(labels, model.predict(image[None])[0])
    assert not torch.equal(found.labels[0], found.labels[2])


def test_mean_shift_in_each_level_of_an_ensemble():
    torch.manual_seed(0)
    options = {"shift": {"num_layers": 1}, "learner": "linear"}
    model = create_model(
        "test_resnet", "senformer", K, pretrained=False, head_kwargs=options, pyramid_kwargs={"out_channels": 16}
    )
    image = torch.randn(3, 70, 100)
    ways = shift_trajectories(model, image, 2)
    names = [f"head.shifts.{n}" for n in range(4)]
    assert [way.name for way in ways] == names
    assert [way.points.shape for way in ways] == [(3, -(-70 // s), -(-100 // s), 2) for s in (4, 8, 16, 32)]
    assert [row.weights.shape for row in shift_affinity(model, image, (69, 99))] == [w.points.shape[1:3] for w in ways]
    model.head.mean_shift_layers = 0  # leaves its shifts out, which can be looked at all the same
    assert [way.name for way in shift_trajectories(model, image, 1)] == names
    maps = labels_by_shift(model, image, (0, 2))
    assert model.head.mean_shift_layers == 0
    assert all(shift.num_layers == 0 for shift in model.head.shifts)
    assert torch.equal(maps.labels[0], model.predict(image[None])[0])
    model.head.mean_shift_layers = 2
    assert torch.equal(maps.labels[1], model.predict(image[None])[0])


def test_mistakes_are_named():
    model, image = built(), torch.randn(3, 32, 32)
    with pytest.raises(ValueError, match="num_layers must be an integer of 0 or more; got -1"):
        labels_by_shift(model, image, (0, -1))
    assert model.head.num_layers == 1
    with pytest.raises(ValueError, match="num_layers must name one number of shifts or more; got none"):
        labels_by_shift(model, image, ())
    with pytest.raises(ValueError, match=r"inside the image of 32 x 32 pixels; got \(32, 0\)"):
        shift_affinity(model, image, (32, 0))
    linear = built("linear")
    for look in (shift_trajectories, labels_by_shift, lambda m, x: shift_affinity(m, x, (0, 0))):
        with pytest.raises(ValueError, match="a head with mean shift, .*; got LinearHead without one"):
            look(linear, image)
