"""Numbers too small to be normal, on which many processors are some ten times slower."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from segheads.functional import mean_shift

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmark"))

from subnormal import Subnormal

affinity = importlib.import_module("segheads.functional.affinity")


class Seen(Subnormal):
    """Also remembers the operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


def peaked(dtype=torch.float32):
    """Tokens of which few attract all others, as real features are: a fifth of the weights would be subnormal."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.linspace(0.1, 26 if dtype != torch.float64 else 80, 40)[:, None]
    return (torch.randn(2, 40, 8, generator=generator) / 8**0.5 * norms).to(dtype)


def gradients(x, weight, kernel):
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    shifted = mean_shift(leaves[0], leaves[1], kernel=kernel)
    grad = torch.randn(shifted.shape, generator=torch.Generator().manual_seed(1)).to(shifted.dtype) * 1e-5
    with Seen() as seen:
        found = torch.autograd.grad(shifted, leaves, grad)
    return seen, found


@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize("shift_channels", [8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peaked_scores_leave_none_in_the_backward_pass(kernel, shift_channels, dtype):
    x = peaked(dtype)
    weight = torch.eye(shift_channels, 8, dtype=dtype) * shift_channels**0.25
    wide = x.to(torch.promote_types(dtype, torch.float32))
    weights = (wide @ wide.mT).softmax(-1)
    assert float(((weights > 0) & (weights < torch.finfo(weights.dtype).tiny)).double().mean()) > 0.01  # they would be
    seen, _ = gradients(x, weight, kernel)
    assert seen.count == 0
    assert not any("attention" in name for name in seen.names)  # whose tensors nobody sees


@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize("shift_channels", [8, 24])
def test_what_is_left_out_is_below_rounding(kernel, shift_channels, monkeypatch):
    x, weight = peaked(), torch.eye(shift_channels, 8) * shift_channels**0.25
    _, found = gradients(x, weight, kernel)
    monkeypatch.setattr(affinity, "_weights", lambda *inputs: affinity._products(*inputs).softmax(-1))
    monkeypatch.setattr(affinity.F, "hardshrink", lambda x, _: x)
    seen, expected = gradients(x, weight, kernel)
    assert seen.count > 0
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-8 * float(plain.abs().max()))


def test_what_is_no_number_stays_so():
    x = peaked()
    x[0, 3, 2] = torch.nan
    _, (found, _) = gradients(x, torch.eye(8), "dot")
    assert found[0].isnan().any()
    assert found[1].isfinite().all()
