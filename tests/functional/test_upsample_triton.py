"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a process of its own.

Triton decides whether to interpret when it is imported, so `test_in_the_interpreter` runs this file again with
TRITON_INTERPRET=1; without a GPU the tests of the kernels skip outside that process.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segheads.functional import upsample_triton
from segheads.functional.upsample_triton import label_map, loss_and_gradient

INTERPRETED = upsample_triton.is_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernels = pytest.mark.skipif(
    bool(upsample_triton.obstacle(torch.device(DEVICE), torch.float32)), reason="runs in test_in_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are tested on the GPU")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def random_case(B, K, h, w, H, W, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, K, h, w, generator=generator)
    labels = torch.randint(0, K, (B, H, W), generator=generator)
    labels[torch.rand(B, H, W, generator=generator) < ignored] = 255 if K <= 255 else -100
    return logits.to(DEVICE), labels.to(DEVICE)


def random_weight(K):
    return 0.1 + torch.rand(K, generator=torch.Generator().manual_seed(K)).to(DEVICE)


def plain(logits, labels, weight=None, smoothing=0.0, ignore_index=255):
    """The loss and its gradient, by PyTorch, in float64."""
    logits = logits.double().requires_grad_()
    scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear")
    weight = None if weight is None else weight.double()
    loss = F.cross_entropy(
        scores, labels.long(), weight, ignore_index=ignore_index, reduction="sum", label_smoothing=smoothing
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def ours(logits, labels, weight=None, smoothing=0.0, ignore_index=255):
    """The same by the kernels."""
    K = logits.shape[1]
    label_weights, smoothing_weights = weight, None
    if smoothing:
        weight = torch.ones(K, device=logits.device) if weight is None else weight
        label_weights, smoothing_weights = (1 - smoothing) * weight, smoothing / K * weight
    return loss_and_gradient(logits, labels, label_weights, smoothing_weights, ignore_index, needs_gradient=True)


def assert_plain(logits, labels, **options):
    loss, gradient = ours(logits, labels, **options)
    expected_loss, expected_gradient = plain(logits, labels, **options)
    assert loss.dtype == gradient.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=1e-5)
    scale = max(float(expected_gradient.abs().max()), 1.0) if expected_gradient.numel() else 1.0
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=2e-6 * scale)
    assert gradient.is_contiguous()


SHAPES = [
    (2, 3, 2, 3, 8, 12),
    (1, 2, 4, 4, 4, 4),  # the size of the logits
    (1, 5, 7, 6, 3, 2),  # down
    (1, 4, 2, 9, 21, 4),  # up and down
    (1, 3, 1, 1, 1, 1),
    (1, 3, 1, 1, 5, 9),
    (2, 3, 3, 5, 1, 1),
    (1, 1, 2, 2, 5, 5),  # one class
    (1, 19, 3, 2, 10, 11),
    (1, 70, 1, 2, 3, 40),  # several blocks of classes, and a cell wider than the block
    (1, 3, 1, 2, 40, 70),  # many pixels in a cell, more columns than one program has
    (1, 1000, 1, 1, 1, 1),
]


@kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_the_plain_ones(shape):
    logits, labels = random_case(*shape)
    assert_plain(logits, labels, ignore_index=255 if shape[1] <= 255 else -100)


@kernels
@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 8, 12), (1, 33, 3, 2, 4, 5), (1, 2, 4, 4, 4, 4)])
@pytest.mark.parametrize(("weighted", "smoothing"), [(True, 0.0), (False, 0.1), (True, 0.3)])
def test_weights_and_smoothing(shape, weighted, smoothing):
    logits, labels = random_case(*shape)
    assert_plain(logits, labels, weight=random_weight(shape[1]) if weighted else None, smoothing=smoothing)


@kernels
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (2, 6, 4, 4, 11, 11))),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 1000),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_size(shape, weighted, smoothing, seed, ignored):
    logits, labels = random_case(*shape, seed=seed, ignored=ignored)
    weight = random_weight(shape[1]) if weighted else None
    assert_plain(logits, labels, weight=weight, smoothing=smoothing)
    assert_plain_label_map(logits, labels.shape[1:])


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_with_in_single(dtype):
    logits, labels = random_case(1, 5, 2, 3, 6, 7)
    if upsample_triton.obstacle(logits.device, dtype):
        pytest.skip("this GPU is too old for bfloat16")
    assert_plain(logits.to(dtype), labels)
    assert_plain_label_map(logits.to(dtype), (6, 7))


@kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_labels(dtype):
    logits, labels = random_case(1, 5, 2, 3, 6, 7)
    assert_plain(logits, labels.to(dtype))


@kernels
@pytest.mark.parametrize("ignore_index", [4, -100, -1])
def test_any_label_that_is_no_class_can_be_ignored(ignore_index):
    logits, labels = random_case(1, 4, 2, 2, 6, 6)
    labels[labels == 255] = ignore_index
    assert_plain(logits, labels, weight=random_weight(4), smoothing=0.1, ignore_index=ignore_index)


@kernels
def test_nothing_but_ignored_pixels_is_zero():
    logits, labels = random_case(2, 3, 2, 2, 5, 5, ignored=1.1)
    loss, gradient = ours(logits, labels, weight=random_weight(3), smoothing=0.1)
    assert loss.item() == 0
    assert not gradient.any()


@kernels
@pytest.mark.parametrize("wrong", [4, -1, 2**32 + 1])
def test_a_label_out_of_range_makes_nan(wrong):
    logits, labels = random_case(2, 4, 2, 2, 6, 6)
    labels[1, 0, 0] = wrong
    loss, gradient = ours(logits, labels)
    assert loss.isnan()
    assert gradient[1, :, 0, 0].isnan().all()
    assert gradient[0].isfinite().all()


@kernels
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_not_hidden(value):
    logits, labels = random_case(2, 4, 2, 2, 6, 6, ignored=0)
    logits[1, 2, 0, 1] = value
    loss, gradient = ours(logits, labels)
    assert not loss.isfinite()
    assert not gradient[1].isfinite().all()
    assert gradient[0].isfinite().all()


@kernels
def test_exponentials_of_large_scores_do_not_overflow():
    logits, labels = random_case(1, 4, 2, 2, 6, 6)
    results, expected = ours(1e4 * logits, labels), plain(1e4 * logits, labels)
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=5e-3)  # a score itself is that uncertain


@kernels
def test_exponentials_of_low_scores_do_not_underflow():
    logits, labels = random_case(1, 4, 2, 2, 6, 6)
    loss, _ = ours(logits - 200, labels)
    torch.testing.assert_close(loss.double(), plain(logits, labels)[0], rtol=1e-5, atol=0)
    _, probability = label_map(logits - 200, (6, 6), torch.uint8, return_probability=True)
    expected = F.interpolate(logits, size=(6, 6), mode="bilinear").softmax(1).amax(1)
    torch.testing.assert_close(probability, expected, rtol=1e-4, atol=0)


@kernels
def test_strides_do_not_matter():
    logits, labels = random_case(2, 4, 3, 2, 6, 7)
    expected = ours(logits, labels)
    strided = torch.stack([logits, logits], -1)[..., 1].to(memory_format=torch.channels_last)
    for other in (strided, logits.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(ours(other, labels.mT.contiguous().mT), expected, rtol=0, atol=0)


@kernels
@pytest.mark.parametrize("ratio", [1, 4])
def test_two_runs_give_the_same_bits(ratio):
    logits, labels = random_case(1, 5, 4, 4, 4 * ratio, 4 * ratio)
    torch.testing.assert_close(ours(logits, labels), ours(logits, labels), rtol=0, atol=0)


@kernels
def test_without_the_gradient_the_loss_is_the_same():
    logits, labels = random_case(1, 5, 2, 3, 7, 6)
    loss, gradient = loss_and_gradient(logits, labels, None, None, 255, needs_gradient=False)
    assert gradient is None
    torch.testing.assert_close(loss, ours(logits, labels)[0], rtol=0, atol=0)


@kernels
def test_no_images():
    logits, labels = random_case(0, 3, 2, 2, 4, 4)
    loss, gradient = ours(logits, labels)
    assert loss.item() == 0
    assert gradient.shape == (0, 3, 2, 2)
    found, probability = label_map(logits, (4, 4), torch.uint8, return_probability=True)
    assert found.shape == probability.shape == (0, 4, 4)


@kernels
def test_classes_shared_by_one_program(monkeypatch):
    monkeypatch.setattr(upsample_triton, "_PROGRAMS", 1)
    assert_plain(*random_case(1, 70, 2, 2, 5, 5))


@kernels
def test_wide_indices(monkeypatch):
    monkeypatch.setattr(upsample_triton, "_index_type", lambda *sizes: upsample_triton.tl.int64)
    logits, labels = random_case(1, 3, 2, 3, 5, 4)
    assert_plain(logits, labels)


@kernels
def test_sizes_whose_product_exceeds_32_bits():
    logits = torch.randn(1, 2, 1, 70_000).to(DEVICE)
    assert_plain_label_map(logits, (1, 16_000))


def assert_plain_label_map(logits, size):
    K = logits.shape[1]
    labels, probability = label_map(logits, size, torch.int64, return_probability=True)
    scores = F.interpolate(logits.double(), size=tuple(size), mode="bilinear")
    if K > 1:
        best, second = scores.topk(2, 1).values.unbind(1)
        labels = torch.where(best - second < 1e-5, scores.argmax(1), labels)
    torch.testing.assert_close(labels, scores.argmax(1))
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability.double(), scores.softmax(1).amax(1), rtol=2e-6, atol=1e-6)


@kernels
@pytest.mark.parametrize("shape", [(2, 5, 2, 3, 9, 13), (1, 3, 6, 7, 3, 4), (1, 19, 3, 2, 9, 70), (1, 300, 1, 1, 2, 3)])
def test_label_map_is_the_plain_one(shape):
    *shape, H, W = shape
    assert_plain_label_map(random_case(*shape, 1, 1)[0], (H, W))


@kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_map_has_the_type_asked_for(dtype):
    logits, _ = random_case(1, 200, 1, 2, 1, 1)
    logits[0, 199] += 50  # beyond what a signed byte holds
    labels, probability = label_map(logits, (2, 4), dtype, return_probability=False)
    torch.testing.assert_close(labels, torch.full((1, 2, 4), 199, dtype=dtype, device=DEVICE))
    assert probability is None


@kernels
def test_of_equal_scores_the_lowest_class_wins():
    logits, _ = random_case(1, 3, 2, 2, 1, 1)
    labels, _ = label_map(torch.cat([logits, logits], 1), (7, 5), torch.int64, return_probability=False)
    torch.testing.assert_close(labels, label_map(logits, (7, 5), torch.int64, return_probability=False)[0])


@pytest.mark.skipif(INTERPRETED, reason="the compiler is not the interpreter")
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_kernels_compile(capability):
    # The interpreter accepts what the compiler does not; this needs no GPU.
    if capability not in (75, 90) and not os.environ.get("SEGHEADS_ALL_GPUS"):
        pytest.skip("takes four seconds each; SEGHEADS_ALL_GPUS=1 builds for all")
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiles(kernel, pointers, constants, options):
        constants = constants | {name: None for name, kind in pointers.items() if kind is None}
        types = {name: pointers.get(name) or "i32" for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, constants)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]

    strip = {"INDEX": triton.language.int32, "ROWS": 4, "COLUMNS": 64}
    cell = {"INDEX": triton.language.int64, "ROWS": 2, "COLUMNS": 8, "CLASSES": 32}
    narrow = "*fp16" if capability < 80 else "*bf16"
    inputs = {"logits": narrow, "labels": "*u8", "label_weights": "*fp32", "smoothing_weights": "*fp32"}
    inputs |= {"everywhere": "*fp32", "lse_map": "*fp32"}
    for pointers in (inputs, inputs | dict.fromkeys(["label_weights", "smoothing_weights", "everywhere"])):
        loss, gradient = pointers | {"parts": "*fp32"}, pointers | {"gradient": "*fp32"}
        assert compiles(upsample_triton._loss_kernel, loss, strip, upsample_triton._STRIP)
        assert compiles(upsample_triton._gradient_kernel, gradient, cell, upsample_triton._CELL)
    for probability in (None, "*fp32"):
        pointers = {"logits": "*fp16", "labels": "*i16", "probability": probability}
        assert compiles(upsample_triton._label_kernel, pointers, strip, upsample_triton._STRIP)


@kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_no_other_types(dtype):
    assert "no kernels for" in upsample_triton.obstacle(torch.device(DEVICE), dtype)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves every device")
def test_not_on_the_cpu():
    pytest.importorskip("triton")
    assert upsample_triton.obstacle(torch.device("cpu"), torch.float32) == "the kernels are for NVIDIA GPUs"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves every device")
@pytest.mark.parametrize(
    ("capability", "dtype", "obstacle"),
    [
        ((7, 5), torch.float16, ""),
        ((8, 0), torch.bfloat16, ""),
        ((7, 5), torch.bfloat16, "compute capability 7.5 is below 8.0"),
        ((6, 1), torch.float32, "compute capability 6.1 is below 7.0"),
    ],
)
def test_gpus(monkeypatch, capability, dtype, obstacle):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert upsample_triton.obstacle(torch.device("cuda"), dtype) == obstacle


@pytest.mark.skipif(INTERPRETED, reason="it has a process of its own")
def test_without_triton_the_module_imports():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from segheads.functional import upsample_triton as u; "
        "print(u.obstacle(torch.device('cpu'), torch.float32), u.is_interpreted(), u.version())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "Triton is not installed False None", run.stderr
