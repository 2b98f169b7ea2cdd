import inspect

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

from segheads import create_model
from segheads.backbones import TimmBackbone
from segheads.heads import find_head
from segheads.heads.smp import SingleValueBatchNorm, SmpHead, smp_decoders

SMALL = {  # smp's defaults are wide
    "unet": {"decoder_channels": [16, 8, 8, 4, 4]},
    "unetplusplus": {"decoder_channels": [16, 8, 8, 4, 4]},
    "manet": {"decoder_channels": [16, 8, 8, 4, 4], "decoder_pab_channels": 4},
    "fpn": {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 64},
    "pspnet": {"psp_out_channels": 8},
    "deeplabv3": {"decoder_channels": 8, "decoder_atrous_rates": [1, 2, 3]},
    "deeplabv3plus": {"decoder_channels": 8, "decoder_atrous_rates": [1, 2, 3]},
    "pan": {"decoder_channels": 8},
    "upernet": {"decoder_channels": 8},
    "segformer": {"decoder_segmentation_channels": 8},
    "dpt": {"decoder_intermediate_channels": [4, 4, 8, 8], "decoder_fusion_channels": 8},
}
BEYOND = ("unet", "unetplusplus", "manet", "linknet")  # upsample beyond the finest map
FIVE = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]  # a ResNet's maps of an image of 32x64
FOUR = [(19, 26), (10, 13), (5, 7), (3, 4)]  # of 75x101
THREE = [(19, 26), (10, 13), (5, 7)]
TWO = [(5, 7), (3, 4)]
CHANNELS = [8, 12, 16, 20, 24]


def build(decoder, count, **options):
    options = {**SMALL.get(decoder, {}), **options}
    if decoder in BEYOND and "decoder_channels" in options:
        options["decoder_channels"] = options["decoder_channels"][: min(count + 1, 5)]
    torch.manual_seed(0)
    head = SmpHead(CHANNELS[:count], 3, decoder=decoder, **options)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):  # no trivial ones
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return head


def make_maps(sizes, batch=2, requires_grad=False):
    torch.manual_seed(1)
    return [torch.randn(batch, C, *size, requires_grad=requires_grad) for C, size in zip(CHANNELS, sizes, strict=False)]


def fits(decoder, sizes):
    return len(sizes) >= {"fpn": 4, "unetplusplus": 2, "deeplabv3plus": 2, "pan": 2, "upernet": 2}.get(decoder, 1)


CASES = [
    (decoder, sizes)
    for decoder in smp_decoders()
    if decoder != "dpt"
    for sizes in (FIVE, FOUR, THREE, TWO, [(3, 4)])
    if fits(decoder, sizes)
] + [("dpt", [(5, 7)] * count) for count in (2, 3, 4)]


@pytest.mark.parametrize(("decoder", "sizes"), CASES)
def test_every_decoder_on_maps_of_every_kind(decoder, sizes):
    head, maps = build(decoder, len(sizes)), make_maps(sizes, requires_grad=True)
    upsampling = 8 if decoder == "dpt" else 1 if decoder not in BEYOND else 2 if len(sizes) == 5 else 4
    logits = head(maps)
    assert head.upsampling == upsampling
    assert logits.shape == (2, 3, sizes[0][0] * upsampling, sizes[0][1] * upsampling)
    logits.square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    used = min(len(sizes), 1 if decoder in ("pspnet", "deeplabv3") else 5 if decoder in (*BEYOND, "segformer") else 4)
    reached = [place >= len(sizes) - used for place in range(len(sizes))]
    if decoder == "deeplabv3plus":
        reached[-used + 1 : -1] = [False] * (used - 2)  # the first and the last of the four
    assert [bool(level.grad is not None and level.grad.any()) for level in maps] == reached
    head.eval()
    torch.testing.assert_close(head(maps)[1:], head([level[1:] for level in maps]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", smp_decoders())
def test_odd_sizes_are_padded_at_the_bottom_and_right(decoder):
    sizes = [(5, 7)] * 4 if decoder == "dpt" else FOUR
    head, maps = build(decoder, 4).eval(), make_maps(sizes)
    extents = [(6, 8)] * 4 if decoder == "dpt" else [(24, 32), (12, 16), (6, 8), (3, 4)]
    if decoder == "pan":
        extents = [(64, 64), (32, 32), (16, 16), (8, 8)]
    padded = [
        F.pad(level, (0, W - level.shape[3], 0, H - level.shape[2]), mode="replicate")
        for level, (H, W) in zip(maps, extents, strict=True)
    ]
    expected = head(padded)[:, :, : sizes[0][0] * head.upsampling, : sizes[0][1] * head.upsampling]
    torch.testing.assert_close(head(maps), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", ["unet", "fpn", "manet"])
def test_sizes_may_be_rounded_down(decoder):
    sizes = [(37, 50), (18, 25), (9, 12), (4, 6)]
    head = build(decoder, 4)
    assert head(make_maps(sizes)).shape[2:] == (37 * head.upsampling, 50 * head.upsampling)


@pytest.mark.parametrize(
    ("decoder", "size", "encoder", "levels", "options", "factor"),
    [
        ("unet", 64, {}, slice(1, 6), {}, 1),
        ("unet", 64, {}, slice(1, 6), {"decoder_attention_type": "scse", "decoder_interpolation": "bilinear"}, 1),
        ("unetplusplus", 64, {}, slice(1, 6), {"decoder_channels": [32, 32, 16, 16, 16]}, 1),
        ("manet", 64, {}, slice(1, 6), {"decoder_pab_channels": 8}, 1),
        ("linknet", 64, {}, slice(1, 6), {"decoder_use_norm": False}, 1),
        ("fpn", 64, {}, slice(2, 6), {"decoder_merge_policy": "cat"}, 4),
        ("pspnet", 64, {"encoder_depth": 3}, slice(3, 4), {"psp_out_channels": 16}, 8),
        ("deeplabv3", 64, {"encoder_output_stride": 8}, slice(5, 6), {"decoder_channels": 16}, 8),
        ("deeplabv3plus", 64, {"encoder_output_stride": 16}, (2, 3, 5), {"decoder_atrous_rates": [1, 2, 3]}, 4),
        ("pan", 256, {"encoder_output_stride": 32}, slice(2, 6), {"decoder_channels": 16}, 4),
        ("upernet", 64, {}, slice(2, 6), {"decoder_channels": 16}, 4),
        ("segformer", 64, {}, slice(1, 6), {}, 4),
    ],
)
def test_equals_smp(decoder, size, encoder, levels, options, factor):
    torch.manual_seed(0)
    model = smp.create_model(decoder, "resnet18", encoder_weights=None, classes=3, **encoder, **options).eval()
    for module in model.decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(1, 3, size, size)
    features = model.encoder(images)
    maps = features[levels] if isinstance(levels, slice) else [features[level] for level in levels]
    head = SmpHead([level.shape[1] for level in maps], 3, decoder=decoder, **options).eval()
    state = model.state_dict()
    unused = [key for key in state if key not in head.state_dict() and not key.startswith("encoder.")]
    assert all(".attention1." in key for key in unused)  # of the last block of unet, which is never called
    head.load_state_dict({key: state[key] for key in head.state_dict()})
    with torch.no_grad():
        ours, theirs = head(maps), model(images)
    if decoder == "segformer":  # smp's logits have stride 4, ours here are enlarged to stride 2
        torch.testing.assert_close(
            ours, F.interpolate(model.segmentation_head[0](model.decoder(features)), scale_factor=2.0, mode="bilinear")
        )
        return
    if factor > 1:
        ours = F.interpolate(ours, scale_factor=float(factor), mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("decoder", ["unet", "segformer"])
def test_four_maps_equal_smp_on_a_transformer_style_encoder(decoder):
    torch.manual_seed(0)
    model = smp.create_model(decoder, "tu-test_convnext", encoder_weights=None, classes=3).eval()
    images = torch.randn(1, 3, 64, 64)
    maps = model.encoder(images)[2:]
    head = SmpHead([level.shape[1] for level in maps], 3, decoder=decoder).eval()
    state = model.state_dict()
    head.load_state_dict({key: state[key] for key in head.state_dict()})
    ours = head(maps)
    if decoder == "segformer":
        ours = F.interpolate(ours, scale_factor=4.0, mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, model(images))


def test_dpt_equals_smp_without_the_class_token():
    torch.manual_seed(0)
    options = {**SMALL["dpt"], "decoder_readout": "ignore"}
    model = smp.DPT("tu-test_vit", encoder_weights=None, classes=3, **options).eval()
    images = torch.randn(1, 3, 160, 160)
    maps, _ = model.encoder(images)
    head = SmpHead([level.shape[1] for level in maps], 3, decoder="dpt", **options).eval()
    state = model.state_dict()
    head.load_state_dict({key: state[key] for key in head.state_dict()})
    ours = F.interpolate(head(maps), scale_factor=2.0, mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, model(images))


@pytest.mark.parametrize("readout", ["cat", "add"])
def test_dpt_equals_smp_with_the_class_token(readout):
    torch.manual_seed(0)
    options = {**SMALL["dpt"], "decoder_readout": readout}
    theirs = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=3, dynamic_img_size=True, **options)
    backbone = TimmBackbone("vit_tiny_patch16_224", pretrained=False, levels=4, final_norm=False, class_token=True)
    assert backbone.channels == [384] * 4
    head = SmpHead(backbone.channels, 3, decoder="dpt", encoder_has_prefix_tokens=True, upsampling=2, **options)
    state = theirs.encoder.model.state_dict()
    nn.init.normal_(state["cls_token"])
    backbone.model.load_state_dict({key: state[key] for key in backbone.model.state_dict()})
    head.load_state_dict({key: theirs.state_dict()[key] for key in head.state_dict()})
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        torch.testing.assert_close(head.eval()(backbone.eval()(images)), theirs.eval()(images))


@pytest.mark.parametrize(
    ("backbone", "pyramid", "strides"),
    [("test_resnet", "auto", [4, 8, 16, 32]), ("vit_small_patch14_dinov2", "simple", [4, 8, 16, 32])],
)
def test_create_model_tells_dpt_the_strides(backbone, pyramid, strides):
    small = {"model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}} if pyramid == "simple" else {}
    model = create_model(
        backbone,
        "smp:dpt",
        3,
        pretrained=False,
        pyramid=pyramid,
        backbone_kwargs={"levels": 1, **small} if small else {},
        head_kwargs=SMALL["dpt"],
    ).eval()
    assert model.head._strides == strides
    assert model.plan.head_kwargs == SMALL["dpt"]  # as it was asked for
    assert model(torch.zeros(1, 3, 84, 56)).shape == (1, 3, 84, 56)


def test_a_head_that_reads_the_class_token_wants_a_backbone_that_gives_it():
    options = {"decoder_readout": "cat", "encoder_has_prefix_tokens": True, **SMALL["dpt"]}

    def build(**backbone):
        return create_model(
            "test_vit", "smp:dpt", 3, pretrained=False, pyramid=None, head_kwargs=options, backbone_kwargs=backbone
        )

    with pytest.raises(ValueError, match="SmpHead was built for maps with the class token .* class_token=True"):
        build()
    with pytest.raises(ValueError, match="decoder_readout='add' adds the class token, which maps have with"):
        SmpHead([8, 8], 3, decoder="dpt", decoder_readout="add")
    assert build(class_token=True).eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [8, 8, 8, 8]])
def test_dpt_takes_maps_of_other_strides_when_told(strides):
    head = build("dpt", 4, encoder_output_strides=strides)
    sizes = FOUR if strides[1] > strides[0] else [(5, 7)] * 4
    assert head(make_maps(sizes)).shape[2:] == tuple(size * strides[0] // 2 for size in sizes[0])
    assert head.upsampling == strides[0] // 2


@pytest.mark.parametrize("decoder", smp_decoders())
def test_options_are_those_of_smp(decoder):
    model = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[decoder]).parameters
    ours = {"in_channels", "classes", "activation", "upsampling", "aux_params", "kwargs"}
    theirs = {
        name: parameter.default
        for name, parameter in model.items()
        if name not in ours and not name.startswith("encoder")
    }
    from segheads.heads.smp_decoders import DECODERS

    got = {name: p.default for name, p in inspect.signature(DECODERS[decoder].build).parameters.items()}
    got.pop("encoder_channels")
    if decoder == "dpt":
        assert got.pop("encoder_output_strides") == (16, 16, 16, 16)
        assert got.pop("encoder_has_prefix_tokens") is False
        assert theirs.pop("decoder_readout") == "cat"
        assert got.pop("decoder_readout") == "ignore"
    if decoder == "pan":  # 16 in smp, whose encoders are dilated by default
        assert got.pop("encoder_output_stride") == 32
    assert got == theirs


def test_knows_every_decoder_of_smp():
    assert smp_decoders() == list(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize("decoder", smp_decoders())
def test_starts_as_smp(decoder):
    head = build(decoder, 4)
    classifier = head.segmentation_head.head[-1] if decoder == "dpt" else head.segmentation_head[0]
    assert bool(classifier.bias.detach().any()) == decoder.startswith("deeplab")  # the two that smp leaves alone
    assert classifier.kernel_size == (
        (3, 3) if decoder in ("unet", "unetplusplus", "manet", "pan", "pspnet") else (1, 1)
    )


def test_length_of_decoder_channels_chooses_the_grid():
    maps = make_maps(FOUR)
    assert SmpHead(CHANNELS[:4], 3, decoder_channels=[8, 8, 8, 8])(maps).shape == (2, 3, 38, 52)
    assert SmpHead(CHANNELS[:4], 3, decoder_channels=[8, 8, 8, 8, 8])(maps).shape == (2, 3, 76, 104)
    with pytest.raises(ValueError, match=r"must list 4 or 5 numbers for 4 maps .* got \[8, 8, 8\]"):
        SmpHead(CHANNELS[:4], 3, decoder_channels=[8, 8, 8])
    with pytest.raises(ValueError, match="got 8"):
        SmpHead(CHANNELS[:4], 3, decoder_channels=8)


def test_attention_leaves_no_parameter_without_gradient():
    for decoder in ("unet", "unetplusplus"):
        head = SmpHead([16, 32], 3, decoder=decoder, decoder_channels=[16, 16, 16], decoder_attention_type="scse")
        head([torch.randn(2, 16, 4, 6), torch.randn(2, 32, 2, 3)]).sum().backward()
        assert [name for name, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("decoder", smp_decoders())
def test_one_image_trains_and_state_round_trips(decoder):
    sizes = [(2, 2)] * 4 if decoder == "dpt" else [(8, 8), (4, 4), (2, 2), (1, 1)]  # pooled and last maps are 1x1
    head, maps = build(decoder, 4), make_maps(sizes, batch=1)
    head(maps).square().sum().backward()
    other = build(decoder, 4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.eval()(maps), head.eval()(maps))


def test_norm_of_single_values_uses_running_statistics():
    torch.manual_seed(0)
    norm, plain = SingleValueBatchNorm(4), nn.BatchNorm2d(4)
    for module in (norm, plain):
        module.weight.data.copy_(torch.arange(1.0, 5))
        module.running_mean.copy_(torch.arange(4.0))
        module.running_var.fill_(4)
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), plain.eval()(x))
    torch.testing.assert_close(norm.running_mean, torch.arange(4.0))
    x = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(norm(x), plain.train()(x))
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_found_by_name_with_the_number_of_maps_it_uses():
    found = {decoder: find_head(f"smp:{decoder}").max_levels for decoder in smp_decoders()}
    assert found == {
        **dict.fromkeys((*BEYOND, "segformer"), 5),
        **dict.fromkeys(("fpn", "deeplabv3plus", "pan", "upernet", "dpt"), 4),
        **dict.fromkeys(("pspnet", "deeplabv3"), 1),
    }
    build_head = find_head("smp:segformer")
    assert build_head.multi_level is True
    assert build_head.preferred_pyramid is None
    assert build_head([8, 8], 3, decoder_segmentation_channels=4).decoder_name == "segformer"


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"smp has no decoder 'unett'; known: unet, .*, dpt; did you mean 'unet'\?"):
        SmpHead([8, 8], 3, decoder="unett")
    with pytest.raises(ValueError, match="no head is called 'smp:nothing'; known: linear"):
        find_head("smp:nothing")
    with pytest.raises(
        ValueError, match=r"'segformer' has no option 'channels'; it has: decoder_segmentation_channels"
    ):
        SmpHead([8, 8], 3, decoder="segformer", channels=8)
    with pytest.raises(ValueError, match=r"'upernet' cannot be built with \{'decoder_channels': '8'\}"):
        SmpHead([8, 8], 3, decoder="upernet", decoder_channels="8")
    with pytest.raises(ValueError, match=r"'fpn' takes 4 to 5 maps; got 3 \(channels \[8, 8, 8\]\)"):
        SmpHead([8, 8, 8], 3, decoder="fpn")
    with pytest.raises(ValueError, match="'unet' takes 1 to 5 maps; got 6"):
        SmpHead([8] * 6, 3, decoder="unet")
    with pytest.raises(ValueError, match="'dpt' takes 2 to 4 maps; got 5"):
        SmpHead([8] * 5, 3, decoder="dpt")
    with pytest.raises(ValueError, match="'linknet' divides channels by 4; got maps of .*2, 8"):
        SmpHead([2, 8], 3, decoder="linknet")
    with pytest.raises(ValueError, match="'pspnet' divides the coarsest map's channels by 4; got 10"):
        SmpHead([8, 10], 3, decoder="pspnet")
    with pytest.raises(ValueError, match=r"power of 2 for each of 2 maps; got \[4, 14\]"):
        SmpHead([8, 8], 3, decoder="dpt", encoder_output_strides=[4, 14])
    with pytest.raises(ValueError, match=r"power of 2 for each of 2 maps; got \[4\]"):
        SmpHead([8, 8], 3, decoder="dpt", encoder_output_strides=[4])


def test_maps_of_wrong_sizes_are_refused():
    head = build("unet", 2)
    for sizes in ([(8, 8), (8, 8)], [(16, 16), (4, 4)], [(8, 8), (4, 8)]):
        with pytest.raises(ValueError, match=r"'unet' takes maps that halve in size .* got \[\(\d+, \d+\), \(\d"):
            head(make_maps(sizes))
    with pytest.raises(
        ValueError, match=r"'dpt' was built for maps of strides \[16, 16\]; .* got \[\(8, 8\), \(4, 4\)\]"
    ):
        build("dpt", 2)(make_maps([(8, 8), (4, 4)]))
    with pytest.raises(ValueError, match=r"SmpHead takes a list of maps .* channels \[8, 12\]; got \[\(2, 8, 8, 8\)\]"):
        head(make_maps([(8, 8)]))


def test_pan_of_maps_whose_last_two_have_one_size():
    maps = [torch.randn(1, C, n, n) for C, n in ((4, 64), (8, 32), (8, 16), (8, 16))]
    head = SmpHead([4, 8, 8, 8], 3, decoder="pan", encoder_output_stride=16).eval()
    assert head(maps).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="'pan' takes maps that halve in size from each to the next, the last two of"):
        head([*maps[:3], torch.randn(1, 8, 8, 8)])
    with pytest.raises(ValueError, match="encoder_output_stride of smp's decoder 'pan' must be 16 or 32; got 8"):
        SmpHead([4, 8, 8, 8], 3, decoder="pan", encoder_output_stride=8)
