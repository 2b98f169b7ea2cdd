"""The benchmark that counts subnormal numbers, at a toy size."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmark"))

import subnormal

from segheads.data import DataConfig

TINY = {"backbone": "test_vit", "crop_size": 32, "batch_size": 1, "updates": 1, "turns": 1}


def test_a_row_for_each_head_and_the_flag_is_down_again(tmp_path, capsys):
    data = DataConfig(dataset="scenes", scenes_size=64)
    config = subnormal.Config(heads=("linear", "mean_shift"), data=data, output=tmp_path / "table.md", **TINY)
    threads = torch.get_num_threads()
    subnormal.main(config)
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "a product of subnormal numbers takes" in said
    rows = [line for line in said.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["linear", "mean_shift"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") in said
    assert float(torch.tensor([1e-39]) * 0.5) > 0


def test_it_counts_what_operations_return():
    some, small = torch.tensor([1.0, 1e-20]), torch.tensor([1e-39, 1e-20])
    with subnormal.Subnormal() as seen:
        _ = some * small  # both below 1.2e-38
        _ = some * 0.5
    assert seen.count == 2
