import json

import numpy as np
import pytest
import torch
from PIL import Image

from segheads import SegmentationMetrics
from segheads.classes import Classes
from segheads.data import Scenes
from segheads.evaluation import scores
from segheads.evaluation.plots import plot_confusion
from segheads.metrics.calibration import CalibrationError
from segheads.training import plot_curves, write_report


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def measured(calibration: bool = True):
    """Of 12 classes, 0 and 1 occur; two pixels of confidence 0.95, one right, and one of 0.3, right."""
    preds, labels = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 255]])
    metrics, error = SegmentationMetrics(12), CalibrationError()
    metrics.update(preds, labels)
    error.update(torch.tensor([[0.95, 0.95, 0.3, 0.9]]), preds, labels)
    return {**metrics.compute(), **(error.compute() if calibration else {})}


def test_curves_are_drawn_even_of_little(tmp_path):
    plot_curves([], tmp_path / "none.png")
    records = [{"iteration": 1, "loss": 2.0, "learning_rate": 0.1}, {"iteration": 1, "mIoU": 0.2, "aAcc": None}]
    plot_curves(records, tmp_path / "some.png")
    some, none = read(tmp_path / "some.png"), read(tmp_path / "none.png")
    assert some.shape == none.shape == (700, 900, 3)
    assert np.any(some != none)


def test_report_without_calibration(tmp_path):
    write_report(tmp_path, measured(calibration=False), [], Scenes("val"), [])
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == ["aAcc", "mAcc", "mIoU", "absent_classes", "classes"]
    assert written["classes"][0] == {"name": "sky", "IoU": 0.5, "Acc": 0.5, "pixels": 2}
    assert written["classes"][2] == {"name": "hill", "IoU": None, "Acc": None, "pixels": 0}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["curves.png", "per_class.md", "results.json"]
    assert list(scores(measured(calibration=False))) == ["aAcc", "mAcc", "mIoU"]


def test_report_with_calibration(tmp_path):
    results = measured()
    write_report(tmp_path, results, [], Scenes("val"), [])
    written = json.loads((tmp_path / "results.json").read_text())
    expected = (2 * 0.45 + 0.7) / 3
    assert written["ECE"] == scores(results)["ECE"] == pytest.approx(expected)
    assert len(written["bins"]) == 15
    assert written["bins"][0] == {"confidence": None, "accuracy": None, "pixels": 0}
    assert written["bins"][14] == {"confidence": pytest.approx(0.95), "accuracy": 0.5, "pixels": 2}
    assert written["bins"][4] == {"confidence": pytest.approx(0.3), "accuracy": 1, "pixels": 1}
    assert read(tmp_path / "reliability.png").shape == (600, 500, 3)


NAMES = ("$a_b^", "_under", "a|b", "<b>", "\N{GRINNING FACE} grin", "x" * 300, "$x$ and $", "two\nlines")


class Awkward(Scenes):
    """Eight classes of names that matplotlib and Markdown take for something else."""

    def __init__(self, size):
        super().__init__("val", length=2, size=size)
        self.classes = Classes(NAMES, tuple((30 * k, 0, 0) for k in range(len(NAMES))))

    def name(self, index):
        return f"$\\frac$_{index}{'y' * 250}"

    def read(self, index):
        image, _ = super().read(index)
        return image, torch.arange(len(NAMES)).repeat_interleave(8).repeat(64, 1)


def test_names_are_shown_as_they_are(tmp_path):
    """Warnings are errors here."""
    dataset = Awkward((64, 64))
    metrics = SegmentationMetrics(len(NAMES))
    image, labels = dataset.read(0)
    metrics.update(labels[None], labels[None])
    results = {**metrics.compute(), "confusion": torch.ones(8, 9)}
    rows = [(dataset.name(index), np.array(image), labels.numpy(), labels.numpy()) for index in range(2)]
    write_report(tmp_path, results, [{"iteration": 1, "loss": 1.0}], dataset, rows)
    plot_confusion(results["confusion"], NAMES, tmp_path / "confusion.png")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "per_class.md", "curves.png", "predictions.png", "confusion.png"),
    }
    table = (tmp_path / "per_class.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(NAMES)
    assert [line.split(" | ")[0] for line in table[2:6]] == [r"| \$a_b^", "| _under", r"| a\|b", r"| \<b>"]
    assert table[-1].startswith("| two lines | ")


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise ValueError("no such font\nand more")

    monkeypatch.setattr("segheads.training.report.plot_curves", broken)
    metrics = SegmentationMetrics(12)
    metrics.update(torch.arange(12)[None], torch.arange(12)[None])
    write_report(tmp_path, metrics.compute(), [], Scenes("val", length=1, size=(32, 32)), [])
    assert caplog.messages == [f"{tmp_path / 'curves.png'} is not drawn: no such font"]
    assert (tmp_path / "per_class.md").is_file()
