"""Attention weights, read out of running modules."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from segheads import TimmBackbone
from segheads.analysis import AttentionCall, attention_calls

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
# a class token; none, and normalised queries and keys; registers and rotary positions; a bias of relative positions
VITS = [
    ("test_vit", {}),
    ("test_vit3", {}),
    ("vit_small_patch16_dinov3", SMALL),
    ("beit_base_patch16_224", SMALL),
]


def calls_of(model: nn.Module, *args: Tensor) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with attention_calls(model, calls.append):
        model(*args)
    return calls


def slow_weights(attention: Attention, x: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)), one query, key and head at a time."""
    B, N, D = x.shape
    d = D // attention.num_heads
    q, k, _ = F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)
    weights = torch.zeros(B, attention.num_heads, N, N)
    for b in range(B):
        for head in range(attention.num_heads):
            at = slice(head * d, (head + 1) * d)
            for i in range(N):
                scores = torch.stack([q[b, i, at] @ k[b, j, at] / d**0.5 for j in range(N)])
                weights[b, head, i] = scores.exp() / scores.exp().sum()
    return weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_weights_equal_slow_reference(fused, training):
    torch.manual_seed(0)
    attention = Attention(12, num_heads=3, qkv_bias=True, attn_drop=0.5).train(training)
    attention.fused_attn = fused
    x = torch.randn(2, 5, 12)
    (call,) = calls_of(attention, x)
    torch.testing.assert_close(call.weights(), slow_weights(attention, x))
    torch.testing.assert_close(call.weights(slice(1, 3)), slow_weights(attention, x)[:, :, 1:3])
    assert call.inside == ("",)


@pytest.mark.parametrize(("name", "options"), VITS)
@pytest.mark.parametrize("fused", [True, False])
def test_rows_sum_to_1_and_their_averages_of_values_are_the_layers_output(name, options, fused):
    torch.manual_seed(0)
    backbone = TimmBackbone(name, pretrained=False, model_kwargs=options).train()
    averages: list[Tensor] = []
    for block in backbone.model.blocks:
        block.attn.fused_attn = fused
        block.attn.qkv.weight.data.mul_(20)  # far from even
        block.attn.proj.register_forward_pre_hook(lambda _, args: averages.append(args[0]))
    calls = calls_of(backbone, torch.randn(2, 3, 40, 70))
    assert len(calls) == len(averages) == len(backbone.model.blocks)
    for call, average in zip(calls, averages, strict=True):
        weights = call.weights()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.max() > 0.2
        torch.testing.assert_close((weights @ call.value).transpose(1, 2).flatten(2), average, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """One call of PyTorch's function, with options."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.result = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.result


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.tensor([[True, False, True, True, False, True]])},  # of keys
        {"attn_mask": torch.randn(1, 4, 6, 6), "scale": 2.0},
        {"is_causal": True},
        {"is_causal": True, "enable_gqa": True},
    ],
    ids=["keys", "bias", "causal", "groups"],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_masks_scale_and_groups_are_taken_into_account(options, autocast):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    module = Masked(**options)
    (call,) = calls_of(module, q, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = call.weights()
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights @ call.value, module.result)
    torch.testing.assert_close(call.weights(slice(4, 6)), weights[:, :, 4:])


def state_of(model: nn.Module) -> list[object]:
    return [
        (m.training, getattr(m, "fused_attn", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    backbone = TimmBackbone("test_vit", pretrained=False, model_kwargs={"attn_drop_rate": 0.5}).train()
    backbone.model.blocks[1].eval()
    backbone.model.blocks[2].attn.fused_attn = False
    before = state_of(backbone)

    def visit(call: AttentionCall) -> None:
        assert not any(module.training for module in backbone.modules())
        assert not torch.is_grad_enabled()
        if fails:
            raise RuntimeError("the visitor's own")

    images = torch.randn(1, 3, 32, 32)
    if fails:
        with pytest.raises(RuntimeError, match="the visitor's own"), attention_calls(backbone, visit):
            backbone(images)
    else:
        with attention_calls(backbone, visit):
            backbone(images)
    assert state_of(backbone) == before
    assert torch.is_grad_enabled()
    seen: list[AttentionCall] = []
    with attention_calls(nn.Identity(), seen.append):  # another module's attention is not looked at
        backbone(images)
    assert not seen


def test_a_compiled_module_runs_as_it_was_written():
    def compiler(*_):
        raise AssertionError("compiled")

    backbone = TimmBackbone("test_vit", pretrained=False, model_kwargs={"depth": 2})
    backbone.model.blocks[0].compile(backend=compiler)
    names = [call.inside[-1] for call in calls_of(backbone, torch.randn(1, 3, 32, 32))]
    assert names == ["model.blocks.0.attn", "model.blocks.1.attn"]
