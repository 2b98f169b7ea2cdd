"""A finished run that goes on."""

import json
import shutil

import pytest
import torch
from runs import SMALL_RUN, build

from segheads import SegmentationModel
from segheads.cli.runs import find_runs
from segheads.data import Scenes
from segheads.errors import OptionError, RunError
from segheads.probing import ProbeConfig
from segheads.training import TrainingConfig, run_training

SMALL = {
    **SMALL_RUN,
    "iterations": 2,
    "log_every": 1,
    "checkpoint_every": 1,
    "evaluate_images": 2,
    "evaluate_every": 1,
    "backbone": "test_resnet",
    "best": "mIoU",
    "ema": 0.5,
    "schedule": "constant",
    "warmup_iterations": 0,
}


@pytest.fixture(autouse=True)
def _set_up(own_run, monkeypatch):
    monkeypatch.setattr(Scenes, "__len__", lambda self: 6)


def trained(folder, **options):
    """The run's model, results.json, losses and rates."""
    run_training(TrainingConfig.from_flat(**{**SMALL, **options}, output=folder), build)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        SegmentationModel.from_pretrained(folder / "model").state_dict(),
        json.loads((folder / "results.json").read_text()),
        [(r["iteration"], r["loss"], r["learning_rate"]) for r in records if "loss" in r],
    )


def kept(folder):
    """What the last checkpoint knows of the best model."""
    return torch.load(max((folder / "checkpoints").iterdir()) / "custom_checkpoint_0.pkl")["best"]


def test_a_run_of_constant_rate_ends_as_one_made_at_once(tmp_path):
    """Weights, results, log and which model was the best: the evaluation at the first end counts, too."""
    at_once = trained(tmp_path / "at_once", iterations=5)
    trained(tmp_path / "longer")
    longer = trained(tmp_path / "longer", extend=5)
    for one, other in zip(at_once[0].values(), longer[0].values(), strict=True):
        assert torch.equal(one, other)
    assert longer[1:] == at_once[1:]
    assert kept(tmp_path / "longer") == kept(tmp_path / "at_once")
    stored = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert (stored["iterations"], stored["extend"]) == (5, 5)


def test_the_evaluation_at_the_first_end_is_judged(tmp_path, monkeypatch):
    scores = [0.1, 0.9, 0.9, 0.9, 0.3, 0.2, 0.5]  # at 1, at the end of 2 and of all images; again; at 3 and 4

    def record(results, names):
        return {"mIoU": scores.pop(0)}

    monkeypatch.setattr("segheads.training.run.validation_record", record)
    trained(tmp_path)
    assert trained(tmp_path, extend=4)[1]["iteration"] == 2
    assert kept(tmp_path) == {"score": 0.9, "iteration": 2, "waited": 1}


PLAIN = {"schedule": "poly", "best": None, "ema": None, "evaluate_every": 0}


def test_the_rate_is_that_of_the_new_length_and_a_killed_extension_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", "segheads")
    trained(tmp_path / "run", **PLAIN)
    _, _, found = trained(tmp_path / "run", **PLAIN, extend=5)
    said = "the run of 2 iterations goes on to 5: the learning rate, 0.0005 at its end, goes on from 0.0006 as poly"
    assert said in caplog.text
    assert [rate for _, _, rate in found] == pytest.approx([1e-3, 5e-4, 6e-4, 4e-4, 2e-4])
    for name in ("00000004", "00000005"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps({"iteration": n, "loss": x, "learning_rate": rate}) + "\n" for n, x, rate in found[:4])
    )
    (before,) = find_runs(tmp_path)
    assert (before["finished"], before["iteration"], before["iterations"]) == (False, 4, 5)  # results of the first end
    assert trained(tmp_path / "run", **PLAIN, extend=5)[2] == found
    assert find_runs(tmp_path)[0]["finished"]
    with pytest.raises(OptionError, match="iterations was 5 and is 2"):
        trained(tmp_path / "run", **PLAIN, resume=True)


def test_mistakes(tmp_path):
    with pytest.raises(OptionError, match="extend 5 goes on with a finished run, and .*nothing holds none"):
        trained(tmp_path / "nothing", **PLAIN, extend=5)
    assert not (tmp_path / "nothing").exists()
    trained(tmp_path / "run", **PLAIN)
    before = (tmp_path / "run" / "config.json").read_text()
    for length in (2, 1, 0, -3):
        message = f"extend is the number of all iterations, so more than the 2 of .*run; got {length}$"
        message = message if length > 0 else f"extend must be 1 or more; got {length}$"
        with pytest.raises(OptionError, match=message):
            trained(tmp_path / "run", **PLAIN, extend=length)
    with pytest.raises(OptionError, match="seed was 0 and is 1"):
        trained(tmp_path / "run", **PLAIN, extend=5, seed=1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000002")
    with pytest.raises(OptionError, match="finished run, and .*run is at iteration 1 of 2: resume finishes it"):
        trained(tmp_path / "run", **PLAIN, extend=5)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_probes_are_not_extended():
    options = {**SMALL_RUN, "head": "all", "learning_rate": 0.0, "heads": ("linear",), "learning_rates": (1e-3,)}
    with pytest.raises(OptionError, match="^extend is for one model"):
        ProbeConfig.from_flat(**options, output=None, extend=5).check()


def test_what_is_damaged_is_named(tmp_path):
    folder = tmp_path / "run"
    trained(folder, **PLAIN)
    (folder / "checkpoints" / "00000002" / "optimizer.bin").unlink()
    with pytest.raises(OptionError, match="run is at iteration 1 of 2: resume finishes it"):
        trained(folder, **PLAIN, extend=5)
    text = (folder / "config.json").read_text()
    for damaged in (text[:-20], "{}", '{"seed": 0}'):
        (folder / "config.json").write_text(damaged)
        with pytest.raises((RunError, OptionError), match="config.json|holds none"):
            trained(folder, **PLAIN, extend=5)
