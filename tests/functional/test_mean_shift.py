import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segheads.functional import mean_shift


def slow_mean_shift(tokens: Tensor, weight: Tensor, bias: Tensor | None, num_layers: int) -> Tensor:
    """The thesis' formula, token by token."""
    result = tokens.clone()
    for _ in range(num_layers):
        shifted = torch.empty_like(result)
        for b in range(len(result)):
            r = result[b] @ weight.T + (0 if bias is None else bias)
            for i in range(len(r)):
                affinity = torch.tensor([float(r[i] @ r[j]) for j in range(len(r))], dtype=r.dtype) / len(weight) ** 0.5
                probabilities = torch.exp(affinity - affinity.max())
                shifted[b, i] = (probabilities / probabilities.sum()) @ result[b]
        result = shifted
    return result


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("shift_channels", [3, 5, 11])
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_the_formula(num_layers, shift_channels, has_bias):
    tokens, weight = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(shift_channels, 5, dtype=torch.float64)
    bias = torch.randn(shift_channels, dtype=torch.float64) if has_bias else None
    expected = slow_mean_shift(tokens, weight, bias, num_layers)
    torch.testing.assert_close(mean_shift(tokens, weight, bias, num_layers=num_layers), expected)


def test_a_map_is_its_tokens():
    x, weight = torch.randn(2, 5, 3, 4), torch.randn(7, 5)
    tokens = mean_shift(x.flatten(2).mT, weight, num_layers=2)
    torch.testing.assert_close(mean_shift(x, weight, num_layers=2).flatten(2).mT, tokens)


def test_permuted_tokens_give_the_permuted_result():
    tokens, weight, order = torch.randn(1, 9, 4), torch.randn(4, 4), torch.randperm(9)
    torch.testing.assert_close(mean_shift(tokens[:, order], weight), mean_shift(tokens, weight)[:, order])


def test_equal_tokens_stay_where_they_are():
    tokens = torch.randn(1, 1, 4).expand(1, 9, 4)
    torch.testing.assert_close(mean_shift(tokens, torch.randn(3, 4), num_layers=3), tokens)


def test_gradients_are_those_of_the_formula():
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in [(1, 5, 3), (4, 3), (4,)]]

    def function(tokens, weight, bias):
        return mean_shift(tokens, weight, bias, num_layers=2)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("tokens_are_fused", [True, False])
@pytest.mark.parametrize(("channels", "shift_channels"), [(16, 16), (16, 24), (24, 7)])
def test_no_square_matrix_without_gradients(monkeypatch, tokens_are_fused, channels, shift_channels):
    N = 2100  # more than two tiles
    tokens, weight = torch.randn(1, N, channels), torch.randn(shift_channels, channels)
    if not tokens_are_fused:  # what happens on a device without fused kernels
        module = importlib.import_module("segheads.functional.mean_shift")  # the function shadows the module
        monkeypatch.setattr(module, "_is_fused", lambda x: False)
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    with torch.no_grad(), LargestTensor() as largest:
        shifted = mean_shift(tokens, weight)
    assert largest.numel < N * N * 0.6
    affinity = (tokens @ weight.T) @ (tokens @ weight.T).mT * shift_channels**-0.5
    torch.testing.assert_close(shifted, affinity.softmax(-1) @ tokens, rtol=1e-4, atol=1e-5)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return (query @ key.mT * scale).softmax(-1) @ value


def test_autocast_keeps_working():
    tokens, weight = torch.randn(1, 12, 8), torch.randn(8, 8) * 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shifted = mean_shift(tokens, weight)
    assert shifted.dtype == torch.bfloat16
    torch.testing.assert_close(shifted.float(), mean_shift(tokens, weight), rtol=0.03, atol=0.03)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"tokens \(B, N, C\) or a map.*got shape \(4, 5\)"):
        mean_shift(torch.randn(4, 5), torch.randn(5, 5))
    with pytest.raises(ValueError, match=r"built for 6 channels; got 5"):
        mean_shift(torch.randn(1, 4, 5), torch.randn(6, 6))
    with pytest.raises(ValueError, match="num_layers must be 0 or more; got -1"):
        mean_shift(torch.randn(1, 4, 5), torch.randn(5, 5), num_layers=-1)
