"""What is exported does what the model and its protocol do; what is exchanged for it gives the same."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import pos_embed_sincos, resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from segheads import create_model
from segheads.exporting import Deployed
from segheads.exporting.deployed import upsample_to_last
from segheads.exporting.exchange import adaptive_average, exchanged, resample_positions, rotary_grid, swin_attention
from segheads.inference import InferenceProtocol, predict_with_confidence


def build(head="linear", num_classes=5, **options):
    torch.manual_seed(0)
    model = create_model("test_vit", head, num_classes, pretrained=False, **options)
    for parameter in model.head.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.1)  # labels differ from place to place
    return model.eval()


@pytest.mark.parametrize(
    ("head", "num_classes", "options"),
    [
        ("linear", 5, {}),
        ("linear", 70, {}),  # so many that classes are the last axis
        ("linear", 300, {"ignore_index": -1}),  # and more than 8 bit hold
        ("linear", 5, {"stretch_logits": True}),
        ("linear", 1, {"loss": "bce"}),
        ("senformer", 5, {"pyramid_kwargs": {"out_channels": 16}}),
        ("senformer", 1, {"loss": "bce", "pyramid_kwargs": {"out_channels": 16}}),
    ],
)
def test_labels_probability_and_logits_are_the_models(head, num_classes, options):
    model = build(head, num_classes, **options)
    if num_classes == 1:
        model.protocol = InferenceProtocol(threshold=0.4)
    deployed = Deployed(model, ("logits", "labels", "probability"))
    images = torch.randint(0, 256, (1, 3, 50, 75), dtype=torch.uint8)
    config = model.data_config
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    x = (images / 255 - mean) / std
    with torch.no_grad():
        logits, labels, probability = deployed(images)
        torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)
    expected, sure = predict_with_confidence(model, x, model.protocol)
    assert labels.dtype == (torch.uint8 if num_classes <= 256 else torch.int32)
    assert (labels[0] == expected).float().mean() >= 0.999
    torch.testing.assert_close(probability[0], sure, atol=1e-4, rtol=1e-4)
    assert len(labels.unique()) > 1 or num_classes == 1


def test_images_of_more_bands_and_bits_come_as_stored_values():
    model = build(backbone_kwargs={"in_chans": 5})
    model.set_input(bit_depth=12, mean=[0.1] * 5, std=[0.2] * 5)
    deployed = Deployed(model, ("logits",))
    values = torch.randint(0, 4096, (1, 5, 32, 48)).float()
    assert deployed.input_dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(deployed(values)[0], model((values / 4095 - 0.1) / 0.2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("factor", "h", "w"), [(8, 3, 4), (16, 1, 1), (14, 2, 5), (32, 5, 1)])
def test_upsampling_with_classes_last(factor, h, w):
    x = torch.randn(2, 7, h, w)
    expected = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample_to_last(x, factor).movedim(-1, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 6, (3, 4)])
@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 2), (12, 6)])
def test_adaptive_average(size, h, w):
    x, pool = torch.randn(2, 3, h, w), nn.AdaptiveAvgPool2d(size)
    torch.testing.assert_close(adaptive_average(pool, x), pool(x))


@pytest.mark.parametrize("new", [(7, 7), (3, 12), (1, 5), (14, 20)])
def test_position_embeddings(new):
    table = torch.randn(1, 50, 8)
    torch.testing.assert_close(
        resample_positions(table, new), resample_abs_pos_embed(table, list(new)), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(NotImplementedError, match="resampled by 'bilinear'"):
        resample_positions(table, new, interpolation="bilinear")


@pytest.mark.parametrize("size", [(9, 15), (7, 7), (14, 8)])
@pytest.mark.parametrize("shift", [0, 3])
def test_swin_attention(size, shift):
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, (28, 28), num_heads=2, window_size=7, shift_size=shift, dynamic_mask=True).eval()
    x = torch.randn(2, *size, 8)
    with torch.no_grad():
        torch.testing.assert_close(swin_attention(block, x), block._attn(x))


def test_what_is_exchanged_is_put_back():
    model = build("uper", pyramid_kwargs={"out_channels": 16})
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    size = model.backbone.model.patch_embed.img_size
    with pytest.raises(ZeroDivisionError), exchanged(model):
        1 / (model.backbone.model.patch_embed.img_size or 0)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert model.backbone.model.patch_embed.img_size == size
    import timm.models.vision_transformer as file

    assert file.resample_abs_pos_embed is resample_abs_pos_embed


@pytest.mark.parametrize("how", ["separate", "max", "min"])
def test_rotary_positions(how):
    original = pos_embed_sincos._build_grid
    options = {"grid_type": "centered", "normalize_coords": how, "ndim": 2}
    torch.testing.assert_close(rotary_grid(original, (3, 5), **options), original((3, 5), **options))
    assert torch.equal(rotary_grid(original, (3, 5), ndim=2), original((3, 5), ndim=2))


def test_other_outputs_leave_the_model_in_its_mode():
    model = build("mask_transformer")
    other = Deployed(model, ("labels", "logits")).with_outputs(("logits",))
    assert other.outputs == ("logits",)
    assert not any(part.training for part in model.modules())
