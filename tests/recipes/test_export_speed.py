"""The table of how fast exported graphs are, at a toy size and without an export."""

import sys
from pathlib import Path
from types import SimpleNamespace

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark" / "export_speed.py"
sys.path.insert(0, str(RECIPE.parent))

import measure  # noqa: E402


def test_each_side_has_a_row(recipe, monkeypatch, capsys):
    sizes, shapes = [], []
    monkeypatch.setattr(measure, "SHORTEST", 0.001)
    monkeypatch.setattr(recipe, "export", lambda model, path, size: sizes.append(size) or SimpleNamespace(path=path))
    fake = SimpleNamespace(load=lambda path: lambda images: shapes.append(tuple(images.shape)))
    monkeypatch.setattr(recipe, "FORMATS", {"onnx": fake})
    recipe.main(
        recipe.Config(classes=(3,), size=32, turns=1, threads=1, compile=False, backbone="test_vit", head="linear")
    )
    assert sizes == [None, (32, 32)]
    assert set(shapes) == {(1, 3, 32, 32)}
    rows = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| 3 |")]
    assert rows == ["eager", "onnxruntime", "onnxruntime, fixed size"]
