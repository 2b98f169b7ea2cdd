import pytest
import torch

from segheads import (
    LinearHead,
    MaskTransformerHead,
    MeanShift,
    MeanShiftHead,
    SegmentationModel,
    create_model,
)
from segheads.functional import mean_shift


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
    assert head.shift.settings() == {"num_layers": 3, "bandwidth": pytest.approx(24**0.25)}


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
        MeanShift(8, shift_channels=0)
    with pytest.raises(ValueError, match="no head is called 'linaer'"):
        MeanShiftHead(8, 3, decoder="linaer")


DEEP = {"kernel": "gaussian", "blurring": False, "num_layers": 2, "spatial_bandwidth": 2.0}


@pytest.mark.parametrize("learned", [True, False])
def test_options_reach_the_formula(learned):
    options = {**DEEP, "bandwidth": 0.7, "step": 0.6}
    head = MeanShiftHead(24, 5, shift_channels=16, **options, learn_bandwidth=learned, learn_step=learned)
    x, projection = torch.randn(2, 24, 3, 4), head.shift.projection
    expected = mean_shift(x, projection.weight, projection.bias, **options)
    torch.testing.assert_close(head.shift(x), expected)
    torch.testing.assert_close(head(x), head.decoder(expected))


def test_what_is_learned_gets_a_gradient_and_is_not_decayed():
    head = MeanShiftHead(24, 5, **DEEP, learn_bandwidth=True, learn_step=True)
    head(torch.randn(2, 24, 3, 4)).square().mean().backward()
    learned = {name: p for name, p in head.shift.named_parameters() if p.ndim == 0}
    assert len(learned) == 3  # two bandwidths and the step
    assert all(p.grad.abs() > 0 for p in learned.values())
    fixed = MeanShiftHead(24, 5, **DEEP)
    assert [name for name, _ in fixed.shift.named_parameters()] == ["projection.weight", "projection.bias"]


@pytest.mark.parametrize("learned", [True, False])
def test_bandwidths_are_given_at_inference_and_saved(learned, tmp_path):
    options = {**DEEP, "learn_bandwidth": learned}
    model = create_model("test_vit", "mean_shift", 5, pretrained=False, head_kwargs=options).eval()
    head = model.head
    assert head.bandwidth == pytest.approx(0.01 * head.in_channels)  # d_ms is the width of the tokens
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    head.bandwidth, head.spatial_bandwidth = 0.5, 1.2
    after = model(images)
    assert not torch.allclose(before, after)
    model.save_pretrained(tmp_path)
    again = SegmentationModel.from_pretrained(tmp_path).eval()
    assert (again.head.bandwidth, again.head.spatial_bandwidth) == pytest.approx((0.5, 1.2))
    assert set(head.shift.settings()) == {"num_layers"} | (set() if learned else {"bandwidth", "spatial_bandwidth"})
    torch.testing.assert_close(again(images), after, rtol=0, atol=0)


def test_trajectory_and_affinity():
    shift, x = (
        MeanShift(24, shift_channels=16, num_layers=3, kernel="gaussian", spatial_bandwidth=1.5),
        torch.randn(2, 24, 3, 4),
    )
    steps = shift.trajectory(x)
    assert len(steps) == 4
    torch.testing.assert_close(steps[0], x)
    torch.testing.assert_close(steps[3], shift(x))
    one_step = torch.stack([shift.affinity(x, i) for i in range(12)], dim=1) @ x.flatten(2).mT  # (B, N, N) (B, N, C)
    torch.testing.assert_close(one_step, steps[1].flatten(2).mT)
    tokens = MeanShift(24, kernel="cosine")
    torch.testing.assert_close(tokens.affinity(x.flatten(2).mT, 7).sum(-1), torch.ones(2))


def test_representation_tells_what_is_learned():
    text = repr(MeanShift(16, num_layers=2, kernel="cosine", learn_bandwidth=True, spatial_bandwidth=2.0))
    assert "kernel=cosine, bandwidth=0.3162 (learned), spatial_bandwidth=2 (learned), blurring=True, step=1" in text
    assert "kernel=dot, bandwidth=2, blurring=True, step=1, num_layers=1" in repr(MeanShift(16))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="kernel must be one of dot, gaussian, cosine; got 'flat'"):
        MeanShift(8, kernel="flat")
    with pytest.raises(ValueError, match="step must be above 0; got 0"):
        MeanShift(8, step=0)
    for value in (0, -1.0, float("inf"), float("nan"), True, "2"):
        with pytest.raises(ValueError, match=f"^bandwidth must be a finite number above 0; got {value!r}"):
            MeanShift(8).bandwidth = value
    with pytest.raises(ValueError, match="spatial_bandwidth must be a finite number above 0; got -2"):
        MeanShiftHead(8, 3, spatial_bandwidth=-2)
    with pytest.raises(ValueError, match=r"built without a spatial bandwidth and can not take 2\.0"):
        MeanShiftHead(8, 3).spatial_bandwidth = 2.0
    with pytest.raises(IndexError, match=r"index must be 0\.\.11, of a token; got 12"):
        MeanShift(8).affinity(torch.randn(1, 8, 3, 4), 12)


def test_the_decoder_may_see_the_unshifted_features_too():
    head, x = MeanShiftHead(24, 5, num_layers=2, concat_input=True), torch.randn(2, 24, 3, 4)
    assert head.decoder.in_channels == 48
    expected = head.decoder(torch.cat([x, head.shift(x)], dim=1))
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.predictions(x)[0], expected)


@pytest.mark.parametrize(("kernel", "expected"), [("dot", 2.0), ("gaussian", 0.01 * 128**0.5), ("cosine", 0.1**0.5)])
def test_default_bandwidths_of_the_block(kernel, expected):
    assert MeanShift(8, shift_channels=16, kernel=kernel).bandwidth == pytest.approx(expected)


def test_default_gaussian_shifts_a_little_where_training_starts():
    torch.manual_seed(0)
    x = torch.randn(1, 192, 20, 20)
    for channels in (64, 192, 384):
        shift = MeanShift(192, shift_channels=channels, kernel="gaussian")
        effective = shift.affinity(x, 7).square().sum().reciprocal().item()  # tokens that weigh in
        assert 2 < effective < 200, channels
