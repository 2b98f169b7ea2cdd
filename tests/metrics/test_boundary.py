import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from segheads.metrics.boundary import BoundaryIoU, near_contour
from segheads.metrics.confusion import SegmentationMetrics

Maps = list[tuple[Tensor, Tensor]]


def random_maps(count: int, K: int, height: int = 83, width: int = 110) -> Maps:
    """Wavy stripes and their shifted copies; a strip of labels ignored, some predictions of no class."""
    maps = []
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for i in range(count):
        labels = ((torch.sin(x / (9 + i)) * 8 + y + 3 * i) / (60 / K)).long().remainder(K)
        preds = labels.roll((2 + i, -3), (0, 1))
        preds[i * 7 : i * 7 + 5, :30] = (i + 1) % K
        preds[60:64, 60:70] = 255
        labels[40 + i : 47, 10:50] = 255
        maps.append((preds, labels))
    return maps


def slow_boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """M_d of M and M: pixels of the mask that are `distance` or less, along an axis or both, from one outside of it."""
    height, width = mask.shape
    near = np.zeros_like(mask)
    for y, x in zip(*mask.nonzero(), strict=True):
        if y < distance or x < distance or y + distance >= height or x + distance >= width:
            near[y, x] = True  # beyond the image is outside of every mask
        else:
            near[y, x] = not mask[y - distance : y + distance + 1, x - distance : x + distance + 1].all()
    return near


def slow_metrics(maps: Maps, K: int, ratio: float = 0.02) -> dict[str, Tensor]:
    """|(G_d & G) & (P_d & P)| / |(G_d & G) | (P_d & P)|, one class at a time, summed over images."""
    both, either, true = (np.zeros(K, dtype=int) for _ in range(3))
    for preds, labels in maps:
        preds, labels = preds.numpy(), labels.numpy()
        distance = max(1, round(ratio * np.sqrt(labels.shape[0] ** 2 + labels.shape[1] ** 2)))
        for k in range(K):
            G_d = slow_boundary(labels == k, distance)
            P_d = slow_boundary((preds == k) & (labels != 255), distance)
            both[k] += (G_d & P_d).sum()
            either[k] += (G_d | P_d).sum()
            true[k] += G_d.sum()
    iou = torch.tensor([b / e if e else np.nan for b, e in zip(both, either, strict=True)], dtype=torch.float64)
    return {"mBIoU": iou.nanmean(), "BIoU": iou, "boundary_pixels": torch.from_numpy(true)}


def measure(maps: Maps, K: int, **options) -> dict[str, Tensor]:
    metric = BoundaryIoU(K, **options)
    for preds, labels in maps:
        metric.update(preds, labels)
    return metric.compute()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("ratio", [0.02, 0.001, 0.05, 0.6])  # 3 pixels; less than one; 7; more than the height
def test_equals_slow_reference(ratio):
    maps = random_maps(2, 4)
    assert_same(measure(maps, 5, dilation_ratio=ratio), slow_metrics(maps, 5, ratio))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (64, 65)])
def test_odd_sizes(shape):
    maps = [(p[: shape[0], : shape[1]], t[: shape[0], : shape[1]]) for p, t in random_maps(2, 3)]
    assert_same(measure(maps, 3), slow_metrics(maps, 3))


def test_equals_the_authors_code():
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    for _, labels in random_maps(2, 4):
        labels = labels[:39]  # none ignored
        distance = round(0.02 * np.sqrt(39**2 + labels.shape[1] ** 2))
        near = near_contour(labels[None], distance)[0].numpy()
        for k in range(4):
            mask = (labels == k).numpy().astype(np.uint8)
            padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
            np.testing.assert_array_equal((mask - eroded) == 1, near & (mask == 1))


def test_single_class_is_a_frame():
    labels = torch.zeros(100, 100, dtype=torch.long)  # 3 pixels
    result = measure([(labels, labels)], 1)
    assert (result["mBIoU"], result["BIoU"], result["boundary_pixels"]) == (1, 1, 100 * 100 - 94 * 94)


def test_right_and_wrong():
    ((_, labels),) = random_maps(1, 4)
    perfect = measure([(labels, labels)], 5)
    assert perfect["BIoU"].nan_to_num(1).eq(1).all()
    assert perfect["BIoU"][4].isnan()  # does not occur
    assert measure([((labels + 1) % 4, labels.clamp(max=3))], 4)["mBIoU"] < 0.3
    assert measure([(torch.full_like(labels, 4), labels)], 5)["BIoU"].eq(0).all()


def test_forgives_less_than_mask_iou_where_objects_are_large():
    labels = torch.zeros(300, 400, dtype=torch.long)
    labels[50:250, 100:300] = 1
    preds, usual = labels.roll(4, dims=1), SegmentationMetrics(2)
    usual.update(preds, labels)
    assert usual.compute()["mIoU"] > 0.95
    assert measure([(preds, labels)], 2)["mBIoU"] < 0.85


def test_ignored_pixels_do_not_count_whatever_is_predicted_there():
    ((preds, labels),) = random_maps(1, 4)
    expected = measure([(preds, labels)], 4)
    for value in (0, 3, 255):
        assert_same(measure([(torch.where(labels == 255, value, preds), labels)], 4), expected)
    renamed = torch.where(labels == 255, -1, labels)
    assert_same(measure([(preds, renamed)], 4, ignore_index=-1), expected)


def test_batches_do_not_matter():
    maps = random_maps(4, 5)
    expected = measure(maps, 5)
    preds, labels = (torch.stack(kind) for kind in zip(*maps, strict=True))
    assert_same(measure([(preds, labels)], 5), expected)
    assert_same(measure([(preds[:3], labels[:3]), (preds[3:], labels[3:])], 5), expected)
    assert_same(measure([(p.to(torch.int32), t.to(torch.uint8)) for p, t in maps[::-1]], 5), expected)


def test_nothing_counted_is_nan():
    metric = BoundaryIoU(4)
    for shape in ((3, 3), (0, 3, 3), (2, 3, 0)):
        metric.update(torch.zeros(shape).long(), torch.full(shape, 255))
        result = metric.compute()
        assert result["mBIoU"].isnan()
        assert result["BIoU"].isnan().all()
        assert result["boundary_pixels"].tolist() == [0] * 4


def test_bad_input_is_explained_and_nothing_counted():
    metric = BoundaryIoU(5)
    labels = torch.zeros(2, 4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"0\.\.4 or the ignore_index 255, got 9;"):
        metric.update(labels, labels + 9)
    with pytest.raises(ValueError, match=r"preds must be an integer label map, got torch\.float32"):
        metric.update(labels.float(), labels)
    assert metric.true.sum() == 0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BoundaryIoU(0)
    for ratio in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {ratio}; the paper's is 0.02"):
            BoundaryIoU(2, dilation_ratio=ratio)


def test_wrong_label_counted_on_a_device_is_named_by_compute():
    metric = BoundaryIoU(5)
    metric.wrong_label = torch.tensor(9)  # what update leaves where it does not wait for the device
    with pytest.raises(ValueError, match=r"0\.\.4 or the ignore_index 255, got 9;"):
        metric.compute()
    metric.reset()
    assert metric.compute()["mBIoU"].isnan()
    metric.to("meta").update(*(torch.zeros(4, 6, dtype=torch.long, device="meta") for _ in range(2)))


@pytest.mark.gpu
def test_cuda_counts_without_waiting():
    maps = random_maps(3, 5)
    metric = BoundaryIoU(5).cuda()
    on_device = [(preds.cuda(), labels.cuda()) for preds, labels in maps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for preds, labels in on_device:
            metric.update(preds, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(metric.compute(), measure(maps, 5))
    metric.update(torch.zeros(4, 6).long().cuda(), torch.full((4, 6), 9).cuda())
    with pytest.raises(ValueError, match="got 9;"):
        metric.compute()


def test_reset_merge_copy_pickle_and_state_dict():
    maps = random_maps(3, 5)
    expected = measure(maps, 5)
    first, second = BoundaryIoU(5), BoundaryIoU(5)
    first.update(*maps[0])
    for preds, labels in maps[1:]:
        second.update(preds, labels)
    restored = BoundaryIoU(5)
    restored.load_state_dict(first.state_dict())
    for copied in (restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first), first):
        copied.merge_state(second)
        assert_same(copied.compute(), expected)
    first.reset()
    assert first.compute()["mBIoU"].isnan()
