"""Logits that are at the labels' size already: PyTorch's own operations, with the options right."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segheads.functional import upsample_argmax, upsample_cross_entropy
from segheads.functional.upsample import upsample
from segheads.losses import CrossEntropy

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])


class Operations(TorchDispatchMode):
    """Names of what runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def drawn(dtype=torch.float32, ignored=255):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, 7, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(5, (2, 9, 7), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = ignored
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["even", "weighted"])
@pytest.mark.parametrize("ignored", [255, -7])
def test_the_loss_is_cross_entropy(dtype, reduction, smoothing, weight, ignored):
    logits, labels = drawn(dtype, ignored)
    options = {"ignore_index": ignored, "label_smoothing": smoothing}
    with Operations() as ran:
        loss = upsample_cross_entropy(logits, labels, reduction=reduction, weight=weight, **options)
    assert any("nll_loss" in name for name in ran.names)
    assert not any("segheads" in name for name in ran.names)
    exact = logits.detach().double().requires_grad_()
    weights = None if weight is None else weight.double()
    expected = F.cross_entropy(exact, labels, weights, **options, reduction="sum" if reduction == "all" else "mean")
    expected = expected / labels.numel() if reduction == "all" else expected
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(loss, logits)[0].double(), torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_padding_counts_as_before():
    logits, labels = drawn()
    loss = CrossEntropy(5, reduction="all")(logits, labels[:, :6, :5], (9, 7))
    expected = F.cross_entropy(logits[:, :, :6, :5], labels[:, :6, :5], ignore_index=255, reduction="sum") / 60
    torch.testing.assert_close(loss, expected)


def test_nothing_but_ignored_pixels_is_zero():
    logits, labels = drawn()
    loss = upsample_cross_entropy(logits, torch.full_like(labels, 255), weight=WEIGHT)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("value", [5, -1, 254])
def test_a_label_out_of_range_is_named(value):
    logits, labels = drawn()
    labels[1, 3, 3] = value
    with pytest.raises(ValueError, match=rf"classes 0 to 4 or 255 \(ignored\); got {value}"):
        upsample_cross_entropy(logits, labels)


def test_autocast_lowers_no_precision():
    logits, labels = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        loss = upsample_cross_entropy(logits, labels)
    assert torch.equal(loss, upsample_cross_entropy(logits, labels))


def test_label_maps_and_scores():
    logits, _ = drawn(torch.bfloat16)
    labels, probability = upsample_argmax(logits, (9, 7), return_probability=True)
    assert torch.equal(labels, logits.argmax(1))
    torch.testing.assert_close(probability, logits.float().softmax(1).amax(1))
    with Operations() as ran:
        scores = upsample(logits, (9, 7))
    assert torch.equal(scores, logits.float())
    assert not any("upsample" in name for name in ran.names)


def test_a_gpu_takes_argmax():
    with torch._subclasses.FakeTensorMode(), Operations() as ran:
        logits = torch.empty(2, 5, 9, 7, device="cuda", dtype=torch.bfloat16)
        labels = upsample_argmax(logits, (9, 7), dtype=torch.uint8)
    assert labels.dtype == torch.uint8
    assert any("argmax" in name for name in ran.names)


def test_on_a_gpu_the_loss_waits_for_nothing_and_is_no_kernel_of_ours():
    with torch._subclasses.FakeTensorMode(), Operations() as ran:
        logits = torch.empty(2, 5, 9, 7, device="cuda")
        upsample_cross_entropy(logits, torch.empty(2, 9, 7, device="cuda", dtype=torch.int64), label_smoothing=0.1)
    assert not any("segheads" in name or "_local_scalar_dense" in name for name in ran.names)
