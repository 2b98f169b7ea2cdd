"""The loss and the label map against plain PyTorch in float64, over drawn sizes, types and memory layouts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from segheads.functional import upsample_argmax, upsample_cross_entropy

many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SIZE, FULL_SIZE = st.integers(1, 9), st.integers(1, 40)
NUM_CLASSES = st.one_of(st.integers(1, 12), st.sampled_from([150, 300]))
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded over the batch": lambda x: x[:1].expand_as(x),
    "expanded over columns": lambda x: x[..., :1].expand_as(x),
    "sliced": lambda x: x.repeat_interleave(2, -1).repeat_interleave(3, 1)[:, 1::3, :, 1::2],
}
LABEL_LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def interpolate(logits, size):
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)


def plain(logits, labels, *, ignore_index=255, reduction="valid", weight=None, label_smoothing=0.0):
    """The loss as PyTorch computes it in float64."""
    scores, labels = interpolate(logits, labels.shape[1:]), labels.long()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    options["weight"] = None if weight is None else weight.double()
    if reduction == "all" or not (labels != ignore_index).any():
        return F.cross_entropy(scores, labels, reduction="sum", **options) / max(labels.numel(), 1)
    return F.cross_entropy(scores, labels, reduction="mean", **options)


def pixel_weights(labels, num_classes, *, ignore_index, reduction, weight, label_smoothing):
    """How much of the loss a pixel can be: what its errors are multiplied by."""
    labels, valid = labels.long(), labels.long() != ignore_index
    weight = torch.ones(num_classes, dtype=torch.float64) if weight is None else weight.double()
    own = weight[torch.where(valid, labels, 0)] * valid
    norm = own.sum() if reduction == "valid" else labels.numel()
    return ((1 - label_smoothing) * own + label_smoothing * weight.mean() * valid) / (norm if valid.any() else 1)


def assert_like_plain(logits, labels, **options):
    """Value and gradient are plain PyTorch's, up to the rounding of the type that sums are in.

    An error of one rounding in a score of 10,000 changes its probability by 10,000 roundings: errors are measured
    against the largest logit, times the share that a pixel has in the loss (value) or a logit in the pixel (gradient).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    options = {"ignore_index": 255, "reduction": "valid", "weight": None, "label_smoothing": 0.0} | options
    logits = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = plain(exact, labels, **options)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    loss = upsample_cross_entropy(logits, labels, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == wide
    assert loss.shape == ()
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    rounding = 16 * torch.finfo(wide).eps
    score_error = rounding * (1 + float(exact.detach().abs().max()) if exact.numel() else 1)
    pixels = pixel_weights(labels, logits.shape[1], **options)
    torch.testing.assert_close(loss.double(), expected, rtol=rounding, atol=score_error * float(pixels.sum()))
    if not exact.numel():
        return
    ones = torch.ones(len(logits), 1, *logits.shape[2:], dtype=torch.float64, requires_grad=True)
    (shares,) = torch.autograd.grad((interpolate(ones, labels.shape[1:])[:, 0] * pixels).sum(), ones)
    last_digit = torch.finfo(logits.dtype).eps if logits.dtype != wide else 0  # the gradient is rounded to it
    smallest = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    in_turn = torch.finfo(torch.float64).eps * labels.numel()  # plain PyTorch adds pixel after pixel
    tolerance = (score_error + in_turn) * shares + (rounding + last_digit) * expected_gradient.abs() + smallest
    error = (gradient.double() - expected_gradient).abs()
    assert (error <= tolerance).all(), f"gradient off by {(error / tolerance).max():.3g} times what rounding explains"


@st.composite
def logits(draw):
    """Class scores of any size, type and memory layout, small and large, about 0 and far from it."""
    shape = (draw(st.integers(0, 3)), draw(NUM_CLASSES), draw(SIZE), draw(SIZE))
    scale, offset = draw(st.sampled_from([0.0, 1.0, 30.0, 1e3])), draw(st.sampled_from([0.0, 0.0, 1e4, -1e4]))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = scale * torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values.to(dtype))


@st.composite
def labels_for(draw, num_classes, batch, ignore_index):
    """Label maps of any size, integer type and memory layout with no, some or only ignored pixels."""
    dtypes = [torch.int64, torch.int32, torch.int16, torch.uint8]
    dtype = draw(st.sampled_from(dtypes))
    limit = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, draw(FULL_SIZE), draw(FULL_SIZE))
    labels = torch.randint(0, min(num_classes, limit.max + 1), shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    if limit.min <= ignore_index <= limit.max:
        labels[ignored] = ignore_index
    return LABEL_LAYOUTS[draw(st.sampled_from(sorted(LABEL_LAYOUTS)))](labels.to(dtype))


@st.composite
def weights_for(draw, num_classes, dtype):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = 0.1 + 3 * torch.rand(num_classes, generator=generator)
    weight[torch.rand(num_classes, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0
    return weight.double() if dtype == torch.float64 else weight


@many
@given(st.data())
def test_loss_and_gradient_are_the_plain_ones(data):
    x = data.draw(logits())
    ignore_index = data.draw(st.sampled_from([max(255, x.shape[1]), -1, -100, x.shape[1]]))
    labels = data.draw(labels_for(x.shape[1], len(x), ignore_index))
    assert_like_plain(x, labels, ignore_index=ignore_index, reduction=data.draw(st.sampled_from(["valid", "all"])))


@many
@given(st.data())
def test_weighted_and_smoothed_loss_and_gradient_are_the_plain_ones(data):
    x = data.draw(logits())
    ignore_index = data.draw(st.sampled_from([max(255, x.shape[1]), -1, -100]))
    labels = data.draw(labels_for(x.shape[1], len(x), ignore_index))
    weight = data.draw(st.one_of(st.none(), weights_for(x.shape[1], x.dtype)))
    if weight is not None:
        valid = labels[labels.long() != ignore_index].long()
        assume(not valid.numel() or float(weight[valid].sum()) > 0)  # PyTorch gives NaN there
    smoothing, reduction = data.draw(st.sampled_from([0.0, 0.1, 1.0])), data.draw(st.sampled_from(["valid", "all"]))
    options = {"ignore_index": ignore_index, "reduction": reduction, "weight": weight, "label_smoothing": smoothing}
    assert_like_plain(x, labels, **options)


# Tiles have about 600,000 elements and 128 columns: these sizes make several of them, whole and in part.
LARGE = [
    ((1, 150, 9, 20), (70, 300)),
    ((1, 3, 5, 40), (333, 517)),
    ((2, 300, 3, 2), (129, 129)),
    ((1, 2, 60, 70), (40, 200)),
    ((1, 150, 40, 150), (20, 140)),
    ((1, 1000, 2, 3), (9, 257)),
    ((1, 7, 1, 1), (300, 300)),
    ((1, 2, 90, 400), (2, 3)),
]


@pytest.mark.parametrize(("shape", "size"), LARGE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"weight": True, "label_smoothing": 0.1, "reduction": "all"}])
def test_loss_of_many_tiles(shape, size, dtype, options):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 65535
    weight = torch.rand(shape[1], generator=generator).to(dtype) if "weight" in options else None
    assert_like_plain(logits, labels, **{**options, "weight": weight, "ignore_index": 65535})


@pytest.mark.parametrize("size", [(7, 11), (2, 3), (2, 9), (8, 1), (3, 4)])
@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_gradient_is_that_of_the_value(size, reduction, label_smoothing, is_weighted):
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, *size))
    labels[0, 0, 0] = 255
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64) if is_weighted else None
    options = {"reduction": reduction, "weight": weight, "label_smoothing": label_smoothing}
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, labels, **options), logits)


def assert_winners(logits, labels, size):
    """Labels are the lowest of the best classes, where rounding cannot have chosen among them."""
    scores = interpolate(logits, size)
    best, lowest = scores.max(1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    tolerance = 16 * torch.finfo(wide).eps * float(logits.double().abs().max()) if logits.numel() else 0
    chosen = scores.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    assert (best - chosen <= tolerance).all()
    clear = (scores >= (best - tolerance).unsqueeze(1)).sum(1) == 1
    torch.testing.assert_close(labels.long()[clear], lowest[clear])


@many
@given(st.data())
def test_label_map_is_the_plain_one(data):
    x, size = data.draw(logits()), (data.draw(FULL_SIZE), data.draw(FULL_SIZE))
    fitting = [torch.int64, torch.int32, torch.int16, None] + [torch.uint8] * (x.shape[1] <= 256)
    dtype = data.draw(st.sampled_from(fitting))
    labels = upsample_argmax(x, size, dtype=dtype)
    assert labels.shape == (len(x), *size)
    smallest = torch.uint8 if x.shape[1] <= 256 else torch.int16
    assert labels.dtype == (smallest if dtype is None else dtype)
    assert_winners(x, labels, size)


@many
@given(st.data())
def test_probability_is_the_softmax_of_the_winner(data):
    x, size = data.draw(logits()), (data.draw(FULL_SIZE), data.draw(FULL_SIZE))
    labels, probability = upsample_argmax(x, size, return_probability=True)
    assert probability.dtype == torch.promote_types(x.dtype, torch.float32)
    assert labels.dtype == torch.int64
    assert_winners(x, labels, size)
    expected = interpolate(x, size).softmax(1).amax(1)
    error = 16 * torch.finfo(probability.dtype).eps * (1 + float(x.double().abs().max()) if x.numel() else 1)
    torch.testing.assert_close(probability.double(), expected, rtol=min(error, 0.1), atol=error)
    assert (probability <= 1).all()


@pytest.mark.parametrize(("shape", "size"), LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_map_of_many_tiles(shape, size, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels, probability = upsample_argmax(x, size, return_probability=True)
    assert_winners(x, labels, size)
    assert_winners(x, upsample_argmax(x, size, dtype=None), size)
    expected = interpolate(x, size).softmax(1).amax(1)
    torch.testing.assert_close(probability.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 150, 257])
@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (16, 16)), ((3, 9), (24, 18)), ((8, 4), (8, 8)), ((8, 16), (4, 4))]
)
@pytest.mark.parametrize("return_probability", [False, True])
def test_ties_go_to_the_lowest_class(num_classes, grid, size, return_probability):
    """With small whole numbers and these ratios every sum is exact, so that ties are ties in any order of sums."""
    logits = torch.randint(-2, 3, (2, num_classes, *grid), generator=torch.Generator().manual_seed(0)).float()
    scores = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    classes = torch.arange(num_classes).view(1, -1, 1, 1).expand_as(scores)
    lowest = torch.where(scores == scores.amax(1, keepdim=True), classes, num_classes).amin(1)
    result = upsample_argmax(logits, size, return_probability=return_probability)
    torch.testing.assert_close(result[0] if return_probability else result, lowest)
