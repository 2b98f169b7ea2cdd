"""One process a folder; pairs of processes are in recipes/benchmark/kills.py."""

import json
import os
import shutil

import pytest
from filelock import FileLock
from runs import SMALL_RUN

from segheads.errors import FolderInUseError, RunError
from segheads.locks import LOCK, OWNER, only_process
from segheads.training import TrainingConfig, run_training


def test_the_second_is_told_who_is_the_first(tmp_path):
    with FileLock(tmp_path / LOCK):
        (tmp_path / OWNER).write_text('{"host": "here", "pid": 12, "since": "2026-01-01 00:00:00"}')
        with pytest.raises(FolderInUseError) as refusal, only_process(tmp_path, "training"):
            pass
    said = f"{tmp_path} is in use, a training of process 12 on here, since 2026-01-01 00:00:00; wait for it"
    assert str(refusal.value).startswith(said)
    with only_process(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_owner_that_does_not_say_who_is_another_process(tmp_path, content, monkeypatch):
    monkeypatch.setattr("segheads.locks.PATIENCE", 0.01)
    with FileLock(tmp_path / LOCK):
        (tmp_path / OWNER).write_text(content)
        with pytest.raises(FolderInUseError, match="a run of another process; wait"), only_process(tmp_path):
            pass


def test_the_owner_may_ask_again_and_is_noted(tmp_path):
    with only_process(tmp_path), only_process(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / OWNER).exists()
    with pytest.raises(ValueError, match="broken"), only_process(tmp_path):
        raise ValueError("broken")
    with only_process(tmp_path):
        pass


def test_what_a_killed_owner_left_is_taken(tmp_path, caplog):
    caplog.set_level("INFO", "segheads")
    (tmp_path / OWNER).write_text('{"host": "there", "pid": 12, "since": "then"}')
    with only_process(tmp_path):
        assert "process 12 on there" in caplog.text


def test_a_folder_made_for_the_lock_alone_goes(tmp_path):
    with only_process(tmp_path / "empty"):
        pass
    with only_process(tmp_path / "full"):
        (tmp_path / "full" / "result").touch()
    with only_process(tmp_path / "gone"):
        shutil.rmtree(tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file cannot be locked: .*; give a folder"), only_process(tmp_path / "file"):
        pass


def test_a_second_run_stops(tmp_path, own_run):
    config = TrainingConfig.from_flat(**SMALL_RUN, output=tmp_path)
    with FileLock(tmp_path / LOCK), pytest.raises(FolderInUseError, match="is in use, a run of another process"):
        run_training(config, None)
    assert not (tmp_path / "config.json").exists()
