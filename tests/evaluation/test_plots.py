import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from segheads import SegmentationMetrics
from segheads.data import Scenes
from segheads.evaluation import plot_predictions, plot_reliability, plot_uncertainty
from segheads.functional.uncertainty import Uncertainty
from segheads.metrics.calibration import CalibrationError


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


def test_reliability_diagram(tmp_path, drawn):
    error = CalibrationError()  # two pixels of confidence 0.95, one right, and one of 0.3, right
    confidence, labels = torch.tensor([[0.95, 0.95, 0.3, 0.9]]), torch.tensor([[0, 0, 1, 255]])
    error.update(confidence, torch.tensor([[0, 1, 1, 1]]), labels)
    plot_reliability(error.compute(), tmp_path / "reliability.png")
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
    plot_reliability(CalibrationError(num_bins=num_bins).compute(), tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").is_file()


def test_reliability_diagram_needs_calibration(tmp_path):
    message = r"needs ECE, which evaluate\(\.\.\., metrics=\['calibration'\]\) measures; got none"
    with pytest.raises(ValueError, match=message):
        plot_reliability(SegmentationMetrics(3).compute(), tmp_path / "reliability.png")


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
