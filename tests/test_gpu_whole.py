"""On an NVIDIA GPU: published values, whole trainings, graphs, memory. `pytest -m gpu` runs these."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parity import as_map, assert_parity, levels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from segheads import HEADS, create_model, from_reference
from segheads.functional import mean_shift, upsample, upsample_argmax, upsample_cross_entropy

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("SEGHEADS_GPU_TESTS_ON", "cuda")
MEASURES = pytest.mark.skipif(DEVICE == "cpu", reason="the CPU's memory is not counted")
RECIPE = Path(__file__).parents[1] / "recipes" / "meanshifter_ade20k.py"
PARITY = 1e-4


@pytest.fixture(autouse=True)
def _exact_products():
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize(
    ("file", "source", "kind"),
    [
        ("linear__fcn_head", "meanshifter", "logits"),
        ("linear__segm_decoder", "segmenter", "logits"),
        ("mean_shift__dms_equal", "meanshifter", "layers_1"),
        ("mean_shift__dms_equal", "meanshifter", "layers_3"),
        ("mean_shift__dms_larger", "meanshifter", "layers_2"),
        ("mean_shift__dms_smaller", "meanshifter", "layers_2"),
        ("mask_transformer_segm__l1_same", "segmenter", "masks"),
        ("mask_transformer_segm__l2_proj", "segmenter", "masks"),
        ("mask_transformer_mmseg__l1_same", "mmseg_segmenter", "masks"),
        ("mask_transformer_mmseg__l2_proj", "mmseg_segmenter", "masks"),
    ],
)
def test_a_head_gives_the_published_values(golden, file, source, kind):
    vectors = golden(file)
    sizes = {"num_heads": vectors.config.get("n_heads") or vectors.config.get("num_heads")}
    if kind.startswith("layers_"):
        sizes = {"num_layers": int(kind[-1])}
    head = from_reference(vectors.tensors("state."), source, **sizes).eval().to(DEVICE)
    x = as_map(vectors).to(DEVICE).requires_grad_()
    found = head(x)
    assert_parity(found.cpu(), vectors[f"output.{kind}"], PARITY)
    prefix = f"grad.{kind}" if kind.startswith("layers_") else "grad"
    if not (of_input := vectors.tensors(f"{prefix}.input.")):
        return
    (found * vectors[f"cotangent.{kind}"].to(DEVICE)).sum().backward()
    (expected,) = of_input.values()
    assert_parity((x.grad if x.grad.shape == expected.shape else x.grad.flatten(2).mT).cpu(), expected, PARITY)
    gradients = vectors.tensors("state.") | vectors.tensors(f"{prefix}.state.")
    as_weights = from_reference(gradients, source, **sizes)
    for name, parameter in head.named_parameters():
        assert_parity(parameter.grad.cpu(), as_weights.get_parameter(name).detach(), PARITY)


@pytest.mark.parametrize("file", ["senformer_head__grad", "senformer_head__odd", "eps_probe__senformer_head"])
def test_an_ensemble_gives_the_published_values(golden, file):
    vectors = golden(file)
    sizes = {"num_heads": vectors.config["num_heads"], "num_layers": vectors.config["branch_depth"]}
    head = from_reference(vectors.tensors("state."), "senformer", **sizes).eval().to(DEVICE)
    x = [level.to(DEVICE).requires_grad_() for level in levels(vectors)]
    merged, *logits = head.predictions(x)
    assert_parity(4 * merged.exp().cpu(), vectors["output.ensemble"], PARITY)
    labels = vectors["input.label"][:, 0].long().to(DEVICE)
    classic = upsample_cross_entropy(merged, labels)
    of_learners = sum(upsample_cross_entropy(each, labels) for each in logits) / 4
    assert_parity(classic.cpu(), vectors["output.loss_classic"], PARITY)
    assert_parity(of_learners.cpu(), vectors["output.loss_seg"], PARITY)
    if vectors.tensors("grad.loss.input."):
        (classic + of_learners).backward()
        for i, level in enumerate(x):
            assert_parity(level.grad.cpu(), vectors[f"grad.loss.input.level_{i}"], PARITY)


@pytest.mark.parametrize(
    ("file", "source", "options"),
    [
        ("meanshifter_e2e__vit", "meanshifter", {"num_layers": 2}),
        ("segmenter_e2e__linear", "segmenter", {"img_size": (64, 64)}),
        ("segmenter_e2e__mask", "segmenter", {"img_size": (64, 64)}),
    ],
)
def test_a_model_gives_the_published_values(golden, file, source, options):
    vectors = golden(file)
    model = from_reference(vectors.tensors("state."), source, num_heads=2, **options).eval().to(DEVICE)
    with torch.no_grad():
        for size in (size for size in vectors.config["sizes"] if size != "quirk_same_count"):
            found = model(vectors[f"input.image_{size}"].to(DEVICE))
            assert_parity(found.cpu(), vectors[f"output.logits_{size}"], PARITY)


@pytest.mark.parametrize("path", ["kernels", "tiles"])
@pytest.mark.parametrize("case", ["small", "odd", "k150"])
def test_the_published_loss(golden, monkeypatch, case, path):
    monkeypatch.setenv("SEGHEADS_TRITON", "1" if path == "kernels" else "0")
    vectors = golden("segm_loss")
    logits = vectors[f"input.{case}.logits"].to(DEVICE).requires_grad_()
    labels = vectors[f"input.{case}.label"].long().to(DEVICE)
    loss = upsample_cross_entropy(logits, labels)
    loss.backward()
    assert_parity(loss.cpu(), vectors[f"output.{case}.loss"], PARITY)
    assert_parity(logits.grad.cpu(), vectors[f"grad.{case}.logits"], PARITY)


class Whole(torch.nn.Module):
    """Logits, loss and label map of a head."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x, labels):
        logits = self.head(x)
        return logits, self.head.loss(x, labels, upsample_cross_entropy), upsample_argmax(logits, labels.shape[1:])


@pytest.mark.parametrize(
    ("name", "channels"), [("mean_shift", 192), ("mean_shift", 384), ("mask_transformer", 96), ("linear", 96)]
)
def test_a_compiled_head_is_one_graph_and_gives_the_same(name, channels):
    torch.manual_seed(0)
    torch._dynamo.reset()
    whole = Whole(HEADS[name](channels, 7)).eval().to(DEVICE)
    compiled = torch.compile(whole, fullgraph=True)
    x, labels = torch.randn(2, channels, 12, 16, device=DEVICE), torch.randint(7, (2, 96, 128), device=DEVICE)
    *found, label_map = compiled(x, labels)
    gradients = torch.autograd.grad(found[1], whole.parameters(), allow_unused=True)
    *expected, _ = whole(x, labels)
    of_whole = torch.autograd.grad(expected[1], whole.parameters(), allow_unused=True)
    for ours, plain in zip([*found, *gradients], [*expected, *of_whole], strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            assert_parity(ours.detach(), plain.detach(), 1e-3)
    best, second = upsample(expected[0].detach(), labels.shape[1:]).topk(2, dim=1).values.unbind(1)
    clear = best - second > 1e-3
    assert torch.equal(label_map[clear], whole(x, labels)[2][clear])


def small_model(head, **options):
    torch.manual_seed(0)
    return create_model("test_vit", head, 5, pretrained=False, **options).to(DEVICE)


def batch(seed, size=160):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, size, size, generator=generator)
    return images.to(DEVICE), torch.randint(5, (2, size, size), generator=generator).to(DEVICE)


def loss_and_gradients(model, parameters, images, labels):
    model.zero_grad()
    loss = model(images, labels)
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in parameters if p.grad is not None)]


@pytest.mark.parametrize("head", ["mean_shift", "mask_transformer"])
def test_cuda_graphs_train_alike(head):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_model(head).eval()  # no drop path, which would draw other numbers
    replayed = copy.deepcopy(model)
    compiled = torch.compile(replayed, mode="reduce-overhead")
    for seed in range(4):  # the first calls warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        found = loss_and_gradients(compiled, list(replayed.parameters()), *batch(seed))
        expected = loss_and_gradients(model, list(model.parameters()), *batch(seed))
        for ours, plain in zip(found, expected, strict=True):
            assert_parity(ours.detach(), plain.detach(), 1e-3)
    assert DEVICE == "cpu" or not counters["inductor"]["cudagraph_skips"]  # else nothing was recorded


def test_one_process_under_ddp_trains_alike(tmp_path):
    model = small_model("mean_shift").eval()
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model), device_ids=[0] if DEVICE == "cuda" else None)
        for seed in range(2):
            found = loss_and_gradients(wrapped, list(wrapped.parameters()), *batch(seed))
            expected = loss_and_gradients(model, list(model.parameters()), *batch(seed))
            for ours, plain in zip(found, expected, strict=True):
                assert_parity(ours, plain, 1e-5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("head", ["mean_shift", "mask_transformer"])
def test_two_trainings_give_the_same_bits(head):
    """Fused attention's own backward pass may add in any order; the rest must not."""

    def trained():
        model = small_model(head).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with sdpa_kernel(SDPBackend.MATH):
            for seed in range(3):
                optimizer.zero_grad()
                model(*batch(seed)).backward()  # of the backbone's own size: positions are not interpolated
                optimizer.step()
        return [*model.state_dict().values(), model.eval().predict(batch(5)[0])]

    for first, second in zip(trained(), trained(), strict=True):
        assert torch.equal(first, second)


def launched(command, *options):
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if DEVICE == "cpu" else {})
    whole = [sys.executable, "-m", *command, str(RECIPE), "--demo", "--tracker", "none", *options]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_demo_end_to_end(tmp_path, precision):
    launch = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launched([*launch, "--mixed_precision", precision], "--output", str(tmp_path))
    assert results(tmp_path)["mIoU"] > 0.65  # 0.734 on the CPU
    assert json.loads((tmp_path / "config.json").read_text())["environment"]["torch"] == torch.__version__


def test_a_run_under_ddp_gives_the_same(tmp_path):
    options = ["--iterations", "6", "--pictures", "0", "--log-every", "1", "--checkpoint-every", "0"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    launch = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    losses = []
    for name, command in (("alone", [*launch, "--mixed_precision", "no"]), ("ddp", torchrun)):
        launched(command, *options, "--output", str(tmp_path / name))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def added_memory(call):
    """Bytes that a call adds at its peak, the second time: the first loads what stays."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
    return torch.cuda.max_memory_allocated() - before


@MEASURES
def test_loss_and_label_map_take_a_fraction_of_the_plain_memory():
    """150 classes, batch 16, bf16."""
    size = (512, 512)
    logits = torch.randn(16, 150, 32, 32, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(150, (16, *size), device=DEVICE)

    def plain():
        return F.interpolate(logits, size, mode="bilinear")

    loss = added_memory(lambda: torch.autograd.grad(upsample_cross_entropy(logits, labels), logits))
    label_map = added_memory(lambda: upsample_argmax(logits, size))
    with torch.no_grad():
        assert label_map < 0.05 * added_memory(lambda: plain().argmax(1))
    assert loss < 0.03 * added_memory(lambda: torch.autograd.grad(F.cross_entropy(plain(), labels), logits))


@MEASURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [192, 384])
@pytest.mark.parametrize("is_map", [False, True])
def test_mean_shift_takes_linear_memory(channels, is_map, dtype):
    weight = (torch.randn(channels, channels, device=DEVICE) * channels**-0.5).to(dtype).requires_grad_()

    def of(side):
        shape = (1, channels, side, side) if is_map else (1, side * side, channels)
        x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        return added_memory(lambda: torch.autograd.grad(mean_shift(x, weight).sum(), (x, weight)))

    few, many = of(64), of(128)
    assert many < 5 * few
    assert many < 0.3 * 4 * 16_384**2  # bytes of the affinities in fp32
