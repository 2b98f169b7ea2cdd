import copy
import os
import pickle

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from segheads.metrics.calibration import CalibrationError

Maps = tuple[Tensor, Tensor, Tensor]


def random_maps(count: int, seed: int = 0) -> list[Maps]:
    """Confidences of all sizes, right in about that share of pixels; a tenth of the labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for _ in range(count):
        confidence = torch.rand(11, 13, generator=generator) ** 0.5
        labels = torch.randint(0, 5, (11, 13), generator=generator)
        wrong = torch.rand(11, 13, generator=generator) > 0.8 * confidence
        preds = torch.where(wrong, (labels + 1) % 5, labels)
        labels[torch.rand(11, 13, generator=generator) < 0.1] = 255
        maps.append((confidence, preds, labels))
    return maps


def slow_error(maps: list[Maps], num_bins: int = 15) -> dict[str, Tensor]:
    """Guo et al., pixel by pixel."""
    pixels, correct, total = [0] * num_bins, [0] * num_bins, [0.0] * num_bins
    for flat in (zip(*(x.flatten().tolist() for x in image), strict=True) for image in maps):
        for confidence, pred, label in flat:
            if label == 255:
                continue
            m = next(m for m in range(num_bins) if confidence <= (m + 1) / num_bins)  # the first whose edge it is below
            pixels[m] += 1
            correct[m] += pred == label
            total[m] += confidence
    nan = float("nan")
    confidences = [t / n if n else nan for t, n in zip(total, pixels, strict=True)]
    accuracies = [c / n if n else nan for c, n in zip(correct, pixels, strict=True)]
    gaps = [n * abs(c - a) for n, c, a in zip(pixels, confidences, accuracies, strict=True) if n]
    return {
        "ECE": torch.tensor(sum(gaps) / sum(pixels), dtype=torch.float64),
        "bin_confidence": torch.tensor(confidences, dtype=torch.float64),
        "bin_accuracy": torch.tensor(accuracies, dtype=torch.float64),
        "bin_pixels": torch.tensor(pixels),
    }


def measure(maps: list[Maps], **options) -> dict[str, Tensor]:
    error = CalibrationError(**options)
    for image in maps:
        error.update(*image)
    return error.compute()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("num_bins", [2, 15, 40])
def test_equals_slow_reference(num_bins):
    maps = random_maps(4)
    assert_same(measure(maps, num_bins=num_bins), slow_error(maps, num_bins), atol=1e-9)


def test_equals_torchmetrics():
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(3, 6, 20, 30, generator=generator).mul(2).softmax(1)
    labels = torch.randint(0, 6, (3, 20, 30), generator=generator)
    labels[:, :3] = 255
    confidence, preds = probabilities.max(1)
    for num_bins in (10, 15):
        options = {"num_classes": 6, "n_bins": num_bins, "ignore_index": 255}
        expected = multiclass_calibration_error(probabilities, labels, **options)
        actual = measure([(confidence, preds, labels)], num_bins=num_bins)["ECE"]
        torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=0)


def test_bins_hold_their_upper_edge():
    confidence = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])
    labels = torch.zeros(1, 5, dtype=torch.long)
    result = measure([(confidence, labels, labels)], num_bins=4)
    assert result["bin_pixels"].tolist() == [2, 1, 1, 1]
    assert result["bin_confidence"].tolist() == [0.125, 0.5, 0.75, 1.0]
    assert result["bin_accuracy"].tolist() == [1, 1, 1, 1]
    assert result["ECE"] == 0.5


def test_perfectly_calibrated_and_always_wrong():
    confidence = torch.full((10, 10), 0.75)
    labels = torch.zeros(10, 10, dtype=torch.uint8)
    preds = torch.zeros(10, 10, dtype=torch.long)
    preds.view(-1)[:25] = 1
    assert measure([(confidence, preds, labels)])["ECE"] == 0
    assert measure([(confidence, torch.ones_like(preds), labels)])["ECE"] == 0.75


def test_ignored_pixels_do_not_count_whatever_they_hold():
    confidence = torch.tensor([[0.5, float("nan"), 7.0, -1.0]])
    labels = torch.tensor([[1, 255, 255, 255]])
    result = measure([(confidence, torch.ones(1, 4).long(), labels)])
    assert result["bin_pixels"].sum() == 1
    assert result["ECE"] == 0.5
    labels[labels == 255] = -1
    assert measure([(confidence, torch.ones(1, 4).long(), labels)], ignore_index=-1)["ECE"] == 0.5


def test_nothing_counted_is_nan():
    error = CalibrationError()
    for shape in ((3, 3), (0, 3, 3)):
        result = error.compute()
        assert result["ECE"].isnan()
        assert result["bin_accuracy"].isnan().all()
        assert result["bin_confidence"].isnan().all()
        assert result["bin_pixels"].tolist() == [0] * 15
        error.update(torch.rand(shape), torch.zeros(shape).long(), torch.full(shape, 255))


def test_batches_order_and_half_precision():
    maps = random_maps(6)
    expected = measure(maps)
    batch = tuple(torch.stack(kind) for kind in zip(*maps, strict=True))
    assert_same(measure([batch]), expected)
    assert_same(measure(maps[::-1]), expected)
    assert_same(measure([tuple(x.T for x in image) for image in maps]), expected)  # not contiguous
    halved = [(confidence.bfloat16(), preds, labels) for confidence, preds, labels in maps]
    assert_same(measure(halved), slow_error(halved), atol=1e-9)
    assert_same(measure([(c.double(), *rest) for c, *rest in maps]), expected, atol=1e-9)


def test_counts_stay_exact_and_small():
    error = CalibrationError(num_bins=1).half()
    confidence = torch.full((1000, 1000), 1 - 2**-20)
    labels = torch.zeros(1000, 1000, dtype=torch.uint8)
    for _ in range(20):
        error.update(confidence, labels, labels)
    result = error.compute()
    assert sum(x.numel() for x in error.state_dict().values()) == 5
    assert result["bin_pixels"].item() == 20_000_000
    assert result["bin_confidence"].item() == 1 - 2**-20


@pytest.mark.parametrize("wrong", [1.5, -0.25, float("nan")])
def test_confidence_that_is_no_probability(wrong):
    (confidence, preds, labels), other = random_maps(2)
    error = CalibrationError()
    error.update(*other)
    expected = error.compute()
    confidence[0, 0], labels[0, 0] = wrong, 1
    with pytest.raises(ValueError, match=rf"in \[0, 1\]; got values from .*{wrong:g}"):
        error.update(confidence, preds, labels)
    assert_same(error.compute(), expected)
    error = CalibrationError()
    error.lowest = error.highest = torch.tensor(wrong)  # what update leaves where it does not wait for the device
    with pytest.raises(ValueError, match=f"got values from {wrong:g} to {wrong:g}; take the softmax"):
        error.compute()
    error.update(*other)  # what follows does not hide it
    with pytest.raises(ValueError, match=f"got values from .*{wrong:g}"):
        error.compute()


def test_bad_input_is_explained():
    error, labels = CalibrationError(), torch.zeros(2, 4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"confidence must be .* shape \(2, 4, 6\); got torch\.int64 of \(2, 4, 6\)"):
        error.update(labels, labels, labels)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 6\); got torch\.float32 of \(2, 5, 4, 6\)"):
        error.update(torch.rand(2, 5, 4, 6), labels, labels)
    with pytest.raises(ValueError, match=r"preds and labels .* got \(2, 4, 5\) and \(2, 4, 6\)"):
        error.update(torch.rand(2, 4, 6), labels[..., :5], labels)
    with pytest.raises(ValueError, match=r"preds must be .* got torch\.float32"):
        error.update(torch.rand(2, 4, 6), torch.rand(2, 4, 6), labels)
    with pytest.raises(ValueError, match="num_bins must be 1 or more; got 0"):
        CalibrationError(num_bins=0)


def test_reset_merge_copy_pickle_and_state_dict():
    maps = random_maps(5)
    expected = measure(maps)
    first, second = CalibrationError(), CalibrationError()
    for image in maps[:3]:
        first.update(*image)
    for image in maps[3:]:
        second.update(*image)
    restored = CalibrationError()
    restored.load_state_dict(first.state_dict())
    for copied in (restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first), first):
        copied.merge_state(second)
        assert_same(copied.compute(), expected)
    first.reset()
    assert first.compute()["ECE"].isnan()


@pytest.mark.gpu
def test_cuda_counts_without_waiting():
    maps = random_maps(3)
    error = CalibrationError().cuda()
    on_device = [tuple(x.cuda() for x in image) for image in maps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for image in on_device:
            error.update(*image)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(error.compute(), measure(maps))
    error.update(torch.full((1, 1), 1.5).cuda(), torch.zeros(1, 1).long().cuda(), torch.zeros(1, 1).long().cuda())
    with pytest.raises(ValueError, match=r"to 1\.5;"):
        error.compute()


def count_in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    maps, error = random_maps(5), CalibrationError()
    for i in ([0, 2, 4], [1, 3])[rank]:
        error.update(*maps[i])
    torch.save(error.compute(), f"{folder}/result_{rank}.pt")
    if rank == 0:
        error.highest = torch.tensor(1.5)
    error._computed = None
    with pytest.raises(ValueError, match=r"to 1\.5;"):  # in every process, so that none is left waiting
        error.compute()
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(count_in_a_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"result_{rank}.pt"), measure(random_maps(5)))
