import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from segheads import create_model
from segheads.training import create_optimizer, poly_learning_rate, set_learning_rate
from segheads.training.optimization import FUSED


@pytest.mark.parametrize("kind", ["mmseg", "segm", "senformer"])
def test_published_schedules(golden, kind):
    vectors = golden(f"schedule__{kind}")
    for run, config in vectors.config.items():
        rates = [
            poly_learning_rate(
                iteration,
                learning_rate=config["lr"],
                max_iterations=config.get("max_iters") or config["iter_max"],
                power=config["power"],
                min_learning_rate=config["min_lr"],
                warmup_iterations=config.get("warmup_iters") or config.get("iter_warmup") or 0,
                warmup_ratio=config.get("warmup_ratio", 0.0),
                warmup="segmenter" if kind == "segm" else "linear",
            )
            for iteration in vectors[f"input.{run}.iteration"].tolist()
        ]
        expected = vectors[f"output.{run}.lr"]
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-12, atol=1e-18)


def test_bad_iterations_are_named():
    with pytest.raises(ValueError, match="got -1 of 10"):
        poly_learning_rate(-1, learning_rate=1.0, max_iterations=10)


def test_optimizers_by_timms_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    momentum, nesterov = (create_optimizer(model, name, **options) for name in ("momentum", "sgd"))
    assert [group["nesterov"] for group in momentum.param_groups] == [False, False]
    assert [group["nesterov"] for group in nesterov.param_groups] == [True, True]
    decayed = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in momentum.param_groups}
    assert decayed == {0.0: 4 + 4 + 4, 0.5: 12}
    adamw = create_optimizer(model, "adamw", **options)
    adamw.param_groups[0]["lr_scale"] = 0.1
    set_learning_rate(adamw, 0.5)
    assert [group["lr"] for group in adamw.param_groups] == [0.05, 0.5]


def grouped(model, **options):
    """Names, decay and lr_scale of each parameter group."""
    defaults = {"learning_rate": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    optimizer = create_optimizer(model, "adamw", **{**defaults, **options})
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        (group["weight_decay"], group["lr_scale"]): {name_of[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }, optimizer


def test_norms_biases_positions_tokens_and_class_embeddings_are_not_decayed():
    model = create_model("test_vit", "mask_transformer", 5, pretrained=False)
    groups, _ = grouped(model)
    assert groups.keys() == {(0.0, 1.0), (0.5, 1.0)}
    spared, decayed = groups[0.0, 1.0], groups[0.5, 1.0]
    of_several_axes = {name for name, p in model.named_parameters() if name in spared and p.ndim > 1}
    assert of_several_axes == {"backbone.model.pos_embed", "backbone.model.cls_token", "head.class_embeddings"}
    assert "head.mask_norm.weight" in spared
    assert "head.project.bias" in spared
    assert {"head.project.weight", "backbone.model.patch_embed.proj.weight"} <= decayed
    assert spared | decayed == {name for name, p in model.named_parameters() if p.requires_grad}


class Tables(nn.Module):
    """Names timm's conventions do not list, a part that lists its own, and a tied parameter under two names."""

    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 2))
        self.reg_token = nn.Parameter(torch.zeros(1, 1, 2))
        part = Part()
        self.alias = nn.Module()  # comes first, so that the parameter goes by this name
        self.alias.weight = part.special
        self.part = part
        self.weight = nn.Parameter(torch.zeros(2, 2))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.special = nn.Parameter(torch.zeros(2, 2))
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self):
        return {"special"}


def test_what_parts_list_and_known_names_are_not_decayed():
    groups, _ = grouped(Tables())
    assert groups[0.0, 1.0] == {"relative_position_bias_table", "reg_token", "alias.weight"}
    assert groups[0.5, 1.0] == {"part.weight", "weight"}


def test_swins_tables_are_not_decayed():
    model = create_model("swin_tiny_patch4_window7_224", "linear", 3, pretrained=False, pyramid=None)
    groups, _ = grouped(model)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 12
    assert tables <= groups[0.0, 1.0]


def test_the_backbone_learns_more_slowly_and_what_is_frozen_not_at_all():
    model = create_model("test_resnet", "linear", 3, pretrained=False, pyramid=None)
    frozen = next(name for name, p in model.named_parameters() if p.ndim == 4 and p.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)
    groups, optimizer = grouped(model, backbone_lr_scale=0.1)
    assert groups.keys() == {(0.0, 0.1), (0.0, 1.0), (0.5, 0.1), (0.5, 1.0)}
    assert groups[0.0, 1.0] | groups[0.5, 1.0] == {name for name, _ in model.named_parameters() if "head." in name}
    assert all(name.startswith("backbone.") for name in groups[0.0, 0.1] | groups[0.5, 0.1])
    assert not any(frozen in names for names in groups.values())
    by_scale = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert by_scale == {0.1: pytest.approx(0.01), 1.0: pytest.approx(0.1)}
    set_learning_rate(optimizer, 0.5)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {0.1: 0.05, 1.0: 0.5}


def test_without_decay_there_is_one_group_in_the_models_order():
    """As timm makes it, so that checkpoints of earlier versions load."""
    model = create_model("test_vit", "linear", 3, pretrained=False)
    _, optimizer = grouped(model, weight_decay=0.0)
    (group,) = optimizer.param_groups
    expected = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert list(map(id, group["params"])) == list(map(id, expected))


def test_optimizers_that_cannot_be_are_named():
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    with pytest.raises(
        ValueError, match=r"backbone_lr_scale .* 1 where the model has no backbone; got 0.1 for a Linear"
    ):
        create_optimizer(nn.Linear(2, 2), "adamw", backbone_lr_scale=0.1, **options)
    with pytest.raises(ValueError, match=r"backbone_lr_scale must be 0 or more.* got -1"):
        create_optimizer(Tables(), "adamw", backbone_lr_scale=-1, **options)
    with pytest.raises(ValueError, match="parameters that require a gradient; Linear has none"):
        create_optimizer(nn.Linear(2, 2).requires_grad_(False), "adamw", **options)
    with pytest.raises(ValueError, match="nonsense"):
        create_optimizer(nn.Linear(2, 2), "nonsense", **options)


def test_layers_towards_the_images_learn_more_slowly():
    """As in BEiT and MMSegmentation: the last block has the decay once, the head none."""
    model = create_model("test_vit", "linear", 3, pretrained=False)
    groups, optimizer = grouped(model, layer_decay=0.5, backbone_lr_scale=0.1)
    scale_of = {name: scale for (_, scale), names in groups.items() for name in names}
    for name, scale in scale_of.items():
        part = name.removeprefix("backbone.model.").split(".")
        away = 6 - int(part[1]) if part[0] == "blocks" else {"head": 0, "norm": 1}.get(part[0], 7)
        assert scale == pytest.approx(0.5**away * (1 if part[0] == "head" else 0.1)), name
    assert scale_of.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    set_learning_rate(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["lr_scale"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "csatv2"])
def test_layers_of_other_families(name):
    model = create_model(
        name, "linear", 3, pretrained=False, backbone_kwargs={"in_chans": 4 if name == "csatv2" else 3}
    )
    groups, _ = grouped(model, layer_decay=0.5)
    scales = {scale for _, scale in groups}
    assert max(scales) == 1.0
    assert len(scales) >= 5
    assert scales == {0.5**k for k in range(len(scales))}
    first = next(n for n, p in model.named_parameters() if p.requires_grad)
    assert first in groups.get((0.5, min(scales)), set()) | groups.get((0.0, min(scales)), set())


@pytest.mark.parametrize(
    ("layer_decay", "options", "message"),
    [
        (0.0, {}, "^layer_decay must be above 0 and at most 1, which decays nothing; got 0.0$"),
        (1.5, {}, "^layer_decay must be above 0 .* got 1.5$"),
        (0.5, {"freeze_backbone": True}, "^layer_decay must be 1 where test_vit is frozen; got 0.5$"),
    ],
)
def test_decays_that_cannot_be(layer_decay, options, message):
    model = create_model("test_vit", "linear", 3, pretrained=False, **options)
    with pytest.raises(ValueError, match=message):
        grouped(model, layer_decay=layer_decay)
    with pytest.raises(ValueError, match="^layer_decay must be .*1 where the model has no backbone|above 0"):
        grouped(nn.Linear(2, 2), layer_decay=layer_decay)


@pytest.mark.parametrize(
    "name", ["adamw", "lion", "lamb", "adan", "adafactor", "adopt", "muon", "rmsprop", "nesterov", "lookahead_adamw"]
)
def test_timms_optimizers_lower_a_loss(name):
    model = convolutions()
    optimizer = create_optimizer(model, name, learning_rate=0.01, weight_decay=0.01, momentum=0.9)
    images = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        loss = (model(images) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_momentum_reaches_all_that_have_it():
    optimizer = create_optimizer(convolutions(), "nesterovw", learning_rate=0.1, weight_decay=0.0, momentum=0.7)
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adanw2", "^optimizer must be one of timm's .* but is 'adanw2'; did you mean adanw,"),
        ("zzz", r"but is 'zzz'; timm\.optim\.list_optimizers\(\) shows all$"),
        ("adahessian", "^optimizer adahessian needs second derivatives"),
        ("bnbadam", "^optimizer bnbadam needs a GPU and the package bitsandbytes"),
    ],
)
def test_optimizers_that_do_not_run_here(name, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(convolutions(), name, learning_rate=0.1, weight_decay=0.0, momentum=0.9)


OPTIONS = {"learning_rate": 0.1, "weight_decay": 0.01, "momentum": 0.9}


def convolutions(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(memory_format=memory_format)


def updates(model, optimizer, start, end):
    for iteration in range(start, end):
        images = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(iteration))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", sorted(FUSED))
def test_fused_is_the_same_optimizer(name):
    models = [convolutions() for _ in range(2)]
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = create_optimizer(model, name, fused=fused, **OPTIONS)
        assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)
        updates(model, optimizer, 0, 5)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_what_has_no_fused_kernel_goes_without():
    assert "fused" not in create_optimizer(convolutions(), "lion", **OPTIONS).defaults
    assert not create_optimizer(convolutions().to("meta"), "adamw", **OPTIONS).defaults["fused"]


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("earlier_fused", [False, True])
@pytest.mark.parametrize("earlier_format", [torch.contiguous_format, torch.channels_last])
def test_a_state_of_another_kind_is_gone_on_with(name, earlier_fused, earlier_format):
    """Not fused, as of earlier versions; of weights in another memory format, which fused kernels do not look for."""
    earlier, whole, resumed = convolutions(earlier_format), convolutions(), convolutions(torch.channels_last)
    before = create_optimizer(earlier, name, fused=earlier_fused, **OPTIONS)
    updates(earlier, before, 0, 3)
    state = copy.deepcopy(before.state_dict())
    resumed.load_state_dict(earlier.state_dict())
    optimizer = create_optimizer(resumed, name, **OPTIONS)
    optimizer.load_state_dict(state)
    assert all(group["fused"] for group in optimizer.param_groups)
    updates(resumed, optimizer, 3, 6)
    updates(whole, create_optimizer(whole, name, fused=False, **OPTIONS), 0, 6)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("clips", [False, True])
def test_fused_under_a_gradient_scaler(name, clips):
    """The scaler of fp16, whose first steps overflow: skipped, without a trace in momentum or weights."""
    Accelerator(cpu=True)
    weights = []
    for fused in (True, False):
        model, scaler = convolutions(), torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2)
        inner = create_optimizer(model, name, fused=fused, **OPTIONS)
        optimizer = AcceleratedOptimizer(inner, scaler=scaler)
        for iteration, factor in enumerate((1e38, 1.0, 1.0, 1e38, 1.0)):
            images = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(iteration))
            junk = [torch.full_like(p, torch.nan) for p in model.parameters()]
            del junk  # what was not written is likely to be this
            before = copy.deepcopy(model.state_dict())
            scaler.scale(factor * model(images).square().mean()).backward()
            if clips:
                scaler.unscale_(inner)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            still = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert still == (factor > 1)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights)
