import numpy as np
import pytest
import torch
from PIL import Image

from segheads.data import RandomScaleCrop, resize_keep_ratio, to_input
from segheads.data.crop import _resize_part
from segheads.data.resize import rescaled_size


def scene(height=90, width=120):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 5, (height, width), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC), labels


def test_published_sizes():
    assert rescaled_size(512, 683) == (512, 683)
    assert rescaled_size(300, 3000) == (205, 2048)
    assert rescaled_size(512, 683, ratio=0.5) == (256, 342)
    assert rescaled_size(100, 1000, ratio=2.0) == (410, 4096)
    assert resize_keep_ratio(Image.new("RGB", (400, 300))).size == (683, 512)


@pytest.mark.parametrize(
    ("factor", "corner"),
    [(2, (11, 17)), (0.5, (10, 20)), (4 / 3, (9, 18)), (2 / 3, (12, 30)), (0.4, (5, 25)), (1, (7, 5))],
)
@pytest.mark.parametrize("flip", [False, True])
def test_equals_resizing_the_whole_and_then_cropping(factor, corner, flip, monkeypatch):
    # At these factors the corner is a whole pixel of the resized image, too.
    image, labels = scene()
    height, width = round(90 * factor), round(120 * factor)
    crop = RandomScaleCrop(32, scale=(height, width), ratio_range=(1, 1), flip_probability=float(flip))
    monkeypatch.setattr(crop, "_choose_corner", lambda *_: corner)
    pixels, classes, valid = crop(image, labels, np.random.default_rng(0))
    assert valid == (32, 32)
    top, left = round(corner[0] * factor), round(corner[1] * factor)
    box = (left, top, left + 32, top + 32)
    whole = np.array(image.resize((width, height), Image.Resampling.BILINEAR).crop(box))
    whole_labels = np.array(Image.fromarray(labels.numpy()).resize((width, height), Image.Resampling.NEAREST).crop(box))
    if flip:
        whole, whole_labels = whole[:, ::-1], whole_labels[:, ::-1]
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - whole)
    assert difference[1:-1, 1:-1].max() <= 2  # Pillow and PyTorch round between their two passes
    np.testing.assert_array_equal(classes.numpy(), whole_labels)


@pytest.mark.parametrize("factor", [0.55, 0.87, 1.13, 1.77])
def test_any_factor_agrees_with_pillow(factor):
    image, _ = scene()
    found = _resize_part(image, (13, 8), (32, 40), (factor, factor))
    box = (8, 13, 8 + 40 / factor, 13 + 32 / factor)
    expected = np.array(image.resize((40, 32), Image.Resampling.BILINEAR, box=box))
    assert found.shape == (3, 32, 40)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)[1:-1, 1:-1].max() <= 2


def test_labels_stay_on_their_pixels():
    # The class is written into the image; after any crop the two still agree away from borders between classes.
    blocks = np.random.default_rng(1).integers(0, 6, (6, 8)).repeat(20, 0).repeat(20, 1).astype(np.uint8)
    image = Image.fromarray(np.repeat((blocks * 40)[..., None], 3, 2))
    crop, rng = RandomScaleCrop(64, scale=(160, 120), max_class_ratio=1), np.random.default_rng(0)
    for _ in range(20):
        pixels, labels, (height, width) = crop(image, torch.from_numpy(blocks), rng)
        agree = (pixels[0].int() - labels.int() * 40).abs()[:height, :width] <= 20
        assert agree.float().mean() > 0.9


def test_padding_is_right_and_below():
    image, labels = scene(40, 60)
    crop = RandomScaleCrop((64, 96), scale=(60, 40), ratio_range=(1, 1))
    pixels, classes, valid = crop(image, labels, np.random.default_rng(0))
    assert valid == (40, 60)
    assert classes[40:].eq(255).all()
    assert classes[:, 60:].eq(255).all()
    assert classes[:40, :60].lt(5).all()
    assert pixels[:, 40:].eq(0).all()
    assert pixels[:, :, 60:].eq(0).all()


@pytest.mark.parametrize("size", [(512, 683), (300, 1900), (77, 41), (1, 9)])
def test_odd_sizes_and_ratios_always_fill_the_crop(size):
    image, labels = Image.new("RGB", size[::-1], (9, 9, 9)), torch.zeros(size, dtype=torch.uint8)
    for seed in range(12):
        pixels, classes, (height, width) = RandomScaleCrop(96, scale=(400, 100))(
            image, labels, np.random.default_rng(seed)
        )
        assert pixels.shape == (3, 96, 96)
        assert pixels[:, :height, :width].eq(9).all()
        assert classes[:height, :width].eq(0).all()


def test_one_class_rarely_fills_a_crop():
    labels = torch.zeros(200, 200, dtype=torch.uint8)
    labels[:50, :50] = 1
    image = Image.new("RGB", (200, 200))

    def share(limit):
        crop = RandomScaleCrop(64, scale=(200, 200), ratio_range=(1, 1), max_class_ratio=limit)
        crops = [crop(image, labels, np.random.default_rng(seed))[1] for seed in range(60)]
        return np.mean([max((part == 0).float().mean(), (part == 1).float().mean()) >= 0.76 for part in crops])

    assert share(1.0) > 0.8
    assert share(0.75) < 0.6


def test_flip_probability():
    image, labels = scene()
    crops = [
        RandomScaleCrop(90, scale=(120, 90), ratio_range=(1, 1), max_class_ratio=1, flip_probability=p) for p in (0, 1)
    ]
    plain, flipped = (crop(image, labels, np.random.default_rng(0)) for crop in crops)
    torch.testing.assert_close(plain[0].flip(-1), flipped[0], rtol=0, atol=0)
    torch.testing.assert_close(plain[1].flip(-1), flipped[1], rtol=0, atol=0)


def test_to_input_normalises_and_converts():
    image = Image.new("L", (3, 2), 51)
    found = to_input(image, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.0, -0.1]).view(3, 1, 1).expand(3, 2, 3))


def sides(rng_seed, **options):
    """What a crop of red pixels, class 1 on their left half and 2 on their right, is taught: the labels."""
    labels = torch.ones(64, 64, dtype=torch.uint8)
    labels[:, 32:] = 2
    labels[0] = 255
    crop = RandomScaleCrop(64, scale=(64, 64), ratio_range=(1.0, 1.0), **options)
    return crop(Image.new("RGB", (64, 64)), labels, np.random.default_rng(rng_seed))[1]


def test_paired_classes_change_places_in_the_mirror():
    mirrored = 0
    for seed in range(40):
        labels, plain = sides(seed, flip_pairs=[(1, 2)]), sides(seed)
        assert (labels[1:, :32] == 1).all()
        assert (labels[1:, 32:] == 2).all()
        assert (labels[0] == 255).all()
        mirrored += int(plain[1, 0] == 2)
    assert 10 < mirrored < 30  # the crops that would be taught the wrong side


def test_no_flip_draws_the_same_crops():
    for seed in range(20):
        assert torch.equal(sides(seed, flip_probability=0.0), sides(seed, flip_pairs=[(1, 2)]))
