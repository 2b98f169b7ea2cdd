"""Images drawn by their classes: at DAFormer's frequencies, in crops that show the class, the same everywhere."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segheads.data import AugmentationConfig, IterationSampler, RandomScaleCrop, RareClasses, Scenes, TrainingSamples
from segheads.data.scan import SplitScan, scan
from segheads.errors import OptionError

# Of five images; class d never occurs
COUNTS = ({0: 900, 1: 100}, {0: 990, 1: 10}, {0: 1000}, {0: 800, 2: 200}, {1: 900, 2: 40})
PIXELS = (3690, 1010, 240, 0)


def found(counts=COUNTS, pixels=PIXELS):
    return SplitScan(class_names=("a", "b", "c", "d"), samples=len(counts), pixels=pixels, class_pixels=counts)


def drawn(temperature=0.3, pixels=50, crop=0.5, scan=None):
    options = {"rare_class_temperature": temperature, "rare_class_pixels": pixels, "rare_class_crop": crop}
    return RareClasses.of(scan or found(), AugmentationConfig(**options))


def slow_softmax(pixels, temperature):
    """The paper's equations 13 and 14, class by class; a class that never occurs is none."""
    total = sum(pixels)
    weights = [math.exp((1 - n / total) / temperature) if n else 0.0 for n in pixels]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 50.0])
def test_probabilities_are_the_papers(temperature):
    np.testing.assert_allclose(drawn(temperature).probabilities, slow_softmax(PIXELS, temperature), atol=1e-12)


def test_a_temperature_near_0_draws_the_rarest_class_alone():
    assert drawn(1e-300).probabilities.tolist() == [0, 0, 1, 0]


def test_classes_and_images_are_drawn_at_these_frequencies():
    rare, n = drawn(), 4000
    keys = [rare.key(5, position) for position in range(n)]
    assert [key[0] for key in keys] == list(range(n))
    expected = slow_softmax(PIXELS, 0.3)
    for label, share in enumerate(expected):
        seen = sum(key[2] == label for key in keys) / n
        assert abs(seen - share) <= 4 * math.sqrt(share * (1 - share) / n)
    of_b = [key[1] for key in keys if key[2] == 1]
    assert set(of_b) == {0, 4}  # of more than 50 pixels, not image 1 of 10
    assert abs(of_b.count(0) / len(of_b) - 0.5) < 0.06
    assert {key[1] for key in keys if key[2] == 2} == {3}
    assert {key[3] for key in keys} == {25}


def test_defaults_are_the_published_ones():
    config = AugmentationConfig(rare_class_temperature=0.01)
    big = tuple({label: 1000 * count for label, count in counts.items()} for counts in COUNTS)
    assert (config.rare_class_pixels, RareClasses.of(found(big), config).crop_pixels) == (3000, 1500)
    assert drawn(crop=0.0).crop_pixels == -1  # the first crop has more, whatever it shows


def sampler(start=0, rare=None):
    return IterationSampler(5, 4, seed=2, num_iterations=6, start_iteration=start, rare=rare or drawn())


def test_a_resume_yields_the_rest_and_the_seed_counts():
    whole = list(sampler())
    assert list(sampler(4)) == whole[4:]
    assert len({key[0] for batch in whole for key in batch}) == 24
    other = list(IterationSampler(5, 4, seed=3, num_iterations=6, rare=drawn()))
    assert [[key[1:] for key in batch] for batch in other] != [[key[1:] for key in batch] for batch in whole]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_scenes_are_drawn_and_cropped_the_same_by_any_number_of_workers():
    scenes = Scenes(size=(48, 64), length=12)
    rare = drawn(0.05, 20, 0.5, scan(scenes, workers=0))
    samples = TrainingSamples(scenes, RandomScaleCrop(24, scale=(64, 48)), seed=2)

    def batches(workers):
        keys = IterationSampler(12, 4, seed=2, num_iterations=4, rare=rare)
        return list(DataLoader(samples, batch_sampler=keys, num_workers=workers))

    alone = batches(0)
    torch.testing.assert_close(batches(2), alone, rtol=0, atol=0)
    keys = [key for batch in IterationSampler(12, 4, seed=2, num_iterations=4, rare=rare) for key in batch]
    shown = [bool((samples[key]["labels"] == key[2]).sum() > key[3]) for key in keys]
    plain = [bool((samples[key[:2]]["labels"] == key[2]).sum() > key[3]) for key in keys]
    assert sum(shown) > sum(plain)  # of the same images and random numbers
    assert sum(shown) >= 14


def test_a_crop_is_drawn_again_until_it_shows_enough_and_then_any():
    """As published: the first that has more pixels than asked, of ten; the eleventh is not looked at."""
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:12, :9] = 1
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    crop = RandomScaleCrop(12, scale=(40, 40), ratio_range=(1, 1), max_class_ratio=1)
    tries = {}
    for seed in range(40):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        pixels, classes, _ = crop(image, labels, rng, (1, 8))
        expected, number = crop(image, labels, again), 0
        while number < 10 and (expected[1] == 1).sum() <= 8:
            expected, number = crop(image, labels, again), number + 1
        torch.testing.assert_close((pixels, classes), expected[:2], rtol=0, atol=0)
        tries.setdefault(bool((classes == 1).sum() > 8), []).append(number)
    assert max(tries[True]) > 1
    assert set(tries[False]) == {10}


def test_what_cannot_be_drawn_is_refused_in_a_line():
    with pytest.raises(OptionError) as caught:
        drawn(pixels=300)
    assert str(caught.value) == (
        "rare_class_pixels 300: no training image has more pixels of c, the most is 200; give rare_class_pixels 199 or "
        "fewer"
    )
    with pytest.raises(OptionError, match="needs labels, and no pixel of the training set is of any class"):
        drawn(scan=found(({},), (0, 0, 0, 0)))


def test_a_scan_counts_each_sample():
    scenes = Scenes(size=(48, 64), length=3)
    scanned = scan(scenes, workers=0)
    for index, counts in enumerate(scanned.class_pixels):
        values, numbers = np.unique(scenes.read(index)[1].numpy(), return_counts=True)
        assert counts == dict(zip(values.tolist(), numbers.tolist(), strict=True))
    assert "class_pixels" not in scanned.as_json()


def test_the_classes_drawn_most_often_are_told():
    assert drawn().words(("a", "b", "c", "d"), 2) == "c 59.1 %, b 35.1 %"
