"""Fixtures that several test files share: golden vectors and real images."""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hub_server import TOKEN, Hub
from parity import SHARED, load_golden

pytest.register_assert_rewrite("testers")


LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -m and -k, so that what was not asked for is not told
def pytest_collection_modifyitems(config, items):
    """Leave the GPU tests out where there is no GPU; the summary says so in one line.

    `SEGHEADS_GPU_TESTS_ON=cpu` tries the bodies of those that can do without.
    """
    if torch.cuda.is_available() or "SEGHEADS_GPU_TESTS_ON" in os.environ:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)
    if hasattr(config, "workeroutput"):  # one of xdist's processes, each of which collects all
        config.workeroutput["left_out"] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    config = node.config
    config.stash[LEFT_OUT] = max(config.stash.get(LEFT_OUT, 0), getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        words = "GPU test was" if count == 1 else "GPU tests were"
        terminalreporter.write_line(f"{count} {words} left out: PyTorch finds no NVIDIA GPU", yellow=True)


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
def hub(monkeypatch, tmp_path):
    """The server in the hub's place, with a cache of its own and somebody logged in."""
    hub = Hub()
    places = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("huggingface_hub")]
    for module in modules:  # its older versions copy constants into each module
        for name in places.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, places[name])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    yield hub
    hub.close()


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
