import pytest
import torch

from segheads import MaskTransformerHead


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (48, 1), (200, 2), (384, 6), (7, 1)])
def test_default_number_of_heads_divides_the_width(width, heads):
    assert MaskTransformerHead(width, 3).blocks[0].attn.num_heads == heads


def test_stochastic_depth_rises_to_the_last_block():
    head = MaskTransformerHead(64, 3, num_layers=3, drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in head.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2]))


def test_masks_are_normalised_over_classes():
    masks = MaskTransformerHead(64, 8).eval()(torch.randn(1, 64, 3, 4))
    torch.testing.assert_close(masks.mean(1), torch.zeros(1, 3, 4), atol=1e-5, rtol=0)


def test_initialisation_is_the_published():
    torch.manual_seed(0)
    head = MaskTransformerHead(256, 200)
    assert float(head.class_embeddings.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(head.project_patches.weight.detach().std()) == pytest.approx(256**-0.5, rel=0.05)
    assert float(head.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not head.project.bias.detach().any()


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim 64; got 5"):
        MaskTransformerHead(64, 3, num_heads=5)
    with pytest.raises(ValueError, match="num_layers must be 1 or more; got 0"):
        MaskTransformerHead(64, 3, num_layers=0)
