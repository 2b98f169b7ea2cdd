"""Padding and cropping for graphs of any size do what slices and pads do."""

import pytest
import torch
import torch.nn.functional as F

from segheads.functional.shapes import crop, extend, whole
from segheads.pyramids import SimplePyramid

SIZES = torch.export.Dim("height", min=3, max=64), torch.export.Dim("width", min=3, max=64)


def for_any_size(function, x):
    """The function in a graph for maps of any size."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    dims = dict(zip((2, 3), SIZES, strict=True))
    options = {"prefer_deferred_runtime_asserts_over_guards": True}
    return torch.export.export(Module(), (x,), dynamic_shapes=({**dims},), **options).module()


@pytest.mark.parametrize(
    ("n", "multiple", "least", "expected"), [(1, 7, 1, 7), (7, 7, 1, 7), (8, 7, 1, 14), (3, 4, 96, 96)]
)
def test_whole_multiples(n, multiple, least, expected):
    assert whole(n, multiple, least) == expected


def test_one_graph_crops_maps_of_any_size():
    graph = for_any_size(lambda x: crop(F.pad(x, (0, 3, 0, 2)) + 1, *x.shape[2:]), torch.randn(1, 2, 9, 11))
    for size in ((9, 11), (5, 20), (3, 3)):
        x = torch.randn(1, 2, *size)
        assert torch.equal(graph(x), x + 1)
        assert torch.equal(crop(F.pad(x, (0, 3)), *size), x)


def test_padding_repeats_the_rim():
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(extend(x, 5, 7), F.pad(x, (0, 3, 0, 2), mode="replicate"))


def test_pooling_keeps_the_rest_of_odd_maps_in_graphs_of_any_size():
    pyramid = SimplePyramid([8], 4, stride=16).eval()
    graph = for_any_size(lambda x: pyramid([x])[3], torch.randn(1, 8, 9, 11))
    with torch.no_grad():
        for size in ((9, 11), (4, 6), (5, 8)):
            x = torch.randn(1, 8, *size)
            torch.testing.assert_close(graph(x), pyramid([x])[3])
