import copy
import os
import pickle
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.object_size import SIZES, ObjectSizeIoU, connected_regions

Maps = list[tuple[Tensor, Tensor]]


def blobs(seed: int, K: int, height: int, width: int) -> Tensor:
    """A map of overlapping rectangles and specks, the smallest of one pixel and the largest of nearly all."""
    generator = np.random.default_rng(seed)
    classes = np.full((height, width), generator.integers(K))
    for _ in range(25):
        size = np.maximum(1, (np.array([height, width]) * generator.random(2) ** 3).astype(int))
        top, left = generator.integers(0, np.array([height, width]) - size + 1)
        classes[top : top + size[0], left : left + size[1]] = generator.integers(K)
    specks = generator.random((height, width)) < 0.01
    classes[specks] = generator.integers(K, size=specks.sum())
    return torch.from_numpy(classes)


def random_maps(count: int, K: int, height: int = 140, width: int = 131) -> Maps:
    maps = []
    for i in range(count):
        labels, preds = blobs(i, K, height, width), blobs(i, K, height, width).roll((3, -2), (0, 1))
        preds = torch.where(blobs(i + 100, 4, height, width) == 0, blobs(i + 200, K, height, width), preds)
        labels[blobs(i + 300, 12, height, width) == 0] = 255
        preds[blobs(i + 400, 30, height, width) == 0] = 255
        maps.append((preds, labels))
    return maps


def flood_fill(classes: np.ndarray) -> np.ndarray:
    """Regions of equal values that touch by a side or a corner, one pixel at a time, numbered in reading order."""
    regions, count = np.full(classes.shape, -1), 0
    for seed in np.ndindex(*classes.shape):
        if regions[seed] >= 0:
            continue
        regions[seed], queue = count, deque([seed])
        while queue:
            y, x = queue.popleft()
            for v in range(max(y - 1, 0), min(y + 2, classes.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, classes.shape[1])):
                    if regions[v, u] < 0 and classes[v, u] == classes[y, x]:
                        regions[v, u] = count
                        queue.append((v, u))
        count += 1
    return regions


def size_of(area: int) -> int:
    return 0 if area < 32 * 32 else 1 if area <= 96 * 96 else 2


def slow_counts(maps: Maps, K: int) -> dict[str, np.ndarray]:
    """The definition, one segment at a time."""
    counts = {name: np.zeros((3, K), dtype=int) for name in ("correct", "false", "pixels", "segments")}
    for preds, labels in maps:
        labels = labels.numpy()
        preds = np.where(labels == 255, 255, preds.numpy())
        true, predicted = flood_fill(labels), flood_fill(preds)
        for region in range(true.max() + 1):
            segment = true == region
            c, size = labels[segment][0], size_of(segment.sum())
            if c != 255:
                counts["segments"][size, c] += 1
                counts["pixels"][size, c] += segment.sum()
                counts["correct"][size, c] += (preds[segment] == c).sum()
        for region in range(predicted.max() + 1):
            segment = predicted == region
            c = preds[segment][0]
            if c == 255:
                continue
            right = segment & (labels == c)
            covered = np.bincount(true[right], minlength=1)
            matched = true == covered.argmax() if right.any() else segment
            counts["false"][size_of(matched.sum()), c] += (segment & ~right).sum()
    return counts


def slow_metrics(maps: Maps, K: int) -> dict[str, Tensor]:
    results, counts = {}, slow_counts(maps, K)
    for size, name in enumerate(SIZES):
        correct, false, pixels, segments = (counts[key][size] for key in ("correct", "false", "pixels", "segments"))
        iou = [correct[k] / (pixels[k] + false[k]) if segments[k] else np.nan for k in range(K)]
        present = [value for value in iou if value == value]
        results[f"mIoU_{name}"] = torch.tensor(np.mean(present) if present else np.nan, dtype=torch.float64)
        results[f"IoU_{name}"] = torch.tensor(iou, dtype=torch.float64)
        results[f"segments_{name}"] = torch.from_numpy(segments)
        results[f"pixels_{name}"] = torch.from_numpy(pixels)
    return results


def measure(maps: Maps, K: int, **options) -> dict[str, Tensor]:
    metric = ObjectSizeIoU(K, **options)
    for preds, labels in maps:
        metric.update(preds, labels)
    return metric.compute()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (17, 23)])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_regions_equal_a_flood_fill(shape, classes):
    generator = torch.Generator().manual_seed(classes)
    maps = torch.randint(0, classes, (4, *shape), generator=generator)
    regions = connected_regions(maps)
    start = 0
    for k in range(4):
        expected = torch.from_numpy(flood_fill(maps[k].numpy()))
        torch.testing.assert_close(regions[k], expected + start)
        start += int(expected.max()) + 1


def test_regions_of_a_spiral_and_a_comb():
    spiral = torch.tensor(
        [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    )  # 0 is one region inside, and 1 another that ends in the middle
    comb = torch.ones(40, 81, dtype=torch.long)
    comb[:-1, 1::2] = 0  # 41 teeth that meet in the last row
    assert connected_regions(spiral[None]).unique().tolist() == [0, 1]
    assert connected_regions(comb[None]).eq(0).sum() == 39 * 41 + 81
    assert len(connected_regions(comb[None]).unique()) == 1 + 40


@pytest.mark.parametrize("K", [1, 3, 150])
def test_equals_slow_reference(K):
    maps = random_maps(2, K)
    expected = slow_metrics(maps, K)
    actual = measure(maps, K)
    if K == 1:  # torchmetrics squeezes (1,) to ()
        expected = {key: value.squeeze() for key, value in expected.items()}
    assert_same(actual, expected)
    if K == 3:
        assert (torch.stack([actual[f"segments_{name}"].sum() for name in SIZES]) > 0).all()
        assert not torch.stack([actual[f"mIoU_{name}"] for name in SIZES]).isnan().any()


def test_sizes_add_up_to_the_usual_counts():
    maps, usual, metric = random_maps(3, 5), SegmentationMetrics(5), ObjectSizeIoU(5)
    for preds, labels in maps:
        usual.update(preds, labels)
        metric.update(preds, labels)
    confusion = usual.confusion
    torch.testing.assert_close(metric.correct.sum(0), confusion.diagonal())
    torch.testing.assert_close(metric.pixels.sum(0), confusion.sum(1))
    torch.testing.assert_close(metric.false.sum(0), confusion[:, :-1].sum(0) - confusion.diagonal())


@pytest.mark.parametrize(
    ("shape", "size"),
    [((31, 33), "small"), ((32, 32), "medium"), ((96, 96), "medium"), ((97, 96), "large"), ((1, 1), "small")],
)
def test_limits_of_sizes(shape, size):
    labels = torch.full((120, 120), 255)
    labels[: shape[0], : shape[1]] = 0
    result = measure([(torch.zeros_like(labels), labels)], 2)
    assert {name: int(result[f"segments_{name}"].sum()) for name in SIZES} == {**dict.fromkeys(SIZES, 0), size: 1}
    assert result[f"pixels_{size}"].tolist() == [shape[0] * shape[1], 0]
    assert result[f"mIoU_{size}"] == 1
    assert [name for name in SIZES if not result[f"mIoU_{name}"].isnan()] == [size]


def test_false_positives_go_to_the_segment_they_belong_to():
    labels = torch.zeros(200, 200, dtype=torch.long)
    labels[10:20, 10:20] = 1  # small, 100 pixels
    labels[50:100, 50:100] = 1  # medium, 2500 pixels
    preds = labels.clone()
    preds[10:40, 10:70] = 1  # the small one seen as one of medium size: 1700 false pixels
    preds[50:100, 100:110] = 1  # the medium one seen 500 pixels too wide
    preds[150:155, 150:160] = 1  # 50 pixels where there is nothing: their own size
    result = measure([(preds, labels)], 2)
    assert result["IoU_small"][1] == pytest.approx(100 / (100 + 1700 + 50))
    assert result["IoU_medium"][1] == pytest.approx(2500 / 3000)
    assert result["IoU_large"][1].isnan()
    assert result["IoU_large"][0] == pytest.approx((200 * 200 - 2600 - 2250) / (200 * 200 - 2600))
    preds[40:50, 60:70] = 1  # one predicted region now, which covers more of the medium one
    result = measure([(preds, labels)], 2)
    assert result["IoU_small"][1] == pytest.approx(100 / 150)
    assert result["IoU_medium"][1] == pytest.approx(2500 / (3000 + 1700 + 100))


def test_of_two_segments_covered_alike_the_first_counts():
    labels = torch.zeros(100, 100, dtype=torch.long)
    labels[0:10, 0:10] = 1  # small
    labels[40:80, 40:80] = 1  # medium
    preds = torch.zeros_like(labels)
    preds[0:10, 0:10] = preds[10:45, 10] = preds[45, 10:40] = preds[45:47, 40:80] = 1
    preds[46, 60:80] = preds[0, 80] = 0  # covers 100 of the small one and 60 of the medium one
    preds[47, 40:80] = 1  # and 100 of each
    metric = ObjectSizeIoU(2)
    metric.update(preds, labels)
    assert metric.correct[:, 1].tolist() == [100, 100, 0]
    assert metric.false[:, 1].tolist() == [int((preds > labels).sum()), 0, 0]


def test_false_positives_alone_are_no_entry():
    labels = torch.zeros(100, 100, dtype=torch.long)
    preds = labels.clone()
    preds[:5, :5] = 1
    result = measure([(preds, labels)], 2)
    assert result["mIoU_small"].isnan()
    assert result["mIoU_large"] == pytest.approx(1 - 25 / 10_000)


def test_ignored_pixels_separate_and_their_predictions_do_not_count():
    labels = torch.zeros(40, 80, dtype=torch.long)  # 3200 pixels: medium
    labels[:, 20] = 255  # 800 and 2360
    result = measure([(torch.zeros_like(labels), labels)], 1)
    assert (result["segments_small"], result["segments_medium"]) == (1, 1)
    preds = torch.ones_like(labels)
    preds[labels != 255] = 0
    assert measure([(preds, labels)], 2)["mIoU_small"] == 1


def test_batches_do_not_matter():
    maps = random_maps(4, 5)
    expected = measure(maps, 5)
    preds, labels = (torch.stack(kind) for kind in zip(*maps, strict=True))
    assert_same(measure([(preds, labels)], 5), expected)
    assert_same(measure([(preds[:3], labels[:3]), (preds[3:], labels[3:])], 5), expected)
    assert_same(measure(maps[::-1], 5), expected)
    assert_same(measure([(p.to(torch.int32), t.to(torch.uint8)) for p, t in maps], 5), expected)


def test_nothing_counted_is_nan():
    metric = ObjectSizeIoU(4)
    for shape in ((3, 3), (0, 3, 3), (2, 3, 0)):
        metric.update(torch.zeros(shape).long(), torch.full(shape, 255))
        result = metric.compute()
        assert all(result[f"{key}_{name}"].isnan().all() for key in ("mIoU", "IoU") for name in SIZES)
        assert all(result[f"{key}_{name}"].eq(0).all() for key in ("segments", "pixels") for name in SIZES)


def test_bad_input_is_explained_and_nothing_counted():
    metric = ObjectSizeIoU(5)
    labels = torch.zeros(2, 4, 6, dtype=torch.long)
    wrong = labels.clone()
    wrong[1, 2, 3] = 7
    with pytest.raises(ValueError, match=r"0\.\.4 or the ignore_index 255, got 7;"):
        metric.update(labels, wrong)
    with pytest.raises(ValueError, match=r"one shape, .* got \(2, 4, 5\) and \(2, 4, 6\)"):
        metric.update(labels[..., :5], labels)
    assert metric.pixels.sum() == 0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ObjectSizeIoU(0)


def test_reset_merge_copy_pickle_and_state_dict():
    maps = random_maps(3, 5)
    expected = measure(maps, 5)
    first, second = ObjectSizeIoU(5), ObjectSizeIoU(5)
    first.update(*maps[0])
    for preds, labels in maps[1:]:
        second.update(preds, labels)
    restored = ObjectSizeIoU(5)
    restored.load_state_dict(first.state_dict())
    for copied in (restored, pickle.loads(pickle.dumps(first)), copy.deepcopy(first), first):
        copied.merge_state(second)
        assert_same(copied.compute(), expected)
    first.reset()
    assert first.compute()["mIoU_large"].isnan()


def count_in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for metric in (ObjectSizeIoU(7), BoundaryIoU(7)):
        for preds, labels in random_maps(3, 7)[rank::2]:
            metric.update(preds, labels)
        torch.save(metric.compute(), f"{folder}/{type(metric).__name__}_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(count_in_a_process, (str(tmp_path),), nprocs=2)
    for metric in (ObjectSizeIoU(7), BoundaryIoU(7)):
        for preds, labels in random_maps(3, 7):
            metric.update(preds, labels)
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"{type(metric).__name__}_{rank}.pt"), metric.compute())


@pytest.mark.gpu
def test_cuda_equals_cpu():
    maps = random_maps(2, 5)
    metric = ObjectSizeIoU(5).cuda()
    for preds, labels in maps:
        metric.update(preds.cuda(), labels.cuda())
    assert_same(metric.compute(), measure(maps, 5))
