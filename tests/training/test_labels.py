"""A run looks at its labels before the first step."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from miniatures import draw_labels, own_folder
from runs import SMALL_RUN, build

from segheads import SegmentationModel
from segheads.cli.run import parse
from segheads.data import FolderDataset, Scenes
from segheads.data.findings import Finding
from segheads.errors import DataError, OptionError
from segheads.training import TrainingConfig, changed, run_training
from segheads.training import labels as labels_module
from segheads.training.labels import look_at_labels, refuse_errors
from segheads.training.setup import open_data

SMALL = {
    **SMALL_RUN,
    "dataset": "folder",
    "scale": (48, 40),
    "window": 32,
    "stride": 8,
    "checkpoint_every": 1,
    "num_classes": 2,
}


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def folder(tmp_path):
    """Two images a split, all different."""
    root = own_folder(tmp_path / "own", values=(0, 0, 1, 255))
    for split in ("train", "val"):
        for index, path in enumerate(sorted((root / "images" / split).iterdir())):
            Scenes(split, size=(40, 48), length=2).read(index)[0].save(path)
    return root


def config(root, **options):
    return TrainingConfig.from_flat(**{**SMALL, "data_root": root, "output": root.parent / "run", **options})


def spoil(root, split="val", value=38):
    path = sorted((root / "labels" / split).iterdir())[-1]
    draw_labels(path, [0, 1, value])
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_file_is_found_before_the_first_step(folder, split):
    path = spoil(folder, split)
    with pytest.raises(DataError, match=f"^{split}: label {path} holds the value 38") as stop:
        run_training(config(folder), build)
    assert "\n" not in str(stop.value)
    assert not (folder.parent / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "nope"}, "name must be one of timm's"),
        ({"head": "liner"}, "no head is called 'liner'"),
        ({"optimizer": "nope"}, "optimizer must be one of timm.s"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more; got -1"),
        ({"crop_size": 0}, "crop_size must be 1 or more; got 0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be 0 or more and below 1; got 2"),
        ({"iterations": 0}, "iterations must be 1 or more; got 0"),
        ({"workers": -1}, "workers must be 0 or more; got -1"),
        ({"class_weights": "nope"}, "class_weights must be balanced, effective or the path"),
        ({"class_weights": (1.0, 2.0, 3.0)}, "weight must have one value for each of 2 classes"),
        ({"pictures": -1}, "pictures must be 0 or more; got -1"),
        ({"seed": -1}, "seed must be 0 to 4294967295; got -1"),
        ({"evaluate_images": 0}, "evaluate_images must be 1 or more; got 0"),
        ({"drop_path_rate": 2.0}, "drop_path_rate must be 0 or more and below 1; got 2"),
    ],
)
def test_options_are_refused_before_labels_are_read(folder, monkeypatch, options, message):
    monkeypatch.setattr(labels_module, "scan_splits", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(OptionError, match=message):
        run_training(config(folder, **options), build)
    assert not (folder.parent / "run").exists()


def test_all_errors_are_in_one_message(folder):
    first, second = spoil(folder, "train"), spoil(folder, "val")
    next((folder / "images" / "val").glob("c*")).write_bytes(b"")
    with pytest.raises(DataError) as stop:
        run_training(config(folder), build)
    lines = str(stop.value).splitlines()
    assert len(lines) == 3
    assert str(first) in lines[0]
    assert "cannot be read as an image" in lines[1]
    assert str(second) in lines[2]


def test_masks_of_0_and_255_are_refused(folder):
    for path in folder.rglob("labels/*/*"):
        draw_labels(path, [0, 255])
    with pytest.raises(DataError, match="0 and 255 alone.*--label-values 0 255"):
        run_training(config(folder), build)


def test_warnings_are_said_and_the_run_goes_on(folder, caplog):
    shutil.copyfile(*(sorted((folder / "images" / split).iterdir())[0] for split in ("train", "val")))
    run_training(config(folder), build)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith("warning: 1 image in two splits, pixel by pixel: ")


def test_without_a_scan_nothing_is_read(folder, monkeypatch):
    spoil(folder, "val")
    monkeypatch.setattr(labels_module, "scan_splits", None)
    assert look(config(folder, scan=False)) is None


def look(run):
    accelerator = Accelerator(cpu=True)
    return look_at_labels(accelerator, run, *open_data(accelerator, run)).class_weights


def test_scenes_are_not_scanned_unless_weights_are_asked_for(tmp_path, monkeypatch):
    run = config(tmp_path, dataset="scenes", num_classes=None, scenes_size=32, train_images=4)
    with monkeypatch.context() as patch:
        patch.setattr(Scenes, "read", None)
        assert look(run) is None
    assert len(look(changed(run, class_weights="balanced"))) == 12


def test_a_finding_without_an_error_does_not_stop(caplog):
    refuse_errors([Finding("warning", "absent", "train: 'sky' never occurs")])
    assert caplog.messages == ["warning: train: 'sky' never occurs"]


def test_a_second_look_reads_nothing(folder, monkeypatch):
    look(config(folder))
    monkeypatch.setattr(FolderDataset, "read", None)
    look(config(folder))


@pytest.mark.parametrize(("rule", "weights"), [("balanced", [0.75, 1.5]), ((1.0, 3.0), [1.0, 3.0]), (None, None)])
def test_weights_reach_the_loss_and_the_saved_model(folder, rule, weights):
    run = config(folder, class_weights=rule)
    losses = []

    def built(config, num_classes):
        model = build(config, num_classes)
        losses.append(model.criterion.weight)
        return model

    run_training(run, built)
    saved = SegmentationModel.from_pretrained(run.output / "model")
    kept = json.loads((run.output / "config.json").read_text())
    assert kept["class_weights"] == (list(rule) if isinstance(rule, tuple) else rule)
    if weights is None:
        assert losses == [None]
        assert saved.criterion.weight is None
        assert not (run.output / "class_weights.json").exists()
        return
    for weight in (*losses, saved.criterion.weight):
        torch.testing.assert_close(weight, torch.tensor(weights))
    assert json.loads((run.output / "class_weights.json").read_text()) == {
        "class 0": weights[0],
        "class 1": weights[1],
    }
    # the file is what another run takes
    assert look(changed(run, class_weights=str(run.output / "class_weights.json"))) == tuple(weights)


def test_a_run_that_goes_on_keeps_its_weights(folder):
    run = config(folder, class_weights="balanced", iterations=1)
    run_training(run, build)
    draw_labels(sorted((folder / "labels" / "train").iterdir())[0], [0, 1])
    assert look(run) != (0.75, 1.5)
    assert look(changed(run, resume=True)) == (0.75, 1.5)


def test_a_run_of_an_older_version_goes_on(folder):
    run = config(folder, scan=False)
    run_training(run, build)
    path = run.output / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: x for name, x in values.items() if name not in ("scan", "class_weights")}))
    run_training(changed(run, resume=True, scan=True), build)
    with pytest.raises(OptionError, match="class_weights was None and is 'balanced'"):
        run_training(changed(run, resume=True, class_weights="balanced"), build)


def test_weights_that_are_not_there(folder):
    with pytest.raises(OptionError, match="class_weights must be balanced, effective or the path"):
        run_training(config(folder, class_weights="nonsense"), build)
    with pytest.raises(OptionError, match="'balanced' must become numbers first; Run.model_config"):
        config(folder, class_weights="balanced").model_options()
    with pytest.raises(OptionError, match="weight must have one value for each of 2 classes"):
        run_training(config(folder, class_weights=(1.0, 2.0, 3.0)), build)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--class-weights", "balanced"], "balanced"),
        (["--class-weights", "some/file.json"], "some/file.json"),
        (["--class-weights", "1", "2.5"], (1.0, 2.5)),
    ],
)
def test_weights_on_the_command_line(folder, words, expected):
    assert parse(TrainingConfig, ["--demo", *words], demo=config(folder, demo=True)).model.class_weights == expected


def test_no_scan_on_the_command_line(folder):
    assert not parse(TrainingConfig, ["--demo", "--no-scan"], demo=config(folder, demo=True)).scan


def test_every_process_raises_what_the_first_found(folder, monkeypatch):
    """The others wait for the first, and have its error or weights."""
    spoil(folder, "val")
    sent = []
    monkeypatch.setattr("segheads.training.machine.broadcast_object_list", lambda found: sent.append(found[0]))
    with pytest.raises(DataError, match="holds the value 38"):
        look(config(folder))
    assert isinstance(sent[0], DataError)

    def received(found):
        found[0] = sent[0]

    monkeypatch.setattr("segheads.training.machine.broadcast_object_list", received)
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    monkeypatch.setattr(labels_module, "_look", None)
    with pytest.raises(DataError, match="holds the value 38"):
        look(config(folder))
