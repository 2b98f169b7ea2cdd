import pytest
import torch
import torch.nn.functional as F

from segheads.functional import upsample_argmax, upsample_cross_entropy


def plain_loss(logits, labels, ignore_index=255):
    scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("size", [(32, 48), (7, 5), (3, 4), (1, 1)])
def test_loss_is_the_plain_one(size):
    logits, labels = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randint(0, 5, (2, *size))
    labels[0, 0, 0] = 255 if labels[0].numel() > 1 else labels[0, 0, 0]
    (gradient,) = torch.autograd.grad(upsample_cross_entropy(logits, labels), logits)
    (expected,) = torch.autograd.grad(plain_loss(logits, labels), logits)
    torch.testing.assert_close(upsample_cross_entropy(logits, labels), plain_loss(logits, labels))
    torch.testing.assert_close(gradient, expected)


def test_all_divides_by_every_pixel():
    logits, labels = torch.randn(1, 5, 2, 2), torch.randint(0, 5, (1, 8, 8))
    labels[:, :2] = 255
    valid, every = (upsample_cross_entropy(logits, labels, reduction=reduction) for reduction in ("valid", "all"))
    torch.testing.assert_close(every, valid * 48 / 64)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_nothing_but_ignored_pixels_is_zero(reduction):
    logits = torch.randn(1, 5, 2, 2, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.full((1, 8, 8), 255), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", ["small", "odd", "k150"])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_published_losses(golden, name, reduction):
    vectors = golden("segm_loss")
    logits, labels = vectors[f"input.{name}.logits"].requires_grad_(), vectors[f"input.{name}.label"]
    suffix = "" if reduction == "valid" else "_mmseg_all_pixels"
    loss = upsample_cross_entropy(logits, labels, reduction=reduction)
    loss.backward()
    torch.testing.assert_close(loss, vectors[f"output.{name}.loss{suffix}"].view(()), rtol=1e-6, atol=0)
    expected = vectors[f"grad.{name}.logits{suffix}"]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_half_precision_logits_are_summed_in_single():
    logits, labels = torch.randn(1, 5, 4, 4), torch.randint(0, 5, (1, 32, 32))
    loss = upsample_cross_entropy(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, upsample_cross_entropy(logits.bfloat16().float(), labels))


def test_label_map_is_the_plain_one():
    logits = torch.randn(2, 7, 5, 6)
    expected = F.interpolate(logits, size=(33, 17), mode="bilinear", align_corners=False).argmax(1)
    torch.testing.assert_close(upsample_argmax(logits, (33, 17)), expected)


def test_bad_input_is_named():
    logits = torch.randn(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"classes 0 to 2 or 255 \(ignored\); got 7"):
        upsample_cross_entropy(logits, torch.full((1, 4, 4), 7))
    with pytest.raises(ValueError, match="got -1"):
        upsample_cross_entropy(logits, torch.full((1, 4, 4), -1))
    with pytest.raises(ValueError, match=r"got \(1, 3, 2, 2\) and \(2, 4, 4\)"):
        upsample_cross_entropy(logits, torch.zeros(2, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="'mean'"):
        upsample_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long), reduction="mean")
