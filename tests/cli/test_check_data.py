"""`segheads check-data`, from words to table, JSON, picture and exit status."""

import json
from pathlib import Path

import pytest
from miniatures import draw_labels, own_folder
from PIL import Image

from segheads.cli import main
from segheads.data import FolderDataset, Scenes


@pytest.fixture
def folder(tmp_path):
    """Two images a split, all different, all sound."""
    root = own_folder(tmp_path / "own", values=(0, 0, 1, 255))
    for split in ("train", "val"):
        for index, path in enumerate(sorted((root / "images" / split).iterdir())):
            Scenes(split, size=(40, 48), length=2).read(index)[0].save(path)
    return root


def check(folder, *words):
    """The exit status."""
    try:
        main(
            ["check-data", "--dataset", "folder", "--data-root", str(folder), "--class-names", "lawn", "pa|th", *words]
        )
    except SystemExit as stop:
        return stop.code
    return 0


def test_sound_data(folder, tmp_path, capsys):
    assert check(folder, "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "| class | train % of pixels | train images | val % of pixels | val images |" in printed
    assert "| lawn | 66.67 | 2 | 66.67 | 2 |" in printed
    assert r"| pa\|th | 33.33 | 2 | 33.33 | 2 |" in printed
    assert (
        "- ignored: 25.00 % of all pixels\n- values in the label files: 0 to 1, 255\n- image sizes: 48x40 (2)"
        in printed
    )
    assert "nothing is wrong, and nothing suspicious" in printed
    saved = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert saved["findings"] == saved["duplicates"] == []
    assert saved["splits"]["val"]["pixels"] == [1920, 960]
    with Image.open(tmp_path / "out" / "scan.png") as picture:
        assert min(picture.size) > 150
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_warnings_end_with_1(folder, capsys):
    path = folder / "labels" / "train" / "a_000000_000019.png"
    draw_labels(path, [255])
    assert check(folder) == 1
    assert f"warning: train: {path} has no pixel of any class\n" in capsys.readouterr().out


def test_errors_end_with_2_and_no_file_is_left_out(folder, capsys):
    bad = folder / "labels" / "val" / "c_000000_000001.png"
    draw_labels(bad, [0, 1, 38])
    draw_labels(folder / "labels" / "train" / "a_000000_000019.png", [255])
    assert check(folder) == 2
    out, error = capsys.readouterr()
    assert f"error: val: label {bad} holds the value 38" in out
    assert out.index("error: val") < out.index("warning: train")
    assert "2, 1 of which cannot be used" in out
    assert "Traceback" not in error


def test_json_is_all_that_is_printed(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path / "file"))  # a warning that must not be in the JSON
    draw_labels(folder / "labels" / "val" / "c_000000_000001.png", [0, 38])
    assert check(folder, "--json") == 2
    values = json.loads(capsys.readouterr().out)
    (finding,) = values["findings"]
    assert (finding["severity"], finding["code"]) == ("error", "values")
    assert [Path(path).name for path in finding["files"]] == ["c_000000_000001.png"]
    assert values["splits"]["train"]["ignored_share"] == 0.25


def test_a_second_check_reads_nothing(folder, monkeypatch):
    check(folder)
    monkeypatch.setattr(FolderDataset, "read", None)
    assert check(folder) == 0


def test_masks_of_0_and_255(folder, capsys):
    for path in folder.rglob("labels/*/*"):
        draw_labels(path, [0, 255])
    assert check(folder) == 2
    assert "--label-values 0 255 reads it as 'pa|th'" in capsys.readouterr().out


def test_scenes_are_checked_when_asked(capsys):
    main(["check-data", "--dataset", "scenes", "--scenes-size", "16", "--train-images", "12", "--json"])
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["samples"] == 12


def test_data_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check-data", "--dataset", "camvid", "--data-root", str(tmp_path)])
    assert stop.value.code == 2
    assert "--data-root PATH says where it is" in capsys.readouterr().err
