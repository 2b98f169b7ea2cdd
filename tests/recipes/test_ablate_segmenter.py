"""Segmenter's ablation: what it trains, and the published numbers beside it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from segheads.cli.run import parse
from segheads.errors import SegheadsError
from segheads.training import changed, flat

RECIPE = Path(__file__).parents[2] / "recipes" / "ablate_segmenter.py"
TINY = {
    **{"backbone": "test_vit", "depth": None, "patch_size": None, "scale": (32, 32), "crop_size": 32, "threads": 1},
    **{"iterations": 2, "batch_size": 2, "warmup_iterations": 0, "pictures": 0},
}


def test_default_is_the_published_configuration(recipe):
    config = SimpleNamespace(**flat(recipe.Config()))
    assert (config.optimizer, config.learning_rate, config.min_learning_rate) == ("sgd", 1e-3, 1e-5)
    assert (config.power, config.weight_decay, config.drop_path_rate) == (0.9, 0.0, 0.1)
    assert (config.iterations, config.batch_size, config.window, config.stride) == (160_000, 8, 512, 512)
    assert config.tables == ("2", "3", "4", "5")


def test_known_numbers_stand_where_the_models_are_the_papers(recipe):
    def known(config):
        tables = recipe.tables(config)
        return {row.name: row.paper["mIoU"] for table in tables.values() for row in table.rows if row.paper}

    third = {
        "vit_tiny_patch16_384.augreg_in21k_ft_in1k": 39.03,
        "vit_base_patch8_224.augreg_in21k_ft_in1k": 49.5,
    }
    assert known(recipe.Config()) == {**third, "mask_transformer": 45.3}
    tiny = known(recipe.Config.from_flat(backbone="vit_tiny_patch16_384.augreg_in21k_ft_in1k"))
    assert tiny == {**third, "linear": 39.03, "mask_transformer": 38.1, "dropout 0, stochastic depth 0.1": 39.03}
    assert known(recipe.Config.from_flat(patch_size=8)) == {}
    assert known(recipe.DEMO) == {}


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_is_everywhere_in_the_backbone(recipe, rate):
    config = recipe.Config.from_flat(backbone="test_vit", pretrained=False, crop_size=32)
    (row,) = [r for r in recipe.tables(config)["2"].rows if r.axes == {"dropout": rate, "stochastic depth": 0.2}]
    model = recipe.build_model(changed(config, **row.training), 5)
    names = [name for name, m in model.backbone.named_modules() if isinstance(m, nn.Dropout) and m.p == 0.1]
    drops = {name.rpartition(".")[2] for name in names}
    attention = {block.attn.attn_drop.p for block in model.backbone.model.blocks}
    assert attention == {rate}
    assert drops == ({"pos_drop", "attn_drop", "proj_drop", "drop1", "drop2"} if rate else set())


def test_the_mask_transformer_has_the_published_dropout(recipe):
    config = recipe.Config.from_flat(backbone="test_vit", pretrained=False, crop_size=32)
    linear, mask = (changed(config, **row.training) for row in recipe.tables(config)["4"].rows)
    assert type(recipe.build_model(linear, 5).head).__name__ == "LinearHead"
    blocks = recipe.build_model(mask, 5).head.blocks
    assert {module.p for module in blocks.modules() if isinstance(module, nn.Dropout)} >= {0.1}
    assert not any(type(module).__name__ == "DropPath" for module in blocks.modules())


def test_backbones_may_have_patches_of_another_size(recipe):
    config = recipe.Config.from_flat(
        backbones=("vit_tiny_patch16_224/8", "test_vit"), pretrained=False, crop_size=32, depth=1
    )
    smaller, own = (row.training for row in recipe.tables(config)["3"].rows)
    assert smaller == {"backbone": "vit_tiny_patch16_224", "patch_size": 8}
    assert own == {"backbone": "test_vit"}
    model = recipe.build_model(changed(config, **smaller), 5)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5, 32, 32)
    assert model.backbone.strides == [8]


def test_demo_makes_tables_by_size_of_objects_and_of_the_data_set(recipe, tmp_path):
    recipe.main(
        changed(recipe.DEMO, **TINY, output=tmp_path, scenes_size=48, tables=("4", "5"), training_set_sizes=(3, 2000))
    )
    fourth = (tmp_path / "table_4.md").read_text().splitlines()
    assert fourth[4].startswith("| | mIoU, paper | mIoU | small | medium | large | aAcc |")
    for line, name in zip(fourth[6:], ("linear", "mask_transformer"), strict=True):
        cells = line.strip("| ").split(" | ")
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert cells[:3] == [name, "–", f"{100 * results['mIoU']:.2f}"]
        assert cells[5] == "–"  # 48 x 48 pixels have nothing above 96²
        assert 0 <= float(cells[3]) <= 100
        assert 0 <= float(cells[4]) <= 100
    (few, many) = (line.split(" | ")[0] for line in (tmp_path / "table_5.md").read_text().splitlines()[6:])
    assert (few, many) == ("| 3", "| 2,000")
    text = (tmp_path / "train_images-3" / "config.json").read_text()
    assert json.loads(text)["train_images"] == 3


def test_more_images_than_there_are_is_an_error(recipe, tmp_path):
    options = ["--training-set-sizes", "2001", "--tables", "5", "--output", str(tmp_path), "--pictures", "0"]
    with pytest.raises(SegheadsError, match="a subset must have 1 to 2000 images.*got 2001"):
        recipe.main(parse(recipe.Config, ["--demo", *options], demo=recipe.DEMO))
