"""Signals, full disks, files and processes that go away: one line, and the run goes on to the same bits."""

import errno
import multiprocessing
import os
import signal
from types import SimpleNamespace

import miniatures
import pytest
import torch
from accelerate.state import AcceleratorState
from runs import SMALL_RUN, build

from segheads import SegmentationModel
from segheads.cli.run import run
from segheads.data import Scenes
from segheads.errors import RunEndedError, StoppedError
from segheads.files import write_text
from segheads.stopping import Stop, stopping
from segheads.training import ModelLearner, TrainingConfig, failures, run_training
from segheads.training.failures import said_in_a_line

FOUR = {**SMALL_RUN, "iterations": 4, "checkpoint_every": 100, "log_every": 3, "drop_path_rate": 0.2}


@pytest.fixture(autouse=True)
def _set_up(own_run, monkeypatch):
    monkeypatch.setattr(Scenes, "__len__", lambda self: 4)


@pytest.fixture(autouse=True)
def _hears_interrupts():  # which a shell's background processes ignore
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trained(folder, **options):
    """The weights that a run ends with."""
    run_training(TrainingConfig.from_flat(**{**FOUR, **options}, output=folder), build)
    return SegmentationModel.from_pretrained(folder / "model").state_dict()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)  # of a test of another file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scenes, "__len__", lambda self: 4)
        return trained(tmp_path_factory.mktemp("undisturbed"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def in_step(monkeypatch, number, do):
    """Do something in the middle of a step."""
    step = ModelLearner.step

    def disturbed(self, iteration, batches):
        if iteration == number:
            do()
        return step(self, iteration, batches)

    monkeypatch.setattr(ModelLearner, "step", disturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heeded_after_the_step(tmp_path, monkeypatch, capsys, undisturbed, number):
    output, handler = tmp_path / "run", signal.getsignal(number)
    config = TrainingConfig.from_flat(**FOUR, output=output)
    with monkeypatch.context() as patch:
        in_step(patch, 1, lambda: os.kill(os.getpid(), number))
        patch.setattr("segheads.cli.run.parse", lambda *_, **__: config)
        with pytest.raises(SystemExit) as ended:
            run(lambda config: run_training(config, build), TrainingConfig, args=[])
    assert ended.value.code == 128 + number
    line = capsys.readouterr().err.splitlines()[-1]
    name, folder = signal.Signals(number).name, output / "checkpoints"
    assert line.endswith(
        f"stopped by {name} after iteration 2 of 4; the last checkpoint is of iteration 2, in {folder}; "
        "--resume goes on with the run"
    )
    assert [path.name for path in folder.iterdir()] == ["00000002"]
    assert signal.getsignal(number) is handler
    assert same(trained(output, resume=True), undisturbed)


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    in_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(StoppedError, match="^stopped by SIGINT; no checkpoint yet$"):
        trained(tmp_path)


def test_a_signal_beside_the_loop_ends_at_once(tmp_path, monkeypatch, undisturbed):
    with monkeypatch.context() as patch:
        patch.setattr("segheads.training.run.report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError, match="^stopped by SIGTERM; the last checkpoint is of iteration 4, in"):
            trained(tmp_path)
    assert same(trained(tmp_path, resume=True), undisturbed)


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["log", "checkpoint", "results.json"])
def test_a_full_disk_ends_the_run_resumably(tmp_path, monkeypatch, undisturbed, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_results(path, text):
        full() if path.name == "results.json" else write_text(path, text)

    with monkeypatch.context() as patch:
        if where == "log":
            in_step(patch, 3, lambda: patch.setattr("segheads.training.run_folder.json.dumps", full))
        elif where == "checkpoint":
            in_step(patch, 3, lambda: patch.setattr("torch.save", full))
        else:
            patch.setattr("segheads.files.write_text", full_for_results)
        with pytest.raises(
            RunEndedError, match="No space left on device.*; (the last checkpoint|no checkpoint)"
        ) as stop:
            trained(tmp_path, checkpoint_every=3 if where == "results.json" else 2)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.rglob(".incomplete-*"))
    assert same(trained(tmp_path, resume=True), undisturbed)


@pytest.fixture
def own(tmp_path):
    root = miniatures.own_folder(tmp_path / "own", (0, 1, 2))
    return root, {"dataset": "folder", "data_root": root, "class_names": ("a", "b", "c"), "checkpoint_every": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_away_is_named(tmp_path, own, monkeypatch, workers):
    root, options = own
    gone = sorted((root / "images" / "train").iterdir())
    kept = [path.read_bytes() for path in gone]
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda: [path.unlink() for path in gone])
        with pytest.raises(RunEndedError) as stop:
            trained(tmp_path / "run", **options, iterations=12, workers=workers)
    assert str(gone[0].parent) in str(stop.value)
    assert "the last checkpoint is of iteration " in str(stop.value)
    assert "\n" not in str(stop.value)
    for path, content in zip(gone, kept, strict=True):
        path.write_bytes(content)
    if not workers:
        resumed = trained(tmp_path / "run", **options, iterations=12, resume=True)
        assert same(resumed, trained(tmp_path / "undisturbed", **options, iterations=12))


def test_a_loading_process_that_is_killed_is_told(tmp_path, own, monkeypatch):
    def kill():
        os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)

    in_step(monkeypatch, 2, kill)
    message = r"the process \d+, which loads images, is gone.*; the last checkpoint is of iteration"
    with pytest.raises(RunEndedError, match=message):
        trained(tmp_path / "run", **own[1], iterations=50, workers=1)


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError()])
def test_a_loading_process_whose_connection_breaks_before_pytorch_tells_is_told(error, monkeypatch):
    def tell(*_):
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")

    folder = SimpleNamespace(left=lambda: "there is no checkpoint")
    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(RunEndedError, match="^the process 17, which"), said_in_a_line(folder, 1, lambda: True):
            raise error
    finally:
        signal.signal(signal.SIGALRM, before)
    monkeypatch.setattr(failures, "MOMENT", 0.0)
    with pytest.raises(RunEndedError, match="^reset by peer; there is no"), said_in_a_line(folder, 1, lambda: True):
        raise ConnectionResetError("reset by peer")


def test_a_signal_after_the_last_look_ends_the_run_too():
    stop = Stop(lambda: "a checkpoint is there")
    with pytest.raises(StoppedError, match="^stopped by SIGTERM; a checkpoint is there$"), stop.after_steps():
        stop.handle(signal.SIGTERM, None)


def test_what_failed_after_a_signal_is_said():
    stop = Stop()

    def stopped() -> None:
        with stop.after_steps():
            stop.handle(signal.SIGTERM, None)
            raise RunEndedError("the checkpoint could not be written")

    with pytest.raises(RunEndedError, match="^the checkpoint could not be written"):
        stopped()
