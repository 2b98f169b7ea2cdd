"""Four images by heart, at a toy size."""

from pathlib import Path

import pytest
import torch
from torch import nn

from segheads import create_model
from segheads.errors import OptionError
from segheads.heads import list_heads
from segheads.plan import parse_head
from segheads.training import changed

RECIPE = Path(__file__).parents[2] / "recipes" / "overfit_heads.py"


def test_the_table(recipe, tmp_path, capsys):
    config = changed(recipe.DEMO, iterations=4, size=(32, 32), scenes_size=32, output=tmp_path / "made" / "table.md")
    recipe.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "made" / "table.md").read_text().splitlines() == lines
    rows = {cells[1].strip("` "): cells for cells in (line.split("|") for line in lines[2:])}
    assert list(rows) != []
    assert rows["linear"][3].strip() == "100"
    linear, fcn = (float(rows[name][2]) for name in ("linear", "fcn"))
    assert rows["fcn"][3].strip() == f"{100 * fcn / linear:.0f}"


def test_every_head_is_tried(recipe):
    assert [parse_head(word).head for word in recipe.Config().heads] == list_heads()


def test_images_and_labels_are_learned(recipe):
    """By heart: the loss falls, and free logits on a fine grid show nearly every pixel."""
    config = changed(recipe.DEMO, iterations=60, size=(32, 48), scenes_size=48, images=2)
    images, labels, num_classes = recipe.read(config)
    assert images.shape == (2, 3, 32, 48)
    assert labels.shape == (2, 32, 48)
    torch.manual_seed(0)
    model = create_model("test_resnet", "linear", num_classes, pretrained=False)
    first = model(images, labels).item()
    assert recipe.learn(model, images, labels, config) < 0.5 * first
    assert recipe.free_logits(model, images, labels) > 0.8


def test_exact_statistics_are_of_the_images(recipe):
    model = create_model("test_resnet", "linear", 3, pretrained=False)
    images = 5 + torch.randn(2, 3, 32, 32)
    exact = recipe.with_exact_statistics(model, images)
    norm = next(m for m in exact.modules() if isinstance(m, nn.BatchNorm2d))
    conv = exact.backbone.model.conv1[0]
    torch.testing.assert_close(norm.running_mean, conv(images).mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(norm.running_mean, next(m for m in model.modules() if type(m) is type(norm)).running_mean)
    assert not exact.training


def test_a_head_that_does_not_exist_is_an_option(recipe):
    with pytest.raises(OptionError, match="no head is called 'nonsense'"):
        recipe.main(changed(recipe.DEMO, heads=("nonsense",)))
