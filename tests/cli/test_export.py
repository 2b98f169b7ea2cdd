"""The command `segheads export`."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from segheads import create_model
from segheads.classes import Classes
from segheads.cli import main as segheads
from segheads.cli.export import MOST_IMAGES, images_of
from segheads.errors import DataMissingError
from segheads.exporting import Deployed
from segheads.inference import InferenceProtocol

RECIPE = Path("export.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run with a tiny model."""
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 2, pretrained=False)
    model.classes, model.protocol = Classes(("cat", "dog")), InferenceProtocol(scale=(64, 48))
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    return folder


def test_a_run_becomes_a_file_that_gives_its_labels(saved, tmp_path, capsys):
    path = tmp_path / "out" / "model.pt"
    segheads(["export", str(saved), "--format", "torchscript", "--output", str(path), "--size", "48", "64"])
    said = capsys.readouterr().out
    assert said.startswith(f"{path} (")
    assert "images of 48 x 64 pixels\n" in said
    assert "labels equal at 100.00 % of the pixels or more" in said
    about = {"classes": "", "protocol": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        graph = torch.jit.load(str(path), _extra_files=about)
    assert json.loads(about["classes"]) == ["cat", "dog"]
    assert json.loads(about["protocol"])["scale"] == [64, 48]
    images = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
    model = Deployed(create_model("test_vit", "linear", 2, pretrained=False).eval())
    with torch.no_grad():
        assert graph(images)[0].shape == model(images)[0].shape


def test_json_for_programs(saved, tmp_path, capsys):
    path = tmp_path / "model.pt"
    options = ["--outputs", "labels", "logits", "--batch-size", "1", "--json"]
    segheads(["export", str(saved), "--format", "torchscript", "--output", str(path), *options])
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(path)
    assert "TorchScript" in found["reason"]
    assert found["labels_equal"] == 1
    assert json.loads(found["metadata"]["outputs"]) == ["labels", "logits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "model.pt"], "a file of format onnx ends in .onnx; got 'model.pt'"),
        (["--output", "model.onnx", "--format", "onxx"], "format must be one of onnx, torch-export, "),
        (["--output", "model.onnx", "--precision", "int8"], "int8 needs calibration"),
        (["--output", "model.onnx", "--calibration", "nowhere"], "--calibration nowhere is not there"),
    ],
)
def test_what_a_user_can_mend_is_one_line(saved, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        segheads(["export", str(saved), *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        segheads(["export", str(tmp_path), "--output", "model.onnx"])
    assert stopped.value.code == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_images_of_folders_are_spread(tmp_path):
    for number in range(MOST_IMAGES + 10):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = images_of((tmp_path,))
    assert len(found) == len(set(found)) == MOST_IMAGES
    assert images_of((tmp_path / "003.png",)) == [tmp_path / "003.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissingError, match="empty holds no image"):
        images_of((tmp_path / "empty",))
