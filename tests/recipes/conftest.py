"""Recipes as modules: a test file names its own in RECIPE."""

import importlib.util
import sys

import pytest


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
def _set_up(own_run):
    pass
