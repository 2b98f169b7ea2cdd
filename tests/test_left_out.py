"""Tests that need a GPU are left out where there is none, and never in silence."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(2))
def test_on_a_gpu(number):
    pass

def test_on_the_cpu():
    pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run three tests, two of which need a GPU, with this suite's conftest.py."""
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu: needs a GPU")
    pytester.makepyfile(TESTS)

    def run(has_gpu, *options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)

    return run


def test_the_summary_counts_them(run):
    result = run(False)
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.fnmatch_lines(["2 GPU tests were left out: PyTorch finds no NVIDIA GPU"])
    run(True).assert_outcomes(passed=3)


def test_asking_for_them_alone_is_no_success(run):
    result = run(False, "-m", "gpu")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED != 0
    result.stdout.fnmatch_lines(["2 GPU tests were left out: PyTorch finds no NVIDIA GPU"])
    run(True, "-m", "gpu").assert_outcomes(passed=2, deselected=1)


def test_what_was_not_asked_for_is_not_told(run):
    result = run(False, "-m", "not gpu")
    result.assert_outcomes(passed=1, deselected=2)
    result.stdout.no_fnmatch_line("*left out*")


def test_what_processes_left_out_is_counted_once(request):
    plugins = request.config.pluginmanager.get_plugins()
    ours = next(plugin for plugin in plugins if hasattr(plugin, "LEFT_OUT"))
    config = SimpleNamespace(stash={})
    for _ in range(2):  # each has collected all
        ours.pytest_testnodedown(SimpleNamespace(config=config, workeroutput={"left_out": 5}), None)
    ours.pytest_testnodedown(SimpleNamespace(config=config), "crashed")
    said = []
    ours.pytest_terminal_summary(SimpleNamespace(write_line=lambda line, **_: said.append(line)), config)
    assert said == ["5 GPU tests were left out: PyTorch finds no NVIDIA GPU"]
