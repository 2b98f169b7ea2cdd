import numpy as np
import pytest
from PIL import Image

from segheads.data import Scenes
from segheads.training import plot_curves, plot_predictions
from segheads.training.report import colour_labels


def read(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


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
