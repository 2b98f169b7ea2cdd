import copy

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from segheads.data import (
    FolderDataset,
    IterationSampler,
    PhotometricNormalize,
    RandomScaleCrop,
    Scenes,
    TrainingSamples,
    collate_samples,
)
from segheads.errors import DataError


def samples(seed=0):
    return TrainingSamples(Scenes(size=(48, 64), length=10), RandomScaleCrop(40, scale=(64, 48)), seed=seed)


def batches(workers, start=0):
    sampler = IterationSampler(10, 4, seed=3, num_iterations=6, start_iteration=start)
    return list(DataLoader(samples(), batch_sampler=sampler, num_workers=workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume():
    alone = batches(0)
    torch.testing.assert_close(batches(2), alone, rtol=0, atol=0)
    torch.testing.assert_close(batches(0, start=4), alone[4:], rtol=0, atol=0)
    assert {key: value.dtype for key, value in alone[0].items()} == {
        "image": torch.uint8,
        "labels": torch.uint8,
        "distortion": torch.float32,
        "valid": torch.int64,
    }


def test_sample_depends_on_seed_epoch_and_index():
    one = samples()[0, 1]
    torch.testing.assert_close(samples()[0, 1], one, rtol=0, atol=0)
    for other in (samples()[1, 1], samples()[0, 2], samples(seed=1)[0, 1]):
        assert not torch.equal(other["image"], one["image"])


def test_batch_goes_through_the_device_side():
    batch = batches(0)[0]
    x = PhotometricNormalize((0.5,) * 3, (0.5,) * 3)(batch["image"], batch["distortion"], batch["valid"])
    assert (x.shape, x.dtype) == ((4, 3, 40, 40), torch.float32)
    assert x.abs().max() <= 1 + 1e-6
    assert x.std() > 0.1


def test_without_distortion():
    plain = TrainingSamples(Scenes(length=2), RandomScaleCrop(32), seed=0, distortion=None)
    assert plain[0, 0]["distortion"].tolist() == [0, 1, 1, 1, 0]


def test_errors_name_sample_and_file(tmp_path):
    for name in ("i", "l"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 7).save(tmp_path / name / "broken.png")
    broken = TrainingSamples(FolderDataset(tmp_path / "i", tmp_path / "l", 3), RandomScaleCrop(8), seed=0)
    with pytest.raises(DataError, match=r"sample 0 of FolderDataset: label .*broken\.png holds the value 7"):
        broken[5, 0]
    sampler = IterationSampler(1, 1, seed=0, num_iterations=1)
    with pytest.raises(DataError, match=r"sample 0 of FolderDataset: label .*broken\.png holds the value 7"):
        list(DataLoader(broken, batch_sampler=sampler, num_workers=1))


@pytest.mark.parametrize(("length", "batch_size"), [(10, 4), (3, 8), (7, 7), (1, 1)])
def test_every_epoch_is_a_permutation_and_epochs_follow_on(length, batch_size):
    sampler = IterationSampler(length, batch_size, seed=0, num_iterations=11)
    found = list(sampler)
    assert len(found) == len(sampler) == 11
    assert {len(batch) for batch in found} == {batch_size}
    flat = [item for batch in found for item in batch]
    assert [epoch for epoch, _ in flat] == [position // length for position in range(len(flat))]
    for epoch in range(len(flat) // length):
        assert sorted(flat[epoch * length : (epoch + 1) * length]) == [(epoch, index) for index in range(length)]


def test_epochs_and_seeds_differ():
    orders = [tuple(batch) for batch in IterationSampler(20, 20, seed=0, num_iterations=3)]
    other = tuple(next(iter(IterationSampler(20, 20, seed=1, num_iterations=1))))
    assert len({tuple(index for _, index in order) for order in [*orders, other]}) == 4


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_resume_yields_the_rest(start):
    whole = list(IterationSampler(5, 3, seed=2, num_iterations=12))
    resumed = IterationSampler(5, 3, seed=2, num_iterations=12, start_iteration=start)
    assert list(resumed) == whole[start:]
    assert len(resumed) == 12 - start


def test_accelerate_splits_batches():
    whole = list(IterationSampler(10, 4, seed=0, num_iterations=5))
    sampler = IterationSampler(10, 4, seed=0, num_iterations=5)
    parts = [list(BatchSamplerShard(sampler, 2, rank, split_batches=True)) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 10, 0), "at least 1, not 0 and 4"),
        ((5, 0, 10, 0), "at least 1, not 5 and 0"),
        ((5, 4, 10, 11), "start_iteration 11 is outside the run of 10 iterations"),
        ((5, 4, 10, -1), "start_iteration -1 is outside the run of 10 iterations"),
    ],
)
def test_sampler_refuses_nonsense(arguments, message):
    length, batch_size, num_iterations, start = arguments
    with pytest.raises(ValueError, match=message):
        IterationSampler(length, batch_size, seed=0, num_iterations=num_iterations, start_iteration=start)


def test_real_images(shared_data):
    root = shared_data("ade20k_sample")
    dataset = FolderDataset(root / "images/training", root / "annotations/training", 150, reduce_zero_label=True)
    sample = TrainingSamples(dataset, RandomScaleCrop(512), seed=0)[0, 0]
    assert sample["image"].shape == (3, 512, 512)
    assert np.unique(sample["labels"].numpy()).size > 1


def test_collated_batches_are_the_plain_ones_in_channels_last():
    samples = TrainingSamples(Scenes("train", length=8), RandomScaleCrop(96, scale=(128, 128)), seed=1)
    drawn = [samples[0, index] for index in range(8)]
    assert {tuple(sample["valid"].tolist()) == (96, 96) for sample in drawn} == {True, False}  # padded ones, too
    batch, plain = collate_samples(drawn), default_collate(drawn)
    assert batch.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0, check_stride=False)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_crops_draw_other_numbers_than_orders_and_scenes():
    """numpy takes missing numbers for 0, so that [seed, epoch] and [seed, epoch, 0] were one stream."""
    drawn = []

    class Spy(RandomScaleCrop):
        def __call__(self, image, labels, rng):
            drawn.append(copy.deepcopy(rng).random(4).tolist())
            return super().__call__(image, labels, rng)

    samples = TrainingSamples(Scenes(length=2, size=(32, 32), seed=3), Spy(16, scale=(32, 32)), seed=3)
    samples[0, 0], samples[0, 1]
    others = [np.random.default_rng(key).random(4).tolist() for key in ([3, 0], [3, 0, 0], [3, 0, 1])]
    assert not any(numbers in others for numbers in drawn)
