"""On an NVIDIA GPU: values, gradients, memory and waiting, against PyTorch in float64. `pytest -m gpu` runs these."""

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from segheads import HEADS, create_model
from segheads.data import PhotometricNormalize
from segheads.data.samples import EvaluationSamples
from segheads.data.scenes import Scenes
from segheads.evaluation import evaluate
from segheads.functional import bilinear, mean_shift, upsample_argmax, upsample_cross_entropy
from segheads.inference.predict import predict_labels
from segheads.inference.protocol import InferenceProtocol
from segheads.training import training_batches

pytestmark = pytest.mark.gpu
ON_GPU = os.environ.get("SEGHEADS_GPU_TESTS_ON", "cuda")
SIZES = [  # images, classes, grid, pixels
    (2, 150, (32, 32), (512, 512)),
    (1, 19, (128, 256), (1024, 2048)),
    (3, 21, (23, 31), (333, 500)),
    (4, 2, (128, 128), (512, 512)),
    (2, 171, (40, 40), (40, 40)),
    (2, 171, (21, 17), (165, 130)),
    (16, 19, (16, 16), (128, 128)),
    (1, 1000, (16, 16), (224, 224)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=["kernels", "tiles"])
def path(request, monkeypatch):
    monkeypatch.setenv("SEGHEADS_TRITON", "1" if request.param == "kernels" else "0")
    return request.param


def random_case(B, K, grid, size, dtype=torch.float32):
    generator = torch.Generator(ON_GPU).manual_seed(0)
    logits = 3 * torch.randn(B, K, *grid, generator=generator, device=ON_GPU)
    labels = torch.randint(K, (B, *size), generator=generator, device=ON_GPU)
    labels[torch.rand(labels.shape, generator=generator, device=ON_GPU) < 0.1] = -100
    return logits.to(dtype).requires_grad_(), labels


def relative_error(found, exact):
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.usefixtures("path")
def test_loss_and_gradient(case, dtype):
    logits, labels = random_case(*case, dtype)
    loss = upsample_cross_entropy(logits, labels, ignore_index=-100, weight=None, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss * labels.numel(), logits)
    exact = logits.detach().double().requires_grad_()
    scores = F.interpolate(exact, size=labels.shape[1:], mode="bilinear")
    expected = F.cross_entropy(scores, labels, ignore_index=-100, label_smoothing=0.1)
    (expected_gradient,) = torch.autograd.grad(expected * labels.numel(), exact)
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 5e-6
    assert relative_error(gradient, expected_gradient) < {4: 1e-5, 2: 4e-3}[dtype.itemsize]  # of rounding at the end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.usefixtures("path")
def test_label_map(case, dtype):
    logits, labels = random_case(*case, dtype)
    found, probability = upsample_argmax(logits, labels.shape[1:], return_probability=True)
    scores = F.interpolate(logits.detach().double(), size=labels.shape[1:], mode="bilinear")
    short = scores.amax(1) - scores.gather(1, found[:, None])[:, 0]  # of the best score; in 16 bits many are equal
    assert short.max() < 1e-5
    assert relative_error(probability, scores.softmax(1).amax(1)) < 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("path")
def test_a_single_class(dtype):
    logits, labels = random_case(2, 1, (8, 8), (64, 60), dtype)
    loss = upsample_cross_entropy(logits, labels, ignore_index=-100)
    (gradient,) = torch.autograd.grad(loss, logits)
    found, probability = upsample_argmax(logits, (64, 60), return_probability=True)
    for value, expected in ((loss, 0.0), (gradient, 0.0), (found, 0), (probability, 1.0)):
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (64, 64)], ids=str)
@pytest.mark.usefixtures("path")
def test_all_pixels_ignored(grid, dtype):
    logits, labels = random_case(2, 19, grid, (64, 64), dtype)
    loss = upsample_cross_entropy(logits, labels.fill_(-100), ignore_index=-100)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("path")
def test_any_strides(dtype):
    logits, labels = random_case(2, 19, (12, 20), (90, 150), dtype)

    def results(logits, labels):
        loss = upsample_cross_entropy(logits, labels, ignore_index=-100)
        return loss, *torch.autograd.grad(loss, logits), upsample_argmax(logits, (90, 150))

    expected, wide = results(logits, labels), logits.detach().repeat_interleave(2, dim=3)
    others = [
        logits.detach().contiguous(memory_format=torch.channels_last),
        logits.detach().mT.contiguous().mT,
        wide[..., ::2],
    ]
    of_labels = [labels.mT.contiguous().mT, labels.int(), labels.repeat_interleave(2, dim=1)[:, ::2]]
    for other, its_labels in zip(others, of_labels, strict=True):
        loss, gradient, label_map = results(other.requires_grad_(), its_labels)
        assert relative_error(loss, expected[0].double()) < 1e-6
        assert relative_error(gradient, expected[1].double()) < {4: 1e-5, 2: 4e-3}[dtype.itemsize]
        assert (label_map == expected[2]).float().mean() > 0.999  # two scores may be equal but for rounding


@pytest.mark.usefixtures("path")
def test_two_runs_give_the_same_bits():
    logits, labels = random_case(*SIZES[0])
    runs = []
    for _ in range(2):
        loss = upsample_cross_entropy(logits, labels, ignore_index=-100)
        runs.append((loss, *torch.autograd.grad(loss, logits), upsample_argmax(logits, (512, 512))))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_loss_adds_little_memory(path):
    logits, labels = random_case(8, *SIZES[0][1:])
    for _ in range(2):  # the first call loads what stays
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        upsample_cross_entropy(logits, labels, ignore_index=-100).backward()
        logits.grad = None
    most = 60e6 if path == "kernels" else 6 * 4 * bilinear.TILE_ELEMENTS_ELSEWHERE  # a tile is 64 MB
    assert torch.cuda.max_memory_allocated() - before < most  # the upsampled scores take 1,258 MB


def plain_shift(x, weight, kernel, num_layers):
    """The formulas of `mean_shift`, with their (N, N) matrix."""
    tokens, h = x.flatten(2).mT if x.ndim == 4 else x, 10**-0.5 if kernel == "cosine" else len(weight) ** 0.25
    for _ in range(num_layers):
        r = tokens @ weight.T
        if kernel == "cosine":
            r = F.normalize(r, dim=-1)
        alike = r @ r.mT
        if kernel == "gaussian":
            alike = alike - r.square().sum(-1)[:, None] / 2  # of the keys
        tokens = (alike / h**2).softmax(-1) @ tokens
    return tokens.mT.reshape(x.shape) if x.ndim == 4 else tokens


@pytest.mark.parametrize("kernel", ["dot", "gaussian", "cosine"])
@pytest.mark.parametrize("shape", [(2, 192, 32, 32), (2, 1024, 192), (1, 256, 33, 17), (1, 1000, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_shift(shape, kernel, dtype):
    channels = shape[1] if len(shape) == 4 else shape[2]
    generator = torch.Generator(ON_GPU).manual_seed(0)
    x = (torch.randn(shape, generator=generator, device=ON_GPU) / 2).to(dtype).requires_grad_()
    weight = torch.randn(channels, channels, generator=generator, device=ON_GPU) * channels**-0.5
    weight = weight.to(dtype).requires_grad_()
    found = mean_shift(x, weight, kernel=kernel, num_layers=2)
    exact_x, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    expected = plain_shift(exact_x, exact_weight, kernel, 2)
    grad = torch.randn(shape, generator=generator, device=ON_GPU)
    gradients = torch.autograd.grad(found, (x, weight), grad.to(dtype))
    expected_gradients = torch.autograd.grad(expected, (exact_x, exact_weight), grad.double())
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(found, expected) < limit
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, exact) < 10 * limit


def maps_for(name, device, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 24, 16 // n, 24 // n, generator=generator).to(device, dtype) for n in (1, 2, 4, 8)]
    return maps if HEADS[name].multi_level else maps[0]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_head_equals_itself_in_float64_on_the_cpu(name):
    torch.manual_seed(0)
    head = HEADS[name]([24] * 4 if HEADS[name].multi_level else 24, 7).eval()
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)  # what starts at zero would hide what is wrong
    labels = torch.randint(7, (2, 64, 96))

    def results(head, device, dtype):
        head.to(device, dtype).zero_grad()
        outputs = head.predictions(maps_for(name, device, dtype))
        sum(upsample_cross_entropy(output, labels.to(device)) for output in outputs).backward()
        return outputs[0].detach().cpu(), [p.grad.cpu() for p in head.parameters() if p.grad is not None]

    found, gradients = results(copy.deepcopy(head), ON_GPU, torch.float32)
    expected, exact_gradients = results(head, "cpu", torch.float64)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(flat(gradients), flat(exact_gradients)) < 1e-3  # a ReLU at zero may go either way


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors])


@pytest.mark.parametrize("head", ["mean_shift", "mask_transformer", "senformer"])
def test_autocast_trains_and_predicts(head):
    torch.manual_seed(0)
    backbone = "test_resnet" if head == "senformer" else "test_vit"
    model = create_model(backbone, head, 5, pretrained=False).eval()
    images, labels = torch.randn(2, 3, 96, 128), torch.randint(5, (2, 96, 128))
    expected = model(images, labels)
    model.to(ON_GPU).train()
    with torch.autocast(ON_GPU, torch.bfloat16):
        model(images.to(ON_GPU), labels.to(ON_GPU)).backward()
        loss = model.eval()(images.to(ON_GPU), labels.to(ON_GPU))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(loss.cpu(), expected, rtol=0.03, atol=0)
    for protocol in (InferenceProtocol(), InferenceProtocol(window=64, stride=48, scales=(0.5, 1.0), flip=True)):
        assert predict_labels(model, images[:1].to(ON_GPU), protocol).shape == (96, 128)


@pytest.mark.parametrize("head", ["mean_shift", "senformer"])
def test_a_step_does_not_wait(head):
    model = create_model("test_resnet", head, 5, pretrained=False).to(ON_GPU).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = torch.randn(2, 3, 96, 96, device=ON_GPU), torch.randint(5, (2, 96, 96), device=ON_GPU)
    for mode in ("default", "error"):  # the first step compiles and loads
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(images, labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("protocol", [InferenceProtocol(), InferenceProtocol(window=64, stride=48)], ids=str)
@pytest.mark.parametrize("metrics", [("iou",), ("iou", "calibration", "boundary")], ids=len)
def test_an_evaluated_image_does_not_wait(protocol, metrics):
    samples = EvaluationSamples(Scenes("val", size=(96, 128), length=6), (0.5,) * 3, (0.5,) * 3)
    model, accelerator = create_model("test_vit", "mean_shift", 12, pretrained=False).to(ON_GPU), Accelerator()
    waits = []
    for limit in (2, 2, 6):  # the first compiles and loads
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                evaluate(accelerator, model, samples, protocol, metrics=metrics, limit=limit)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchron" in str(warning.message) for warning in told))
    assert waits[1] == waits[2]  # those at the end alone


def test_batches_made_beside_the_step_are_those_of_the_cpu():
    def handed_over(device):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            yield {
                "image": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator).to(device),
                "labels": torch.randint(5, (2, 64, 64), dtype=torch.uint8, generator=generator).to(device),
                "distortion": torch.tensor([[10.0, 1.2, 1.0, 0.7, 12.0]] * 2, device=device),
                "valid": torch.tensor([[64, 64], [40, 64]], device=device),
                "given": (torch.rand(2, 64, 64, generator=generator) < 0.5).to(device),
            }

    half = (0.5, 0.5, 0.5)
    ours, expected = (
        training_batches(handed_over(device), PhotometricNormalize(half, half).to(device)) for device in (ON_GPU, "cpu")
    )
    for found, exact in zip(ours, expected, strict=True):
        difference = (found[0].cpu() - exact[0]).abs()
        assert difference.max() < 0.2  # a level of 8 bits may round the other way, and move the hue
        assert difference.mean() < 1e-3
        torch.testing.assert_close(found[1].cpu(), exact[1])
