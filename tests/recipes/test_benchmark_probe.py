"""The probe's measurement: what it compares, and its table."""

import json
from pathlib import Path

import pytest
import torch

from segheads.probing import SharedBackbone

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark" / "probe.py"


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_set_is_of_eight_heads(recipe):
    assert {name: sum(heads.values()) for name, heads in recipe.SETS.items()} == dict.fromkeys(recipe.SETS, 8)
    for heads in recipe.SETS.values():
        assert all(str(recipe.parse_head(head)) == head for head in heads)


def test_both_sides_do_the_same_work(recipe, tmp_path, monkeypatch, capsys):
    passes, updates, compute, probe_step = [], [], SharedBackbone.compute, recipe.probe_step
    monkeypatch.setattr(SharedBackbone, "compute", lambda self, x: (passes.append(1), compute(self, x))[1])
    monkeypatch.setattr(
        recipe,
        "probe_step",
        lambda a, s, probes, *args, **kw: (updates.append(len(probes)), probe_step(a, s, probes, *args, **kw))[1],
    )
    times = iter(range(1000))
    monkeypatch.setattr(recipe.time, "process_time", lambda: next(times))
    monkeypatch.setitem(recipe.SETS, "tiny", {"linear": 2, "fcn(channels=4)": 1})
    output = tmp_path / "folder" / "numbers.json"
    options = {"backbone": "test_vit", "size": 32, "classes": 5, "turns": 2, "heavy": False, "output": output}
    results = recipe.main(recipe.Config(sets=("tiny",), **options))
    # kept once; each turn: the backbone alone, the probe, three runs of one head
    assert len(passes) == 1 + 2 * (1 + 1 + 3)
    # warm, the cost of each kind of head, and in each turn together, apart, and from the cache
    assert updates == [1, 1, 1, 1, 1, *[3, 1, 1, 1, 3] * 2]
    row = results["sets"]["tiny"]
    assert (row["apart"], row["together"], row["cached"]) == (3, 1, 1)
    assert (row["factor"], row["factor_cached"]) == (3, 3)
    assert json.loads(output.read_text())["sets"] == results["sets"]
    printed = capsys.readouterr().out
    assert "| linear (2), fcn(channels=4) | 3.00 | 1.00 | **3.0** | 1.00 | **3.0** |" in printed
    assert "| fcn(channels=4) | 1.000 | 1.00 |" in printed


def test_an_unknown_set(recipe):
    with pytest.raises(SystemExit, match="--sets nothing must be some of linear light transformers mixed"):
        recipe.main(recipe.Config(sets=("nothing",)))
