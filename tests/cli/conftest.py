"""Commands as modules: a test file names its own in RECIPE."""

import importlib

import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(scope="module")
def recipe(request):
    """The module of the command at the test file's RECIPE."""
    return importlib.import_module(f"segheads.cli.{request.module.RECIPE.stem}")


@pytest.fixture(autouse=True)
def _progress_is_heard(caplog):
    caplog.set_level("INFO", "segheads")


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
