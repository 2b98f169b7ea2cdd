"""Colours of label maps, sheets of panels, and pictures that are whole or as they were."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from segheads.drawing import LINE_COLOURS, OKABE_ITO, colour_labels, picture_sheet, save_figure, sheet


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_colours_of_labels(dtype):
    labels = np.array([[0, 1], [255, 1]], dtype=dtype)
    coloured = colour_labels(labels, np.array([(1, 2, 3), (4, 5, 6)], dtype=np.uint8))
    assert coloured.dtype == np.uint8
    assert coloured.tolist() == [[[1, 2, 3], [4, 5, 6]], [[255, 255, 255], [4, 5, 6]]]
    floats = colour_labels(np.array([1, -1, 2]), np.array([(0, 0, 0), (0.5, 0.25, 0)]))
    assert floats.tolist() == [[0.5, 0.25, 0], [1, 1, 1], [1, 1, 1]]


def test_colours_of_256_classes_leave_no_room_for_ignored_pixels():
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    assert colour_labels(np.array([0, 255], dtype=np.uint8), palette)[:, 0].tolist() == [0, 255]


def test_lines_have_the_palettes_colours():
    assert set(LINE_COLOURS) == set(OKABE_ITO) - {OKABE_ITO[6]}


def test_sheets_have_the_panels_that_are_asked_for():
    figure, axes = sheet(5, 4, (2, 3), margins=(1, 0.5))
    assert (len(axes), len(figure.axes)) == (5, 5)
    assert figure.get_size_inches().tolist() == [9, 6.5]
    assert axes[4].get_subplotspec().rowspan.start == 1
    figure, axes = sheet(2, 4, (2, 3))
    assert figure.get_size_inches().tolist() == [4, 3]
    _, axes = picture_sheet(5, 4, 0.5)
    assert [axis.get_subplotspec().rowspan.start for axis in axes] == [0, 0, 0, 1, 1]  # 3 and 2


def test_a_picture_that_fails_midway_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_figure(Figure(figsize=(1, 1)), path)
    before = path.read_bytes()

    def fail(figure, temporary, **options):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        save_figure(Figure(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
