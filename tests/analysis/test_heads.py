"""Attention maps of transformer heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads import create_model
from segheads.analysis import class_attention, head_attention

K = 5


def built(head: str, backbone: str = "test_vit", **options):
    torch.manual_seed(0)
    model = create_model(backbone, head, K, pretrained=False, **options)
    for name, module in model.head.named_modules():
        if isinstance(module, nn.Linear) and name.split(".")[-1] in ("qkv", "q", "kv"):
            module.weight.data.mul_(30)  # far from even
        for embeddings in (p for n, p in module.named_parameters(recurse=False) if n == "class_embeddings"):
            nn.init.normal_(embeddings)
    return model


def slow_weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) of `(N, D)` and `(M, D)`, `(heads, N, M)`."""
    d = q.shape[1] // heads
    return torch.stack([(q[:, n * d :][:, :d] @ k[:, n * d :][:, :d].T / d**0.5).softmax(-1) for n in range(heads)])


def inputs_of(model, modules, image: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: found.append(args[0])) for module in modules]
    with torch.no_grad():
        model.eval().logits(image[None])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("size", "pixel"), [((32, 48), (31, 47)), ((40, 70), (39, 69)), ((40, 70), (5, 40))])
def test_mask_transformer_equals_slow_reference(size, pixel):
    model = built("mask_transformer").train()
    image, (h, w) = torch.randn(3, *size), (-(-size[0] // 16), -(-size[1] // 16))
    of_patch = head_attention(model, image, pixel)
    of_class = class_attention(model, image, 3)
    assert model.training
    attentions = [block.attn for block in model.head.blocks]
    for layer, (attention, x) in enumerate(zip(attentions, inputs_of(model, attentions, image), strict=True)):
        q, k, _ = F.linear(x[0], attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
        weights = slow_weights(q, k, attention.num_heads)  # of patches, then classes
        for found, index in ((of_patch[layer], pixel[0] // 16 * w + pixel[1] // 16), (of_class[layer], h * w + 3)):
            assert (found.part, found.layer, found.name) == ("head", layer + 1, f"head.blocks.{layer}.attn")
            torch.testing.assert_close(found.patches, weights[:, index, : h * w].unflatten(1, (h, w)))
            torch.testing.assert_close(found.tokens, weights[:, index, h * w :])
            assert found.cell == (16.0, 16.0)


@pytest.mark.parametrize("shared", [True, False])
def test_class_attention_equals_slow_reference(shared):
    model = built("class_attention", head_kwargs={"num_layers": 2, "shared_block": shared, "num_heads": 2}).train()
    image = torch.randn(3, 40, 70)
    maps = class_attention(model, image, 2)
    assert [(m.part, m.layer) for m in maps] == [("head", 1), ("head", 2)]
    blocks = model.head.blocks
    (features,) = [model.head.norm_features(x) for x in inputs_of(model, [model.head.norm_features], image)]
    queries = inputs_of(model, [block.cross_attention.q for block in blocks], image)
    for layer, (found, query) in enumerate(zip(maps, queries, strict=True)):
        attention = blocks[0 if shared else layer].cross_attention
        key = attention.kv(features[0]).chunk(2, -1)[0]
        weights = slow_weights(attention.q(query[0]), key, 2)
        torch.testing.assert_close(found.patches, weights[:, 2].unflatten(1, (3, 5)))
        assert found.tokens.shape == (2, 0)


@pytest.mark.parametrize("learner", ["class_attention", "mask_transformer"])
@pytest.mark.parametrize("share", ["none", "decoder"])
def test_each_learner_has_its_maps(learner, share):
    options = {"learner": learner, "share": share, "learner_kwargs": {"num_layers": 2}}
    model = built("senformer", "test_resnet", pyramid_kwargs={"out_channels": 16}, head_kwargs=options)
    maps = class_attention(model, torch.randn(3, 70, 100), 1)
    expected = [(f"head.learners.{n}", layer) for n in range(4) for layer in (1, 2)]
    assert [(m.part, m.layer) for m in maps] == expected
    strides = [4.0, 8.0, 16.0, 32.0]
    for found, stride in zip(maps, [s for s in strides for _ in range(2)], strict=True):
        assert found.cell == (stride, stride)
        assert found.patches.shape[1:] == (-(-70 // stride), -(-100 // stride))
        torch.testing.assert_close(found.patches.sum((1, 2)) + found.tokens.sum(1), torch.ones(len(found.patches)))
    finest, *_, coarsest = maps
    assert not torch.equal(finest.patches[0, :3, :3], coarsest.patches[0])


def test_a_head_inside_another():
    model = built("mean_shift", head_kwargs={"decoder": "mask_transformer"})
    assert [m.part for m in head_attention(model, torch.randn(3, 32, 32), (0, 0))] == ["head.decoder"] * 2


@pytest.mark.parametrize("head", ["linear", "mean_shift"])
def test_heads_without_attention_are_refused(head):
    model, image = built(head), torch.randn(3, 32, 32)
    name = type(model.head).__name__
    with pytest.raises(ValueError, match=f"needs a MaskTransformerHead in it; got {name}"):
        head_attention(model, image, (0, 0))
    with pytest.raises(ValueError, match=f"needs a MaskTransformerHead or ClassAttentionHead in it; got {name}"):
        class_attention(model, image, 0)


def test_arguments_that_do_not_fit():
    model = built("mask_transformer")
    with pytest.raises(ValueError, match="label must be 0 to 4, the model's classes; got 5"):
        class_attention(model, torch.randn(3, 32, 32), 5)
    with pytest.raises(ValueError, match=r"inside the image of 32 x 32 pixels; got \(3, 32\)"):
        head_attention(model, torch.randn(3, 32, 32), (3, 32))
