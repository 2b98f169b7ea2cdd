import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from segheads.metrics.confusion import SegmentationMetrics


def random_maps(count: int, K: int, seed: int = 0, height: int = 13, width: int = 17) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(0, high, (height, width), generator=generator)

    maps = []
    for _ in range(count):
        labels, preds = draw(K), draw(K)
        preds = torch.where(draw(3) == 0, preds, labels)  # about two thirds right
        labels[draw(10) == 0] = 255
        preds[draw(20) == 0] = 255
        maps.append((preds, labels))
    return maps


def slow_metrics(maps: list[tuple[Tensor, Tensor]], K: int) -> dict[str, np.ndarray]:
    """The definitions, one class at a time."""
    preds = np.concatenate([p.numpy().ravel() for p, _ in maps])
    labels = np.concatenate([t.numpy().ravel() for _, t in maps])
    preds, labels = preds[labels != 255], labels[labels != 255]
    iou, accuracy = np.full(K, np.nan), np.full(K, np.nan)
    for k in range(K):
        both, either = ((preds == k) & (labels == k)).sum(), ((preds == k) | (labels == k)).sum()
        iou[k] = both / either if either else np.nan
        accuracy[k] = both / (labels == k).sum() if (labels == k).any() else np.nan
    return {
        "aAcc": (preds == labels).mean(),
        "mAcc": np.nanmean(accuracy),
        "mIoU": np.nanmean(iou),
        "IoU": iou,
        "Acc": accuracy,
        "pixels": np.bincount(labels, minlength=K),
    }


def measure(maps: list[tuple[Tensor, Tensor]], K: int, **options) -> dict[str, Tensor]:
    metrics = SegmentationMetrics(K, **options)
    for preds, labels in maps:
        metrics.update(preds, labels)
    return metrics.compute()


def assert_same(actual: dict[str, Tensor], expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        # rounding of one float64 division at most
        torch.testing.assert_close(value, torch.as_tensor(expected[key]), rtol=1e-14, atol=0, equal_nan=True)


def without_zero_label(labels: Tensor) -> Tensor:
    """0 becomes 255, classes 1..K become 0..K-1, 255 stays."""
    return torch.where((labels == 0) | (labels == 255), 255, labels.long() - 1)


@pytest.mark.parametrize("run", ["plain", "reduce", "k150"])
def test_equals_mmsegmentation(golden, run):
    file = golden("metrics__mmseg")
    config, expected = file.config[run], file.tensors(f"output.{run}.")
    K = config["K"]
    metrics, official = SegmentationMetrics(K), SegmentationMetrics(K, average="scene_parsing")
    for i in range(len(config["sizes"])):
        preds, labels = file[f"input.{run}.pred_{i}"], file[f"input.{run}.label_{i}"]
        if config["reduce_zero_label"]:
            labels = without_zero_label(labels)
        metrics.update(preds, labels)
        official.update(preds, labels)
    actual = metrics.compute()
    for key in ("aAcc", "mAcc", "mIoU", "IoU", "Acc"):
        assert actual[key].dtype == torch.float64
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-12, atol=0, equal_nan=True)
    for key in ("mIoU", "mAcc"):
        torch.testing.assert_close(official.compute()[key], expected[f"{key}_nan_as_zero"], rtol=1e-12, atol=0)
    counts = metrics.confusion
    intersect, label_area, pred_area = counts.diagonal(), counts.sum(1), counts[:, :-1].sum(0)
    assert torch.equal(intersect.double(), expected["intersect"])
    assert torch.equal(label_area.double(), expected["label_area"])
    assert torch.equal(actual["pixels"].double(), expected["label_area"])
    assert torch.equal(pred_area.double(), expected["pred_area"])
    assert torch.equal((label_area + pred_area - intersect).double(), expected["union"])


def test_equals_official_scene_parsing(golden):
    file = golden("metrics__sceneparsing")
    metrics, present = SegmentationMetrics(150, average="scene_parsing"), SegmentationMetrics(150)
    for i in (1, 2, 3):
        preds, labels = (without_zero_label(file[f"input.{name}_{i}"]) for name in ("pred", "label"))
        present.update(preds, labels)
        alone = metrics(preds, labels)  # torchmetrics' forward: this batch, and added to the sum
        torch.testing.assert_close(alone["aAcc"], file[f"output.pixel_accuracy_{i}"], rtol=1e-12, atol=0)
        one = SegmentationMetrics(150)
        one.update(preds, labels)
        intersect = one.confusion.diagonal()
        assert torch.equal(intersect, file[f"output.area_intersection_{i}"])
        union = one.confusion.sum(1) + one.confusion[:, :-1].sum(0) - intersect
        assert torch.equal(union, file[f"output.area_union_{i}"])
    actual = metrics.compute()
    expected = {"aAcc": "pixel_accuracy", "mIoU": "mean_IoU_over_150"}
    for key, name in expected.items():
        torch.testing.assert_close(actual[key], file[f"output.{name}"], rtol=1e-12, atol=0)
    torch.testing.assert_close(actual["IoU"].nan_to_num(0), file["output.IoU"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(actual["IoU"], file["output.mmseg_IoU"], rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(present.compute()["mIoU"], file["output.mmseg_mIoU"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("K", [2, 7, 150])
def test_equals_slow_reference(K):
    maps = random_maps(4, K, seed=K)
    assert_same(measure(maps, K), slow_metrics(maps, K))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_any_integer_type(dtype):
    maps = random_maps(2, 5)
    assert_same(measure([(p.to(dtype), t.to(dtype)) for p, t in maps], 5), slow_metrics(maps, 5))


def test_batches_order_and_pixel_order_do_not_matter():
    maps = random_maps(6, 5)
    expected = measure(maps, 5)
    preds, labels = (torch.stack(maps_of_kind) for maps_of_kind in zip(*maps, strict=True))
    assert_same(measure([(preds, labels)], 5), expected)
    assert_same(measure([(preds[:4], labels[:4]), (preds[4:], labels[4:])], 5), expected)
    assert_same(measure(maps[::-1], 5), expected)
    assert_same(measure([(p.T, t.T) for p, t in maps], 5), expected)  # not contiguous


def test_renaming_classes_renames_results():
    maps, order = random_maps(2, 5), torch.tensor([3, 0, 4, 1, 2])
    table = torch.cat([order, torch.full((251,), 255)])
    renamed, original = measure([(table[p], table[t]) for p, t in maps], 5), measure(maps, 5)
    torch.testing.assert_close(renamed["IoU"][order], original["IoU"])
    torch.testing.assert_close(renamed["mIoU"], original["mIoU"])


def test_prediction_without_class_is_an_error_of_the_true_class_only():
    labels = torch.tensor([[0, 0, 1, 1]])
    for no_class in (255, 2, -1):
        result = measure([(torch.tensor([[0, no_class, 1, 1]]), labels)], 2)
        assert result["IoU"].tolist() == [0.5, 1.0]
        assert result["Acc"].tolist() == [0.5, 1.0]
        assert result["aAcc"] == 0.75


def test_ignore_index_may_be_negative():
    result = measure([(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 1, 1]]))], 3, ignore_index=-1)
    assert result["aAcc"] == 0.5
    result = measure([(torch.tensor([[0, 1]]).byte(), torch.tensor([[0, 1]]).byte())], 2, ignore_index=-1)
    assert result["aAcc"] == 1


@pytest.mark.parametrize("average", ["present", "scene_parsing"])
def test_nothing_counted_is_nan(average):
    metrics = SegmentationMetrics(4, average=average)
    for _ in range(2):
        result = metrics.compute()
        assert all(result[key].isnan().all() for key in ("aAcc", "mAcc", "mIoU", "IoU", "Acc"))
        metrics.update(torch.zeros(3, 3, dtype=torch.long), torch.full((3, 3), 255))  # everything ignored
    metrics.update(torch.zeros(0, 3, 3, dtype=torch.long), torch.zeros(0, 3, 3, dtype=torch.long))
    assert metrics.compute()["mIoU"].isnan()


@pytest.mark.parametrize("label", [5, 254, -3])
def test_wrong_label_is_named_and_nothing_counted(label):
    maps = random_maps(2, 5)
    metrics = SegmentationMetrics(5)
    metrics.update(*maps[0])
    expected = metrics.compute()
    wrong = maps[1][1].clone()
    wrong[3, 4] = label
    with pytest.raises(ValueError, match=rf"0\.\.4 or the ignore_index 255, got {label};"):
        metrics.update(maps[1][0], wrong)
    assert_same(metrics.compute(), expected)


def test_wrong_label_counted_on_a_device_is_named_by_compute():
    metrics = SegmentationMetrics(5)
    metrics.wrong_label = torch.tensor(7)  # what update leaves where it does not wait for the device
    with pytest.raises(ValueError, match="got 7;"):
        metrics.compute()
    metrics.reset()
    assert metrics.compute()["aAcc"].isnan()


@pytest.mark.gpu
def test_cuda_counts_without_waiting():
    maps = random_maps(3, 150)
    metrics = SegmentationMetrics(150).cuda()
    on_device = [(p.cuda(), t.cuda()) for p, t in maps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for preds, labels in on_device:
            metrics.update(preds, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(metrics.compute(), slow_metrics(maps, 150))
    metrics.update(torch.zeros(1, 1).long().cuda(), torch.full((1, 1), 200).cuda())
    with pytest.raises(ValueError, match="got 200;"):
        metrics.compute()


def test_bad_input_is_explained():
    metrics = SegmentationMetrics(5)
    labels = torch.zeros(2, 4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"preds must be .* got torch\.float32 of shape \(2, 5, 4, 6\); take logits"):
        metrics.update(torch.rand(2, 5, 4, 6), labels)
    with pytest.raises(ValueError, match=r"labels must be .* got torch\.float64"):
        metrics.update(labels, labels.double())
    with pytest.raises(ValueError, match=r"one shape, .* got \(2, 4, 5\) and \(2, 4, 6\)"):
        metrics.update(labels[..., :5], labels)
    with pytest.raises(ValueError, match=r"got \(2, 1, 4, 6\) and \(2, 1, 4, 6\)"):
        metrics.update(labels[:, None], labels[:, None])
    with pytest.raises(ValueError, match="present, scene_parsing, got 'macro'"):
        SegmentationMetrics(5, average="macro")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SegmentationMetrics(0)


def test_reset_merge_copy_pickle_and_state_dict():
    maps = random_maps(5, 5)
    expected = measure(maps, 5)
    first, second = SegmentationMetrics(5), SegmentationMetrics(5)
    for preds, labels in maps[:3]:
        first.update(preds, labels)
    for preds, labels in maps[3:]:
        second.update(preds, labels)
    restored = SegmentationMetrics(5)
    restored.load_state_dict(first.state_dict())
    for copied in (restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first), first):
        copied.merge_state(second)
        assert_same(copied.compute(), expected)
    first.reset()
    for preds, labels in maps:
        first.update(preds, labels)
    assert_same(first.compute(), expected)
    with pytest.raises(RuntimeError, match="must match the size"):
        first.merge_state(SegmentationMetrics(6))


def test_conversion_to_half_keeps_exact_counts():
    metrics = SegmentationMetrics(2).half()
    metrics.update(torch.zeros(70, 1000).long(), torch.zeros(70, 1000).long())
    assert metrics.compute()["pixels"].tolist() == [70_000, 0]


def count_in_a_process(rank: int, folder: str, shares: list[list[list[int]]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    maps = random_maps(5, 7)
    for number, share in enumerate(shares):
        metrics = SegmentationMetrics(7)
        for i in share[rank]:
            metrics.update(*maps[i])
        local = metrics.confusion.clone()
        torch.save(metrics.compute(), f"{folder}/result_{number}_{rank}.pt")
        assert torch.equal(metrics.confusion, local)  # counting goes on from the process' own
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    shares = [[[0, 2, 4], [1, 3]], [[0, 1, 2, 3, 4], []]]
    torch.multiprocessing.spawn(count_in_a_process, (str(tmp_path), shares), nprocs=2)
    expected = slow_metrics(random_maps(5, 7), 7)
    for number in range(len(shares)):
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"result_{number}_{rank}.pt"), expected)
