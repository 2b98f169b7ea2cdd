"""`segheads runs` on folders as trainings leave them."""

import json

import pytest

from segheads.cli import main
from segheads.cli.runs import find_runs, runs_markdown
from segheads.errors import SavedModelMissingError


def write(folder, records, results=None):
    folder.mkdir(parents=True)
    config = {"backbone": "vit_tiny", "head": "linear", "iterations": 20}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"cut')
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "b", [{"iteration": 20, "mIoU": 0.3}], {"aAcc": 0.75, "mIoU": 0.5, "mAcc": None, "classes": []})
    write(tmp_path / "a" / "deep", [{"iteration": 5, "mIoU": 0.25}, {"iteration": 10, "loss": 1.0}])
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "config.json").write_text("{}")
    return tmp_path


def test_runs_stand_side_by_side(runs, capsys):
    main(["runs", str(runs)])
    printed = capsys.readouterr().out
    assert "| run | backbone | head | iterations | aAcc | mIoU |" in printed
    assert "| a/deep | vit_tiny | linear | 10 of 20 | – | 25.00* |" in printed
    assert "| b | vit_tiny | linear | 20 of 20 | 75.00 | 50.00 |" in printed
    assert printed.strip() in (runs / "runs.md").read_text(encoding="utf-8")
    assert runs_markdown(find_runs(runs)) == printed.strip()


def test_json_is_alone(runs, capsys):
    main(["runs", str(runs), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["finished"], run["scores"]) for run in found] == [
        ("a/deep", False, {"mIoU": 0.25}),
        ("b", True, {"aAcc": 0.75, "mIoU": 0.5}),
    ]
    assert not (runs / "runs.md").exists()


def test_folders_without_runs_are_refused(runs):
    with pytest.raises(SavedModelMissingError, match=r"nothing is no folder; give one that has runs in it$"):
        find_runs(runs / "nothing")
    with pytest.raises(SavedModelMissingError, match=r"no run holds no run: no folder in it has both"):
        find_runs(runs / "no run")
    with pytest.raises(SavedModelMissingError, match=r"config\.json is no folder"):
        find_runs(runs / "b" / "config.json")
