"""The table of what is exported where."""

import json
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark" / "export_table.py"


def test_rows_are_ok_or_say_why_and_are_not_made_twice(recipe, tmp_path, monkeypatch, capsys):
    config = recipe.Config(
        heads=("linear", "smp:dpt"), backbones=("convnext",), formats=("torchscript",), output=tmp_path
    )
    monkeypatch.setitem(recipe.ONE_LAYER, "smp:dpt", {"encoder_output_strides": [16] * 4})
    recipe.main(config)
    found = json.loads((tmp_path / "export.json").read_text())
    assert found["torchscript convnext linear"].startswith("fixed: tracing to TorchScript")
    assert found["torchscript convnext smp:dpt"].startswith("no such model: ")
    assert "| linear | torchscript | fixed |" in (tmp_path / "export.md").read_text()
    monkeypatch.setattr(recipe, "attempt", lambda *_: 1 / 0)
    recipe.main(config)  # everything is there
