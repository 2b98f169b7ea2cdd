import pytest
import torch

from segheads import LinearHead, MaskTransformerHead, MeanShift, MeanShiftHead


def test_head_is_the_decoder_on_shifted_features():
    head, x = MeanShiftHead(24, 5, shift_channels=16, num_layers=2), torch.randn(2, 24, 3, 4)
    torch.testing.assert_close(head(x), head.decoder(head.shift(x)))
    assert not torch.allclose(head(x), head.decoder(x))


def test_no_layers_is_the_decoder_alone():
    head, x = MeanShiftHead(24, 5, num_layers=0), torch.randn(2, 24, 3, 4)
    torch.testing.assert_close(head(x), head.decoder(x), rtol=0, atol=0)
    head(x).sum().backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)  # or DDP stops


def test_layers_may_change_after_building():
    head, x = MeanShiftHead(24, 5, num_layers=1), torch.randn(2, 24, 3, 4)
    head.num_layers = 3
    expected = head.decoder(MeanShift.forward(head.shift, x))
    torch.testing.assert_close(head(x), expected)
    one = MeanShiftHead(24, 5, num_layers=1)
    one.load_state_dict(head.state_dict())
    x3 = one.shift(one.shift(one.shift(x)))
    torch.testing.assert_close(head(x), one.decoder(x3))
    assert head.settings() == {"num_layers": 3}


@pytest.mark.parametrize("decoder", ["mask_transformer", MaskTransformerHead])
def test_any_head_may_follow(decoder):
    head = MeanShiftHead(24, 5, decoder=decoder)
    assert isinstance(head.decoder, MaskTransformerHead)
    assert head.predictions(torch.randn(1, 24, 3, 4))[0].shape == (1, 5, 3, 4)


def test_initialisation_is_the_published():
    torch.manual_seed(0)
    head = MeanShiftHead(192, 150)
    assert float(head.shift.projection.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not head.shift.projection.bias.detach().any()
    assert head.shift.projection.weight.shape == (192, 192)  # shift_channels defaults to in_channels
    assert isinstance(head.decoder, LinearHead)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_bad_number_of_layers_is_named(value):
    with pytest.raises(ValueError, match=f"num_layers must be an integer of 0 or more; got {value!r}"):
        MeanShift(8).num_layers = value


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="got 8 and 0"):
        MeanShift(8, 0)
    with pytest.raises(ValueError, match="no head is called 'linaer'"):
        MeanShiftHead(8, 3, decoder="linaer")
