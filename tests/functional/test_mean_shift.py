import importlib
from functools import partial

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


@pytest.fixture
def small_tiles(monkeypatch):
    """What happens on a device without fused kernels, in tiles of 4 rows."""
    module = importlib.import_module("segheads.functional.affinity")
    monkeypatch.setattr(module, "_is_fused", lambda *_: False)
    monkeypatch.setattr(module, "TILE", 4)
    return module


@pytest.mark.parametrize("shift_channels", [3, 4])  # in tiles, and fused
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_are_those_of_the_formula(shift_channels, needed):
    check_gradients(shift_channels, needed)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradients_in_several_tiles(small_tiles, needed):
    check_gradients(3, needed)


def check_gradients(shift_channels, needed):
    sizes = [(2, 9, 3), (shift_channels, 3), (shift_channels,)]
    needs = (needed[0], needed[1], needed[1])
    leaves = [torch.randn(n, dtype=torch.float64, requires_grad=g) for n, g in zip(sizes, needs, strict=True)]

    def function(tokens, weight, bias):
        return mean_shift(tokens, weight, bias, num_layers=2)

    assert torch.autograd.gradcheck(function, leaves)


def test_tiles_equal_the_formula(small_tiles):
    tokens, weight = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = slow_mean_shift(tokens, weight, None, 2)
    torch.testing.assert_close(mean_shift(tokens, weight, num_layers=2), expected)
    torch.testing.assert_close(mean_shift(tokens.requires_grad_(), weight, num_layers=2), expected)


def test_gradients_of_gradients_are_refused(small_tiles):
    x = torch.randn(1, 9, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(mean_shift(x, torch.randn(3, 5)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(("channels", "shift_channels"), [(16, 16), (16, 24), (24, 7)])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("form", ["tokens", "map", "map, channels last"])
def test_no_square_matrix(monkeypatch, is_fused, channels, shift_channels, trains, form):
    N = 2100  # more than four tiles
    tokens, weight = torch.randn(1, N, channels), torch.randn(shift_channels, channels) * 0.3
    grad = torch.randn(1, N, channels)
    expected = shifted_plainly(tokens, weight, grad)
    if not is_fused:
        module = importlib.import_module("segheads.functional.affinity")
        monkeypatch.setattr(module, "_is_fused", lambda *_: False)
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    x, w = tokens.detach(), weight.requires_grad_(trains)
    if form != "tokens":
        x = x.mT.reshape(1, channels, 42, 50)
        x = x.contiguous(memory_format=torch.channels_last if "last" in form else torch.contiguous_format)
    x.requires_grad_(trains)

    def as_tokens(map_or_tokens):
        return map_or_tokens if form == "tokens" else map_or_tokens.flatten(2).mT

    with LargestTensor() as largest, torch.set_grad_enabled(trains):
        shifted = as_tokens(mean_shift(x, w))
        if trains:
            (shifted * grad).sum().backward()
    assert largest.numel < N * N * 0.3
    torch.testing.assert_close(shifted, expected[0], rtol=1e-4, atol=1e-5)
    if trains:
        for found, gradient in ((as_tokens(x.grad), expected[1]), (w.grad, expected[2])):
            torch.testing.assert_close(found, gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))


class Operations(TorchDispatchMode):
    """Notes the names of the operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [8, 192])
@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 3, 5)])
def test_fused_attention_gets_what_its_kernels_take(monkeypatch, channels, shape):
    """The channels of a token side by side: with other strides PyTorch falls back to the whole matrix in silence."""
    strides, attention = [], F.scaled_dot_product_attention

    def noted(*tensors, **options):
        strides.extend(x.stride(-1) for x in tensors)
        return attention(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    batch, *size = shape
    x = torch.randn(batch, channels, *size)
    for form in (x, x.contiguous(memory_format=torch.channels_last), x.flatten(2).mT, x.flatten(2).mT.contiguous()):
        with torch.no_grad():
            mean_shift(form, torch.eye(channels))
    assert strides == [1] * 12


@pytest.mark.parametrize(("shift_channels", "is_fused"), [(8, True), (5, True), (24, False)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_quicker_way_on_the_cpu(shift_channels, is_fused, batch, needs_grad):
    x, weight = torch.randn(batch, 9, 8), torch.randn(shift_channels, 8, requires_grad=needs_grad)
    with Operations() as operations:
        shifted = mean_shift(x, weight)
    assert any("attention" in name for name in operations.names) == is_fused
    if needs_grad:
        with Operations() as operations:
            shifted.sum().backward()
        assert not any("attention" in name for name in operations.names)


def test_meta_tensors_have_the_shape():
    x, weight = torch.empty(2, 9, 8, device="meta"), torch.empty(24, 8, device="meta", requires_grad=True)
    shifted = mean_shift(x, weight)
    shifted.sum().backward()
    assert (shifted.shape, weight.grad.shape) == (x.shape, weight.shape)


def shifted_plainly(tokens, weight, grad):
    """The formula with autograd, in fp64: result, and gradients of its product with `grad`."""
    x, w = tokens.double().requires_grad_(), weight.double().requires_grad_()
    r = x @ w.T
    shifted = (r @ r.mT * len(w) ** -0.5).softmax(-1) @ x
    (shifted * grad).sum().backward()
    return shifted.float(), x.grad.float(), w.grad.float()


def test_exports_for_any_number_of_tokens():
    class Shift(torch.nn.Module):
        def forward(self, x):
            return mean_shift(x, weight)

    weight = torch.nn.Parameter(torch.randn(24, 8) * 0.3)
    N = torch.export.Dim("N", min=2, max=4096)
    exported = torch.export.export(Shift(), (torch.randn(1, 9, 8),), dynamic_shapes=({1: N},)).module()
    x = torch.randn(1, 700, 8)  # more than one tile
    torch.testing.assert_close(exported(x), Shift()(x))


@pytest.mark.parametrize("shift_channels", [8, 5, 24])
def test_exports_and_compiles(shift_channels):
    class Shift(torch.nn.Module):
        def forward(self, x, weight):
            return mean_shift(x, weight, num_layers=2)

    x, weight = torch.randn(1, 9, 8).double(), torch.randn(shift_channels, 8).double()
    exported = torch.export.export(Shift(), (x, weight)).module()
    torch.testing.assert_close(exported(x, weight), Shift()(x, weight))
    compiled = torch.compile(Shift(), backend="eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf, weight).square().sum().backward()
    (expected,) = torch.autograd.grad(Shift()(y := x.clone().requires_grad_(), weight).square().sum(), y)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("kernel", ["dot", "gaussian", "cosine"])
def test_tiles_are_part_of_one_graph(monkeypatch, kernel):
    """What widths past the fused kernels' take on a GPU, where the dot kernel's queries are its keys."""
    monkeypatch.setattr(importlib.import_module("segheads.functional.affinity"), "_is_fused", lambda *_: False)
    compiled = torch.compile(partial(mean_shift, num_layers=2, kernel=kernel), backend="aot_eager", fullgraph=True)
    leaves = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    results = []
    for function in (compiled, partial(mean_shift, num_layers=2, kernel=kernel)):
        shifted = function(*leaves)
        results.append((shifted, *torch.autograd.grad(shifted.square().sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_training_under_autocast(small_tiles):
    x, weight = torch.randn(1, 12, 8), torch.randn(5, 8) * 0.3
    grads = []
    for enabled in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            shifted = mean_shift(leaf, weight)
        assert shifted.dtype == (torch.bfloat16 if enabled else torch.float32)
        shifted.float().square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


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
