"""Commands as modules: a test file names its own in RECIPE."""

import importlib

import pytest


@pytest.fixture(scope="module")
def recipe(request):
    """The module of the command at the test file's RECIPE."""
    return importlib.import_module(f"segheads.cli.{request.module.RECIPE.stem}")


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass
