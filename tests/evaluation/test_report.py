import csv
import json
from typing import ClassVar

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from segheads import SegmentationMetrics
from segheads.classes import Classes
from segheads.data import Scenes
from segheads.evaluation.plots import WRONG, plot_confusion, plot_worst
from segheads.evaluation.report import (
    evaluation_markdown,
    per_class_markdown,
    score_line,
    score_record,
    scores,
    worst_images,
    write_evaluation,
    write_images,
    write_results,
)
from segheads.metrics import METRICS, SegmentationMetric
from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.calibration import CalibrationError
from segheads.metrics.images import image_scores
from segheads.metrics.object_size import ObjectSizeIoU

PROTOCOL = {"dataset": "scenes", "scales": [0.5, 1.0], "flip": True, "window": "whole image"}


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def measured(scenes):
    """Everything that can be measured, of predictions that call all windows walls, and ever more pixels sky."""
    rows, counts = [], []
    metrics = [SegmentationMetrics(12), ObjectSizeIoU(12), BoundaryIoU(12)]
    error = CalibrationError()
    for i in range(len(scenes)):
        image, labels = scenes.read(i)
        labels = labels.long()
        prediction = torch.where(labels == 8, 6, labels)
        prediction[: 20 * i] = 0
        for metric in metrics:
            metric.update(prediction, labels)
        error.update(torch.full(labels.shape, 0.9), prediction, labels)
        confusion = torch.zeros(12, 12, dtype=torch.long)
        for true, predicted in zip(labels.flatten().tolist(), prediction.flatten().tolist(), strict=True):
            confusion[true, predicted] += 1
        counts.append(torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)]))
        rows.append((scenes.name(i), np.array(image), labels.numpy(), prediction.numpy()))
    results = {name: value for metric in (*metrics, error) for name, value in metric.compute().items()}
    return results | image_scores(torch.stack(counts)), rows


@pytest.fixture(scope="module")
def scenes():
    return Scenes("val", size=(64, 96), length=3)


@pytest.fixture(scope="module")
def everything(scenes):
    return measured(scenes)


def test_files(tmp_path, scenes, everything):
    results, rows = everything
    order = worst_images(results, 2)
    assert order == [2, 1]
    write_evaluation(tmp_path / "new" / "folder", results, PROTOCOL, scenes, [rows[i] for i in order])
    folder = tmp_path / "new" / "folder"
    files = ["images.csv", "reliability.png", "results.json", "results.md", "worst.png"]
    assert sorted(path.name for path in folder.iterdir()) == files
    written = json.loads((folder / "results.json").read_text())
    assert written["protocol"] == PROTOCOL
    for name in ("aAcc", "mIoU", "mIoU_small", "mBIoU", "ECE"):
        assert written[name] == scores(results)[name] == results[name].item()
    assert written["mIoU_large"] is None  # no such segment in scenes this small
    road = written["classes"][4]
    assert road["name"] == "road"
    for name in ("IoU", "Acc", "pixels", "BIoU", "IoU_small", "segments_medium"):
        value = results[name][4].item()
        assert road[name] == (None if value != value else value)
    assert len(written["bins"]) == 15


def test_table_of_images(tmp_path, scenes, everything):
    results, _ = everything
    write_evaluation(tmp_path, results, PROTOCOL, scenes, [])
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [scenes.name(i) for i in range(3)]
    assert [float(row["mIoU"]) for row in rows] == results["image_mIoU"].tolist()
    assert [float(row["aAcc"]) for row in rows] == results["image_aAcc"].tolist()
    assert [int(row["pixels"]) for row in rows] == [64 * 96] * 3
    labels = scenes.read(0)[1]
    assert (int(rows[0]["classes"]), int(rows[0]["of classes"])) == (len(labels.unique()), 12)
    if (labels == 8).any():
        assert (rows[0]["lowest class"], float(rows[0]["its IoU"])) == ("window", 0)
    assert not (tmp_path / "worst.png").exists()


def test_an_image_without_labels_has_empty_cells_and_is_never_the_worst(tmp_path, scenes):
    counts = torch.zeros(3, 3, 12, dtype=torch.long)
    counts[0, :, 3] = torch.tensor([5, 10, 10])
    counts[1, :, 2] = torch.tensor([1, 10, 10])
    results = {**SegmentationMetrics(12).compute(), **image_scores(counts)}
    assert worst_images(results, 5) == [1, 0]
    write_evaluation(tmp_path, results, PROTOCOL, scenes, [])
    lines = (tmp_path / "images.csv").read_text().splitlines()
    assert lines[1:] == [
        f"{scenes.name(0)},{5 / 15},0.5,10,1,12,grass,{5 / 15}",
        f"{scenes.name(1)},{1 / 19},0.1,10,1,12,hill,{1 / 19}",
        f"{scenes.name(2)},,,0,0,12,,",
    ]


def test_confusion_is_written_and_drawn(tmp_path, scenes):
    metric, labels = METRICS["f1"](12), scenes.read(0)[1].long()
    usual = SegmentationMetrics(12)
    prediction = torch.where(labels == 4, 12, labels.roll(3, dims=1))  # 12 is no class
    for one in (metric, usual):
        one.update(prediction, labels)
    counts = torch.ones(1, 3, 12, dtype=torch.long)
    results = {**usual.compute(), **metric.compute(), **image_scores(counts.expand(3, 3, 12))}
    write_evaluation(tmp_path, results, PROTOCOL, scenes, [])
    with (tmp_path / "confusion.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["true class", *scenes.class_names, "(no class)"]
    assert tuple(row[0] for row in rows) == tuple(scenes.class_names)
    assert [[int(x) for x in row[1:]] for row in rows] == results["confusion"].tolist()
    assert int(rows[4][-1]) == int((labels == 4).sum())
    whole = read(tmp_path / "confusion.png")
    assert len(np.unique(whole.reshape(-1, 3), axis=0)) > 10
    plot_confusion(torch.zeros(40, 41, dtype=torch.long), [f"class {i}" for i in range(40)], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"confusion of 3 classes must be \(3, 4\); got \(12, 13\)"):
        plot_confusion(results["confusion"], ["a", "b", "c"], tmp_path / "x.png")
    text = (tmp_path / "results.md").read_text()
    assert "| aAcc | mAcc | mIoU | mF1 | fwIoU |" in text
    assert "| class | IoU | Acc | F1 | pixels |" in text


def test_markdown(scenes, everything):
    results, _ = everything
    text = evaluation_markdown(results, PROTOCOL, scenes.class_names)
    first = " | ".join(f"{100 * results[name].item():.2f}" for name in ("aAcc", "mAcc", "mIoU", "mBIoU", "ECE"))
    assert f"| aAcc | mAcc | mIoU | boundary IoU | ECE |\n|--:|--:|--:|--:|--:|\n| {first} |" in text
    segments = results["segments_small"]
    share = 100 * (results["pixels_small"].sum() / results["pixels"].sum()).item()
    small = f"{100 * results['mIoU_small'].item():.2f} | {int((segments > 0).sum())} | {int(segments.sum())}"
    assert f"| small, under 32² | {small} | {share:.2f} |" in text
    assert "| large, over 96² | – | 0 | 0 | 0.00 |" in text
    assert "| scales | 0.5, 1.0 |\n| flip | yes |\n| window | whole image |" in text
    road = " | ".join(f"{100 * results[name][4].item():.2f}" for name in ("IoU", "Acc", "BIoU"))
    assert "| class | IoU | Acc | boundary IoU | pixels |" in text
    assert f"| road | {road} | {int(results['pixels'][4])} |" in text


def test_a_new_metric_has_its_columns_everywhere(tmp_path, monkeypatch, scenes, everything):
    class Dice(SegmentationMetric):
        scores: ClassVar = {"mDice": "Dice", "hidden": ""}
        class_scores: ClassVar = {"Dice": "Dice", "dice_pixels": "pixels in both", "raw": ""}

    monkeypatch.setitem(METRICS, "dice", Dice)
    results = {**everything[0], "mDice": torch.tensor(0.5), "hidden": torch.tensor(0.125)}
    results |= {"Dice": torch.full((12,), 0.25), "dice_pixels": torch.arange(12), "raw": torch.full((12,), torch.nan)}
    write_evaluation(tmp_path, results, PROTOCOL, scenes, [])
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["mDice"], written["hidden"]) == (0.5, 0.125)
    assert list(written["classes"][3])[-3:] == ["Dice", "dice_pixels", "raw"]
    assert [written["classes"][3][key] for key in ("Dice", "dice_pixels", "raw")] == [0.25, 3, None]
    text = (tmp_path / "results.md").read_text()
    assert "| aAcc | mAcc | mIoU | boundary IoU | ECE | Dice |\n|--:|" in text
    assert "| class | IoU | Acc | boundary IoU | Dice | pixels | pixels in both |\n|---|--:|" in text
    assert f"| 25.00 | {int(results['pixels'][3])} | 3 |" in text
    assert "hidden" not in text
    assert "raw" not in text


@pytest.mark.parametrize("name", list(METRICS))
def test_reports_of_one_metric_alone(tmp_path, scenes, name):
    metric, labels = METRICS[name](12), scenes.read(0)[1]
    confidence = {"confidence": torch.full(labels.shape, 0.9)} if metric.needs_confidence else {}
    metric.update(preds=labels.roll(1, dims=1), labels=labels, **confidence)
    results = metric.compute()
    write_results(tmp_path, results, scenes)
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["classes"]) == 12
    assert set(METRICS[name].scores) <= written.keys()
    text = evaluation_markdown(results, {}, scenes.class_names)
    assert "| class |" in text
    assert ("## By size of segments" in text) == (name == "object_sizes")


def test_files_that_fail_midway_leave_the_old_ones(tmp_path, monkeypatch, scenes, everything):
    results, _ = everything
    write_evaluation(tmp_path, results, PROTOCOL, scenes, [])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = Scenes("val", size=(64, 96), length=3)

    def name(index):
        if index == 2:
            raise OSError("no such image")
        return "changed"

    broken.name = name
    with pytest.raises(OSError, match="no such image"):
        write_images(tmp_path / "images.csv", results, broken)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_results(tmp_path, results, scenes, {"protocol": object()})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".png"} == {
        name: content for name, content in before.items() if not name.endswith(".png")
    }


def test_markdown_of_the_usual_scores_alone(scenes):
    text = evaluation_markdown(SegmentationMetrics(12).compute(), {}, scenes.class_names)
    assert "| aAcc | mAcc | mIoU |\n" in text
    assert "boundary" not in text
    assert "size" not in text


def test_table_of_classes():
    def measure(preds, labels, num_classes):
        metrics = SegmentationMetrics(num_classes)
        metrics.update(torch.tensor(preds), torch.tensor(labels))
        return metrics.compute()

    result = measure([[0, 1, 1, 1]], [[0, 0, 1, 255]], 3)
    assert per_class_markdown(result, ["wall", "a|b", "sky"]).splitlines() == [
        "| class | IoU | Acc | pixels |",
        "|---|--:|--:|--:|",
        "| wall | 50.00 | 50.00 | 2 |",
        "| a\\|b | 50.00 | 100.00 | 1 |",
        "| sky | – | – | 0 |",
        "",
        "mIoU over 2 of 3 classes; absent: sky",
    ]
    with pytest.raises(ValueError, match="each of 3 classes is required, got 1;"):
        per_class_markdown(result, ["wall"])
    one_class = measure([[0]], [[0]], 1)
    assert per_class_markdown(one_class, ["all"]).endswith("| all | 100.00 | 100.00 | 1 |")


def test_sheet_of_the_worst(tmp_path, monkeypatch, scenes, everything):
    _, rows = everything
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    name, image, truth, prediction = rows[2]
    truth = truth.copy()
    truth[:5] = 255
    plot_worst([(name, image, truth, prediction), rows[1]], [0.25, 0.5], scenes, tmp_path / "worst.png")
    (figure,) = figures
    axes = [axis for axis in figure.axes if axis.images]
    titles = [axis.get_title() for axis in axes]
    labelled = truth != 255
    wrong = labelled & (truth != prediction)
    assert titles[:3] == [f"1. {name}", "truth", "prediction"]
    assert titles[3].startswith("mIoU 25.00 %")
    assert titles[3].endswith(f", {100 * wrong.sum() / labelled.sum():.0f} % of pixels wrong")
    assert titles[4] == f"2. {rows[1][0]}"
    shown = axes[3].images[0].get_array()
    assert (shown[~labelled] == 255).all()
    right = shown[labelled & ~wrong]
    assert (right == right[:, :1]).all()  # grey
    assert (right < 200).all()
    hue = shown[wrong].astype(float)
    np.testing.assert_allclose(hue / hue[:, :1], np.array([WRONG]) / WRONG[0] * np.ones_like(hue), atol=0.02)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["(ignored)", "(wrong)"]
    assert read(tmp_path / "worst.png").std() > 0


def test_sheet_of_the_worst_explains_what_is_missing(tmp_path, scenes):
    with pytest.raises(ValueError, match="a sheet needs rows, and a score for each; got 0 rows and 0 scores"):
        plot_worst([], [], scenes, tmp_path / "worst.png")


def test_legend_shows_the_classes_of_most_pixels_where_there_is_no_room_for_all(tmp_path, monkeypatch):
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, path, **kwargs):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    names = tuple(f"class {k}" for k in range(90))

    class Many(Scenes):
        def __init__(self):
            self.classes = Classes(names, tuple((k, k, k) for k in range(90)))

    truth = np.repeat(np.arange(90), 20).reshape(30, 60)
    truth[:, 40:] = 77
    truth[0, 0] = 255
    plot_worst([("a", np.zeros((30, 60, 3), np.uint8), truth, truth)], [1.0], Many(), tmp_path / "sheet.png")
    (figure,) = figures
    save(figure, tmp_path / "sheet.png")
    legend = figure.legends[0]
    labels = [text.get_text() for text in legend.get_texts()]
    assert "class 77" in labels
    assert labels[-3:] == [f"and {len(np.unique(truth)) - 1 - (len(labels) - 3)} more", "(ignored)", "(wrong)"]
    numbers = [int(label.split()[1]) for label in labels[:-3]]
    assert numbers == sorted(numbers)
    assert legend.get_window_extent().height <= figure.bbox.height


def results_of_three(labels):
    metric = SegmentationMetrics(3)
    metric.update(torch.tensor([labels]), torch.tensor([labels]))
    return metric.compute()


class ThreeClasses:
    class_names = ("road", "sky", "sea")


def test_absent_classes_are_named_wherever_miou_stands(tmp_path):
    results = results_of_three([0, 0, 2])
    line = "mIoU over 2 of 3 classes; absent: sky"
    assert score_line(results, ThreeClasses.class_names) == f"aAcc 1.0000, mAcc 1.0000, mIoU 1.0000; {line}"
    assert score_record(results, ThreeClasses.class_names)["absent_classes"] == ["sky"]
    assert per_class_markdown(results, ThreeClasses.class_names).endswith(f"| 1 |\n\n{line}")
    parts = evaluation_markdown(results, {}, ThreeClasses.class_names).split("\n\n")
    assert parts[3] == line
    assert parts.count(line) == 1
    write_results(tmp_path, results, ThreeClasses)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["absent_classes"] == ["sky"]
    assert written["mIoU"] == 1


def test_nothing_is_said_where_all_classes_occur(tmp_path):
    results = results_of_three([0, 1, 2])
    assert score_line(results, ThreeClasses.class_names) == "aAcc 1.0000, mAcc 1.0000, mIoU 1.0000"
    assert score_record(results, ThreeClasses.class_names) == scores(results)
    for text in (per_class_markdown, lambda *a: evaluation_markdown(a[0], {}, a[1])):
        assert "absent" not in text(results, ThreeClasses.class_names)
    write_results(tmp_path, results, ThreeClasses)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["absent_classes"] == []
