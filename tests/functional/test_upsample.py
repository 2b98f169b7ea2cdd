import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from segheads.functional import upsample, upsample_argmax, upsample_cross_entropy

LABEL_TYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def plain_loss(logits, labels, ignore_index=255):
    scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, ignore_index=ignore_index)


def value_and_gradient(logits, labels, loss=upsample_cross_entropy, **options):
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels, **options)
    return value.detach(), *torch.autograd.grad(value, logits)


def drawn(shape=(2, 5, 4, 6), size=(13, 21), dtype=torch.float32):
    """Logits, and labels a part of which is ignored."""
    logits, labels = torch.randn(shape, dtype=dtype), torch.randint(0, shape[1], (shape[0], *size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return logits, labels


@pytest.mark.parametrize("size", [(32, 48), (7, 5), (3, 4), (1, 1)])
def test_loss_is_the_plain_one(size):
    logits, labels = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, *size))
    labels[0, 0, 0] = 255 if labels[0].numel() > 1 else labels[0, 0, 0]
    torch.testing.assert_close(value_and_gradient(logits, labels), value_and_gradient(logits, labels, loss=plain_loss))


def test_all_divides_by_every_pixel():
    logits, labels = torch.randn(1, 5, 2, 2), torch.randint(0, 5, (1, 8, 8))
    labels[:, :2] = 255
    valid, every = (upsample_cross_entropy(logits, labels, reduction=reduction) for reduction in ("valid", "all"))
    torch.testing.assert_close(every, valid * 48 / 64)


@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([0.0, 1, 2, 3, 4])}])
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_but_ignored_pixels_is_zero(reduction, options, batch):
    labels = torch.full((batch, 8, 8), 255)
    value, gradient = value_and_gradient(torch.randn(batch, 5, 2, 2), labels, reduction=reduction, **options)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.zeros(batch, 5, 2, 2), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_nothing_but_classes_of_weight_zero_is_zero(reduction):
    labels, weight = torch.full((1, 8, 8), 1), torch.tensor([1.0, 0.0, 1.0])
    value, gradient = value_and_gradient(torch.randn(1, 3, 2, 2), labels, reduction=reduction, weight=weight)
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.zeros(1, 3, 2, 2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["small", "odd", "k150"])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_published_losses(golden, name, reduction):
    vectors = golden("segm_loss")
    logits, labels = vectors[f"input.{name}.logits"].requires_grad_(), vectors[f"input.{name}.label"]
    suffix = "" if reduction == "valid" else "_mmseg_all_pixels"
    loss = upsample_cross_entropy(logits, labels, reduction=reduction)
    loss.backward()
    torch.testing.assert_close(loss, vectors[f"output.{name}.loss{suffix}"].view(()), rtol=1e-6, atol=0)
    expected = vectors[f"grad.{name}.logits{suffix}"]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_half_precision_logits_are_summed_in_single():
    logits, labels = torch.randn(1, 5, 4, 4), torch.randint(0, 5, (1, 32, 32))
    loss = upsample_cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, upsample_cross_entropy(logits.bfloat16().float(), labels))


# Extreme logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_label_whose_probability_underflows(dtype):
    logits = torch.zeros(1, 3, 2, 2, dtype=dtype)
    logits[:, 1] = 1e4
    value, gradient = value_and_gradient(logits, torch.zeros(1, 8, 8, dtype=torch.long))
    torch.testing.assert_close(float(value), 1e4)
    torch.testing.assert_close(
        gradient, torch.tensor([-0.25, 0.25, 0], dtype=dtype).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    )
    smoothed = upsample_cross_entropy(logits, torch.ones(1, 8, 8, dtype=torch.long), label_smoothing=0.3)
    torch.testing.assert_close(float(smoothed), 0.3 / 3 * 2e4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_certain_pixels_cost_nothing(dtype):
    logits = torch.zeros(1, 3, 2, 2, dtype=dtype)
    logits[:, 1] = 1e4
    value, gradient = value_and_gradient(logits, torch.ones(1, 8, 8, dtype=torch.long))
    assert value.item() == 0
    assert not gradient.any()


def test_largest_numbers_of_half_precision():
    logits = 65504 * (torch.rand(2, 4, 3, 3) * 2 - 1).sign().half()
    logits[:, 1] *= 0.999
    labels = torch.randint(0, 4, (2, 17, 9))
    value, gradient = value_and_gradient(logits, labels)
    expected, expected_gradient = value_and_gradient(logits.double(), labels, loss=plain_loss)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": torch.arange(1.0, 6.0)}])
@pytest.mark.parametrize("margin", [30.0, 300.0])
def test_cells_that_are_sure_of_different_classes(margin, options):
    """Half-way all scores are so much lower than in the cells that their exponentials, less these, would vanish."""
    logits, labels = drawn((2, 5, 4, 6), (40, 60))
    logits.scatter_add_(1, torch.randint(5, (2, 1, 4, 6)), torch.full((2, 1, 4, 6), margin))
    value, gradient = value_and_gradient(logits, labels, **options)
    expected = [x.float() for x in value_and_gradient(logits.double(), labels, loss=plain_of(options))]
    torch.testing.assert_close([value, gradient], expected, rtol=1e-5, atol=1e-7 * margin)


def plain_of(options):
    def loss(logits, labels):
        scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        weight = options["weight"].double() if options else None
        return F.cross_entropy(
            scores, labels, weight, ignore_index=255, label_smoothing=options.get("label_smoothing", 0.0)
        )

    return loss


def test_no_loss_is_negative_by_rounding():
    logits = torch.zeros(100, 19, 1, 2)
    logits[:, 3] = torch.tensor([90.0, 40.0])
    logits[:, 5, 0, 1] = 40 + torch.rand(100)
    labels = torch.full((100, 16, 32), 255)
    labels[..., :12] = 3  # of which all are sure
    assert all(upsample_cross_entropy(x[None], y[None]) >= 0 for x, y in zip(logits, labels, strict=True))


def test_classes_masked_with_the_lowest_number():
    logits, labels = drawn()
    labels[labels == 4] = 3
    masked = logits.clone()
    masked[:, 4] = torch.finfo(torch.float32).min
    value, gradient = value_and_gradient(masked, labels)
    expected, expected_gradient = value_and_gradient(logits[:, :4], labels, loss=plain_loss)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :4], expected_gradient)
    assert not gradient[:, 4].any()
    assert upsample_argmax(masked, (13, 21)).max() == 3


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": torch.ones(5)}])
def test_not_a_number_is_not_hidden(options):
    logits, labels = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 13, 21))
    logits[1, 3, 2, 2] = torch.nan
    assert upsample_cross_entropy(logits, labels, **options).isnan()
    assert 0 <= upsample_argmax(logits, (13, 21)).min() <= upsample_argmax(logits, (13, 21)).max() < 5


# Labels


@pytest.mark.parametrize("value", [-1, -100, 3, 254, 256, 2**31, 2**32 + 1, -(2**32)])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 299, 140), (1, 63, 7)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_label_out_of_range_is_named(value, place, requires_grad):
    logits, labels = torch.randn(2, 3, 5, 4, requires_grad=requires_grad), torch.zeros(2, 300, 141, dtype=torch.long)
    labels[:, :9] = 255
    labels[place] = value
    with pytest.raises(ValueError, match=rf"classes 0 to 2 or 255 \(ignored\); got {value}$"):
        upsample_cross_entropy(logits, labels)
    labels[place] = 255
    upsample_cross_entropy(logits, labels)


@pytest.mark.parametrize("dtype", LABEL_TYPES)
def test_labels_of_any_integer_type(dtype):
    logits, labels = drawn((2, 200, 3, 3))
    torch.testing.assert_close(value_and_gradient(logits, labels.to(dtype)), value_and_gradient(logits, labels))
    labels[1, 2, 3] = 201
    with pytest.raises(ValueError, match="got 201"):
        upsample_cross_entropy(logits, labels.to(dtype))


@pytest.mark.parametrize(("dtype", "label"), [(torch.uint8, 156), (torch.uint8, 255), (torch.int16, 156)])
def test_ignored_number_that_the_type_of_labels_cannot_hold(dtype, label):
    """-100 is 156 in uint8, and 511 is 255: these labels are classes nevertheless."""
    logits, labels = torch.randn(1, 300, 2, 2), torch.full((1, 4, 4), label, dtype=dtype)
    for ignore_index in (-100, 511):
        loss = upsample_cross_entropy(logits, labels, ignore_index=ignore_index)
        torch.testing.assert_close(loss, plain_loss(logits, labels.long(), ignore_index))


@pytest.mark.parametrize("ignore_index", [-100, -1, 5, 1000])
def test_ignored_number_anywhere(ignore_index):
    logits, labels = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 13, 21))
    labels[:, 3:5] = ignore_index
    expected = value_and_gradient(logits, labels, loss=plain_loss, ignore_index=ignore_index)
    torch.testing.assert_close(value_and_gradient(logits, labels, ignore_index=ignore_index), expected)


# Label maps


@pytest.mark.parametrize("num_classes", [2, 7, 300])
def test_label_map_is_the_plain_one(num_classes):
    logits = torch.randn(2, num_classes, 5, 6)
    expected = F.interpolate(logits, size=(33, 17), mode="bilinear", align_corners=False).argmax(1)
    torch.testing.assert_close(upsample_argmax(logits, (33, 17)), expected)


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (300, 333), (3, 2)])
@pytest.mark.parametrize("constant", [0.0, -7.3, 1e4])
def test_equal_logits_are_class_zero(size, constant):
    labels, probability = upsample_argmax(torch.full((2, 7, 4, 6), constant), size, return_probability=True)
    assert not labels.any()
    assert not upsample_argmax(torch.full((2, 7, 4, 6), constant), size).any()
    torch.testing.assert_close(probability, torch.full((2, *size), 1 / 7))


@pytest.mark.parametrize(("num_classes", "dtype"), [(1, torch.uint8), (256, torch.uint8), (257, torch.int16)])
def test_smallest_type_of_a_label_map(num_classes, dtype):
    logits = torch.zeros(1, num_classes, 2, 2)
    logits[:, -1, 0, 0] = 1
    labels = upsample_argmax(logits, (8, 8), dtype=None)
    assert labels.dtype == dtype
    assert labels.max() == num_classes - 1
    torch.testing.assert_close(labels.long(), upsample_argmax(logits, (8, 8)))
    assert upsample_argmax(logits, (8, 8), dtype=torch.int32).dtype == torch.int32


@pytest.mark.parametrize("num_classes", [1, 2, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(33, 170), (2, 3), (5, 6)])
def test_probability_of_the_winner(num_classes, dtype, size):
    logits = torch.randn(2, num_classes, 5, 6).to(dtype)
    labels, probability = upsample_argmax(logits, size, dtype=None, return_probability=True)
    expected = upsample(logits.double(), size).softmax(1).amax(1)
    assert probability.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probability, expected.to(probability.dtype))
    torch.testing.assert_close(labels, upsample_argmax(logits, size, dtype=None))


def test_label_map_of_an_empty_batch():
    labels, probability = upsample_argmax(torch.randn(0, 5, 2, 2), (8, 8), return_probability=True)
    assert labels.shape == probability.shape == upsample_argmax(torch.randn(0, 5, 2, 2), (8, 8)).shape == (0, 8, 8)


def test_label_map_needs_no_gradient():
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    labels = upsample_argmax(logits, (8, 8))
    torch.testing.assert_close(labels, upsample_argmax(logits.detach(), (8, 8)))


# Autograd


def test_inputs_stay_as_they_are():
    logits, labels = drawn()
    weight = torch.rand(5)
    before = [x.clone() for x in (logits, labels, weight)]
    value_and_gradient(logits, labels, weight=weight, label_smoothing=0.1)
    value_and_gradient(logits, labels)
    upsample_argmax(logits, (13, 21), return_probability=True)
    upsample_argmax(logits, (4, 6), return_probability=True)  # the size of the grid: the logits are the scores
    torch.testing.assert_close([logits, labels, weight], before, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_where_none_is_asked(context):
    logits, labels = drawn()
    expected = upsample_cross_entropy(logits.requires_grad_(), labels)
    with context():
        loss = upsample_cross_entropy(logits, labels)
    assert expected.requires_grad
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    loss = upsample_cross_entropy(logits.detach(), labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


def test_gradient_can_be_asked_for_again():
    logits, labels = drawn()
    logits.requires_grad_()
    _, expected = value_and_gradient(logits, labels)
    loss = upsample_cross_entropy(logits, labels)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 3 * expected)
    logits.grad.zero_()  # in place: the memory must not be the one that the loss keeps
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, expected)
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * expected)


def test_losses_that_share_logits():
    logits, labels = drawn()
    other = torch.randint(0, 5, (2, 3, 40))
    shared, plain = (
        value_and_gradient(logits, labels, loss=lambda x, y, f=f: (f(x, y) + 0.4 * f(2 * x, other)) * f(x, other))
        for f in (upsample_cross_entropy, plain_loss)
    )
    torch.testing.assert_close(shared, plain)


def test_half_precision_gradients_are_summed_in_single():
    """60 tiles add to each of these logits."""
    logits, labels = torch.randn(1, 1000, 1, 1).bfloat16(), torch.randint(0, 1000, (1, 80, 257))
    _, gradient = value_and_gradient(logits, labels, ignore_index=-1)
    _, expected = value_and_gradient(logits.float(), labels, ignore_index=-1)
    torch.testing.assert_close(gradient, expected.bfloat16(), rtol=2**-7, atol=0)


def test_half_precision_gradients_are_divided_in_single():
    """The sum over pixels is beyond fp16's largest number, one over their number has five bits there."""
    logits, labels = torch.randn(1, 3, 1, 1).half(), torch.ones(1, 500, 501, dtype=torch.long)
    _, gradient = value_and_gradient(logits, labels)
    _, expected = value_and_gradient(logits.double(), labels, loss=plain_loss)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


def test_loss_scaling_saves_small_gradients():
    """A gradient of 4e-7 has three bits in fp16, unless it is scaled in single precision."""
    logits, labels = torch.randn(1, 150, 64, 64).half(), torch.randint(0, 150, (1, 64, 64))
    scale = 2.0**14
    _, gradient = value_and_gradient(logits, labels, loss=lambda x, y: scale * upsample_cross_entropy(x, y) / 4)
    _, expected = value_and_gradient(logits.double(), labels, loss=plain_loss)
    torch.testing.assert_close(gradient.double(), scale / 4 * expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivative_is_right_or_refused(power):
    logits, labels = drawn(dtype=torch.float64)
    logits.requires_grad_()

    def penalty(loss):
        (gradient,) = torch.autograd.grad(loss(logits, labels) ** power, logits, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), logits)[0]

    try:
        second = penalty(upsample_cross_entropy)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(second, penalty(plain_loss))


@pytest.mark.parametrize("options", [{}, {"weight": torch.arange(5.0), "label_smoothing": 0.1}])
@pytest.mark.parametrize("is_forced", [False, True])
def test_two_runs_are_equal_to_the_last_bit(options, is_forced):
    logits, labels = drawn((2, 5, 7, 40), (150, 333))
    torch.use_deterministic_algorithms(is_forced)
    try:
        runs = [value_and_gradient(logits, labels, **options) for _ in range(2)]
        maps = [upsample_argmax(logits, (150, 333), return_probability=True) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    torch.testing.assert_close(*maps, rtol=0, atol=0)
    torch.testing.assert_close(runs[0], value_and_gradient(logits, labels, **options), rtol=0, atol=0)


def test_batch_is_its_images():
    logits, labels = drawn((3, 5, 7, 40), (50, 333))
    batch = value_and_gradient(logits, labels, reduction="all")
    single = [value_and_gradient(logits[i : i + 1], labels[i : i + 1], reduction="all") for i in range(3)]
    torch.testing.assert_close(batch[0], sum(value for value, _ in single) / 3)
    torch.testing.assert_close(batch[1], torch.cat([gradient for _, gradient in single]) / 3)


# What a loss meets in training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_lowers_no_precision(dtype, cast):
    logits, labels = drawn(dtype=dtype)
    options = {"weight": torch.rand(5, dtype=torch.promote_types(dtype, torch.float32)), "label_smoothing": 0.1}
    expected = value_and_gradient(logits, labels, **options)
    expected_map = upsample_argmax(logits, (13, 21), return_probability=True)
    with torch.autocast("cpu", cast):
        torch.testing.assert_close(value_and_gradient(logits, labels, **options), expected, rtol=0, atol=0)
        torch.testing.assert_close(
            upsample_argmax(logits, (13, 21), return_probability=True), expected_map, rtol=0, atol=0
        )


WEIGHTED = {"weight": torch.arange(5.0), "label_smoothing": 0.1, "reduction": "all"}


@pytest.mark.parametrize(
    ("backend", "dynamic", "options"),
    [("inductor", False, {})]  # machine code takes seconds
    + [("aot_eager", dynamic, options) for dynamic in (False, True) for options in ({}, WEIGHTED)],
)
def test_compiled_in_one_graph(backend, dynamic, options):
    def loss(logits, labels):
        return 2 * upsample_cross_entropy(logits * 3, labels, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=dynamic)
    counts = []
    sizes = [((2, 5, 4, 6), (13, 21)), ((3, 5, 5, 7), (30, 9)), ((2, 5, 9, 3), (8, 200))]
    for shape, size in sizes if dynamic else sizes[:1]:
        logits, labels = drawn(shape, size)
        actual = value_and_gradient(logits, labels, loss=compiled)
        torch.testing.assert_close(actual, value_and_gradient(logits, labels, loss=loss))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1  # nothing was compiled again for another size
    labels[0, 0, 0] = 99
    with pytest.raises(ValueError, match="got 99"):
        compiled(logits, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_compilers_are_told_the_truth(dtype, needs_gradient):
    """Types and shapes that the operator says it returns are those that it does return, and it changes no input."""
    logits, labels = drawn(dtype=dtype)
    arguments = (logits.contiguous(memory_format=torch.channels_last), labels, None, None, 255, needs_gradient)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.segheads.cross_entropy_sum.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_label_map_compiled_in_one_graph(dynamic):
    def probable(logits):
        return upsample_argmax(logits * 3, (21, 150), dtype=None, return_probability=True)

    torch._dynamo.reset()
    compiled = torch.compile(probable, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in [(2, 5, 4, 6), (3, 5, 7, 4)]:
        logits = torch.randn(shape)
        torch.testing.assert_close(compiled(logits), probable(logits))


class LossOfConvolution(nn.Module):
    """What stands between a head and an optimizer."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x, labels):
        return upsample_cross_entropy(self.convolution(x), labels)


@pytest.fixture
def convolution():
    module, x, labels = LossOfConvolution(), torch.randn(2, 3, 4, 6), drawn()[1]
    scores = plain_loss(module.convolution(x), labels)
    return module, x, labels, torch.autograd.grad(scores, list(module.parameters()))


def test_gradient_checkpointing(convolution):
    module, x, labels, expected = convolution
    checkpoint(module, x, labels, use_reentrant=False).backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], list(expected))


def test_functional_call(convolution):
    module, x, labels, expected = convolution
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    loss = torch.func.functional_call(module, parameters, (x, labels))
    torch.testing.assert_close(torch.autograd.grad(loss, list(parameters.values())), expected)
    assert all(p.grad is None for p in module.parameters())


def test_functional_gradient(convolution):
    module, x, labels, expected = convolution
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x, labels)))(parameters)
    torch.testing.assert_close(tuple(gradient.values()), expected)


def test_distributed_data_parallel(convolution, tmp_path):
    module, x, labels, expected = convolution
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(module)
        for _ in range(2):
            parallel.zero_grad(set_to_none=False)
            parallel(x, labels).backward()
            torch.testing.assert_close([p.grad for p in module.parameters()], list(expected))
    finally:
        torch.distributed.destroy_process_group()


# Memory

PEAKS = """
import json, os, torch
from pathlib import Path
from segheads.functional import upsample_argmax, upsample_cross_entropy

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

def loss(logits, labels):
    upsample_cross_entropy(logits.requires_grad_(), labels).backward()

def smoothed_loss(logits, labels):
    weight = torch.ones(logits.shape[1])
    upsample_cross_entropy(logits.requires_grad_(), labels, weight=weight, label_smoothing=0.1).backward()

def loss_alone(logits, labels):
    upsample_cross_entropy(logits, labels)

def label_map(logits, labels):
    upsample_argmax(logits, labels.shape[1:])

def probability(logits, labels):
    upsample_argmax(logits, labels.shape[1:], return_probability=True)

torch.set_num_threads(1)
for call in (loss, smoothed_loss, loss_alone, label_map, probability):
    child = os.fork()  # each starts from the same memory
    if child == 0:
        call(torch.randn(1, 150, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))  # what is loaded at the first call
        logits, labels = torch.randn(4, 150, 16, 16), torch.randint(0, 150, (4, 256, 256))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = megabytes("VmRSS")
        call(logits, labels)
        print(json.dumps([call.__name__, megabytes("VmHWM") - before]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def peaks():
    """Megabytes that calls add to a process of one thread, at their peak."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from Linux's /proc")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("call", ["loss", "smoothed_loss", "loss_alone", "label_map", "probability"])
def test_no_full_resolution_tensor(peaks, call):
    """Scores of four images, 150 classes and 256 x 256 pixels are 157 MB."""
    assert peaks[call] < 40


# Errors


def test_bad_input_is_named():
    logits = torch.randn(1, 3, 2, 2)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"classes 0 to 2 or 255 \(ignored\); got 7"):
        upsample_cross_entropy(logits, torch.full((1, 4, 4), 7))
    with pytest.raises(ValueError, match="got -1"):
        upsample_cross_entropy(logits, torch.full((1, 4, 4), -1))
    with pytest.raises(ValueError, match=r"got \(1, 3, 2, 2\) and \(2, 4, 4\)"):
        upsample_cross_entropy(logits, torch.zeros(2, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="'mean'"):
        upsample_cross_entropy(logits, labels, reduction="mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_of_another_type_are_named(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        upsample_cross_entropy(torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (), (3, 1), (1, 3)])
def test_weight_of_another_shape_is_named(shape):
    with pytest.raises(
        ValueError, match=rf"(?s)weight.*3.*{str(tuple(shape)).replace('(', '[(]').replace(')', '[)]')}"
    ):
        upsample_cross_entropy(
            torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long), weight=torch.ones(shape)
        )


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_out_of_range_is_named(label_smoothing):
    with pytest.raises(ValueError, match=rf"label_smoothing.*{label_smoothing}"):
        upsample_cross_entropy(
            torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long), label_smoothing=label_smoothing
        )


def test_label_map_type_that_holds_too_few_classes_is_named():
    with pytest.raises(ValueError, match=r"uint8.*300|300.*uint8"):
        upsample_argmax(torch.randn(1, 300, 2, 2), (4, 4), dtype=torch.uint8)


@pytest.mark.parametrize("weight", [None, [0.3, 2.0]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [255, -100])
def test_two_classes_by_their_difference(weight, label_smoothing, ignore_index):
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(2, 2, 7, 9, generator=generator)).requires_grad_()
    labels = torch.randint(2, (2, 150, 140), generator=generator)  # two rows of tiles, two columns
    labels[0, :40] = labels[1, 20:, 60:] = ignore_index
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    weight = None if weight is None else torch.tensor(weight)
    loss = upsample_cross_entropy(logits, labels, weight=weight, **options)
    exact = logits.detach().double().requires_grad_()
    scores = F.interpolate(exact, size=labels.shape[1:], mode="bilinear")
    expected = F.cross_entropy(scores, labels, weight=None if weight is None else weight.double(), **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, leaf)[0].double() for x, leaf in ((loss, logits), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
    labels[0, 140, 3] = 2
    with pytest.raises(ValueError, match=f"labels must be classes 0 to 1 or {ignore_index} .ignored.; got 2"):
        upsample_cross_entropy(logits, labels, **options)


@pytest.mark.parametrize("margin", [4, 8, 12])
def test_no_digits_are_lost_where_two_classes_are_sure(margin):
    """A loss of a millionth is no difference of numbers of the size of the scores."""
    logits, labels = torch.randn(2, 2, 8, 8) / 2, torch.zeros(2, 32, 32, dtype=torch.long)
    logits[:, 0] += margin
    expected = F.cross_entropy(upsample(logits.double(), (32, 32)), labels)
    torch.testing.assert_close(upsample_cross_entropy(logits, labels).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 0, 20), (2, 20, 0)])
def test_labels_without_pixels_have_no_gradient(shape):
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    upsample_cross_entropy(logits, torch.zeros(shape, dtype=torch.long)).backward()
    assert not logits.grad.any()
