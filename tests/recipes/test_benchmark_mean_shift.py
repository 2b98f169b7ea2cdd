from pathlib import Path

import torch

from segheads.functional import mean_shift

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark_mean_shift.py"


def test_the_plain_formula_is_what_we_compute(recipe):
    x, weight = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(recipe.plain_mean_shift(x, weight), mean_shift(x, weight))


def test_memory_is_counted_above_the_input(recipe):
    config = recipe.Config(tokens=(1600,), channels=8, repeats=1, dtype="float64", threads=1)
    plain = recipe.run(config, "plain", 1600)
    square = 1600**2 * 8 / 1e6
    assert 2.5 * square < plain["megabytes"] < 6 * square
    assert plain["seconds"] > 0


def test_the_table(recipe, capsys, monkeypatch):
    results = {("ours", 4): 10.0, ("ours", 8): 20.0, ("plain", 4): 30.0}
    measured = {key: {"megabytes": value, "seconds": value / 100} for key, value in results.items()}
    monkeypatch.setattr(recipe, "run", lambda config, name, tokens: measured[name, tokens])
    monkeypatch.setattr(recipe, "fits", lambda config, tokens: tokens < 8)
    recipe.main(recipe.Config(tokens=(4, 8), shift_channels=16))
    first, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "512 channels shifted by 16, batch size 1, float32, cpu"
    assert rows[0] == "| 4 | 10 |  | 0.10 | 30 |  | 0.30 | 3.00 | 3.00 |"
    assert rows[1] == "| 8 | 20 | x 2.00 | 0.20 | does not fit |  |  |  |  |"
    assert all(row.count("|") == head.count("|") for row in rows)


def test_matrices_that_do_not_fit(recipe):
    assert recipe.fits(recipe.Config(), 64)
    assert not recipe.fits(recipe.Config(), 10**7)
