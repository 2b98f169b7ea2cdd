"""Mean shift's ablation: what it trains, what it reads, and the thesis' numbers beside it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from segheads.ablation import folder_name
from segheads.cli.run import parse
from segheads.errors import OptionError
from segheads.training import changed, flat

RECIPE = Path(__file__).parents[2] / "recipes" / "ablate_mean_shift.py"
TINY = {
    **{"backbone": "test_vit", "depth": None, "patch_size": None, "scale": (32, 32), "crop_size": 32, "threads": 1},
    **{"iterations": 2, "batch_size": 2, "warmup_iterations": 0, "pictures": 0},
}


def trained(rows):
    return {folder_name(row.training, seed) for row in rows for seed in range(row.seeds)}


def test_default_is_the_authors_configuration(recipe):
    config = SimpleNamespace(**flat(recipe.Config()))
    assert (config.optimizer, config.learning_rate, config.min_learning_rate) == ("momentum", 1e-3, 1e-4)
    assert (config.power, config.weight_decay, config.drop_path_rate) == (0.9, 0.0, 0.1)
    assert (config.iterations, config.batch_size, config.crop_size) == (160_000, 8, 512)
    assert (config.window, config.stride, config.loss_reduction) == (512, 480, "all")
    assert config.tables == ("1", "2")


def test_the_thesis_numbers_stand_where_its_rows_are(recipe):
    tables = recipe.tables(recipe.Config())
    paper = {row.name: row.paper.get("mIoU") for row in tables["1"].rows}
    assert len(paper) == 1 + 4 * 3
    known = {name: value for name, value in paper.items() if value is not None}
    assert known == {
        **{"no shift (linear)": 31.44, "L_ms 1, d_ms 192": 31.05},
        **{"L_ms 2, d_ms 192": 19.37, "L_ms 3, d_ms 192": 4.07},
    }
    paper = {(row.axes["L_ms"], row.axes["L'_ms"]): row.paper.get("mIoU") for row in tables["2"].rows}
    assert len(paper) == 4 * 5
    assert {at: value for at, value in paper.items() if value is not None} == {
        (1, 1): 31.05,
        (2, 2): 19.37,
        (3, 3): 4.07,
    }


def test_tables_share_trainings(recipe):
    config = recipe.Config.from_flat(seeds=2, steps=(0.5, 1.0), shift_channels=(192, 96))
    rows = {name: table.rows for name, table in recipe.tables(config).items()}
    assert trained(rows["2"]) < trained(rows["1"])
    assert trained(rows["inference"]) < trained(rows["grid"])
    assert len(rows["grid"]) == 1 + 3 * 4 * 2 * 2 * 2  # kernels, layers, blurring, widths, steps
    # with one layer, blurring or not is the same
    assert len(trained(rows["grid"])) == 2 * (1 + 3 * (1 + 3 * 2) * 2 * 2)
    assert "linear__seed-1" in trained(rows["grid"])
    read = {json.dumps(row.settings) for row in rows["2"]}
    assert read == {"{}", *(json.dumps({"num_layers": n}) for n in range(5))}


def test_variants_are_any_options_of_the_head(recipe):
    options = ["--variants", '{"kernel": "dot"}', '{"kernel": "gaussian", "bandwidth": 2.5}', "--shift-layers", "3"]
    config = parse(recipe.Config, ["--demo", *options], demo=recipe.DEMO)
    dot, gaussian = recipe.tables(config)["variants"].rows[1:]
    assert gaussian.training["model_kwargs"]["head_kwargs"] == {
        **{"num_layers": 3, "shift_channels": 192, "kernel": "gaussian", "bandwidth": 2.5}
    }
    assert gaussian.name == "kernel gaussian, bandwidth 2.5, L_ms 3"
    assert dot.training in [row.training for row in recipe.tables(config)["1"].rows]


@pytest.mark.parametrize("variant", ["cosine", "[1, 2]"])
def test_variants_that_are_no_options_are_named(recipe, variant):
    with pytest.raises(OptionError) as error:
        recipe.tables(recipe.Config.from_flat(variants=(variant,)))
    assert f"variants must be JSON objects; got {variant!r}" in str(error.value)


def test_every_row_can_be_built(recipe):
    small = {"backbone": "test_vit", "pretrained": False, "crop_size": 32, "decoder": "mask_transformer"}
    config = recipe.Config.from_flat(**small, shift_layers=(0, 1, 3), thesis_channels=(32,), shift_channels=(16,))
    from segheads.ablation.run import build_from_fields

    for table in recipe.tables(config).values():
        for row in table.rows:
            own = changed(config, **row.training)
            model = build_from_fields(own, 5)
            for name, value in row.settings.items():
                setattr(model.head, name, value)
            decoder = model.head.decoder if own.model.head == "mean_shift" else model.head
            assert type(decoder).__name__ == "MaskTransformerHead"


def test_demo_makes_the_thesis_tables(recipe, tmp_path, caplog):
    recipe.main(changed(recipe.DEMO, **TINY, output=tmp_path, scenes_size=32, shift_layers=(2,), read_layers=(0, 2)))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        *("linear", "mean_shift__num_layers-2__shift_channels-192"),
        *("table_1.csv", "table_1.md", "table_1.png", "table_2.csv", "table_2.md", "table_2.png"),
    ]
    text = (tmp_path / "table_2.md").read_text()
    assert text.strip() in caplog.text
    assert "Ours: scenes, test_vit from random weights, crop 32, 2 iterations of 2 images, adamw at 0.001." in text
    read, trained_with = [line.split(" | ") for line in text.splitlines() if line.startswith("| dot")]
    results = json.loads((tmp_path / written[1] / "results.json").read_text())
    assert trained_with[:3] == ["| dot, L_ms 2, read with 2", "19.37", f"{100 * results['mIoU']:.2f}"]
    assert read[:2] == ["| dot, L_ms 2, read with 0", "–"]
