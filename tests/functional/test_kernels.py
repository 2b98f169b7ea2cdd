"""Every registered kernel: symmetries, limits, gradients, 16 bit, export, saving."""

import importlib

import pytest
import torch

from segheads import SegmentationModel, create_model
from segheads.functional import KERNELS, mean_shift
from segheads.functional.kernels import Dot, Kernel, find_kernel
from segheads.mean_shift import MeanShift

ALL = pytest.mark.parametrize("kernel", list(KERNELS))


@pytest.fixture(params=["fused", "tiles"])
def way(request, monkeypatch):
    """Both ways to the average, the second in tiles of 4 rows."""
    module = importlib.import_module("segheads.functional.affinity")
    monkeypatch.setattr(module, "_is_fused", lambda *_: request.param == "fused")
    monkeypatch.setattr(module, "TILE", 4)


@ALL
@pytest.mark.parametrize("blurring", [True, False])
def test_gradients_reach_tokens_weights_bandwidth_and_step(way, kernel, blurring):
    leaves = [torch.randn(2, 9, 3), torch.randn(3, 3), torch.randn(3), torch.tensor(1.3), torch.tensor(0.6)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def function(x, weight, bias, bandwidth, step):
        options = {"kernel": kernel, "blurring": blurring, "num_layers": 2}
        return mean_shift(x, weight, bias, bandwidth=bandwidth, step=step, **options)

    assert torch.autograd.gradcheck(function, leaves)


@ALL
@pytest.mark.parametrize("blurring", [True, False])
def test_permuted_tokens_give_the_permuted_result(kernel, blurring):
    tokens, weight, order = torch.randn(1, 9, 4), torch.randn(4, 4), torch.randperm(9)
    options = {"kernel": kernel, "blurring": blurring, "num_layers": 3, "step": 0.7}
    torch.testing.assert_close(
        mean_shift(tokens[:, order], weight, **options), mean_shift(tokens, weight, **options)[:, order]
    )


@ALL
@pytest.mark.parametrize("blurring", [True, False])
def test_equal_tokens_stay_where_they_are(kernel, blurring):
    tokens = torch.randn(1, 1, 4).expand(1, 9, 4)
    options = {"kernel": kernel, "blurring": blurring, "num_layers": 3}
    torch.testing.assert_close(mean_shift(tokens, torch.randn(3, 4), **options), tokens)


@ALL
def test_a_huge_bandwidth_gives_the_mean(kernel):
    tokens = torch.randn(2, 9, 4)
    shifted = mean_shift(tokens, torch.randn(6, 4), kernel=kernel, bandwidth=1e4)
    torch.testing.assert_close(shifted, tokens.mean(1, keepdim=True).expand_as(tokens), rtol=0, atol=1e-5)


@ALL
def test_exports_with_every_kernel(kernel):
    class Shift(torch.nn.Module):
        def forward(self, x, weight):
            options = {"kernel": kernel, "blurring": False, "spatial_bandwidth": 2.0, "num_layers": 2}
            return mean_shift(x, weight, **options)

    x, weight = torch.randn(1, 8, 3, 4), torch.randn(5, 8)
    exported = torch.export.export(Shift(), (x, weight)).module()
    torch.testing.assert_close(exported(x, weight), Shift()(x, weight))
    compiled = torch.compile(Shift(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), Shift()(x, weight))


@ALL
def test_bandwidths_are_positive_for_any_width(kernel):
    how = find_kernel(kernel)
    assert isinstance(how, Kernel)
    for C, D in ((1, 1), (192, 48), (48, 192)):
        assert how.default_bandwidth(D) > 0
        assert how.initial_bandwidth(C, D, 0.02) > 0
        assert MeanShift(C, shift_channels=D, kernel=kernel).bandwidth == how.initial_bandwidth(C, D, 0.02)


@ALL
@pytest.mark.parametrize("spatial_bandwidth", [None, 1.5])
def test_affinity_is_the_weight_in_the_first_shift(kernel, spatial_bandwidth):
    shift = MeanShift(6, kernel=kernel, bandwidth=0.7, spatial_bandwidth=spatial_bandwidth)
    torch.nn.init.normal_(shift.projection.weight)
    x = torch.randn(2, 6, 3, 4)
    weights = shift.affinity(x, 5)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    average = torch.einsum("bn,bcn->bc", weights, x.flatten(2))
    torch.testing.assert_close(shift(x).flatten(2)[:, :, 5], average)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_near_32(way, kernel, dtype):
    x, weight = torch.randn(1, 16, 5, 7), 0.3 * torch.randn(8, 16)
    options = {"kernel": kernel, "bandwidth": 1.5, "spatial_bandwidth": 3.0}
    shifted = mean_shift(x.to(dtype), weight.to(dtype), **options)
    assert shifted.dtype == dtype
    torch.testing.assert_close(shifted.float(), mean_shift(x, weight, **options), rtol=0.05, atol=0.05)


@ALL
def test_model_is_saved_with_its_kernel(kernel, tmp_path):
    options = {"kernel": kernel, "num_layers": 2, "blurring": False}
    model = create_model("test_vit", "mean_shift", 5, pretrained=False, head_kwargs=options).eval()
    model.save_pretrained(tmp_path)
    again, images = SegmentationModel.from_pretrained(tmp_path), torch.randn(1, 3, 40, 50)
    assert again.head.shift.kernel == kernel
    torch.testing.assert_close(again(images), model(images))


def test_a_kernel_of_ones_own(monkeypatch):
    class Sharp(Dot):
        """The dot kernel with half the bandwidth."""

        def default_bandwidth(self, shift_channels):
            return super().default_bandwidth(shift_channels) / 2

    monkeypatch.setitem(KERNELS, "sharp", Sharp())
    x, weight = torch.randn(1, 9, 4), torch.randn(16, 4)
    torch.testing.assert_close(mean_shift(x, weight, kernel="sharp"), mean_shift(x, weight, bandwidth=1.0))
    with pytest.raises(ValueError, match="kernel must be one of .*, sharp; got 'blunt'"):
        MeanShift(4, kernel="blunt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_of_zeros_has_a_gradient_like_others(dtype):
    """It has no direction; its gradient was that of a division by 1e-12."""
    tokens = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]], dtype=dtype, requires_grad=True)
    directions = KERNELS["cosine"].measured(tokens)
    torch.testing.assert_close(directions, torch.tensor([[[0.0, 0.0], [0.6, 0.8]]], dtype=dtype))
    directions.sum().backward()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.abs().max() <= 1
