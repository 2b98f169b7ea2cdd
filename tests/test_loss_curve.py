"""A training run with the loss in tiles is the run with the plain loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segheads import create_model
from segheads.data import Scenes

STEPS = 50


def plain_loss(logits, labels, *, ignore_index=255, reduction="valid", weight=None, label_smoothing=0.0):
    """The loss as it is written in papers, through tensors of full resolution."""
    scores = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(scores, labels.long(), ignore_index=ignore_index, reduction="sum")
    return total / (labels.numel() if reduction == "all" else (labels != ignore_index).sum())


def loss_curve(reduction):
    """Losses of the first steps from fixed weights on fixed images, whose size needs padding."""
    torch.manual_seed(0)
    scenes = Scenes(size=(56, 72), length=8)
    model = create_model("test_vit", "mean_shift", 12, pretrained=False, loss_reduction=reduction).train()
    pairs = [scenes.read(index) for index in range(len(scenes))]
    mean, std = (torch.tensor(model.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image, _ in pairs]
    images = torch.stack([(image - mean) / std for image in pixels])
    labels = torch.stack([labels for _, labels in pairs]).long()
    labels[:, :3] = 255
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch = [2 * step % 8, (2 * step + 1) % 8]
        loss = model(images[batch], labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_loss_curve_is_the_plain_one(monkeypatch, reduction):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        curve = loss_curve(reduction)
        calls = []
        monkeypatch.setattr(
            "segheads.losses.cross_entropy.upsample_cross_entropy",
            lambda *a, **k: calls.append(1) or plain_loss(*a, **k),
        )
        expected = loss_curve(reduction)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == STEPS
    assert expected[-5:].mean() < 0.8 * expected[:5].mean()  # it trains
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=0)
