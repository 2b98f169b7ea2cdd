import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segheads.heads.fcn import FCNHead


def test_is_convolution_norm_relu_classifier():
    torch.manual_seed(0)
    head = FCNHead(6, 3, channels=4, num_layers=2).eval()
    x = torch.randn(2, 6, 5, 7)
    expected = x
    for conv, norm, _ in head.layers:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        expected = F.conv2d(expected, conv.weight, padding=1)
        expected = F.relu(F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    expected = F.conv2d(expected, head.classifier.weight, head.classifier.bias)
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize(("num_layers", "kernel_size"), [(0, 3), (1, 1), (1, 3), (3, 5)])
def test_keeps_the_grid(num_layers, kernel_size):
    head = FCNHead(6, 3, channels=4, num_layers=num_layers, kernel_size=kernel_size)
    assert head(torch.randn(2, 6, 5, 7)).shape == (2, 3, 5, 7)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == num_layers


def test_parameters_are_those_of_the_auxiliary_head():
    with torch.device("meta"):
        head = FCNHead(1024, 150)  # the third stage of ResNet-50
    convolution, norm, classifier = 1024 * 256 * 9, 2 * 256, 256 * 150 + 150
    assert sum(p.numel() for p in head.parameters()) == convolution + norm + classifier


def test_dropout_drops_whole_channels():
    torch.manual_seed(0)
    head = FCNHead(4, 2, channels=64, drop_rate=0.5)
    assert FCNHead(4, 2).dropout.p == 0.1
    seen = []
    head.dropout.register_forward_hook(lambda module, args, out: seen.append(out))
    head(torch.randn(2, 4, 9, 9))
    empty = (seen[0] == 0).flatten(2).all(2)
    assert 0.2 < float(empty.float().mean()) < 0.8
    head.eval()
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(head(x), head(x))


def test_classifier_starts_like_other_heads_or_as_published():
    torch.manual_seed(0)
    head, published = FCNHead(128, 100), FCNHead(128, 100, init="published")
    xavier = (2 / (256 + 100)) ** 0.5
    for own, std in ((head, xavier), (published, 0.01)):
        assert float(own.classifier.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert not own.classifier.bias.detach().any()
        assert float(own.layers[0][0].weight.detach().std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)
    with pytest.raises(ValueError, match="^init must be one of xavier, published; got 'zeros'"):
        FCNHead(128, 100, init="zeros")


def test_batch_equals_single_and_gradients_reach_all():
    head = FCNHead(6, 3, channels=4).eval()
    x = torch.randn(3, 6, 5, 7)
    torch.testing.assert_close(head(x)[1:2], head(x[1:2]))
    head.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="channels must be 1 or more and num_layers 0 or more; got 0 and 1"):
        FCNHead(6, 3, channels=0)
    with pytest.raises(ValueError, match="got 256 and -1"):
        FCNHead(6, 3, num_layers=-1)
    with pytest.raises(ValueError, match="kernel_size must be odd, so that the grid stays the same; got 2"):
        FCNHead(6, 3, kernel_size=2)
    with pytest.raises(ValueError, match=r"FCNHead takes a map of shape \(B, 6, h, w\); got \(2, 5, 4, 4\)"):
        FCNHead(6, 3)(torch.randn(2, 5, 4, 4))
