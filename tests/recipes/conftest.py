"""Recipes as modules: a test file names its own in RECIPE."""

import importlib.util
import sys

import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(scope="module")
def recipe(request):
    """The module of the recipe at the test file's RECIPE."""
    path = request.module.RECIPE
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _progress_is_heard(caplog):
    caplog.set_level("INFO", "segheads")


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
