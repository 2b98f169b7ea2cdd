"""Segmenter's recipe: the published numbers, and a short run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from segheads import SegmentationModel
from segheads.cli.run import parse
from segheads.errors import SegheadsError
from segheads.training import flat

RECIPE = Path(__file__).parents[2] / "recipes" / "segmenter_ade20k.py"
TINY = ["--backbone", "test_vit", "--depth", "1", "--scenes-size", "32", "--scale", "32", "32", "--crop-size", "32"]
TINY += ["--batch-size", "2", "--iterations", "2", "--pictures", "1", "--tracker", "none"]
TINY += ["--threads", "1"]


def test_defaults_are_the_published_ones(recipe):
    config = SimpleNamespace(**flat(recipe.Config()))
    assert (config.backbone.split(".")[0], config.head) == ("vit_tiny_patch16_384", "mask_transformer")
    assert (config.optimizer, config.learning_rate, config.momentum, config.weight_decay) == ("sgd", 1e-3, 0.9, 0.0)
    assert (config.power, config.min_learning_rate, config.warmup_iterations) == (0.9, 1e-5, 0)
    assert (config.iterations, config.batch_size, config.crop_size) == (160_000, 8, 512)
    assert (config.window, config.stride, config.scale) == (512, 512, (2048, 512))
    assert (config.drop_path_rate, config.loss_reduction, config.max_grad_norm) == (0.1, "valid", None)
    assert (config.decoder_layers, config.decoder_drop_rate, config.decoder_drop_path_rate) == (2, 0.1, 0.0)


def test_the_options_reach_the_model(recipe):
    options = ["--decoder-layers", "3", "--decoder-drop-rate", "0.3", "--drop-path-rate", "0"]
    config = parse(recipe.Config, ["--demo", *TINY, *options], demo=recipe.DEMO)
    model = recipe.build_model(config, 7)
    assert model.plan.head_kwargs == {"num_layers": 3, "drop_rate": 0.3, "drop_path_rate": 0.0}
    assert len(model.head.blocks) == 3
    assert len(model.backbone.model.blocks) == 1
    assert model.num_classes == 7


@pytest.mark.parametrize("head", ["mask_transformer", "linear"])
def test_a_short_run(recipe, tmp_path, head):
    config = parse(recipe.Config, ["--demo", *TINY, "--head", head, "--output", str(tmp_path)], demo=recipe.DEMO)
    recipe.main(config)
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["mIoU"] <= 1
    assert json.loads((tmp_path / "config.json").read_text())["head"] == head
    assert SegmentationModel.from_pretrained(tmp_path / "model").plan.head == head


def test_mistakes_are_named(recipe, tmp_path):
    words = ["--demo", *TINY, "--output", str(tmp_path), "--decoder-layers", "0"]
    with pytest.raises(SegheadsError, match="decoder_layers must be 1 or more; got 0"):
        parse(recipe.Config, words, demo=recipe.DEMO)


def test_help_describes_inherited_options(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(recipe.Config, ["--help"], description=recipe.__doc__)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Any of segheads.list_heads(). (default: mask_transformer)" in text
    assert "Transformer blocks of the mask_transformer head. (default: 2)" in text
