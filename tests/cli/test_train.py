"""`segheads train` and `segheads probe` on a folder of one's own, and what `segheads info` then says."""

import json

import pytest
from accelerate.state import AcceleratorState, PartialState
from miniatures import draw_labels, own_folder

from segheads import Predictor
from segheads.cli import main
from segheads.cli.probe import Config, what_next
from segheads.cli.train import tell_classes
from segheads.data import DataConfig, Scenes
from segheads.errors import OptionError
from segheads.pretrained import origin
from segheads.training import changed

SMALL = [
    "--backbone",
    "test_resnet",
    "--no-pretrained",
    "--crop-size",
    "32",
    "--scale",
    "48",
    "40",
    "--batch-size",
    "2",
]
SMALL += ["--iterations", "2", "--workers", "0", "--threads", "1", "--class-names", "lawn", "path"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder without duplicates."""
    root = own_folder(tmp_path_factory.mktemp("data") / "own")
    for split in ("train", "val"):
        for index, path in enumerate(sorted((root / "images" / split).iterdir())):
            Scenes(split, size=(40, 48), length=2).read(index)[0].save(path)
    return root


@pytest.fixture(scope="module")
def trained(data):
    """The folder of a run, and what was printed."""
    head = "mean_shift(num_layers=1) @ fpn(out_channels=16)"
    words = ["train", "--data-root", data, "--output", data.parent / "run", "--head", head, "--pictures", "1"]
    main([*map(str, words), "--evaluate-every", "0", *SMALL])
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return data.parent / "run"


def refused(capsys, *words):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[0]


def test_a_folder_of_ones_own_is_trained_on(trained, data):
    assert {"model", "predictions.png", "per_class.md", "results.json", "curves.png"} <= {
        path.name for path in trained.iterdir()
    }
    plan = Predictor.from_pretrained(trained).model.plan
    assert (plan.head, plan.head_kwargs, plan.pyramid) == ("mean_shift", {"num_layers": 1}, "fpn")
    assert plan.pyramid_kwargs == {"out_channels": 16}
    told = json.loads((trained / "config.json").read_text())
    assert (told["dataset"], told["data_root"], told["optimizer"]) == ("folder", str(data), "adamw")


def test_what_to_do_next_is_told(data, caplog):
    words = ["train", "--data-root", data, "--output", data.parent / "next", "--pictures", "0"]
    main([*map(str, words), *SMALL, "--evaluate-every", "0", "--iterations", "1"])
    last = caplog.messages[-1].splitlines()
    assert last[0].startswith("next: look at ")
    assert f"  segheads predict IMAGES --model {data.parent / 'next'} --output labels --overlay" in last


def test_info_tells_what_a_run_is(trained, data, capsys):
    main(["info", str(trained)])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert told["backbone"].startswith("test_resnet, strides 4, 8, 16, 32, channels 32, 48, 192, 96, 0.373 M")
    assert told["pyramid"].startswith("fpn (out_channels 16), 0.0")
    assert told["head"].startswith("mean_shift (num_layers 1), 0.00")
    assert told["classes"] == "2: lawn, path"
    assert told["protocol"].startswith("scale 48, 40, scales 1.0, flip no")
    assert told["trained"].startswith(f"dataset folder, data_root {data}, iterations 2, batch_size 2, crop_size 32")
    score = json.loads((trained / "results.json").read_text())["mIoU"]
    assert f"mIoU {score:.4f}" in told["scores"]
    main(["info", str(trained / "model"), "--json"])
    values = json.loads(capsys.readouterr().out)
    model = Predictor.from_pretrained(trained).model
    assert values["parameters"] == sum(p.numel() for p in model.parameters())
    assert values["weights"]["bytes"] == (trained / "model" / "model.safetensors").stat().st_size
    assert (values["classes"], values["scores"], values["trained"]) == (["lawn", "path"], None, None)
    assert values["head"]["settings"]["head.shift"]["num_layers"] == 1
    (trained / "results.json").rename(trained / "kept")
    (trained / "results.json").write_text("[]")
    assert "results.json is damaged" in refused(capsys, "info", trained)
    (trained / "kept").replace(trained / "results.json")
    assert "nothing here" in refused(capsys, "info", data / "nothing here")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({}, None),
        (
            {"pretrained": True},
            {
                "words": "weights as of timm's resnet18.a1_in1k",
                "licence": "apache-2.0",
                "hub_id": "timm/resnet18.a1_in1k",
            },
        ),
        ({"pretrained": False}, None),
        ({"init_from": "runs/a"}, {"words": "began from runs/a", "licence": None, "hub_id": None}),
    ],
)
def test_where_the_backbones_weights_are_from(run, expected):
    assert origin("resnet18", run) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [0, 1, 2, 255],
            "hold 0, 1, 2, 255: give --class-names with the 3 names of 0 to 2, or --num-classes 3 (255 is",
        ),
        ([0, 1], "hold 0, 1: give --class-names with the 2 names of 0 and 1, or --num-classes 2; --ignore"),
        ([0, 255], "hold 0, 255: --class-names NAME --label-values 0 255 --loss bce tells 255 from 0"),
    ],
)
def test_classes_that_were_not_named_are_counted(tmp_path, capsys, values, message):
    root = own_folder(tmp_path / "own")
    for path in root.rglob("labels/*/*"):
        draw_labels(path, values)
    for command in ("train", "probe"):
        line = refused(capsys, command, "--data-root", root)
        assert f"{root} needs names of its classes; 2 label files {message}" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-classes", "2"], "a folder of your own needs data_root"),
        (["--data-root", "nowhere"], "there is no folder nowhere/images/train"),
        (["--data-root", "nowhere", "--head", "liner"], "no head is called 'liner'; known: linear, "),
        (["--data-root", "nowhere", "--head", "linear()("], "a head must be NAME, NAME(option=value, ...) or either"),
        (["--dataset", "camvit"], "no data set is called 'camvit'"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *words)
    assert not list(tmp_path.rglob("config.json"))


def test_probes_end_with_the_command_that_trains_the_best_head(data, caplog):
    words = ["probe", "--data-root", data, "--output", data.parent / "probe", "--heads", "linear @ fpn(out_channels=8)"]
    main([*map(str, words), "--learning-rates", "1e-3", *SMALL])
    assert (data.parent / "probe" / "models").is_dir()
    (last,) = caplog.messages[-1].splitlines()[1:]
    assert last.startswith("  segheads train --head 'linear @ fpn(out_channels=8)' --backbone test_resnet ")
    for option in (f"--data-root {data}", "--class-names lawn path", "--scale 48 40", "--no-pretrained"):
        assert f" {option}" in last


def test_that_command_has_the_same_backbone_and_data():
    scores = {"linear": 3.0, "fcn": 4.0, "uper": None}
    rows = [{"head": name, "best": True, "mIoU": score} for name, score in scores.items()]
    config = changed(Config(), dataset="camvid", num_classes=3, ignore_index=(7, 9), reduce_zero_label=True)
    config = changed(config, patch_size=8, depth=4)
    told = what_next(config, rows)
    for option in ("--head fcn --backbone convnext", "--dataset camvid", "--ignore-index 7 9", "--reduce-zero-label"):
        assert f" {option}" in told
    assert " --patch-size 8 " in told
    assert " --depth 4 " in told
    assert "--scale" not in told
    assert what_next(config, rows[2:]) == "no head has a score; give other --learning-rates"


def test_values_are_told_of_a_choice_of_images_too(data):
    with pytest.raises(OptionError, match=r"[1-9]\d* label files hold 0"):
        tell_classes(DataConfig(dataset="folder", data_root=data, train_images=2))
