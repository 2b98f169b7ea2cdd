"""The recipe that draws what a model looks at, on runs of a few steps."""

import importlib.util
import sys
from pathlib import Path

import pytest
import tyro
from PIL import Image

from segheads import create_model
from segheads.cli.run import parse
from segheads.data import DataConfig, Scenes
from segheads.errors import SegheadsError

RECIPE = Path(__file__).parents[2] / "segheads" / "cli" / "analyse.py"
SCENES = ["--dataset", "scenes", "--scenes-size", "40", "--scale", "60", "40"]
OF_ENCODER = {"attention_encoder", "attention_heads", "attended_distance"}
OF_EMBEDDINGS = {"class_embeddings", "class_similarity"}
OF_SHIFT = {"shift_affinity", "shift_trajectory", "shift_labels"}
OPTIONS = {"senformer": {"pyramid_kwargs": {"out_channels": 16}, "head_kwargs": {"shift": {"num_layers": 1}}}}


def run(recipe, *args: str) -> None:
    recipe.main(tyro.cli(recipe.Config, args=[*args]))


def saved(folder: Path, head: str, num_classes: int = 12, backbone: str = "test_vit") -> str:
    create_model(backbone, head, num_classes, pretrained=False, **OPTIONS.get(head, {})).save_pretrained(folder / head)
    return str(folder / head)


@pytest.mark.parametrize(
    ("head", "backbone", "pictures"),
    [
        ("mask_transformer", "test_vit", OF_ENCODER | OF_EMBEDDINGS | {"attention_head", "attention_class"}),
        ("mean_shift", "test_vit", OF_ENCODER | OF_EMBEDDINGS | OF_SHIFT),
        (
            "senformer",
            "test_resnet",
            OF_EMBEDDINGS
            | {"attention_class", "shift_affinity", "shift_labels"}
            | {f"shift_trajectory_{level}" for level in (1, 2, 3, 4)},
        ),
        ("fcn", "test_convnext", set()),
    ],
)
def test_every_picture_that_fits_and_no_other(recipe, tmp_path, caplog, head, backbone, pictures):
    model = saved(tmp_path, head, backbone=backbone)
    options = ["--distance-images", "2", "--shifts", "2", "--pixel", "39", "3"]
    run(recipe, "--model", model, *SCENES, "--output", str(tmp_path / "out"), *options)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == pictures
    for path in (tmp_path / "out").iterdir():
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 30
    printed = "\n".join(caplog.messages)
    assert f"pictures are in {tmp_path / 'out'}" in printed
    if head == "mean_shift":
        assert "without attention_head: attention of the head needs a MaskTransformerHead in it" in printed
    if backbone == "test_resnet":
        reason = "test_resnet has no layer in which every patch attends to all patches"
        assert f"without attention_encoder, attention_heads, attended_distance: {reason}" in printed


def trained(name: str, tmp_path: Path, *args: str) -> Path:
    """A run of a recipe, of two steps."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    options = ["--backbone", "test_vit", "--depth", "1", "--scenes-size", "40", "--scale", "40", "40"]
    options += ["--crop-size", "32", "--batch-size", "2", "--iterations", "2", "--pictures", "0", "--seed", "7"]
    options += ["--tracker", "none", "--threads", "1", "--output", str(tmp_path / name), *args]
    module.main(parse(module.Config, ["--demo", *options], demo=module.DEMO))
    return tmp_path / name


def test_a_run_knows_its_data_and_two_runs_are_compared(recipe, tmp_path, caplog):
    first, second = trained("meanshifter_ade20k", tmp_path), saved(tmp_path, "linear")
    options = ["--distance-images", "1", "--shifts", "1", "--image", "5", "--class-name", "water"]
    run(recipe, "--model", str(first), "--other", second, "--output", str(tmp_path / "out"), *options)
    pictures = {path.stem for path in (tmp_path / "out").iterdir()}
    assert pictures == OF_ENCODER | OF_EMBEDDINGS | OF_SHIFT | {"disagreement"}
    assert "val_00005, where the model sees " in "\n".join(caplog.messages)
    data = recipe.data_of(recipe.Config(model=str(first)))
    assert data == recipe.Data(DataConfig(dataset="scenes", scenes_size=40), (40, 40), 7)
    changed = recipe.data_of(recipe.Config(model=str(first), dataset="camvid", data_root=Path("here")))
    assert changed == recipe.Data(DataConfig(dataset="camvid", data_root=Path("here")), (40, 40), 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pixel", "40", "0"], "--pixel must be inside the image of 40 x 40 pixels; got 40 0"),
        (["--image", "100"], "--image must be 0 to 99; got 100"),
        (["--class-name", "moon"], "--class-name must be one of sky, cloud, .*; got 'moon'"),
        (["--model", "nowhere"], "'nowhere' is no local folder"),
        (["--dataset", "camvit"], "no data set is called 'camvit'; .*did you mean 'camvid'[?]$"),
        (["--dataset", "camvid", "--data-root", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, monkeypatch, args, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--model", saved(tmp_path, "linear"), *SCENES, "--output", str(tmp_path / "out"), *args]
    with pytest.raises(SegheadsError, match=message):
        run(recipe, *given)


def test_a_model_alone_must_be_told_its_data(recipe, tmp_path):
    model = saved(tmp_path, "linear", num_classes=5)
    with pytest.raises(SegheadsError, match=f"{model} is no run that knows its data; say which with --dataset"):
        run(recipe, "--model", model)
    with pytest.raises(SegheadsError, match=f"{model} has 5 classes, and the data set 12"):
        run(recipe, "--model", model, *SCENES)
    other = saved(tmp_path, "mask_transformer", num_classes=12)
    with pytest.raises(SegheadsError, match=f"{model} has 5 classes, and the data set 12"):
        run(recipe, "--model", other, "--other", model, *SCENES, "--output", str(tmp_path / "out"))


def test_labels_and_picture_keep_together_when_resized(recipe):
    data = Scenes("val", size=(40, 60), length=3)
    sample = recipe.read(data, 1, (120, 80))
    assert sample.picture.shape == (3, 80, 120)
    labels = data.read(1)[1].long()
    assert (sample.truth == labels.repeat_interleave(2, 0).repeat_interleave(2, 1)).all()
    assert (recipe.read(data, 1, (60, 40)).truth == labels).all()
    assert 0 <= sample.picture.min() < sample.picture.max() <= 1
