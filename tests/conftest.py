"""Fixtures that several test files share: golden vectors and real images."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from parity import SHARED, load_golden

pytest.register_assert_rewrite("testers")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session", autouse=True)
def scans_are_remembered_elsewhere(tmp_path_factory):
    """Not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGHEADS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_run(caplog):
    """What segheads says of its progress is heard, and the next test finds no run set up."""
    caplog.set_level("INFO", "segheads")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def golden():
    return load_golden


@pytest.fixture
def shared_data():
    """The folder of real images beside the checkout; tests that need it skip when it is missing."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.is_dir():
            pytest.skip(f"real images {path} are not there")
        return path

    return find
