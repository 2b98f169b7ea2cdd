"""The class-attention learner against its formula written out, and its options."""

import pytest
import torch
import torch.nn.functional as F

from segheads import ClassAttentionHead


def randomised(head):
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.double().eval()


def attention(q, k, v, heads):
    """Softmax attention, one head and one image at a time."""
    out = torch.empty_like(q)
    width = q.shape[-1] // heads
    for b in range(q.shape[0]):
        for n in range(heads):
            s = slice(n * width, (n + 1) * width)
            out[b, :, s] = (q[b, :, s] @ k[b, :, s].T * width**-0.5).softmax(-1) @ v[b, :, s]
    return out


def slow(head, x, heads, pre_norm):
    """The block as SenFormer's paper draws it."""
    f = F.layer_norm(x.flatten(2).mT, (x.shape[1],), head.norm_features.weight, head.norm_features.bias, 1e-5)
    q = head.class_embeddings.repeat(x.shape[0], 1, 1)
    for layer in range(head.num_layers):
        block = head.blocks[0 if head.shared_block else layer]

        def cross(y, block=block):
            a = block.cross_attention
            k, v = a.kv(f).chunk(2, dim=-1)
            return a.proj(attention(a.q(y), k, v, heads))

        def own(y, block=block):
            a = block.self_attention
            return a.proj(attention(*a.qkv(y).chunk(3, dim=-1), heads))

        def mlp(y, block=block):
            return block.mlp.fc2(F.gelu(block.mlp.fc1(y)))

        for norm, part in ((block.norm1, cross), (block.norm2, own), (block.norm3, mlp)):
            q = q + part(norm(q)) if pre_norm else norm(q + part(q))
    return torch.einsum("bkd,bnd->bkn", head.norm(q), f).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("shared_block", [True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_is_the_formula(shared_block, pre_norm):
    head = ClassAttentionHead(12, 5, num_layers=3, num_heads=2, shared_block=shared_block, pre_norm=pre_norm)
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    head = randomised(head)
    torch.testing.assert_close(head(x), slow(head, x, 2, pre_norm))


def test_a_shared_block_has_one_blocks_weights_and_any_number_of_layers():
    shared, separate = ClassAttentionHead(16, 5), ClassAttentionHead(16, 5, shared_block=False)
    block = sum(p.numel() for p in shared.blocks.parameters())
    assert sum(p.numel() for p in separate.blocks.parameters()) == 6 * block
    head, x = randomised(shared), torch.randn(1, 16, 3, 4, dtype=torch.float64)
    six = head(x)
    head.num_layers = 2
    torch.testing.assert_close(head(x), slow(head, x, 8, True))
    assert not torch.allclose(head(x), six)
    assert head.settings() == {"num_layers": 2}


def test_keys_and_values_of_a_shared_block_are_computed_once():
    head, calls = ClassAttentionHead(16, 5), []
    head.blocks[0].cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    head(torch.randn(1, 16, 3, 4))
    assert len(calls) == 1


def test_classes_start_equal_as_published():
    assert not ClassAttentionHead(16, 5).class_embeddings.any()


def test_stochastic_depth_drops_in_training_only():
    head = randomised(ClassAttentionHead(16, 5, drop_path_rate=0.5))
    x = torch.randn(4, 16, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(head(x), head(x))
    assert not torch.allclose(head.train()(x), head(x))


def test_attention_heads_default_to_eight_or_what_divides():
    assert [ClassAttentionHead(C, 2).blocks[0].cross_attention.num_heads for C in (64, 12, 7, 1)] == [8, 6, 7, 1]


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="num_heads must divide in_channels 16; got 3"):
        ClassAttentionHead(16, 5, num_heads=3)
    with pytest.raises(ValueError, match="num_layers must be 1 or more; got 0"):
        ClassAttentionHead(16, 5, num_layers=0)
    with pytest.raises(ValueError, match="num_layers of separate blocks is fixed at 2; got 3"):
        ClassAttentionHead(16, 5, num_layers=2, shared_block=False).num_layers = 3
    with pytest.raises(ValueError, match="num_layers must be 1 or more; got -1"):
        ClassAttentionHead(16, 5).num_layers = -1
