"""Attention maps and attended distances of encoders."""

import math

import pytest
import torch
from torch import Tensor

from segheads import TimmBackbone, create_model
from segheads.analysis import attended_distance, attention, encoder_attention

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}


def sharp(name: str, options: dict | None = None) -> TimmBackbone:
    """A ViT whose attention is far from even."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, pretrained=False, model_kwargs=options or {})
    for block in backbone.model.blocks:
        block.attn.qkv.weight.data.mul_(15)
    return backbone


def slow_attention(backbone: TimmBackbone, images: Tensor) -> list[Tensor]:
    """All weights of a plain ViT, `(B, heads, N, N)` for each layer, from the queries and keys of its layers."""
    projected: list[Tensor] = []
    hooks = [
        block.attn.qkv.register_forward_hook(lambda module, args, output: projected.append(output))
        for block in backbone.model.blocks
    ]
    with torch.no_grad():
        backbone.eval()(images)
    for hook in hooks:
        hook.remove()
    layers = []
    for qkv, block in zip(projected, backbone.model.blocks, strict=True):
        q, k, _ = (part.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        layers.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
    return layers


@pytest.mark.parametrize(("size", "pixel"), [((32, 48), (0, 0)), ((40, 70), (39, 69)), ((40, 70), (20, 17))])
@pytest.mark.parametrize("training", [True, False])
def test_maps_equal_slow_reference(size, pixel, training):
    backbone = sharp("test_vit").train(training)
    image = torch.randn(3, *size)
    h, w = -(-size[0] // 16), -(-size[1] // 16)
    index = 1 + pixel[0] // 16 * w + pixel[1] // 16  # after the class token
    maps = encoder_attention(backbone, image, pixel)
    assert backbone.training == training
    assert [(m.part, m.layer, m.name, m.cell) for m in maps] == [
        ("encoder", n + 1, f"model.blocks.{n}.attn", (16.0, 16.0)) for n in range(6)
    ]
    for found, expected in zip(maps, slow_attention(backbone, image[None]), strict=True):
        assert not found.patches.requires_grad
        torch.testing.assert_close(found.patches, expected[0, :, index, 1:].reshape(2, h, w))
        torch.testing.assert_close(found.tokens, expected[0, :, index, :1])
    again = encoder_attention(create_model("test_vit", "linear", 3, pretrained=False), image[None], pixel)
    assert again[0].patches.shape == maps[0].patches.shape


# Class, distillation and register tokens; none; rotary positions; patches of 14
@pytest.mark.parametrize(
    ("name", "tokens", "grid"),
    [
        ("deit_tiny_distilled_patch16_224", 2, (3, 5)),
        ("vit_small_patch14_reg4_dinov2", 5, (3, 6)),
        ("vit_small_patch16_dinov3", 5, (3, 5)),
        ("vit_base_patch16_siglip_224", 0, (3, 5)),
        ("eva02_tiny_patch14_224", 1, (3, 6)),
        ("samvit_base_patch16", 0, (3, 5)),
    ],
)
def test_tokens_that_are_no_patches_are_kept_apart(name, tokens, grid):
    options = SMALL | ({"global_attn_indexes": (1,)} if "sam" in name else {})
    maps = encoder_attention(
        TimmBackbone(name, pretrained=False, model_kwargs=options), torch.randn(3, 40, 75), (3, 70)
    )
    assert [m.name for m in maps] == [f"model.blocks.{n}.attn" for n in ((1,) if "sam" in name else (0, 1))]
    for found in maps:
        assert found.patches.shape == (2, *grid)
        assert found.tokens.shape == (2, tokens)
        torch.testing.assert_close(found.patches.sum((1, 2)) + found.tokens.sum(1), torch.ones(2))


def test_an_image_that_is_resized_has_patches_of_another_size():
    backbone = TimmBackbone("beit_base_patch16_224", pretrained=False, model_kwargs=SMALL)
    backbone.model.blocks[0].attn.qkv.weight.data.mul_(15)
    first, *_ = encoder_attention(backbone, torch.randn(3, 112, 56), (111, 55))
    assert first.patches.shape == (2, 14, 14)
    assert first.cell == (8.0, 4.0)
    assert attended_distance(backbone, torch.randn(1, 3, 112, 56))[0].uniform < math.hypot(112, 56)


def test_late_stages_of_hierarchies_that_attend_to_all():
    maps = encoder_attention(TimmBackbone("pvt_v2_b0", pretrained=False), torch.randn(3, 64, 96), (63, 95))
    assert maps[-1].patches.shape[1:] == (2, 3)
    assert maps[-1].cell == (32.0, 32.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_resnet", "none of its layers calls PyTorch's attention"),
        (
            "swin_tiny_patch4_window7_224",
            "model.layers.0.blocks.0.attn, for one, attends among 49 queries in each of 12",
        ),
        ("hiera_tiny_224", "model.blocks.0.attn, for one"),
    ],
)
def test_backbones_without_such_a_layer_are_refused(name, reason):
    backbone = TimmBackbone(name, pretrained=False)
    message = f"{name} has no layer in which every patch attends to all patches: {reason}.*; supported are ViTs"
    with pytest.raises(ValueError, match=message):
        encoder_attention(backbone, torch.randn(3, 56, 84), (0, 0))
    with pytest.raises(ValueError, match=message):
        attended_distance(backbone, torch.randn(1, 3, 56, 84))


@pytest.mark.parametrize(
    ("shape", "pixel", "message"),
    [
        ((3, 40, 70), (40, 0), r"pixel \(y, x\) must be inside the image of 40 x 70 pixels; got \(40, 0\)"),
        ((3, 40, 70), (0, -1), r"inside the image of 40 x 70 pixels; got \(0, -1\)"),
        ((2, 3, 40, 70), (0, 0), r"image must be one image, .* got \(2, 3, 40, 70\)"),
        ((40, 70), (0, 0), r"image must be one image, .* got \(40, 70\)"),
    ],
)
def test_images_and_pixels_that_do_not_fit(shape, pixel, message):
    with pytest.raises(ValueError, match=message):
        encoder_attention(TimmBackbone("test_vit", pretrained=False), torch.randn(shape), pixel)


def slow_distance(weights: Tensor, grid: tuple[int, int], side: int) -> float:
    """Mean over patches of the mean distance to the others, weighted by attention to patches alone."""
    places = [(y * side, x * side) for y in range(grid[0]) for x in range(grid[1])]
    total = 0.0
    for i, here in enumerate(places):
        row = weights[i].tolist()
        total += sum(row[j] * math.dist(here, there) for j, there in enumerate(places)) / sum(row)
    return total / len(places)


@pytest.mark.parametrize("rows", [4, 256])
def test_distances_equal_slow_reference(rows, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", rows)
    backbone = sharp("test_vit").train()
    images = torch.randn(2, 3, 40, 70)
    layers = attended_distance(backbone, images)
    assert [entry.layer for entry in layers] == [1, 2, 3, 4, 5, 6]
    assert layers[1].name == "model.blocks.1.attn"
    for found, weights in zip(layers, slow_attention(backbone, images), strict=True):
        expected = [sum(slow_distance(weights[b, head, 1:, 1:], (3, 5), 16) for b in range(2)) / 2 for head in range(2)]
        torch.testing.assert_close(found.pixels, torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert found.uniform == pytest.approx(slow_distance(torch.ones(15, 15), (3, 5), 16))
    assert layers[0].pixels.std() > 0.1


def test_distance_of_even_attention_and_of_attention_to_oneself():
    backbone = TimmBackbone("test_vit", pretrained=False)
    for block in backbone.model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.zeros_(block.attn.qkv.bias)
    for entry in attended_distance(backbone, torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(entry.pixels, torch.full((2,), entry.uniform))
    one_patch = attended_distance(backbone, torch.randn(1, 3, 9, 16))
    assert all(entry.uniform == 0 and (entry.pixels == 0).all() for entry in one_patch)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\); got \(3, 64, 64\)"):
        attended_distance(backbone, torch.randn(3, 64, 64))
