"""The benchmark that starts its own load, at a toy size."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmark"))

import busy
import measure


def test_a_row_for_each_load(monkeypatch, capsys):
    monkeypatch.setattr(measure, "SHORTEST", 0.001)
    at_work = []

    def measured(*args):
        at_work.append(sum(child.is_alive() for child in multiprocessing.active_children()))
        return measure_of(*args)

    measure_of = busy.ratio_of
    monkeypatch.setattr(busy, "ratio_of", measured)
    busy.main(busy.Config(load=(0, 1), turns=1, quick=True))
    assert at_work == [0] * 3 + [1] * 3  # loss, label map, mean shift
    assert not multiprocessing.active_children()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 5 classes", "| 40 tokens"))]
    assert [row.split("|")[2].strip() for row in rows] == ["0", "0", "1", "1"]


def test_both_sides_compute_the_same():
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 32, 32))
    loss, label_map = busy.SIDES["loss"], busy.SIDES["label_map"]
    torch.testing.assert_close(loss["ours"](logits, labels), loss["plain"](logits, labels))
    assert torch.equal(label_map["ours"](logits, (32, 32)), label_map["plain"](logits, (32, 32)))


def test_the_load_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), busy.busy(1):
        raise ZeroDivisionError
    assert not multiprocessing.active_children()
