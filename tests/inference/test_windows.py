"""Upsampling of windows and views: in full precision under autocast, with weights that are made once for a size."""

import pytest
import torch
from torch import nn

from segheads import create_model
from segheads.functional import bilinear, upsample_argmax, upsample_cross_entropy
from segheads.inference import InferenceProtocol, predict_labels, predict_probabilities, predict_with_confidence

PROTOCOLS = {
    "whole": InferenceProtocol(),
    "windows": InferenceProtocol(window=32, stride=20),
    "views": InferenceProtocol(scales=(0.5, 1.0), flip=True),
    "views of windows": InferenceProtocol(window=32, stride=20, scales=(0.75, 1.25), flip=True),
}


class FixedLogits(nn.Module):
    """Logits that no autocast changes: a function of the window's pixels, in fp32."""

    def low_resolution(self, images):
        with torch.autocast(images.device.type, enabled=False):
            logits = nn.functional.avg_pool2d(images.float(), 4)
        return logits * 8, (images.shape[2], images.shape[3])


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_autocast_changes_no_score(protocol):
    torch.manual_seed(0)
    model, image = FixedLogits(), torch.randn(3, 48, 64)
    expected = predict_probabilities(model, image, protocol, size=(90, 120))
    labels, confidence = predict_with_confidence(model, image, protocol, size=(90, 120))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            predict_probabilities(model, image, protocol, size=(90, 120)), expected, rtol=0, atol=1e-6
        )
        found = predict_with_confidence(model, image, protocol, size=(90, 120))
        assert torch.equal(found[0], labels)
        assert torch.equal(predict_labels(model, image, protocol, size=(90, 120)), labels)
    torch.testing.assert_close(found[1], confidence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_weights_are_made_once_for_a_size(protocol, monkeypatch):
    model, images = FixedLogits(), torch.randn(3, 3, 48, 64)
    first = predict_labels(model, images[0], protocol)
    copies, make = [], bilinear._make_blocks
    monkeypatch.setattr(bilinear, "_make_blocks", lambda *args: (copies.append(args), make(*args))[1])
    assert torch.equal(predict_labels(model, images[0], protocol), first)
    predict_labels(model, images[1], protocol)
    assert copies == []
    predict_labels(model, images[2], protocol, size=(50, 65))
    assert copies  # of another size


def test_kept_weights_serve_a_training_after_a_prediction():
    logits, labels = torch.randn(1, 5, 6, 7), torch.randint(5, (1, 23, 29))
    with torch.inference_mode():
        upsample_argmax(logits, (23, 29))
    leaf = logits.clone().requires_grad_()
    upsample_cross_entropy(leaf, labels).backward()
    expected = logits.clone().requires_grad_()
    up = nn.functional.interpolate(expected, (23, 29), mode="bilinear")
    nn.functional.cross_entropy(up, labels).backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_model_under_autocast_gives_the_labels_of_its_own_logits():
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 5, pretrained=False).eval()
    image = torch.randn(3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, covered = model.low_resolution(image[None])
        labels = predict_labels(model, image)
    assert torch.equal(labels, upsample_argmax(logits.float(), covered)[0, :64, :96])
