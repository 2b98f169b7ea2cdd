"""The ablation: what it trains, what it reads from one model, and what it keeps."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from segheads.ablation import folder_name, markdown
from segheads.errors import SegheadsError
from segheads.training import changed, flat
from segheads.training.config import as_launched

RECIPE = Path(__file__).parents[2] / "recipes" / "ablate_senformer.py"


def small(recipe, folder, **changes):
    sizes = {"scenes_size": 32, "scale": (32, 32), "crop_size": 32, "iterations": 2, "batch_size": 2, "width": 8}
    return changed(recipe.DEMO, **sizes, warmup_iterations=0, pictures=1, threads=1, output=folder, **changes)


def test_default_is_the_protocol(recipe):
    config = SimpleNamespace(**flat(recipe.Config()))
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adamw", 1e-4, 1e-4)
    assert (config.backbone_lr_scale, config.max_grad_norm, config.power) == (0.1, 3.0, 1.0)
    assert (config.warmup_iterations, config.batch_size, config.crop_size, config.iterations) == (
        1500,
        16,
        512,
        160_000,
    )
    assert (config.width, config.auxiliary_weight, config.min_learning_rate) == (512, 0.4, 0.0)
    assert config.tables == ("1", "2", "3", "4", "10", "11", "12", "13")


def test_every_training_has_a_folder_of_its_own(recipe):
    trainings = {
        json.dumps([row.training, seed]): (row.training, seed)
        for table in recipe.tables(recipe.Config()).values()
        for row in table.rows
        for seed in range(row.seeds)
    }
    folders = [folder_name(*training) for training in trainings.values()]
    assert len(set(folders)) == len(folders) > 15
    assert all("/" not in folder and " " not in folder for folder in folders)


def test_rows_are_the_papers(recipe):
    names = {key: [row.name for row in table.rows] for key, table in recipe.tables(recipe.Config()).items()}
    assert names["3"] == ["1", "3", "6", "9"]
    assert names["12"] == ["1", "2"]
    assert "one block" in names["2"]
    assert "none, pre-norm" in names["13"]


def test_papers_rows_start_as_published(recipe):
    tables = recipe.tables(recipe.Config())
    starts = {row.name: row.training["model_kwargs"]["head_kwargs"]["init"] for row in tables["4"].rows[:2]}
    assert starts == {"UPerNet, fused": "published", "SenUPer, self-ensemble": "published"}
    config = recipe.Config.from_flat(backbone="test_resnet", pretrained=False, width=16)
    assert recipe.build_model(config, 5).plan.auxiliary_kwargs["init"] == "published"


def test_every_row_can_be_built(recipe):
    config = recipe.Config.from_flat(backbone="test_resnet", pretrained=False, width=16, crop_size=32)
    models = {}
    for table in recipe.tables(config).values():
        for row in table.rows:
            name = folder_name(row.training)
            if name not in models:
                models[name] = recipe.build_model(changed(config, **row.training), 5)
            for key, value in row.settings.items():
                setattr(models[name].head, key, value)
                assert getattr(models[name].head, key) == value
    assert len(models) > 15


def test_tables_are_written_from_one_training_and_kept(recipe, tmp_path, caplog, monkeypatch):
    config = small(recipe, tmp_path / "runs", tables=("1",))
    recipe.main(config)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "senformer",
        "table_1.csv",
        "table_1.md",
        "table_1.png",
    ]
    table = (config.output / "table_1.md").read_text()
    assert table.strip() in caplog.text
    rows = [line for line in table.splitlines() if line.startswith("| P")]
    assert [row.split("|")[1].strip() for row in rows] == [
        *("P2", "P3", "P4", "P5", "P4 + P5", "P3 + P4 + P5", "P2 + P3 + P4 + P5"),
    ]
    results = json.loads((config.output / "senformer" / "results.json").read_text())
    assert float(rows[-1].split("|")[3]) == pytest.approx(100 * results["mIoU"], abs=0.006)
    assert len({row.split("|")[3] for row in rows}) > 1  # learners differ

    monkeypatch.setattr("segheads.ablation.cell.run_training", None)  # nothing is trained or evaluated again
    monkeypatch.setattr("segheads.ablation.cell.evaluate", None)
    recipe.main(config)
    assert (config.output / "table_1.md").read_text() == table


def test_another_budget_is_refused(recipe, tmp_path):
    config = small(recipe, tmp_path, tables=("1",))
    own = changed(config, output=tmp_path / "senformer", resume=True)
    own.output.mkdir(parents=True)
    (own.output / "config.json").write_text(json.dumps(as_launched(own).as_json()))
    with pytest.raises(SegheadsError, match="iterations was 2 and is 3$"):
        recipe.main(changed(config, iterations=3))


def test_unknown_tables_are_named(recipe, tmp_path):
    with pytest.raises(SegheadsError, match="^tables 5 9 must be some of heads start 1 2 3 4 10 11 12 13"):
        recipe.main(small(recipe, tmp_path, tables=("5", "1", "9")))


def test_variance_is_of_one_model(recipe):
    table = recipe.tables(recipe.Config())["11"]
    assert [row.seeds for row in table.rows] == [1] * 5
    assert all(row.evaluation == {"class_variance": True} for row in table.rows)
    text = markdown(table, [[{"mIoU": 40.0, "class_variance": 0.5 + i}] for i in range(5)])
    assert "| ensemble | – | 0.500 | 40.00 |" in text


def test_the_papers_numbers_stand_beside_ours(recipe):
    text = markdown(recipe.tables(recipe.Config())["2"], [[None]] * 5)
    assert "| | mIoU, paper | mIoU | aAcc | mAcc | parameters, M, paper | parameters, M |" in text
    assert "| repeated block | 44.38 | not yet | – | – | 55 | – | 179 | – |" in text
    assert "| separate blocks | 44.6 | not yet | – | – | 144 | – | 179 | – |" in text
