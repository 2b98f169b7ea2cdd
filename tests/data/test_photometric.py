import colorsys

import numpy as np
import pytest
import torch

from segheads.data import PhotometricDistortion, PhotometricNormalize
from segheads.data.photometric import _distort

IDENTITY = [0.0, 1.0, 1.0, 1.0, 0.0]
CASES = [
    IDENTITY,
    [20.0, 1.0, 1.0, 1.0, 0.0],
    [-31.0, 1.4, 1.0, 1.0, 0.0],
    [12.0, 1.0, 0.6, 1.0, 0.0],
    [0.0, 1.0, 1.0, 1.5, 0.0],
    [0.0, 1.0, 1.0, 0.5, 0.0],
    [0.0, 1.0, 1.0, 1.0, -36.0],
    [0.0, 1.0, 1.0, 1.0, 34.0],
    [9.0, 1.3, 1.0, 1.4, 20.0],
    [-9.0, 1.0, 1.45, 0.7, -14.0],
]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels():
    image = torch.randint(0, 256, (3, 70, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image[:, 0] = image[:1, 0]  # grey
    image[1, 1] = image[0, 1]  # two equal channels
    image[:, 2] = torch.tensor([[0, 255, 0, 255, 9], [0, 255, 255, 0, 0], [0, 255, 0, 0, 0]])
    return image


def slow_reference(image, values):
    """The published steps, pixel by pixel, through the standard library's HSV."""
    brightness, before, after, saturation, hue = values
    out = np.empty(image.shape)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            rgb = np.clip(image[:, row, column].numpy() + brightness, 0, 255)
            rgb = np.clip(rgb * before, 0, 255) / 255
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            rgb = np.array(colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v))
            out[:, row, column] = (np.clip(rgb * after, 0, 1) - MEAN) / STD
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("values", CASES)
def test_equals_slow_reference(values):
    found = PhotometricNormalize(MEAN, STD)(pixels()[None], torch.tensor([values]))[0]
    torch.testing.assert_close(found, slow_reference(pixels(), values), rtol=0, atol=1e-4)


def test_batched_form_for_devices_equals_the_one_for_the_cpu():
    images, values = pixels().repeat(len(CASES), 1, 1, 1), torch.tensor(CASES)
    prepare = PhotometricNormalize(MEAN, STD)
    batched = _distort(images.float(), values).mul_(prepare.scale).add_(prepare.shift)
    torch.testing.assert_close(batched, prepare(images, values), rtol=0, atol=1e-4)


def test_channels_last_input_and_no_distortion():
    images = pixels().repeat(2, 1, 1, 1)
    found = PhotometricNormalize(MEAN, STD)(images.to(memory_format=torch.channels_last))
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


def test_padding_is_zero_after_normalising():
    images = torch.zeros(2, 3, 8, 9, dtype=torch.uint8)
    found = PhotometricNormalize(MEAN, STD)(images, None, torch.tensor([[8, 9], [5, 3]]))
    assert found[0].ne(0).all()
    assert found[1, :, :5, :3].ne(0).all()
    assert found[1, :, 5:].eq(0).all()
    assert found[1, :, :, 3:].eq(0).all()


def test_draws_are_the_published_ones():
    draws = torch.stack([PhotometricDistortion()(np.random.default_rng(seed)) for seed in range(2000)])
    brightness, before, after, saturation, hue = draws.T
    changed = (draws != torch.tensor(IDENTITY)).float().mean(0)
    torch.testing.assert_close(changed, torch.tensor([0.5, 0.25, 0.25, 0.5, 0.49]), rtol=0, atol=0.05)
    assert not ((before != 1) & (after != 1)).any()
    assert 31 < brightness.abs().max() <= 32
    assert saturation.min() >= 0.5
    assert max(before.max(), after.max(), saturation.max()) <= 1.5
    assert hue.min() == -36
    assert hue.max() == 34
    assert (hue % 2 == 0).all()


def test_nothing_to_save():
    assert PhotometricNormalize(MEAN, STD).state_dict() == {}


def test_twelve_bits_are_distorted_as_the_same_picture_of_eight():
    eight = torch.randint(0, 256, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = torch.tensor([[20.0, 1.2, 1.0, 0.7, 24.0], [-10.0, 1.0, 0.8, 1.3, -20.0]])
    twelve = eight.float() * (4095 / 255)
    expected = PhotometricNormalize(MEAN, STD)(eight, drawn)
    torch.testing.assert_close(
        PhotometricNormalize(MEAN, STD, bit_depth=12)(twelve, drawn), expected, atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize(("channels", "bit_depth"), [(5, None), (1, 12), (3, 32)])
def test_colours_of_what_is_no_colour_stay(channels, bit_depth):
    images = torch.rand(1, channels, 4, 5) * (1 if bit_depth == 32 else 200)
    mean, std = [0.3] * channels, [0.2] * channels
    drawn = torch.tensor([[20.0, 1.2, 1.0, 0.7, 24.0]])
    full = {None: 255, 12: 4095, 32: 1}[bit_depth]
    found = PhotometricNormalize(mean, std, bit_depth=bit_depth)(images, drawn)
    torch.testing.assert_close(found, (images / full - 0.3) / 0.2)
