"""SenFormer's Table 11: the variance of each pixel's probabilities over the classes."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from segheads.evaluation.variance import class_variance


class Fixed(nn.Module):
    """The image's first channel is the logit of class 0 of four."""

    def forward(self, x):
        return torch.cat([x[:, :1], x.new_zeros(len(x), 3, *x.shape[2:])], dim=1)


def test_it_is_averaged_over_the_pixels_of_the_set():
    images = [torch.full((3, 4, 6), 100.0), torch.zeros(3, 4, 2)]  # certain, undecided
    samples = [(image, torch.zeros(image.shape[1:], dtype=torch.long)) for image in images]
    found = class_variance(Accelerator(cpu=True), Fixed(), samples)
    assert found.item() == pytest.approx(24 / 32 * 3 / 16)
