"""The mathematics of the kernels, against mean shift written out point by point."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segheads.functional import mean_shift
from segheads.functional.mean_shift import mean_shift_steps

KERNELS = ["dot", "gaussian", "cosine"]  # whose formulas are written out here; test_kernels.py has every kernel


def slow(tokens, weight, bias, num_layers, kernel, bandwidth, blurring, step):
    """Token by token, from the distances themselves."""
    start, result = tokens.numpy(), tokens.numpy().copy()
    W, b = weight.numpy(), 0 if bias is None else bias.numpy()
    for _ in range(num_layers):
        data, shifted = (result if blurring else start), result.copy()
        for n in range(len(result)):
            for i in range(result.shape[1]):
                q = W @ result[n, i] + b
                weights = []
                for j in range(result.shape[1]):
                    k = W @ data[n, j] + b
                    if kernel == "dot":
                        weights.append(np.exp(q @ k / bandwidth**2))
                    elif kernel == "gaussian":
                        weights.append(np.exp(-((q - k) ** 2).sum() / (2 * bandwidth**2)))
                    else:
                        weights.append(np.exp(q @ k / np.linalg.norm(q) / np.linalg.norm(k) / bandwidth**2))
                average = np.array(weights) @ data[n] / sum(weights)
                shifted[n, i] = result[n, i] + step * (average - result[n, i])
        result = shifted
    return torch.from_numpy(result)


@pytest.fixture(params=["fused", "tiles"])
def way(request, monkeypatch):
    """Both ways to the average, the second in tiles of 4 rows."""
    module = importlib.import_module("segheads.functional.affinity")
    monkeypatch.setattr(module, "_is_fused", lambda *_: request.param == "fused")
    monkeypatch.setattr(module, "TILE", 4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blurring", [True, False])
@pytest.mark.parametrize(("bandwidth", "step", "has_bias"), [(0.9, 1.0, True), (1.7, 0.4, False)])
@pytest.mark.parametrize("shift_channels", [4, 7])
def test_equals_the_formula(way, kernel, blurring, bandwidth, step, has_bias, shift_channels):
    tokens, weight = torch.randn(2, 9, 5).double(), torch.randn(shift_channels, 5).double() * 0.4
    bias = torch.randn(shift_channels).double() if has_bias else None
    expected = slow(tokens, weight, bias, 3, kernel, bandwidth, blurring, step)
    options = {"num_layers": 3, "kernel": kernel, "blurring": blurring, "step": step}
    torch.testing.assert_close(mean_shift(tokens, weight, bias, bandwidth=bandwidth, **options), expected)
    as_tensors = {**options, "step": torch.tensor(step, dtype=torch.float64)}
    h = torch.tensor(bandwidth, dtype=torch.float64)
    torch.testing.assert_close(mean_shift(tokens, weight, bias, bandwidth=h, **as_tensors), expected)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("dot", 16**0.25), ("gaussian", 16**0.25), ("cosine", 0.1**0.5)],
)
def test_default_bandwidths(kernel, expected):
    tokens, weight = torch.randn(1, 9, 5), torch.randn(16, 5)
    torch.testing.assert_close(
        mean_shift(tokens, weight, kernel=kernel), mean_shift(tokens, weight, kernel=kernel, bandwidth=expected)
    )


def clusters(seed=0):
    """60 points of the plane about three centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.5], [1.0, 4.0]]).double()
    return centres.repeat_interleave(20, 0) + 0.6 * torch.randn(60, 2, generator=generator, dtype=torch.float64)


def density(points, data, bandwidth):
    """Gaussian kernel density estimate, but for a constant factor."""
    return torch.exp(-torch.cdist(points, data).square() / (2 * bandwidth**2)).sum(1)


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("step", [1.0, 0.5, 1.5])
def test_the_density_rises_at_every_step(bandwidth, step):
    data = clusters()
    options = {"num_layers": 25, "kernel": "gaussian", "bandwidth": bandwidth, "blurring": False, "step": step}
    steps = list(mean_shift_steps(data[None], torch.eye(2).double(), **options))
    densities = torch.stack([density(points[0], data, bandwidth) for points in steps])
    rises = densities.diff(dim=0)
    assert (rises >= -1e-9).all()
    assert (rises[0] > 1e-6).all()  # and every point moved


def test_the_dot_kernel_is_not_mean_shift():
    data = clusters()
    options = {"num_layers": 25, "kernel": "dot", "bandwidth": 1.0, "blurring": False}
    steps = list(mean_shift_steps(data[None], torch.eye(2).double(), **options))
    densities = torch.stack([density(points[0], data, 1.0) for points in steps])
    assert (densities.diff(dim=0) < -1e-3).any()


def modes_of(data, bandwidth):
    """Modes by mean shift of one point at a time, written for this test; and the mode of each point."""
    modes, nearest = [], []
    for start in data.numpy():
        point = start.copy()
        while True:
            weights = np.exp(-0.5 * ((data.numpy() - point) ** 2).sum(1) / bandwidth**2)
            moved = (weights[:, None] * data.numpy()).sum(0) / weights.sum()
            if np.linalg.norm(moved - point) < 1e-12:
                break
            point = moved
        distances = [np.linalg.norm(point - mode) for mode in modes]
        if not distances or min(distances) > 1e-3:
            modes.append(point)
            distances.append(0.0)
        nearest.append(int(np.argmin(distances)))
    return torch.from_numpy(np.stack(modes)), torch.tensor(nearest)


@pytest.mark.parametrize(("bandwidth", "count"), [(0.9, 3), (5.0, 1)])
def test_ends_at_the_modes(bandwidth, count):
    data = clusters()
    modes, nearest = modes_of(data, bandwidth)
    assert len(modes) == count
    options = {"num_layers": 400, "kernel": "gaussian", "bandwidth": bandwidth, "blurring": False}
    shifted = mean_shift(data[None], torch.eye(2).double(), **options)[0]
    torch.testing.assert_close(shifted, modes[nearest], rtol=0, atol=1e-6)
    for mode in modes:  # a maximum of the density: no slope, and bent downwards
        slope = torch.autograd.functional.jacobian(lambda x: density(x[None], data, bandwidth)[0], mode)
        bend = torch.autograd.functional.hessian(lambda x: density(x[None], data, bandwidth)[0], mode)
        assert slope.abs().max() < 1e-8
        assert torch.linalg.eigvalsh(bend).max() < 0


def test_blurring_gathers_each_cluster_in_one_point():
    data = clusters()
    shifted = mean_shift(data[None], torch.eye(2).double(), num_layers=40, kernel="gaussian", bandwidth=0.9)[0]
    groups = shifted.view(3, 20, 2)
    assert torch.cdist(groups, groups).max() < 1e-6
    assert torch.pdist(groups[:, 0]).min() > 2


def test_cosine_is_von_mises_fisher_mean_shift():
    data = F.normalize(torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    concentration = 8.0
    options = {"kernel": "cosine", "bandwidth": concentration**-0.5, "blurring": False, "num_layers": 30}
    steps = [F.normalize(x[0], dim=-1) for x in mean_shift_steps(data[None], torch.eye(3).double(), **options)]
    densities = torch.stack([torch.exp(concentration * (points @ data.T)).sum(1) for points in steps])
    assert (densities.diff(dim=0) >= -1e-9).all()


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])  # the dot kernel goes to the longest, whatever is near
@pytest.mark.parametrize("blurring", [True, False])
def test_a_tiny_bandwidth_changes_nothing(kernel, blurring):
    tokens = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    options = {"kernel": kernel, "blurring": blurring, "num_layers": 3}
    torch.testing.assert_close(mean_shift(tokens, torch.eye(4), bandwidth=1e-2, **options), tokens)


def test_gaussian_does_not_see_where_the_origin_is():
    tokens, weight = torch.randn(1, 50, 8), torch.randn(8, 8)
    near = mean_shift(tokens, weight, kernel="gaussian")
    far = mean_shift(tokens, weight, torch.full((8,), 300.0), kernel="gaussian")  # products of 10^6, all the same
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_keep_their_digits_in_16_bits(way, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(1, 40, 64, generator=generator)
    tokens = tokens + 0.5 * torch.randn(1, 40, 64, generator=generator)
    x = tokens.to(dtype)
    eye = torch.eye(64)
    shifted = mean_shift(x, eye.to(dtype), kernel="gaussian", bandwidth=4.0)
    expected = mean_shift(x.float(), eye, kernel="gaussian", bandwidth=4.0)
    assert shifted.dtype == dtype
    torch.testing.assert_close(shifted.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_runs_in_fused_attention(monkeypatch, kernel):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or fused(*a, **k))
    mean_shift(torch.randn(2, 50, 16), torch.randn(16, 16), kernel=kernel, num_layers=2, blurring=False)
    assert calls == [(2, 1, 50, 17 if kernel == "gaussian" else 16)] * 2  # the keys' norms are one more channel


def test_wrong_options_are_named():
    x, weight = torch.randn(1, 4, 5), torch.randn(5, 5)
    with pytest.raises(ValueError, match="kernel must be one of dot, gaussian, cosine; got 'flat'"):
        mean_shift(x, weight, kernel="flat")
    with pytest.raises(ValueError, match=r"bandwidth must be above 0; got -0\.5"):
        mean_shift(x, weight, bandwidth=-0.5)


def slow_joint(x, weight, num_layers, kernel, bandwidth, spatial_bandwidth, blurring):
    """Places and features, each with its distance, on the (N, N) matrices themselves."""
    B, C, h, w = x.shape
    place = torch.tensor([[i, j] for i in range(h) for j in range(w)]).to(x.dtype)
    near = torch.exp(-torch.cdist(place, place).square() / (2 * spatial_bandwidth**2))
    tokens = data = x.flatten(2).mT
    for _ in range(num_layers):
        data = tokens if blurring else data
        q, k = tokens @ weight.T, data @ weight.T
        if kernel == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        alike = -torch.cdist(q, k).square() / 2 if kernel == "gaussian" else q @ k.mT
        weights = torch.exp(alike / bandwidth**2) * near
        tokens = weights / weights.sum(-1, keepdim=True) @ data
    return tokens.mT.reshape(B, C, h, w)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blurring", [True, False])
@pytest.mark.parametrize(("h", "w"), [(3, 5), (4, 2), (1, 7)])
def test_joint_domain_equals_the_formula(way, kernel, blurring, h, w):
    x, weight = torch.randn(2, 6, h, w).double(), torch.randn(4, 6).double() * 0.5
    expected = slow_joint(x, weight, 3, kernel, 0.8, 1.3, blurring)
    options = {"num_layers": 3, "kernel": kernel, "blurring": blurring}
    torch.testing.assert_close(mean_shift(x, weight, bandwidth=0.8, spatial_bandwidth=1.3, **options), expected)
    bandwidths = [torch.tensor(value, dtype=torch.float64) for value in (0.8, 1.3)]
    shifted = mean_shift(x, weight, bandwidth=bandwidths[0], spatial_bandwidth=bandwidths[1], **options)
    torch.testing.assert_close(shifted, expected)


def test_gradients_reach_the_spatial_bandwidth(way):
    leaves = [torch.randn(2, 3, 2, 4), torch.randn(3, 3), torch.tensor(1.3), torch.tensor(1.7)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def function(x, weight, h, s):
        return mean_shift(x, weight, bandwidth=h, spatial_bandwidth=s, kernel="gaussian", num_layers=2)

    assert torch.autograd.gradcheck(function, leaves)


def test_wide_places_are_no_places_and_narrow_ones_change_nothing():
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(6, 6)
    options = {"kernel": "cosine", "num_layers": 2}
    torch.testing.assert_close(
        mean_shift(x, weight, spatial_bandwidth=1e4, **options), mean_shift(x, weight, **options)
    )
    torch.testing.assert_close(mean_shift(x, weight, spatial_bandwidth=0.1, **options), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_keep_their_digits_in_16_bits(way, dtype):
    x, weight = torch.randn(1, 16, 6, 70), torch.eye(16) * 0.3  # places up to 35 cells from the middle
    options = {"kernel": "gaussian", "spatial_bandwidth": 1.1, "bandwidth": 2.0}
    shifted = mean_shift(x.to(dtype), weight.to(dtype), **options)
    torch.testing.assert_close(shifted.float(), mean_shift(x, weight, **options), rtol=0.05, atol=0.05)


def test_tokens_without_places_are_refused():
    with pytest.raises(ValueError, match=r"spatial_bandwidth needs a map \(B, C, h, w\).*got \(1, 4, 5\)"):
        mean_shift(torch.randn(1, 4, 5), torch.randn(5, 5), spatial_bandwidth=2.0)
    with pytest.raises(ValueError, match="spatial_bandwidth must be above 0; got 0"):
        mean_shift(torch.randn(1, 5, 2, 2), torch.randn(5, 5), spatial_bandwidth=0)
