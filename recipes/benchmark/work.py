"""What `recipes/benchmark` runs: for each kind of row the functions of both sides, and the inputs that they share."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import plain
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segheads import SegmentationModel, create_model
from segheads.functional import mean_shift, upsample_argmax, upsample_cross_entropy
from segheads.heads import HEADS
from segheads.inference.predict import predict_labels
from segheads.inference.protocol import InferenceProtocol

IGNORED = 255
FORWARD_AND_BACKWARD = 3  # times the multiply-adds of a forward pass


@dataclass(frozen=True)
class Setup:
    """Where a row is measured."""

    device: str = "cpu"
    dtype: str = "float32"  # of tensors; models keep fp32 weights and run under autocast where it is narrower
    quick: bool = False  # tiny sizes and models, for tests
    gpu_memory: float | None = None  # GB that the largest batch may take; None means all

    @property
    def type(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def is_narrow(self) -> bool:
        """Whether models run under autocast."""
        return self.type in (torch.bfloat16, torch.float16)

    def autocast(self) -> AbstractContextManager:
        """The context in which models run."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.type if self.is_narrow else None, enabled=self.is_narrow)


@dataclass
class Work:
    """The two sides of a row, and more that is told beside them."""

    functions: dict[str, Callable[..., Any]]  # "plain", "ours", and "backbone" where it is the limit
    run: Callable[[str, Callable[..., Any], Any], Any]  # (side, function, inputs): one call, with its backward pass
    inputs: Any
    tiny_inputs: Any  # the same kind, small: they load kernels, and compile what is compiled for any size
    limit: str  # what cannot be avoided, in words
    least: dict[str, float] = field(default_factory=dict)  # and in numbers, see `measure.seconds_at_best`

    def call(self, side: str, *, tiny: bool = False) -> Any:
        """Run one side once."""
        return self.run(side, self.functions[side], self.tiny_inputs if tiny else self.inputs)

    def compile(self, is_model: bool = False) -> None:
        """Add the side "compiled", which is plain's, and of models "ours compiled"."""
        self.functions["compiled"] = torch.compile(self.functions["plain"], dynamic=False)
        if is_model:
            self.functions["ours compiled"] = torch.compile(self.functions["ours"], dynamic=False)


def loss(setup: Setup, batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int]) -> Work:
    """Upsampling and cross-entropy, forward and backward."""

    def run(_side: str, function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> Any:
        logits, labels = inputs
        logits.grad = None
        result = function(logits, labels)
        result.backward()
        return result.detach(), logits.grad

    def inputs(batch: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return _logits(setup, batch, classes, grid).requires_grad_(), _labels(setup, batch, classes, size)

    made, ignored = inputs(batch, grid, size), _ignored(classes)
    scores = batch * classes * size[0] * size[1]
    return Work(
        {
            "plain": partial(plain.loss, ignore_index=ignored),
            "ours": partial(upsample_cross_entropy, ignore_index=ignored),
        },
        run,
        made,
        inputs(1, (4, 4), (16, 16)),
        f"{scores / 1e6:,.0f} M exponentials; the gradient, {made[0].nbytes / 1e6:.1f} MB",
        {"exponentials": scores, "bytes": 2 * made[0].nbytes + made[1].nbytes},
    )


def label_map(setup: Setup, batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int]) -> Work:
    """Upsampling and the best class; ours in the smallest integers that hold it."""

    @torch.no_grad()
    def run(_side: str, function: Callable[..., Tensor], inputs: tuple[Tensor, tuple[int, int]]) -> Tensor:
        return function(*inputs)

    logits, pixels = _logits(setup, batch, classes, grid), batch * size[0] * size[1]
    return Work(
        {"plain": plain.label_map, "ours": partial(upsample_argmax, dtype=None)},
        run,
        (logits, size),
        (_logits(setup, batch, classes, (4, 4)), (16, 16)),
        f"{classes * pixels / 1e6:,.0f} M comparisons; the labels, {pixels / 1e6:.1f} MB",
        {"comparisons": classes * pixels, "bytes": logits.nbytes + 8 * pixels},
    )


def shift(setup: Setup, batch: int, tokens: int, channels: int) -> Work:
    """One mean shift of tokens, forward and backward."""

    def run(_side: str, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Any:
        x, weight, grad = inputs
        x.grad = weight.grad = None
        result = function(x, weight)
        result.backward(grad)
        return result.detach(), x.grad, weight.grad

    def inputs(tokens: int) -> list[Tensor]:
        x, grad = (_random(setup, (batch, tokens, channels), seed) for seed in (0, 1))
        weight = _random(setup, (channels, channels), 2) * channels**-0.5
        return [x.requires_grad_(), weight.requires_grad_(), grad]

    flops = 14 * batch * tokens**2 * channels  # forward 4, backward 8, and 2 since the affinities are not kept
    results = 2 * batch * tokens * channels * setup.type.itemsize
    text = f"{flops / 1e9:,.0f} GFLOP; result and gradient, {results / 1e6:.0f} MB"
    functions = {"plain": plain.mean_shift, "ours": mean_shift}
    return Work(functions, run, inputs(tokens), inputs(min(64, tokens)), text, {"flops": flops})


def head(setup: Setup, name: str, *, trains: bool) -> Work:
    """A head on given features: forward, or forward, loss and backward as in training."""
    torch.manual_seed(0)
    build, K = HEADS[name], 5 if setup.quick else 150
    channels = 16 if setup.quick else 256 if build.multi_level else 192
    built: Any = build([channels] * 4 if build.multi_level else channels, K)
    built = _prepare(setup, built).train(trains)

    def inputs(size: int, batch: int) -> tuple[Any, Tensor]:
        strides = (4, 8, 16, 32) if build.multi_level else (16,)
        shapes = [(batch, channels, size // stride, size // stride) for stride in strides]
        maps = [_random(setup, shape, seed, narrow=False) for seed, shape in enumerate(shapes)]
        maps = [x.requires_grad_(trains) for x in maps]
        return maps if build.multi_level else maps[0], _labels(setup, batch, K, (size, size))

    def plain_side(x: Any, labels: Tensor) -> Tensor:
        outputs = plain.predictions(built, x)
        return plain.head_loss(outputs, lambda logits: plain.loss(logits, labels)) if trains else outputs[0]

    def our_side(x: Any, labels: Tensor) -> Tensor:
        if not trains:
            return built(x)
        return plain.head_loss(built.predictions(x), lambda logits: upsample_cross_entropy(logits, labels))

    def run(_side: str, function: Callable[..., Tensor], inputs: tuple[Any, Tensor]) -> Any:
        torch.manual_seed(0)  # dropout
        if not trains:
            with torch.no_grad(), setup.autocast():
                return function(*inputs)
        x = inputs[0]
        leaves = [*(x if build.multi_level else [x]), *built.parameters()]
        return _forward_and_backward(setup, function, inputs, leaves)

    made = inputs(64 if setup.quick else 512, 2)
    flops = _count_flops(built, made[0]) * (FORWARD_AND_BACKWARD if trains else 1)
    functions: dict[str, Callable[..., Any]] = {"ours": our_side}
    if trains or plain.has_plain_forward(built):
        functions = {"plain": plain_side, **functions}
    return Work(functions, run, made, inputs(64, 2), f"{flops / 1e9:,.1f} GFLOP", {"flops": flops})


def step(setup: Setup, name: str, batch: int, *, shared_block: bool = True) -> Work:
    """A training step of a whole model: loss, gradients, update of the weights."""
    model = build_model(setup, name, shared_block=shared_block).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers: dict[str, torch.optim.Optimizer] = {}  # made when needed: each has its own state

    def optimizer(side: str) -> torch.optim.Optimizer:
        if side not in optimizers:
            fused = True if side.startswith("ours") else None
            if name != "senformer":
                optimizers[side] = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, fused=fused)
            else:
                optimizers[side] = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-4, fused=fused)
        return optimizers[side]

    def backbone(images: Tensor, _labels: Tensor) -> Tensor:
        return torch.stack([x.float().sum() for x in model.backbone(images)]).sum()

    def run(side: str, function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> Any:
        torch.manual_seed(0)  # dropout
        result = _forward_and_backward(setup, function, inputs, weights)
        if side != "backbone":
            optimizer(side).step()
        return result

    def inputs(size: int, batch: int) -> tuple[Tensor, Tensor]:
        images = _random(setup, (batch, 3, size, size), 0, narrow=False)
        return images, _labels(setup, batch, model.num_classes, (size, size))

    def plain_side(images: Tensor, labels: Tensor) -> Tensor:
        return plain.model_loss(model, images, labels)

    functions: dict[str, Callable[..., Any]] = {"plain": plain_side, "ours": model, "backbone": backbone}
    made = inputs(64 if setup.quick else 512, batch)
    return Work(functions, run, made, inputs(64, min(batch, 2)), "the backbone's own forward and backward")


def evaluation(setup: Setup) -> Work:
    """The label map of one image from sliding windows."""
    model = build_model(setup, "mean_shift").eval()

    def run(_side: str, function: Callable[..., Tensor], inputs: tuple[Tensor, int, int]) -> Tensor:
        with torch.inference_mode(), setup.autocast():
            return function(*inputs)

    def plain_side(image: Tensor, window: int, stride: int) -> Tensor:
        return plain.slide_inference(model, image, window, stride)

    def our_side(image: Tensor, window: int, stride: int) -> Tensor:
        return predict_labels(model, image, InferenceProtocol(window=window, stride=stride))

    def backbone(image: Tensor, window: int, _stride: int) -> list[Tensor]:
        return model.backbone(torch.cat([image[..., :window], image[..., -window:]]))

    def inputs(scale: int) -> tuple[Tensor, int, int]:
        return _random(setup, (1, 3, 512 // scale, 683 // scale), 0, narrow=False), 512 // scale, 480 // scale

    functions = {"plain": plain_side, "ours": our_side, "backbone": backbone}
    return Work(functions, run, inputs(8 if setup.quick else 1), inputs(8), "the backbone's own forward of two windows")


def build_model(setup: Setup, name: str, *, shared_block: bool = True) -> SegmentationModel:
    """The MeanShifter on ViT-Ti/16, Segmenter on ViT-S/16, or SenFormer on ResNet-50; random weights."""
    torch.manual_seed(0)
    K = 5 if setup.quick else 150
    if name == "mean_shift":
        backbone = "test_vit" if setup.quick else "vit_tiny_patch16_384"
        model = create_model(backbone, "mean_shift", K, pretrained=False, loss_reduction="all")
    elif name == "segmenter":
        backbone = "test_vit" if setup.quick else "vit_small_patch16_384"
        model = create_model(backbone, "mask_transformer", K, pretrained=False)
    else:
        width = 16 if setup.quick else 512
        model = create_model(
            "test_resnet" if setup.quick else "resnet50",
            "senformer",
            K,
            pretrained=False,
            pyramid_kwargs={"out_channels": width},
            head_kwargs={"learner_kwargs": {"shared_block": shared_block}},
            auxiliary_weight=0.4,
            auxiliary_kwargs={"channels": width},
        )
    return _prepare(setup, model)


def _prepare(setup: Setup, module: Any) -> Any:
    """The module where it is to run; class embeddings that start at zero would make all classes the same."""
    for name, parameter in module.named_parameters():
        if name.endswith("class_embeddings"):
            torch.nn.init.normal_(parameter, std=0.02)
    return module.to(setup.device, None if setup.is_narrow else setup.type)


def _forward_and_backward(
    setup: Setup, function: Callable[..., Tensor], inputs: Sequence[Any], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    for leaf in leaves:
        leaf.grad = None
    with setup.autocast():
        result = function(*inputs)
    result.backward()
    return result.detach(), [leaf.grad for leaf in leaves]


def _random(setup: Setup, shape: tuple[int, ...], seed: int, *, narrow: bool = True) -> Tensor:
    dtype = setup.type if narrow or not setup.is_narrow else torch.float32
    return torch.randn(shape, generator=_generator(setup, seed), device=setup.device).to(dtype)


def _generator(setup: Setup, seed: int) -> torch.Generator:
    return torch.Generator(setup.device).manual_seed(seed)


def _logits(setup: Setup, batch: int, classes: int, grid: tuple[int, int]) -> Tensor:
    return 3 * _random(setup, (batch, classes, *grid), 0)


def _labels(setup: Setup, batch: int, classes: int, size: tuple[int, int]) -> Tensor:
    """Patches of one class, a tenth of them ignored."""
    generator = _generator(setup, 1)
    shape = (batch, 1, -(-size[0] // 8), -(-size[1] // 8))
    patches = torch.randint(classes, shape, generator=generator, device=setup.device)
    patches[torch.rand(shape, generator=generator, device=setup.device) < 0.1] = _ignored(classes)
    return F.interpolate(patches.float(), size=size).long()[:, 0]


def _ignored(classes: int) -> int:
    """A label that is no class."""
    return IGNORED if classes <= IGNORED else -100


def _count_flops(head: Any, x: Any) -> int:
    """Floating-point operations of a head's forward pass, on a copy without memory."""
    shadow, counter = copy.deepcopy(head).to("meta").eval().requires_grad_(False), FlopCounterMode(display=False)
    maps = [y.detach().to("meta") for y in x] if isinstance(x, list) else x.detach().to("meta")
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # fused kernels of the CPU are not counted
        shadow(maps)
    return counter.get_total_flops()
