"""Backbones: one architecture of every timm family, sizes, levels, norms, weights and what the errors show."""

import copy
import io
import json
import time

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from parity import assert_parity
from safetensors.torch import save_file
from testers import BackboneTester
from timm.layers import resample_abs_pos_embed
from timm.models._hub import save_for_hf
from torch import nn

from segheads import create_model
from segheads.backbones import TimmBackbone
from segheads.errors import PretrainedWeightsError

# Beyond the smallest architecture of each family: the exceptions of segheads.backbones.
EXCEPTIONS = [
    "resnet50_clip",
    "sehalonet33ts",
    "gemma4_vit_167m_enc",
    "vit_so400m_patch14_siglip_384",
    "deit_tiny_distilled_patch16_224",
]
SHALLOW = (  # large in every size that timm has
    *("beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m", "gemma4_vit_167m_enc", "qwen3_vit_88m"),
    *("naflexvit_base_patch16_parfac_gap", "samvit_base_patch16_224", "vit_so400m_patch14_siglip_384"),
)
# The smallest architecture of each of timm's model files, and the exceptions, by their strides.
STRIDES = {
    (2, 4, 8, 16, 32): """
        test_byobnet halonet_h1 test_coatnet cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c test_nfnet dpn48b
        ese_vovnet19b_slim_dw test_resnet test_efficientnet mobilenetv3_small_050 ghostnet_050 hardcorenas_b
        hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4 legacy_seresnet18 legacy_xception
        mobilenetv5_base mobilevit_xxs nasnetalarge pnasnet5large regnetx_002 repghostnet_050 res2next50 resnest14d
        resnetv2_18 rexnet_100 skresnet18 vgg11 xception41p resnet50_clip sehalonet33ts""",
    (16,): """
        test_vit beit_base_patch16_224 cait_xxs24_224 convit_tiny deit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
        gemma4_vit_167m gmlp_ti16_224 naflexvit_base_patch16_parfac_gap qwen3_vit_88m samvit_base_patch16_224
        test_vit_relpos tnt_s_legacy_patch16_224 vitamin_small_224 gemma4_vit_167m_enc
        deit_tiny_distilled_patch16_224""",
    (4, 8, 16, 32): """
        poolformerv2_s12 coat_tiny test_convnext cpubone_nano davit_tiny edgenext_xx_small efficientformer_l1
        efficientformerv2_s0 efficientvit_b0 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny hgnetv2_b0
        hiera_tiny_224 sam2_hiera_tiny iformer_t inception_next_atto lcnetv2_small lowformer_b0 test_mambaout
        mvitv2_tiny nextvit_small pvt_v2_b0 rdnet_tiny repvit_m1 starnet_s050 swiftformer_xs
        swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tresnet_m
        twins_svt_small""",
    (7,): "convmixer_768_32",
    (12, 17): "crossvit_tiny_240",  # its second branch sees the image shrunk from 240 to 224 pixels
    (8, 16, 32, 64): "csatv2",
    (14,): "deepseek_vit_412m vit_so400m_patch14_siglip_384",
    (16, 32, 64): "efficientvim_m1 efficientvit_m0 levit_128s shvit_s1",
    (4, 8, 16): "nest_tiny",
    (8, 16, 32): "pit_ti_224 visformer_tiny",
    (2, 4, 8, 16, 32, 64): "selecsls42",
    (7, 14): "sequencer2d_s",
    (32,): "vit_tiny_r_s16_p8_224",
    (8, 16): "volo_d1_224",
    (8,): "xcit_nano_12_p8_224",
}
STRIDES_OF = {name: list(strides) for strides, names in STRIDES.items() for name in names.split()}

IMAGE, build, grids = BackboneTester.IMAGE, BackboneTester.build, BackboneTester.grids


@pytest.mark.parametrize("name", STRIDES_OF)
def test_every_family_gives_maps_and_gradients(name):
    backbone = build(name, model_kwargs={"depth": 2} if name in SHALLOW else None)
    assert backbone.strides == STRIDES_OF[name]
    assert backbone.training
    features = backbone(IMAGE)
    assert [tuple(x.shape) for x in features] == [
        (2, channels, *grid)
        for channels, grid in zip(backbone.channels, grids((64, 96), backbone.strides), strict=True)
    ]
    assert all(x.isfinite().all() for x in features)
    sum(x.sum() for x in features).backward()
    without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    # what the classifier alone needs is gone; efficientvim keeps the weights of its sum over stages, frozen
    frozen = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen == (["model.weights"] if name == "efficientvim_m1" else [])


def test_one_architecture_of_each_family():
    smallest = STRIDES_OF.keys() - EXCEPTIONS
    families = {timm.model_entrypoint(name).__module__ for name in smallest}
    assert len(families) == len(smallest)
    assert families == {timm.model_entrypoint(name).__module__ for name in timm.list_models()}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
class TestBackbones(BackboneTester):
    pass


@pytest.mark.parametrize("name", ["test_resnet", "test_coatnet", "inception_v3"])
class TestMoreBackbones(BackboneTester):
    test_compiles_without_graph_breaks = None  # slow, and up to timm


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_odd_size_is_padding_with_zeros(name):
    backbone = build(name).eval()
    image = IMAGE[:1, :, :37, :51]
    padded = F.pad(image, (0, 13, 0, 27))  # to 64 x 64
    height, width = (48, 64) if name == "test_vit" else (64, 64)
    with torch.no_grad():
        expected = backbone(padded[..., :height, :width])
        for ours, theirs in zip(backbone(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs[..., : ours.shape[2], : ours.shape[3]])


def test_fixed_size_resizes_the_image():
    backbone = build("test_coatnet").eval()
    assert backbone.fixed_size == (160, 160)
    with torch.no_grad():
        native = F.interpolate(IMAGE, (160, 160), mode="bilinear", antialias=True)
        last = backbone.model.forward_features(native)
        torch.testing.assert_close(backbone(native)[-1], last)
        expected = F.interpolate(last, (2, 3), mode="bilinear")
        torch.testing.assert_close(backbone(IMAGE)[-1], expected)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("test_vit", 1),
        ("test_vit2", 1),
        ("test_vit3", 1),  # a register, no class token
        ("vit_small_patch14_reg4_dinov2", 5),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_tiny_patch16_dinov3_qkvb", 5),
        ("cait_xxs24_224", 0),
        ("test_vit_relpos", 0),
        ("gmlp_ti16_224", 0),
    ],
)
def test_last_map_is_forward_features_without_prefix_tokens(name, prefix):
    backbone = build(name).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):  # so that a forgotten norm shows
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    stride = backbone.strides[0]
    height, width = backbone.fixed_size or (4 * stride, 6 * stride)
    image = torch.randn(1, 3, height, width)
    with torch.no_grad():
        tokens = backbone.model.forward_features(image)[:, prefix:]
        expected = tokens.transpose(1, 2).unflatten(2, (height // stride, width // stride))
        torch.testing.assert_close(backbone(image)[0], expected)


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [
        ("swin_tiny_patch4_window7_224", True),
        ("test_convnext", False),
        ("resnetv2_18", False),
        ("focalnet_tiny_srf", False),
        ("hiera_tiny_224", True),
        ("twins_svt_small", None),
        ("test_efficientnet", None),
    ],
)
def test_last_map_of_a_hierarchy_has_the_final_norm(name, channels_last):
    backbone = build(name).eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm2d) and module.weight is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    image = torch.randn(1, 3, *(backbone.fixed_size or (64, 96)))
    with torch.no_grad():
        last = backbone(image)[-1]
        expected = backbone.model.forward_features(image)
    if channels_last or expected.ndim == 3:
        expected = expected.reshape(1, *last.shape[2:], -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(last, expected)


def test_levels_of_a_hierarchy():
    full = build("test_convnext").eval()
    for n in (1, 2, 4):
        backbone = build("test_convnext", levels=n).eval()
        assert backbone.strides == full.strides[-n:]
        assert backbone.channels == full.channels[-n:]
        with torch.no_grad():
            for ours, theirs in zip(backbone(IMAGE), full(IMAGE)[-n:], strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("levels", "indices"), [(None, [5]), (1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (6, list(range(6)))]
)
def test_levels_of_a_plain_vit(levels, indices):
    backbone = build("test_vit", levels=levels)  # 6 blocks
    assert backbone.indices == indices
    assert backbone.strides == [16] * len(indices)
    assert backbone.channels == [64] * len(indices)
    assert [tuple(x.shape) for x in backbone(IMAGE)] == [(2, 64, 4, 6)] * len(indices)


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("test_convnext", 5, "levels must be 1 to 4, the levels of test_convnext, but is 5"),
        ("test_convnext", 0, "levels must be 1 to 4, the levels of test_convnext, but is 0"),
        ("test_vit", 7, "levels must be 1 to 6, the blocks of test_vit, but is 7"),
        ("test_vit", -1, "levels must be 1 to 6, the blocks of test_vit, but is -1"),
    ],
)
def test_levels_that_are_not_there(name, levels, message):
    with pytest.raises(ValueError, match=message):
        build(name, levels=levels)


@pytest.mark.parametrize(
    ("name", "size"),
    [("crossvit_tiny_240", (240, 240)), ("mvitv2_tiny", (224, 224)), ("xcit_nano_12_p8_224", None), ("test_vit", None)],
)
def test_what_is_bound_to_one_size(name, size):
    assert build(name).fixed_size == size


def test_parameters_that_one_level_does_not_need_are_frozen():
    backbone = build("coat_tiny", levels=1)  # its parallel blocks mix all four levels to the end
    backbone(IMAGE)[0].sum().backward()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert {"model.norm2.weight", "model.norm3.weight"} <= frozen
    assert frozen == {name for name, p in backbone.named_parameters() if p.grad is None}


def test_full_resolution_level_is_dropped():
    assert timm.create_model("dla46x_c").feature_info[0]["reduction"] == 1
    assert build("dla46x_c").strides == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "csatv2", "swin_tiny_patch4_window7_224"])
def test_grey_images(name):
    backbone = build(name, in_chans=1)
    features = backbone(IMAGE[:, :1])
    sum(x.sum() for x in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert backbone.data_config["input_size"][0] == len(backbone.data_config["mean"]) == 1


@pytest.mark.parametrize(
    ("name", "img_size", "built"),
    [
        ("swin_tiny_patch4_window7_224", (64, 96), (64, 96)),
        ("coat_tiny", 64, (64, 64)),
        ("mvitv2_tiny", (64, 96), (96, 96)),
    ],
)
def test_img_size_of_windows_and_tables(name, img_size, built):
    if name == "mvitv2_tiny":
        with pytest.warns(UserWarning, match=r"mvitv2_tiny is bound to images of \(96, 96\), not \(64, 96\)"):
            backbone = build(name, img_size=img_size)
    else:
        backbone = build(name, img_size=img_size)
    assert backbone.fixed_size in (built, None)
    assert backbone.data_config["input_size"] == [3, *built]
    assert [tuple(x.shape[-2:]) for x in backbone(IMAGE)] == grids((64, 96), backbone.strides)


def test_img_size_of_a_vit():
    assert build("test_vit", img_size=(64, 96)).model.pos_embed.shape[1] == 1 + 4 * 6


def test_drop_path_rate_is_used_or_warned_about():
    assert build("test_vit", drop_path_rate=0.5).model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.5)
    with pytest.warns(UserWarning, match="vgg11 has no stochastic depth; drop_path_rate is ignored"):
        build("vgg11", drop_path_rate=0.1)


def test_building_disturbs_nothing():
    torch.manual_seed(0)
    expected = timm.create_model("test_resnet", num_classes=0)
    state = torch.get_rng_state()
    backbone = build("test_resnet")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in backbone.modules())
    assert all(p.grad is None for p in backbone.parameters())
    for key, value in backbone.model.state_dict().items():  # weights and BatchNorm statistics
        torch.testing.assert_close(value, expected.state_dict()[key])
    with torch.no_grad():
        assert not build("test_resnet").model.conv1[0].weight.grad_fn
        assert all(p.requires_grad for p in build("test_resnet").parameters())


def test_data_config_is_timms_and_json():
    config = build("test_vit").data_config
    assert config == json.loads(json.dumps(config))
    expected = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    assert config == {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()}


def test_repr():
    assert "'test_convnext', channels=[24, 32, 48, 64], strides=[4, 8, 16, 32]" in repr(build("test_convnext"))


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 4, 64, 96)])
def test_wrong_images(shape):
    with pytest.raises(ValueError, match=rf"images must be \(B, 3, H, W\), but are \({', '.join(map(str, shape))}\)"):
        build("test_vit")(torch.zeros(shape))


@pytest.mark.parametrize(("name", "hint"), [("resnet5O", "did you mean .*resnet50"), ("??", "list_models")])
def test_unknown_name(name, hint):
    with pytest.raises(ValueError, match=rf"but is '{name[:2] if name[0] != '?' else '..'}.*{hint}"):
        build(name)


# weights -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("no_hub")
def test_hub_out_of_reach_fails_fast():
    start = time.perf_counter()
    with pytest.raises(
        PretrainedWeightsError, match=r"vit_tiny_patch16_224.augreg_in21k .*127\.0\.0\.1.* is out of reach"
    ) as e:
        TimmBackbone("vit_tiny_patch16_224.augreg_in21k", pretrained=True)
    assert time.perf_counter() - start < 10
    assert 'pretrained="PATH"' in str(e.value)
    assert "pretrained=False" in str(e.value)


def test_cached_weights_need_no_hub(no_hub):
    repository = no_hub / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    state = timm.create_model("test_vit").state_dict()
    save_file(state, repository / "snapshots" / "0123" / "model.safetensors")
    backbone = TimmBackbone("test_vit")
    torch.testing.assert_close(backbone.model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_architecture_without_weights():
    with pytest.raises(
        PretrainedWeightsError, match="pretrained weights of nest_tiny cannot be loaded \\(timm has none"
    ):
        TimmBackbone("nest_tiny")


@pytest.mark.parametrize("pretrained", [True, False])
def test_tag_that_does_not_exist(pretrained):
    with pytest.raises(ValueError, match=r"'test_vit.nonsense' names weights .*test_vit\.r160_in1k"):
        TimmBackbone("test_vit.nonsense", pretrained=pretrained)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_local_checkpoint(tmp_path, name, suffix):
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()  # with its classifier
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    for pretrained in (path, str(path)):
        backbone = TimmBackbone(name, pretrained=pretrained)
        for key, value in backbone.model.state_dict().items():
            torch.testing.assert_close(value, state[key])


def nested(*keys):
    """A checkpoint with the state under these keys, beside what trainers keep."""

    def checkpoint(state):
        for key in reversed(keys):
            state = {"epoch": 3, key: state}
        return state

    return checkpoint


def under(*prefixes, beside=()):
    """All names under these prefixes, one after the other, beside weights of other parts."""
    return lambda state: {"".join(prefixes) + k: v for k, v in state.items()} | dict.fromkeys(beside, torch.ones(2))


@pytest.mark.parametrize(
    "change",
    [
        nested("state_dict"),
        nested("model"),
        nested("ema"),
        nested("model", "ema", "state_dict"),
        under("module."),
        under("_orig_mod."),
        under("module.", "_orig_mod."),
        under("model.", "encoder.", beside=["model.decoder.weight"]),
        under("backbone.", beside=["decode_head.weight", "auxiliary_head.weight"]),
        under("module.", "teacher.", "backbone.", beside=["module.student.backbone.cls_token", "teacher.head.weight"]),
        lambda state: nested("state_dict")(under("model.", "_orig_mod.", "backbone.")(state)),
    ],
)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_checkpoints_as_trainers_write_them(tmp_path, name, change):
    state = timm.create_model(name).state_dict()
    torch.save(change(state), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, pretrained=tmp_path / "weights.pth")
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[key])
    assert "state_dict" not in backbone.model.pretrained_cfg


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_saved_model_serves_as_weights(tmp_path, name, caplog):
    caplog.set_level("INFO", "segheads")
    model = create_model(name, "linear", 5, pretrained=False, backbone_kwargs={"img_size": 64})
    model.save_pretrained(tmp_path / "run" / "model")
    for place in ("run", "run/model", "run/model/model.safetensors"):
        backbone = TimmBackbone(name, pretrained=tmp_path / place, img_size=64)
        for key, value in backbone.model.state_dict().items():
            torch.testing.assert_close(value, model.backbone.model.state_dict()[key])
    assert "that are not the backbone's: head.classifier.bias, head.classifier.weight" in caplog.text


def test_a_checkpoint_without_tensors_and_one_with_code_are_refused(tmp_path):
    torch.save({"epoch": 3, "model": {"weight": None}}, tmp_path / "none.pth")
    with pytest.raises(PretrainedWeightsError, match=r"none\.pth'.* it holds no tensors by name, nor any under"):
        TimmBackbone("test_vit", pretrained=tmp_path / "none.pth")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(PretrainedWeightsError, match=r"code\.pth'.*Weights only load failed"):
        TimmBackbone("test_vit", pretrained=tmp_path / "code.pth")


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3"])
def test_the_class_token_stands_behind_each_cell(name):
    kwargs = {"model_kwargs": {"depth": 4, "embed_dim": 32, "num_heads": 2}}  # two and five tokens without a place
    backbone = build(name, levels=2, class_token=True, final_norm=False, **kwargs)
    plain = build(name, levels=2, final_norm=False, **kwargs)
    nn.init.normal_(backbone.model.cls_token)
    plain.load_state_dict(backbone.state_dict())
    images = torch.randn(2, 3, 48, 64)
    tokens = []
    backbone.model.blocks[1].register_forward_hook(lambda _module, _inputs, output: tokens.append(output[:, 0]))
    with torch.no_grad():
        maps, others = backbone(images), plain(images)
    assert backbone.channels == [64, 64]
    assert not backbone.model.norm.weight.requires_grad  # which no map goes through
    for x, other in zip(maps, others, strict=True):
        torch.testing.assert_close(x[:, :32], other)
    torch.testing.assert_close(maps[0][:, 32:], tokens[0][:, :, None, None].expand(2, 32, 3, 4))


@pytest.mark.parametrize("name", ["test_convnext", "test_vit2"])  # test_vit2 has a register, and no class token
def test_a_backbone_without_class_token_says_so(name):
    with pytest.raises(ValueError, match=f"class_token needs a ViT with a class token, which {name} has not"):
        TimmBackbone(name, pretrained=False, class_token=True)


def test_coarser_levels_are_left_out():
    backbone = build("test_resnet", max_stride=8)
    assert backbone.strides == [2, 4, 8]
    assert not any(name.startswith("model.layer4") for name, _ in backbone.named_parameters())
    assert build("test_resnet", max_stride=16, levels=2).strides == [8, 16]
    assert build("test_vit", max_stride=16).strides == [16]
    with pytest.raises(ValueError, match=r"max_stride must be a stride of test_resnet, \[2, 4, 8, 16, 32\]; got 1"):
        build("test_resnet", max_stride=1)


def test_stages_of_one_stride_give_a_map_each_on_demand():
    dilated = {"model_kwargs": {"output_stride": 16}}
    assert build("test_resnet", **dilated).strides == [2, 4, 8, 16]
    backbone = build("test_resnet", every_stage=True, **dilated)
    assert backbone.strides == [2, 4, 8, 16, 16]
    maps = backbone(torch.randn(1, 3, 50, 64))
    assert [x.shape[2:] for x in maps[-2:]] == [(4, 4), (4, 4)]
    assert [x.shape[1] for x in maps] == backbone.channels
    assert build("test_resnet", every_stage=True, levels=2, **dilated).strides == [16, 16]
    assert build("test_resnet", every_stage=True).strides == build("test_resnet").strides


def test_a_stage_is_dilated_in_part_or_as_a_whole():
    for dilation, first in (("timm", 1), ("smp", 2)):
        backbone = build("resnet18", dilation=dilation, model_kwargs={"output_stride": 16})
        assert [block.conv1.dilation[0] for block in backbone.model.layer4] == [first, 2]
        assert backbone.strides == [2, 4, 8, 16]
        assert backbone(torch.zeros(1, 3, 64, 32))[-1].shape == (1, 512, 4, 2)
    for name, dilation, message in (
        ("test_convnext", "smp", "dilation='smp' needs a ResNet, which test_convnext is not"),
        ("resnet18", "x", "dilation must be 'timm' or 'smp'; got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            TimmBackbone(name, pretrained=False, dilation=dilation)


def test_what_does_not_fit_is_listed(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    state["transformer.0.weight"] = state.pop("blocks.0.attn.qkv.weight")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.pth")
    with pytest.raises(PretrainedWeightsError, match=r"lacks 1 .*\(blocks\.0\.attn\.qkv\.weight; .*transformer\.0"):
        TimmBackbone("test_vit", pretrained=tmp_path / "weights.pth")


def test_local_folder_as_timm_saves_it(tmp_path):
    model = timm.create_model("test_convnext")
    save_for_hf(model, tmp_path)
    backbone = TimmBackbone(f"local-dir:{tmp_path}")
    torch.testing.assert_close(backbone.model.stem[0].weight, model.stem[0].weight)
    assert backbone.final_norm


def test_local_checkpoint_of_a_backbone_itself(tmp_path):
    backbone = build("test_convnext")  # pruned: no classifier, no head norm
    save_file(backbone.model.state_dict(), tmp_path / "weights.safetensors")
    again = TimmBackbone("test_convnext", pretrained=tmp_path / "weights.safetensors")
    for key, value in again.model.state_dict().items():
        torch.testing.assert_close(value, backbone.model.state_dict()[key])


def test_local_checkpoint_with_other_sizes(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    backbone = TimmBackbone("test_vit", pretrained=tmp_path / "weights.safetensors", img_size=(64, 96), in_chans=1)
    kernel = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, kernel)
    position = resample_abs_pos_embed(state["pos_embed"], [4, 6], [10, 10])
    torch.testing.assert_close(backbone.model.pos_embed, position)


@pytest.mark.parametrize("name", ["test_vit_relpos", "test_coatnet"])
def test_local_checkpoint_with_tables_is_resized_after_loading(tmp_path, name):
    state = timm.create_model(name).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    backbone = TimmBackbone(name, pretrained=tmp_path / "weights.safetensors", img_size=(64, 96))
    assert backbone.fixed_size == (64, 96)
    loaded = backbone.model.state_dict()
    for key in (key for key in loaded if key.endswith("qkv.weight")):
        torch.testing.assert_close(loaded[key], state[key])
    assert [tuple(x.shape[-2:]) for x in backbone(IMAGE)] == grids((64, 96), backbone.strides)


@pytest.mark.parametrize("name", ["gmlp_ti16_224", "hiera_tiny_224"])
def test_img_size_that_weights_do_not_allow(tmp_path, name):
    save_file(timm.create_model(name).state_dict(), tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match=rf"{name} is bound to images of \(224, 224\), not \(64, 96\)"):
        TimmBackbone(name, pretrained=tmp_path / "weights.safetensors", img_size=(64, 96))


def test_augreg_npz(tmp_path):
    rng = np.random.default_rng(0)
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    block = "Transformer/encoderblock_0"
    shapes = {
        "embedding/kernel": (16, 16, 3, 32),
        "embedding/bias": (32,),
        "cls": (1, 1, 32),
        "Transformer/posembed_input/pos_embedding": (1, 197, 32),
        "Transformer/encoder_norm/scale": (32,),
        "Transformer/encoder_norm/bias": (32,),
        **{f"{block}/MultiHeadDotProductAttention_1/{x}/kernel": (32, 2, 16) for x in ("query", "key", "value")},
        **{f"{block}/MultiHeadDotProductAttention_1/{x}/bias": (2, 16) for x in ("query", "key", "value")},
        f"{block}/MultiHeadDotProductAttention_1/out/kernel": (2, 16, 32),
        f"{block}/MultiHeadDotProductAttention_1/out/bias": (32,),
        **{f"{block}/LayerNorm_{i}/{x}": (32,) for i in (0, 2) for x in ("scale", "bias")},
        f"{block}/MlpBlock_3/Dense_0/kernel": (32, 128),
        f"{block}/MlpBlock_3/Dense_0/bias": (128,),
        f"{block}/MlpBlock_3/Dense_1/kernel": (128, 32),
        f"{block}/MlpBlock_3/Dense_1/bias": (32,),
    }
    arrays = {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    backbone = TimmBackbone("vit_tiny_patch16_224", pretrained=tmp_path / "weights.npz", model_kwargs=size)
    expected = torch.from_numpy(arrays[f"{block}/MlpBlock_3/Dense_0/kernel"]).T
    torch.testing.assert_close(backbone.model.blocks[0].mlp.fc1.weight, expected, check_stride=False)
    expected = torch.from_numpy(arrays["embedding/kernel"]).permute(3, 2, 0, 1)
    torch.testing.assert_close(backbone.model.patch_embed.proj.weight, expected, check_stride=False)
    larger = TimmBackbone(  # position embeddings resampled to another grid, as the recipe's crops need
        "vit_tiny_patch16_224", pretrained=tmp_path / "weights.npz", img_size=(96, 128), model_kwargs=size
    )
    assert larger.model.pos_embed.shape == (1, 1 + 6 * 8, 32)
    first = torch.from_numpy(arrays["Transformer/posembed_input/pos_embedding"])[:, :1]
    torch.testing.assert_close(larger.model.pos_embed[:, :1], first)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none at .*nothing\.pth'"):
        TimmBackbone("test_vit", pretrained=tmp_path / "nothing.pth")


def test_checkpoint_of_another_architecture(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), path)
    with pytest.raises(
        PretrainedWeightsError, match=r"test_vit cannot be loaded .*weights\.safetensors.*size mismatch"
    ):
        TimmBackbone("test_vit", pretrained=path)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(
        PretrainedWeightsError, match=r"weights\.safetensors' lacks 78 of the weights of test_vit \(blocks"
    ):
        TimmBackbone("test_vit", pretrained=path)


def test_checkpoint_that_lacks_one_block(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in timm.create_model("test_vit").state_dict().items() if "blocks.3." not in k}, path)
    with pytest.raises(PretrainedWeightsError, match=r"lacks 12 of the weights of test_vit \(blocks\.3\.attn"):
        TimmBackbone("test_vit", pretrained=path)


def test_unreadable_checkpoint(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(PretrainedWeightsError, match=r"weights\.pth"):
        TimmBackbone("test_vit", pretrained=tmp_path / "weights.pth")


# position embeddings as published ------------------------------------------------------------------------------------


def published(name, file, prefix, mode, eps=None):
    """A small ViT with the weights of a golden file; `prefix` is that of the encoder's keys."""
    config = file.config
    sizes = {
        "img_size": tuple(config.get("image_size") or config["img_size"]),
        "embed_dim": config.get("d_model") or config["embed_dims"],
        "depth": config.get("n_layers") or config["num_layers"],
    }
    heads = config.get("n_heads") or config["num_heads"]
    backbone = build(
        name,
        img_size=sizes["img_size"],
        pos_embed_resize=mode,
        norm_eps=eps,
        model_kwargs={"embed_dim": sizes["embed_dim"], "depth": sizes["depth"], "num_heads": heads},
    )
    renamed = {}
    for key, value in file.tensors(f"state.{prefix}.").items():
        for theirs, ours in (
            *(("patch_embed.projection", "patch_embed.proj"), ("layers.0.ffn.layers.0.0", "layers.0.mlp.fc1")),
            *(("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"), ("attn.attn.in_proj_", "attn.qkv.")),
            *(("attn.attn.out_proj", "attn.proj"), ("ln1.", "norm1."), ("ln2.", "norm2."), ("layers.", "blocks.")),
        ):
            key = key.replace(theirs, ours)
        key = "norm." + key.removeprefix("norm1.") if key.startswith("norm1.") else key
        if not key.startswith("head"):
            renamed[key] = value
    backbone.model.load_state_dict(renamed)
    return backbone.eval()


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("linear", "vit_tiny_patch16_224"),
        ("mask", "vit_tiny_patch16_224"),
        ("linear_distilled", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_segmenter_tokens(golden, case, name):
    file = golden(f"segmenter_e2e__{case}")
    backbone = published(name, file, "encoder", "bilinear", eps=1e-5)
    for duplicate in (backbone, copy.deepcopy(backbone)):
        with torch.no_grad():
            image = file["input.image_ragged"]
            padded = F.pad(image, (0, -image.shape[3] % 16, 0, -image.shape[2] % 16))
            assert_parity(duplicate.model.forward_features(padded), file["output.tokens_ragged"])
            tokens = duplicate(image)[0].flatten(2).transpose(1, 2)
        assert_parity(tokens, file["output.tokens_ragged"][:, duplicate.model.num_prefix_tokens :])


def test_meanshifter_features(golden):
    file = golden("meanshifter_e2e__vit")
    backbone = published("vit_tiny_patch16_224", file, "backbone", "bicubic")
    for case in ("equal", "ragged"):
        with torch.no_grad():
            features = backbone(file[f"input.image_{case}"])[0]
        assert_parity(features, file[f"output.features_{case}"])


def test_norm_eps(golden):
    file = golden("eps_probe__segmenter_vit")
    for eps, matches in ((1e-5, True), (None, False)):  # timm's ViTs have 1e-6
        backbone = published("vit_tiny_patch16_224", file, "encoder", "bilinear", eps=eps)
        for case in ("equal", "larger"):
            image = file[f"input.image_{case}"]
            with torch.no_grad():
                head = file.tensors("state.decoder.head.")
                scores = F.conv2d(backbone(image)[0], head["weight"][:, :, None, None], head["bias"])
                logits = F.interpolate(scores, image.shape[-2:], mode="bilinear")
            expected = file[f"output.logits_{case}"]
            if matches:
                assert_parity(logits, expected)
            else:
                assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


def test_pos_embed_resize_differs_from_timm_only_off_the_built_grid():
    timms, ours = build("test_vit"), build("test_vit", pos_embed_resize="bilinear")
    torch.nn.init.normal_(timms.model.pos_embed)
    ours.load_state_dict(timms.state_dict())
    with torch.no_grad():
        native = torch.rand(1, 3, 160, 160)
        torch.testing.assert_close(ours(native), timms(native))
        assert (ours(IMAGE)[0] - timms(IMAGE)[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["test_vit2", "test_vit4", "deit3_small_patch16_224"])
def test_pos_embed_resize_keeps_registers_and_unembedded_tokens(name):
    timms, ours = (build(name, pos_embed_resize=mode, model_kwargs={"depth": 1}).eval() for mode in ("timm", "bicubic"))
    image = torch.rand(1, 3, *timms.data_config["input_size"][1:])
    with torch.no_grad():
        torch.testing.assert_close(ours(image), timms(image))
        assert ours(IMAGE)[0].shape == timms(IMAGE)[0].shape


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_pos_embed_resize_of_as_many_patches_in_another_shape(name, mode):
    backbone = build(name, img_size=(64, 96), pos_embed_resize=mode, model_kwargs={"depth": 1})
    vit = backbone.model
    torch.nn.init.normal_(vit.pos_embed)
    first = vit.num_prefix_tokens
    table = vit.pos_embed[:, first:].unflatten(1, (4, 6)).movedim(-1, 1)
    expected = F.interpolate(table, (6, 4), mode=mode).flatten(2).mT
    added = vit._pos_embed(torch.zeros(1, 6, 4, vit.embed_dim))[:, first:]
    torch.testing.assert_close(added, expected, rtol=0, atol=0)
    added = vit._pos_embed(torch.zeros(1, 4, 6, vit.embed_dim))[:, first:]
    torch.testing.assert_close(added, vit.pos_embed[:, first:], rtol=0, atol=0)


def test_pos_embed_resize_survives_copies():
    backbone = build("test_vit", pos_embed_resize="bilinear").eval()
    buffer = io.BytesIO()
    torch.save(backbone, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(backbone), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        before = backbone(IMAGE)[0]
        torch.nn.init.normal_(backbone.model.pos_embed)  # a copy that looked at the original would change
        for duplicate in copies:
            torch.testing.assert_close(duplicate(IMAGE)[0], before)


@pytest.mark.parametrize(("name", "kind"), [("test_convnext", "ConvNeXt"), ("vit_tiny_patch16_dinov3_qkvb", "Eva")])
def test_pos_embed_resize_needs_a_plain_vit(name, kind):
    with pytest.raises(ValueError, match=f"pos_embed_resize='bicubic' needs a plain ViT .* but {name} is a {kind}"):
        build(name, pos_embed_resize="bicubic")


def test_pos_embed_resize_names_the_choices():
    with pytest.raises(ValueError, match="must be 'timm', 'bilinear' or 'bicubic', but is 'nearest'"):
        build("test_vit", pos_embed_resize="nearest")
