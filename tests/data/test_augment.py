"""Augmentations of crops: against slow formulas, in register, drawn the same everywhere, and nothing when off."""

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

from segheads.data import (
    Augment,
    AugmentationConfig,
    ImageForm,
    IterationSampler,
    PhotometricNormalize,
    RandomScaleCrop,
    TrainingSamples,
    collate_samples,
    mix_neighbours,
)
from segheads.data import augment as augment_module
from segheads.data.dataset import SegmentationDataset
from segheads.errors import OptionError
from segheads.training import training_batches

RGB, BANDS, FLOATS = ImageForm(), ImageForm(5, 12), ImageForm(4, 32)
FORMS = [RGB, ImageForm(3, 16), ImageForm(5), BANDS, FLOATS]
EVERYTHING = AugmentationConfig(
    rotation=60,
    rotation_share=0.7,
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_share=0.7,
    grey=0.3,
    blur=0.5,
    erasing=0.5,
    erased_labels="ignore",
    cutmix=0.4,
    classmix=0.4,
)


class Patches(SegmentationDataset):
    """Squares of three classes and of none, 48 x 64, under noise."""

    def __init__(self):
        super().__init__(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))

    def __len__(self):
        return 4

    def name(self, index):
        return str(index)

    def read(self, index):
        rng = np.random.default_rng(index)
        labels = np.kron(rng.integers(0, 4, (6, 8)), np.ones((8, 8), int)).astype(np.uint8)
        labels[labels == 3] = 255
        return Image.fromarray(rng.integers(0, 256, (48, 64, 3)).astype(np.uint8)), torch.from_numpy(labels)


def samples(config=None, size=40):
    crop = RandomScaleCrop(size, scale=(64, 48))
    augment = None if config is None else Augment(config, RGB, mean=(0.5, 0.4, 0.3))
    return TrainingSamples(Patches(), crop, seed=3, augment=augment)


def drawn_image(form, size=(24, 30), seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, int(form.full_scale) + 1 if form.full_scale > 1 else 9, (form.channels, *size))
    return torch.from_numpy(values.astype(np.uint8 if form.bit_depth in (None, 8) else np.float32))


def squares(size=(24, 30), values=(0, 1, 2, 255), dtype=np.uint8):
    rng = np.random.default_rng(7)
    drawn = np.array(values)[rng.integers(0, len(values), (size[0] // 6, size[1] // 6))]
    return torch.from_numpy(np.kron(drawn, np.ones((6, 6), int)).astype(dtype))


def only(form, mean=None, ignore_index=255, **options):
    return Augment(AugmentationConfig(**options), form, mean=mean, ignore_index=ignore_index)


def same(image, labels, pair):
    torch.testing.assert_close(pair, (image, labels), rtol=0, atol=0)


# off


def test_without_augmentations_samples_are_those_of_before():
    """Bit for bit: the hash is of the pipeline before there were any; images are resized by PyTorch, so no hash."""
    found, plain, crop = hashlib.sha256(), samples(), RandomScaleCrop(40, scale=(64, 48))
    for epoch in (0, 5):
        for index in range(4):
            sample = plain[epoch, index]
            assert list(sample) == ["image", "labels", "distortion", "valid"]
            for name in ("labels", "distortion", "valid"):
                found.update(sample[name].numpy().tobytes())
            expected = crop(*Patches().read(index), np.random.default_rng([3, epoch, index, 1]))
            torch.testing.assert_close(sample["image"], expected[0], rtol=0, atol=0)
    assert found.hexdigest() == "36c902825339656067d18b586aebfc5e98898d6ef577d18d30b6f4564a2cf61c"


def test_what_is_drawn_for_augmentations_changes_no_crop_and_no_other_augmentation():
    never = AugmentationConfig(rotation=9, rotation_share=0, jitter=(1, 1, 1, 0.5), jitter_share=0, cutmix=0.5)
    for key in ((0, 1), (2, 3)):
        with_them, without = samples(never)[key], samples()[key]
        given = with_them.pop("given")
        torch.testing.assert_close(with_them, without, rtol=0, atol=0)
        changed = samples(EVERYTHING)[key]
        for name in ("distortion", "valid"):
            torch.testing.assert_close(changed[name], without[name], rtol=0, atol=0)
        alone = samples(AugmentationConfig(cutmix=0.5))[key]
        torch.testing.assert_close(alone["given"], given)
    assert not AugmentationConfig().changes_crops
    assert AugmentationConfig(rotation=5, blur=0.5).changed_values() == {"rotation": 5, "blur": 0.5}


# the same everywhere


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume():
    def batches(workers, start=0):
        sampler = IterationSampler(4, 4, seed=3, num_iterations=4, start_iteration=start)
        loader = DataLoader(samples(EVERYTHING), batch_sampler=sampler, num_workers=workers, collate_fn=collate_samples)
        return list(loader)

    alone = batches(0)
    torch.testing.assert_close(batches(2), alone, rtol=0, atol=0)
    torch.testing.assert_close(batches(0, start=2), alone[2:], rtol=0, atol=0)
    assert any(not torch.equal(a["image"], b["image"]) for a, b in pairwise(alone))
    assert torch.stack([b["given"] for b in alone]).any()


def test_samples_depend_on_seed_epoch_and_index():
    augment, image, labels = only(RGB, rotation=90), drawn_image(RGB), squares()
    turned = {
        key: augment(image, labels, (24, 30), key)[1].numpy().tobytes()
        for key in [(s, e, i) for s in (0, 1) for e in (0, 1) for i in (0, 1)]
    }
    assert len(set(turned.values())) > 3
    same(*augment(image, labels, (24, 30), (0, 1, 1)), augment(image, labels, (24, 30), (0, 1, 1)))


def test_shares_are_those_asked_for():
    image, labels, n = drawn_image(RGB), squares(), 400
    for share, options in ((0.3, {"grey": 0.3}), (0.3, {"rotation": 90, "rotation_share": 0.3}), (0.6, {"blur": 0.6})):
        augment = only(RGB, **options)
        changed = sum(not torch.equal(augment(image, labels, (24, 30), (0, 0, i))[0], image) for i in range(n))
        assert abs(changed / n - share) < 4 * math.sqrt(share * (1 - share) / n)


# one after another


def slowly_turned(image, labels, degrees, fill, ignore_index):
    """Pixel by pixel: where it comes from, the nearest label there, and a mean of the four pixels around."""
    C, (H, W), angle = len(image), labels.shape, math.radians(degrees)
    out, classes = np.empty((C, H, W)), np.empty((H, W), int)
    for row in range(H):
        for column in range(W):
            dx, dy = column + 0.5 - W / 2, row + 0.5 - H / 2
            x = math.cos(angle) * dx - math.sin(angle) * dy + W / 2
            y = math.sin(angle) * dx + math.cos(angle) * dy + H / 2
            if not (0 <= x < W and 0 <= y < H):
                out[:, row, column], classes[row, column] = fill, ignore_index
                continue
            classes[row, column] = labels[int(y), int(x)]
            u, v = min(max(x - 0.5, 0), W - 1), min(max(y - 0.5, 0), H - 1)
            left, top = int(u), int(v)
            right, bottom, a, b = min(left + 1, W - 1), min(top + 1, H - 1), u - int(u), v - int(v)
            upper = (1 - a) * image[:, top, left] + a * image[:, top, right]
            lower = (1 - a) * image[:, bottom, left] + a * image[:, bottom, right]
            out[:, row, column] = (1 - b) * upper + b * lower
    return out, classes


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("degrees", [10.0, -77.0, 180.0])
def test_rotation_is_the_slow_one(form, degrees):
    mean = [0.1 * (c + 1) for c in range(form.channels)]
    values, ignored = ((0, 1, 2, 255), 255) if form.channels == 3 else ((0, 700, -1), -1)
    image, labels = drawn_image(form, (18, 24)), squares((18, 24), values, np.uint8 if ignored == 255 else np.int16)
    turned, classes = only(form, mean, ignored, rotation=180)._rotate(image, labels, degrees)
    fill = np.array(mean) * form.full_scale
    expected, expected_classes = slowly_turned(image.double().numpy(), labels.numpy(), degrees, fill, ignored)
    assert (turned.dtype, classes.dtype) == (image.dtype, labels.dtype)
    np.testing.assert_array_equal(classes.numpy(), expected_classes)
    tolerance = 0.51 if image.dtype == torch.uint8 else 1e-4 * form.full_scale
    np.testing.assert_allclose(turned.double().numpy(), expected, atol=tolerance)


def test_rotation_turns_as_torchvision_does():
    labels = squares((60, 60))
    ours = only(RGB, rotation=20)._rotate(drawn_image(RGB, (60, 60)), labels, 20.0)[1]
    theirs = tv.rotate_mask(labels[None], 20.0, fill=255)[0]
    assert (ours == theirs).float().mean() > 0.98


def test_image_and_labels_stay_in_register():
    labels = squares((48, 60), (0, 1, 2))
    image = (labels * 100)[None].expand(3, -1, -1)
    for index in range(10):
        turned, classes = only(RGB, (1.0, 1.0, 1.0), rotation=180, rotation_share=1)(
            image, labels, (48, 60), (0, 0, index)
        )
        highest = ndimage.maximum_filter(classes.numpy(), 5, mode="constant", cval=99)
        calm = torch.from_numpy(highest == ndimage.minimum_filter(classes.numpy(), 5))
        inside = calm & (classes != 255)
        assert inside.float().mean() > 0.05
        torch.testing.assert_close(turned[0][inside], (classes * 100)[inside])
        assert (turned[:, classes == 255] == 255).all()  # the mean pixel


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.5])
def test_blur_is_a_gaussian(form, sigma):
    image = drawn_image(form)
    augment = only(form, blur=1.0, blur_sigma=(sigma, sigma))
    blurred, labels = augment(image, squares(), (24, 30), (0, 0, 0))
    slow = image.double().numpy()
    for axis in (1, 2):
        slow = ndimage.gaussian_filter1d(slow, sigma, axis, mode="mirror", radius=math.ceil(3 * sigma))
    tolerance = 0.51 if image.dtype == torch.uint8 else 1e-5 * float(image.max())
    np.testing.assert_allclose(blurred.double().numpy(), slow, atol=tolerance)
    torch.testing.assert_close(labels, squares())


class Drawn:
    """Draws what it is told, in the middle of the range unless told."""

    def __init__(self, uniform, order=(0, 1, 2, 3)):
        self.values, self.order = iter(uniform), order

    def uniform(self, low, high):
        value = next(self.values)
        assert low <= value <= high
        return value

    def permutation(self, n):
        return np.array(self.order)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
@pytest.mark.parametrize("form", [RGB, ImageForm(3, 16)], ids=str)
def test_jitter_of_colours_is_torchvisions(form, order):
    image, drawn = drawn_image(form), (1.3, 0.6, 1.4, -0.2)
    found = only(form, jitter=(0.5, 0.5, 0.5, 0.3))._jitter(image, Drawn(drawn, order))
    steps = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    expected = image.float() / form.full_scale
    for step in order:
        expected = steps[step](expected, drawn[step])
    tolerance = 0.51 if image.dtype == torch.uint8 else 1e-4 * form.full_scale
    torch.testing.assert_close(found.float(), expected * form.full_scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", [ImageForm(1), ImageForm(5), BANDS, FLOATS], ids=str)
def test_jitter_of_bands_is_brightness_and_contrast_of_each(form):
    image = drawn_image(form)
    found = only(form, jitter=(0.5, 0.5, 0, 0))._jitter(image, Drawn((1.4, 1.5, 1, 0)))
    values, most = image.double().numpy(), np.inf if form is FLOATS else form.full_scale
    values = np.minimum(values * 1.4, most)
    middle = values.mean((1, 2), keepdims=True)
    values = np.clip((values - middle) * 1.5 + middle, -np.inf if form is FLOATS else 0, most)
    tolerance = 0.51 if image.dtype == torch.uint8 else 1e-5 * float(image.max())
    np.testing.assert_allclose(found.double().numpy(), values, atol=tolerance)


def test_grey_has_three_equal_channels():
    image = drawn_image(RGB)
    grey, labels = only(RGB, grey=1.0)(image, squares(), (24, 30), (0, 0, 0))
    expected = (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]).numpy()
    for channel in grey:
        np.testing.assert_allclose(channel.numpy(), expected, atol=1)
    torch.testing.assert_close(labels, squares())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_erasing_covers_a_rectangle_with_the_mean_pixel(form):
    mean = [0.21 + 0.1 * c for c in range(form.channels)]
    image, labels = drawn_image(form, (40, 50)) * 0, torch.zeros(40, 50, dtype=torch.uint8)
    pixel = torch.tensor(mean) * form.full_scale
    pixel = pixel.round().to(image.dtype) if image.dtype == torch.uint8 else pixel
    areas = []
    for index in range(20):
        erased, kept = only(form, mean, erasing=1.0)(image, labels, (40, 50), (0, 0, index))
        covered = (erased == pixel[:, None, None]).all(0)
        rows, columns = covered.any(1).sum(), covered.any(0).sum()
        areas.append(int(covered.sum()) / 2000)
        assert covered.sum() == rows * columns == (erased != 0).any(0).sum()
        torch.testing.assert_close(kept, labels)
        ignoring = only(form, mean, erasing=1.0, erased_labels="ignore")
        torch.testing.assert_close(ignoring(image, labels, (40, 50), (0, 0, index))[1] == 255, covered)
    assert 0.015 < min(areas) < 0.1
    assert 0.2 < max(areas) < 0.35


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_padding_stays_as_it_is_and_labels_are_never_mixed_up(form):
    config = (
        EVERYTHING
        if form.has_colours
        else AugmentationConfig(**{**EVERYTHING.changed_values(), "grey": 0.0, "jitter": (0.4, 0.4, 0.0, 0.0)})
    )
    augment = Augment(config, form, mean=[0.5] * form.channels)
    image, labels = drawn_image(form), squares(values=(0, 7, 200, 255))
    image[:, 20:], image[:, :, 22:] = 0, 0
    labels[20:], labels[:, 22:] = 255, 255
    before = image.clone(), labels.clone()
    for index in range(20):
        out, classes = augment(image, labels, (20, 22), (1, 2, index))
        assert (out.shape, out.dtype, classes.dtype) == (image.shape, image.dtype, labels.dtype)
        assert not out[:, 20:].any()
        assert not out[:, :, 22:].any()
        assert (classes[20:] == 255).all()
        assert (classes[:, 22:] == 255).all()
        assert set(classes.unique().tolist()) <= {0, 7, 200, 255}
        given = augment.gift(classes, (20, 22), (1, 2, index))
        assert not given[20:].any()
        assert not given[:, 22:].any()
    same(image, labels, before)  # what came in is not written to


# mixing


def slowly_mixed(images, labels, given, valid):
    images, labels = images.clone(), labels.clone()
    sources = images.clone(), labels.clone()
    for b in range(len(images)):
        other = b + 1 if b % 2 == 0 else b - 1
        for row in range(int(valid[b, 0])):
            for column in range(int(valid[b, 1])):
                if given[other, row, column]:
                    images[b, :, row, column] = sources[0][other, :, row, column]
                    labels[b, row, column] = sources[1][other, row, column]
    return images, labels


def test_neighbours_exchange_what_they_give_however_a_batch_is_cut():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 5, 6, 7, generator=generator)
    labels = torch.randint(0, 9, (8, 6, 7), generator=generator)
    given = torch.rand(8, 6, 7, generator=generator) < 0.5
    valid = torch.tensor([[6, 7], [4, 5]] * 4)
    mixed = mix_neighbours(images, labels, given, valid)
    torch.testing.assert_close(mixed, slowly_mixed(images, labels, given, valid), rtol=0, atol=0)
    for size in (2, 4):
        cut = [
            mix_neighbours(*part) for part in zip(*(x.split(size) for x in (images, labels, given, valid)), strict=True)
        ]
        torch.testing.assert_close(tuple(torch.cat(x) for x in zip(*cut, strict=True)), mixed, rtol=0, atol=0)
    whole = mix_neighbours(images, labels, torch.ones_like(given))
    torch.testing.assert_close(whole[0], images.view(4, 2, 5, 6, 7).flip(1).flatten(0, 1))
    with pytest.raises(ValueError, match="two by two, so a batch must have an even number of images; got 3"):
        mix_neighbours(images[:3], labels[:3], given[:3])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_mix_what_one_would(processes):
    """As Accelerate deals samples out: each process has its part of every batch."""
    prepare, samples_ = PhotometricNormalize((0.5,) * 3, (0.5,) * 3), samples(EVERYTHING)

    def batches(sampler):
        loader = DataLoader(samples_, batch_sampler=sampler, collate_fn=collate_samples)
        return list(training_batches(loader, prepare))

    def sampler():
        return IterationSampler(4, 8, seed=3, num_iterations=2)

    parts = [batches(BatchSamplerShard(sampler(), processes, rank, split_batches=True)) for rank in range(processes)]
    for whole, own in zip(batches(sampler()), zip(*parts, strict=True), strict=True):
        for expected, cut in zip(whole, zip(*own, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(cut), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (24, 2)])
def test_crops_of_a_few_pixels(size):
    augment = Augment(EVERYTHING, RGB)
    for index in range(20):
        image, labels = augment(drawn_image(RGB), squares(), size, (0, 0, index))
        assert image.shape[1:] == labels.shape == augment.gift(labels, size, (0, 0, index)).shape == (24, 30)


def test_classmix_gives_half_of_the_classes_whole():
    augment = only(RGB, classmix=1.0)
    chosen = set()
    for labels in (squares(), squares(values=(3, 255)), squares(values=(255,))):
        there = set(labels.unique().tolist()) - {255}
        for index in range(30):
            given = augment.gift(labels, (24, 30), (0, 0, index))
            classes = set(labels[given].unique().tolist())
            assert classes <= there
            assert len(classes) == math.ceil(len(there) / 2)
            torch.testing.assert_close(given, torch.isin(labels, torch.tensor(sorted(classes), dtype=torch.uint8)))
            chosen.add(tuple(sorted(classes)))
    assert {(0, 1), (0, 2), (1, 2)} <= chosen


def test_cutmix_gives_a_rectangle_of_every_size():
    augment, shares = only(RGB, cutmix=1.0), []
    for index in range(200):
        given = augment.gift(torch.zeros(40, 60), (30, 60), (0, 0, index))
        assert given.sum() == given.any(1).sum() * given.any(0).sum()
        assert not given[30:].any()
        shares.append(given.sum().item() / 1800)
    assert min(shares) < 0.05
    assert max(shares) > 0.7


def test_a_crop_is_mixed_in_one_way_as_often_as_asked():
    augment = only(RGB, cutmix=0.3, classmix=0.4)
    labels, kinds = squares(), []
    for index in range(600):
        given = augment.gift(labels, (24, 30), (0, 0, index))
        by_class = given.any() and all(given[labels == k].all() or not given[labels == k].any() for k in (0, 1, 2, 255))
        kinds.append("class" if by_class else "box" if given.any() else "none")
    assert abs(kinds.count("class") / 600 - 0.4) < 0.08
    assert abs(kinds.count("box") / 600 - 0.3) < 0.08


# what is refused

WRONG = [
    ({"rotation": -1}, "rotation must be 0 to 180; got -1"),
    ({"rotation": 181}, "rotation must be 0 to 180; got 181"),
    ({"rotation": math.nan}, "rotation must be 0 to 180; got nan"),
    ({"rotation_share": 1.5}, "rotation_share must be 0 to 1; got 1.5"),
    ({"jitter": (-0.1, 0, 0, 0)}, "jitter must be 0 to 1; got (-0.1, 0, 0, 0)"),
    ({"jitter": (0, 0, 1.1, 0)}, "jitter must be 0 to 1; got (0, 0, 1.1, 0)"),
    ({"jitter": (0, 0, 0, 0.6)}, "the hue of jitter must be 0 to 0.5, in turns; got 0.6"),
    ({"jitter": (0.4, 0.4)}, "jitter has 4 numbers, brightness contrast saturation hue; got (0.4, 0.4)"),
    ({"jitter_share": 2}, "jitter_share must be 0 to 1; got 2"),
    ({"grey": -0.2}, "grey must be 0 to 1; got -0.2"),
    ({"grey": 20}, "grey must be 0 to 1; got 20"),
    ({"blur": 1.1}, "blur must be 0 to 1; got 1.1"),
    ({"blur_sigma": (2.0, 1.0)}, "blur_sigma must be two numbers, the smaller first; got 2.0 1.0"),
    ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be above 0; got (0.0, 1.0)"),
    ({"erasing": math.inf}, "erasing must be 0 to 1; got inf"),
    (
        {"erasing_area": (0.1, 1.0)},
        "erasing_area must be above 0 and below 1; got (0.1, 1.0)",
    ),
    ({"erased_labels": "drop"}, "erased_labels must be keep or ignore; got 'drop'"),
    ({"cutmix": -1}, "cutmix must be 0 to 1; got -1"),
    ({"classmix": 1.01}, "classmix must be 0 to 1; got 1.01"),
    (
        {"cutmix": 0.6, "classmix": 0.6},
        "a crop is mixed in one way: cutmix and classmix must be 1 or less in sum; got 0.6",
    ),
    ({"rare_class_temperature": 0.0}, "rare_class_temperature must be above 0; got 0.0"),
    ({"rare_class_temperature": -0.01}, "rare_class_temperature must be above 0; got -0.01"),
    ({"rare_class_temperature": math.nan}, "rare_class_temperature must be above 0; got nan"),
    ({"rare_class_pixels": -1}, "rare_class_pixels must be 0 or more; got -1"),
    ({"rare_class_crop": -0.5}, "rare_class_crop must be 0 or more; got -0.5"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_wrong_values_are_refused_in_a_line(options, message):
    with pytest.raises(OptionError) as caught:
        AugmentationConfig(**options).check()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (
            ImageForm(5),
            {"grey": 0.2},
            "grey is of colours, 3 channels of 8 to 16 bit; got 0.2 for images of 5 channels, 8",
        ),
        (
            ImageForm(1),
            {"jitter": (0, 0, 0.3, 0)},
            "the saturation of jitter is of colours.* got 0.3 for images of 1 channel",
        ),
        (
            ImageForm(3, 32),
            {"jitter": (0, 0, 0, 0.1)},
            "the hue of jitter is of colours.* for images of 3 channels, floats",
        ),
    ],
)
def test_colours_are_refused_for_images_that_have_none(form, options, message):
    with pytest.raises(OptionError, match=message):
        only(form, **options)
    Augment(AugmentationConfig(jitter=(0.3, 0.3, 0, 0), blur=0.5), form)


def test_a_mean_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="mean has 3 values for images of 5 channels, 8 bit"):
        only(ImageForm(5), (0.5, 0.5, 0.5), blur=0.5)


def test_streams_are_apart(monkeypatch):
    """numpy takes missing numbers for 0: none of an augmentation is the crop's, the order's or another one's."""
    keys, original = [], np.random.default_rng

    def note(key):
        if not isinstance(key, int):  # as the data set's
            keys.append(tuple(key))
        return original(key)

    monkeypatch.setattr(augment_module.np.random, "default_rng", note)
    samples(EVERYTHING)[2, 1]
    assert (3, 2, 1, 1) in keys
    assert len(keys) == 7
    assert len({key + (0,) * (6 - len(key)) for key in [*keys, (3, 2)]}) == 8
