"""A few of the kills that recipes/benchmark/kills.py counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "benchmark" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_three_kills_end_right(tmp_path):
    """In a process of its own: one that has started threads must not fork."""
    words = ["--only", "checkpoint", "--kills", "3", "--pairs", "0", "--output", tmp_path / "kills"]
    done = subprocess.run(
        [sys.executable, RECIPE, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "3 of 3 right"
