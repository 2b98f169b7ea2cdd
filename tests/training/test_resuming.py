"""What a run that goes on must find as it was, beside its options."""

import json

import pytest
import torch
from miniatures import own_folder
from runs import SMALL_RUN, build
from torch import nn

from segheads import create_model
from segheads.data import Scenes
from segheads.errors import OptionError
from segheads.training import TrainingConfig, run_training
from segheads.training.resuming import check_contents, check_environment, check_processes, contents_of


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass


@pytest.fixture
def begun(tmp_path):
    """A run of one iteration on a folder with a label map, and how it goes on with other options."""
    root = own_folder(tmp_path / "own", values=(0, 7, 9))
    names = tmp_path / "map.json"
    names.write_text('{"0": "sky", "7": "road", "9": "ignore"}')
    (tmp_path / "weights.json").write_text('{"sky": 1.0, "road": 3.0}')
    options = {
        **{**SMALL_RUN, "dataset": "folder", "class_names": ("sky", "road"), "label_map": names, "data_root": root},
        **{"class_weights": str(tmp_path / "weights.json"), "iterations": 1, "output": tmp_path / "run"},
    }
    run_training(TrainingConfig.from_flat(**options), build)

    def go_on(**more):
        run_training(TrainingConfig.from_flat(**{**options, "resume": True, **more}), build)

    return go_on


def test_contents_of_files_stay(begun, tmp_path, caplog):
    """Spelled otherwise they are the same; one line says what is not."""
    (tmp_path / "map.json").write_text('{"9": null,  "0": 0, "7": 1}')
    (tmp_path / "weights.json").write_text("[1, 3]")
    begun()
    before = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(before)["contents"]["label_map"] == {"0": 0, "7": 1, "9": None}
    (tmp_path / "weights.json").write_text("[1, 2.5]")
    message = r"^class_weights .*weights\.json was changed since the run began: road was 3\.0 and is 2\.5$"
    with pytest.raises(OptionError, match=message):
        begun()
    (tmp_path / "map.json").write_text('{"9": 1, "0": "sky", "7": "road"}')
    with pytest.raises(OptionError, match=r"config\.json is of a run on other data: label_map: 9 was None and is 1$"):
        begun()
    (tmp_path / "map.json").write_text('{"9": null, "0": 0, "7": 1}')
    image = next((tmp_path / "own" / "images" / "train").iterdir())
    label = tmp_path / "own" / "labels" / "train" / f"{image.stem}.png"
    for path in (image, label):
        path.rename(path.with_stem("renamed"))
    with pytest.raises(OptionError, match="other data: training_images: 2 have other names$"):
        begun()
    assert (tmp_path / "run" / "config.json").read_text() == before


def told(tmp_path, **values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_classes_and_the_number_of_images_stay(tmp_path):
    scenes = Scenes("train", length=4)
    now = contents_of(scenes, None)
    folder = told(tmp_path, contents=now)
    check_contents(folder, now)
    renamed = {**now, "class_names": ["heaven", *now["class_names"][1:]]}
    with pytest.raises(OptionError, match="class_names: class 0 was 'sky' and is 'heaven'$"):
        check_contents(folder, renamed)
    with pytest.raises(OptionError, match="training_images were 4 and are 5$"):
        check_contents(folder, contents_of(Scenes("train", length=5), None))
    with pytest.raises(OptionError, match=r"label_map was None and is \{'0': 1\}$"):
        check_contents(folder, {**now, "label_map": {"0": 1}})
    check_contents(told(tmp_path, seed=0), now)  # of an older version
    check_contents(tmp_path / "none", now)


def test_the_arithmetic_of_a_gpu_stays_and_versions_are_told(tmp_path, caplog):
    flags = {"tf32_products": False, "tf32_convolutions": True, "cudnn_benchmark": False, "cudnn_deterministic": False}
    before = {**flags, "torch": "2.14", "timm": "1.0", "segheads": "0.2.0", "gpu": "A100"}
    folder = told(tmp_path, environment=before)
    check_environment(folder, {**before, "gpu": "H100"})
    check_environment(folder, {**before, **dict.fromkeys(flags)})  # on a CPU they mean nothing
    assert caplog.text == ""
    for key, option in (("tf32_products", "tf32"), ("cudnn_benchmark", "cudnn_benchmark")):
        with pytest.raises(OptionError, match=f"another arithmetic: {option}: {key} was False and is True$"):
            check_environment(folder, {**before, key: True})
    check_environment(folder, {**before, "torch": "2.15", "timm": "1.1"})
    (line,) = caplog.messages
    assert line.startswith("torch was 2.14 and is 2.15, timm was 1.0 and is 1.1: the run goes on, and its numbers may")
    check_environment(told(tmp_path, seed=0), before)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(2, 2), None),
        (nn.BatchNorm2d(2).eval(), None),
        (nn.Dropout(0.0), None),
        (nn.BatchNorm2d(2), "batch norms see the images of their process alone"),
        (nn.Dropout(0.1), "each process drops what it draws"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.1)), "process alone and each process drops what it draws"),
        (
            create_model("test_vit", "linear", 2, pretrained=False, backbone_kwargs={"drop_path_rate": 0.1}),
            "each process drops what it draws",
        ),
        (create_model("test_resnet", "linear", 2, pretrained=False, freeze_backbone=True, pyramid=None), None),
    ],
)
def test_the_number_of_processes_stays_where_it_matters(tmp_path, model, why):
    folder = told(tmp_path, environment={"processes": 2})
    check_processes(folder, 2, [model])
    if why is None:
        check_processes(folder, 1, [model])
    else:
        with pytest.raises(OptionError, match=f"it was 2 and is 1, and .*{why}; launch 2$"):
            check_processes(folder, 1, [model])
    if isinstance(model, nn.BatchNorm2d):
        check_processes(folder, 1, [model], is_synced=True)
    check_processes(told(tmp_path, seed=0), 1, [model])


def test_both_are_asked_before_a_run_goes_on(tmp_path, monkeypatch):
    options = {**SMALL_RUN, "iterations": 1, "evaluate_images": 1, "output": tmp_path, "backbone": "test_resnet"}
    monkeypatch.setattr(Scenes, "__len__", lambda self: 4)
    run_training(TrainingConfig.from_flat(**options), build)
    path = tmp_path / "config.json"
    kept = json.loads(path.read_text())
    assert kept["environment"]["processes"] == 1
    kept["environment"] |= {"processes": 2, "torch": "1.0"}
    path.write_text(json.dumps(kept))
    with pytest.raises(OptionError, match="another number of processes: it was 2 and is 1"):
        run_training(TrainingConfig.from_flat(**options, resume=True), build)
    assert torch.__version__ != "1.0"
    assert json.loads(path.read_text()) == kept
