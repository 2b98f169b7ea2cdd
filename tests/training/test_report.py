import json

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from segheads import SegmentationMetrics
from segheads.data import Scenes
from segheads.functional.uncertainty import Uncertainty
from segheads.metrics.calibration import CalibrationError
from segheads.training import plot_curves, plot_predictions
from segheads.training.report import colour_labels, plot_reliability, plot_uncertainty, scores, write_report


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


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


def test_colours_of_labels():
    coloured = colour_labels(np.array([[0, 1], [255, 1]]), [(1, 2, 3), (4, 5, 6)])
    assert coloured.tolist() == [[[1, 2, 3], [4, 5, 6]], [[255, 255, 255], [4, 5, 6]]]


def test_sheet_holds_the_three_pictures(tmp_path):
    scenes = Scenes("val", length=2)
    rows = []
    for i in range(2):
        image, labels = scenes.read(i)
        rows.append((scenes.name(i), np.array(image), labels.numpy(), np.zeros(labels.shape, dtype=np.int64)))
    plot_predictions(rows, scenes, tmp_path / "sheet.png")
    colours = np.unique(read(tmp_path / "sheet.png").reshape(-1, 3), axis=0).tolist()
    for label in np.unique(rows[0][2]):
        assert list(scenes.palette[label]) in colours
    with pytest.raises(ValueError, match="at least one sample"):
        plot_predictions([], scenes, tmp_path / "sheet.png")


def test_report_without_calibration(tmp_path):
    write_report(tmp_path, measured(calibration=False), [], Scenes("val"), [])
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written) == ["aAcc", "mAcc", "mIoU", "classes"]
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


def test_reliability_diagram(tmp_path, drawn):
    plot_reliability(measured(), tmp_path / "reliability.png")
    upper, lower = drawn[0].axes
    assert upper.get_title() == "ECE 53.33 %"
    bars = upper.containers[0].patches
    assert [bar.get_height() for bar in bars] == [0] * 4 + [1] + [0] * 9 + [0.5]
    assert bars[14].get_x() + bars[14].get_width() == pytest.approx(1)
    heights = [bar.get_height() for bar in lower.containers[0].patches]
    assert heights == pytest.approx([0] * 4 + [100 / 3] + [0] * 9 + [200 / 3])
    (marks,) = upper.collections
    drawn_marks = [segment for segment in marks.get_segments() if len(segment) and np.isfinite(segment).all()]
    np.testing.assert_allclose(drawn_marks, [[[4 / 15, 0.3], [5 / 15, 0.3]], [[14 / 15, 0.95], [1, 0.95]]], rtol=1e-6)


@pytest.mark.parametrize("num_bins", [1, 15])
def test_reliability_diagram_of_nothing(tmp_path, num_bins):
    plot_reliability(CalibrationError(num_bins).compute(), tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").is_file()


def test_reliability_diagram_needs_calibration(tmp_path):
    with pytest.raises(ValueError, match=r"needs ECE, which evaluate\(\.\.\., calibration=True\) measures; got none"):
        plot_reliability(measured(calibration=False), tmp_path / "reliability.png")


def test_sheet_of_uncertainty(tmp_path, drawn):
    scenes, rows = Scenes("val", size=(24, 32), length=2), []
    for i in range(2):
        image, labels = scenes.read(i)
        maps = Uncertainty(*(torch.full((24, 32), value) for value in (0.5 + i, 0.25, 0.0)))
        rows.append((scenes.name(i), np.array(image), labels.numpy(), labels.numpy().astype(np.int64), maps))
    plot_uncertainty(rows, scenes, tmp_path / "sheet.png")
    axes = [axis for axis in drawn[0].axes if axis.images]
    titles = ["truth", "prediction", "entropy", "mutual information", "disagreement"]
    assert [axis.get_title() for axis in axes] == [scenes.name(0), *titles, scenes.name(1), *titles]
    limits = [axis.images[0].get_clim() for axis in axes[3:6] + axes[9:]]
    assert limits == [(0, 1.5), (0, 0.25), (0, 1)] * 2  # one scale for all samples; of nothing but 0 it is any
    assert axes[3].images[0].get_array().min() == 0.5
    assert axes[9].images[0].get_array().min() == 1.5
    bars = [axis for axis in drawn[0].axes if axis.get_xlabel() == "nats"]
    assert len(bars) == 3
    assert len(drawn[0].legends[0].get_texts()) == len({k for row in rows for k in np.unique(row[2])})


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (96, 48)])
def test_sheet_of_one_sample_shows_its_titles_in_one_line(tmp_path, drawn, size):
    scenes = Scenes("val", size=size, length=1)
    image, labels = scenes.read(0)
    maps = Uncertainty(*(torch.ones(size) for _ in range(3)))
    row = (scenes.name(0), np.array(image), labels.numpy(), labels.numpy().astype(np.int64), maps)
    plot_uncertainty([row], scenes, tmp_path / "sheet.png")
    axes = [axis for axis in drawn[0].axes if axis.images]
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    tops = [axis.title.get_window_extent(renderer).y1 for axis in axes]
    assert max(tops) <= drawn[0].bbox.height
    assert max(tops) - min(tops) < 4  # letters that reach below the line


def test_sheet_of_uncertainty_explains_what_does_not_fit(tmp_path):
    scenes = Scenes("val", size=(24, 32), length=1)
    with pytest.raises(ValueError, match="at least one sample; got none"):
        plot_uncertainty([], scenes, tmp_path / "sheet.png")
    image, labels = scenes.read(0)
    maps = Uncertainty(torch.zeros(24, 32), torch.zeros(1, 24, 32), torch.zeros(24, 32))
    row = (scenes.name(0), np.array(image), labels.numpy(), labels.numpy().astype(np.int64), maps)
    message = r"mutual_information of val_00000 must be \(24, 32\) as its labels; got \(1, 24, 32\)"
    with pytest.raises(ValueError, match=message):
        plot_uncertainty([row], scenes, tmp_path / "sheet.png")
