import pytest
import torch

from segheads.metrics import F1Score, SegmentationMetrics


def test_scores_are_those_of_the_formulas():
    torch.manual_seed(0)
    preds, labels = torch.randint(0, 4, (2, 20, 30)), torch.randint(0, 3, (2, 20, 30))
    labels[0, :3] = 255
    metric, usual = F1Score(5), SegmentationMetrics(5)
    for one in (metric, usual):
        one.update(preds, labels)
    found, counts = metric.compute(), labels != 255
    f1, weighted = [], 0.0
    for k in range(5):
        mine, true = (preds == k) & counts, (labels == k) & counts
        tp, fp, fn = (int(x.sum()) for x in (mine & true, mine & ~true, ~mine & true))
        f1.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else torch.nan)
        weighted += (tp + fn) / int(counts.sum()) * (tp / (tp + fp + fn) if tp else 0)
    torch.testing.assert_close(found["F1"], torch.tensor(f1, dtype=torch.float64), equal_nan=True)
    assert f1[3] == 0  # predicted, never true
    assert found["mF1"].item() == pytest.approx(sum(f1[:4]) / 4)
    assert found["fwIoU"].item() == pytest.approx(weighted)
    iou = usual.compute()["IoU"]
    torch.testing.assert_close(found["F1"], 2 * iou / (1 + iou), equal_nan=True)
    assert found["confusion"][2, 3] == int(((preds == 3) & (labels == 2)).sum())


def test_average_and_nothing_at_all():
    metric = F1Score(4, average="scene_parsing")
    assert all(metric.compute()[name].isnan() for name in ("mF1", "fwIoU"))
    metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long))
    assert metric.compute()["mF1"].item() == 0.25
    metric.update(torch.full((1, 1, 4), 9), torch.ones(1, 1, 4, dtype=torch.long))
    assert metric.compute()["confusion"][1].tolist() == [0, 0, 0, 0, 4]
    with pytest.raises(ValueError, match="label"):
        metric.update(torch.zeros(1, 1, 1, dtype=torch.long), torch.full((1, 1, 1), 7))
