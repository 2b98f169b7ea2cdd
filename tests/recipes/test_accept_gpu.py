"""Everything about a GPU in one command, rehearsed at toy sizes on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmark"))

import accept_gpu
import measure
from accept_gpu import Config


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 0.001)


def config(tmp_path, **options):
    return Config(**{"output": tmp_path, "rehearse": True, "turns": 1, "tests": False, **options})


def test_the_rehearsal(tmp_path, capsys):
    pytest.importorskip("cv2")  # the published input pipeline draws the files
    accept_gpu.main(config(tmp_path))
    kept = json.loads((tmp_path / "report.json").read_text())["rows"]
    names = [row["name"] for row in kept]
    assert names == [name for name, _ in accept_gpu.plan(config(tmp_path))]
    assert not [row for row in kept if row["notes"]]
    compared = [row for row in kept if "seconds" in row]
    assert all({"plain", "ours"} <= row["seconds"].keys() for row in compared)
    assert all("compiled" in row["seconds"] for row in compared if row["name"].startswith(("loss", "mean_shift")))
    assert all("backbone" in row["seconds"] for row in compared if row["name"].startswith("step"))
    printed, table = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert all(f"{name}: " in printed for name in names)
    assert "numbers mean nothing" in table
    assert "| what | type | ours / plain | / compiled | / backbone |" in table
    assert "The quickest step, step/" in table
    assert "hours for 160,000 iterations" in table


def test_every_gpu_test_is_run(tmp_path):
    names = [name for name, _ in accept_gpu.plan(config(tmp_path, tests=True))]
    assert {names[0], names[-1]} == accept_gpu.TESTS.keys()
    run = [accept_gpu.ROOT / path for paths in accept_gpu.TESTS.values() for path in paths]
    assert all(path.exists() for path in run)
    mark = "pytest.mark" + ".gpu"
    files = [path for path in (accept_gpu.ROOT / "tests").rglob("test_*.py") if mark in path.read_text()]
    assert len(files) > 4
    left_out = [path.name for path in files if not any(path.is_relative_to(each) for each in run)]
    assert left_out == ["test_left_out.py"]  # which are about being left out


def test_it_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    only = ("loss/150", "label_map/150", "mean_shift/16")
    accept_gpu.main(config(tmp_path, only=only[:1]))
    before = json.loads((tmp_path / "report.json").read_text())["rows"]
    monkeypatch.setattr(accept_gpu, "write", stop_after(1, accept_gpu.write))
    with pytest.raises(KeyboardInterrupt):
        accept_gpu.main(config(tmp_path, only=only))
    monkeypatch.undo()
    capsys.readouterr()
    accept_gpu.main(config(tmp_path, only=only))
    assert capsys.readouterr().out.count(": known") == 3  # two, and the one before the stop
    after = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert after[: len(before)] == before
    assert len(after) == 4


def stop_after(rows, write):
    def stopping(*args):
        write(*args)
        raise KeyboardInterrupt

    return stopping


def test_what_another_card_gave_or_failed_is_measured_again(tmp_path, monkeypatch):
    asked = config(tmp_path, only=("loss/150",))
    accept_gpu.main(asked)
    assert len(accept_gpu.read(asked)) == 2
    monkeypatch.setattr(accept_gpu, "machine", lambda device: "another card")
    assert not accept_gpu.read(asked)
    monkeypatch.undo()
    monkeypatch.setattr(accept_gpu, "compare", lambda *_: 1 / 0)
    accept_gpu.main(config(tmp_path, only=("loss/19",)))
    assert len(accept_gpu.read(asked)) == 2  # not the failed one
    assert "failed: ZeroDivisionError" in (tmp_path / "report.md").read_text()


def test_no_row_begins_when_time_is_over(tmp_path, capsys):
    accept_gpu.main(config(tmp_path, only=("loss",), minutes=0))
    assert "0 minutes are over; the same command goes on from loss/150/bf16" in capsys.readouterr().out


def test_goals_are_told():
    record = {"seconds": {"ours": [1.0], "plain": [4.0], "compiled": [1.5]}, "extra": {"ours": 1, "plain": 100}}
    goals = [("seconds", 0.2, "plain"), ("seconds", 0.7, "compiled"), ("extra", 0.03, "plain")]
    record["goals"] = [dict(zip(("measure", "limit", "against"), goal, strict=True)) for goal in goals]
    assert accept_gpu._goals(record) == "plain ≤ 0.2: **missed**; compiled ≤ 0.7: reached; memory ≤ 0.03: reached"
    assert accept_gpu._goals(record, rehearses=True) == "plain ≤ 0.2; compiled ≤ 0.7; memory ≤ 0.03"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="finds no GPU; --rehearse does everything at toy sizes"):
        accept_gpu.main(Config(output=tmp_path))


def test_unknown_rows_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no row begins with step/nothing; known: loss/150/bf16, "):
        accept_gpu.main(config(tmp_path, only=("step/nothing",)))
