"""What a run shows of itself: its start, its log, its curves, its pictures, in its folder and its trackers."""

import csv
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL_RUN, build, untimed

from segheads.data import Scenes
from segheads.progress import Progress
from segheads.training import TrainingConfig, plot_curves, run_training
from segheads.training.setup import Run
from segheads.training.watching import track_picture

EACH = {
    **SMALL_RUN,
    "iterations": 4,
    "evaluate_every": 2,
    "log_every": 1,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "pictures": 2,
    "evaluate_images": 2,
    "loss": "ce + 0.5*dice",
    "tracker": "tensorboard",
}


@pytest.fixture(autouse=True)
def _set_up(own_run, monkeypatch):
    monkeypatch.setattr(Scenes, "__len__", lambda self: 6)


def trained(folder, **options):
    run_training(TrainingConfig.from_flat(**{**EACH, **options}, output=folder), build)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Tags of scalars and pictures with their steps, of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(next(folder.rglob("events.out.tfevents*")).parent), size_guidance={"images": 0})
    found.Reload()
    scalars = {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return scalars, {tag: [event.step for event in found.Images(tag)] for tag in found.Tags()["images"]}


def test_a_run_tells(tmp_path, caplog, capsys):
    records = trained(tmp_path)
    # how it starts
    assert "batches of 4: 1 process(es) x 2 part(s) x 2 image(s); loss ce + 0.5*dice, divided by" in caplog.text
    assert "divided by the update's valid pixels (ce), images (dice)\n" in caplog.text
    # the log
    steps = [record for record in records if "loss" in record]
    for record in steps:
        assert record["loss"] == pytest.approx(record["terms"]["ce"] + 0.5 * record["terms"]["dice"])
        assert 0 <= record["data_wait"] < 1
        assert 0.05 < record["memory_gb"] < 50
    lines = [message for message in caplog.messages if message.startswith("iteration ")]
    assert lines[0].startswith("iteration 1 of 4 (0:0")
    assert f"loss {steps[0]['loss']:.3f}, learning rate" in lines[0]
    assert "images/s" in lines[0]
    assert " %, memory " in lines[0]
    assert sum("waiting for data" in line for line in lines) == 2  # the first and the last
    assert capsys.readouterr().err == ""  # no bar where there is no terminal
    # scores of each class
    evaluations = [record for record in records if "IoU" in record]
    assert [record["iteration"] for record in evaluations] == [2, 4]
    with (tmp_path / "class_iou.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    names = Scenes("val").class_names
    assert head == ["iteration", *names]
    assert [int(row[0]) for row in rows] == [2, 4]
    for row, record in zip(rows, evaluations, strict=True):
        assert [float(x) if x else None for x in row[1:]] == record["IoU"]
        present = [x for x in record["IoU"] if x is not None]
        assert record["mIoU"] == pytest.approx(sum(present) / len(present))
    # trackers
    scalars, pictures = events(tmp_path)
    assert scalars["loss"] == scalars["terms/ce"] == scalars["terms/dice"] == scalars["data_wait"] == [1, 2, 3, 4]
    assert scalars["mIoU"] == [2, 4]
    occurring = [name for name, value in zip(names, evaluations[0]["IoU"], strict=True) if value is not None]
    assert {tag for tag, steps in scalars.items() if tag.startswith("IoU/") and 2 in steps} == {
        f"IoU/{name}" for name in occurring
    }
    assert pictures == {"predictions": [2, 4]}


def test_a_resumed_run_forgets_later_evaluations(tmp_path):
    options = {"tracker": "none", "pictures": 0, "checkpoint_every": 2}
    whole = trained(tmp_path, **options)
    lines = (tmp_path / "class_iou.csv").read_text()
    for file in (tmp_path / "checkpoints" / "00000004").iterdir():
        file.unlink()
    (tmp_path / "checkpoints" / "00000004").rmdir()
    again = trained(tmp_path, **options, resume=True)
    assert (tmp_path / "class_iou.csv").read_text() == lines
    assert untimed(again) == untimed(whole)


def test_pictures_are_of_the_averaged_weights_under_way(tmp_path, monkeypatch):
    """Those that the scores beside them are of."""
    drawn, kept = [], []
    monkeypatch.setattr(
        "segheads.training.run.draw_predictions",
        lambda accelerator, model, *_, iteration, **__: drawn.append((iteration, weight_of(model))) or [],
    )
    evaluate = __import__("segheads.training.run", fromlist=["evaluate"]).evaluate
    monkeypatch.setattr(
        "segheads.training.run.evaluate",
        lambda accelerator, model, *a, **k: kept.append(weight_of(model)) or evaluate(accelerator, model, *a, **k),
    )
    trained(tmp_path, tracker="none", ema=0.5)
    assert [iteration for iteration, _ in drawn] == [2, 4]
    for (_, seen), scored in zip(drawn, kept, strict=True):
        assert torch.equal(seen, scored)


def weight_of(model):
    return next(model.head.parameters()).detach().clone()


def test_evaluations_on_the_way_have_the_runs_protocol(tmp_path, monkeypatch):
    seen = []
    evaluate = __import__("segheads.training.run", fromlist=["evaluate"]).evaluate
    monkeypatch.setattr(
        "segheads.training.run.evaluate",
        lambda *a, protocol, **k: seen.append((a[2].scale, protocol)) or evaluate(*a, protocol=protocol, **k),
    )
    options = {"window": 24, "stride": 16, "small_images": "enlarge", "scales": (0.5, 1.0), "flip": True}
    trained(tmp_path, **options, tracker="none", pictures=0, iterations=3)
    assert len(seen) == 2  # on the way and at the end
    assert seen[0] == seen[1]
    scale, protocol = seen[0]
    assert scale == (32, 32)
    assert {name: getattr(protocol, name) for name in options} == options


class Tracker:
    def __init__(self, name, fails=False):
        self.name, self.fails, self.seen = name, fails, []

    def log_images(self, values, step, **options):
        if self.fails:
            raise RuntimeError("no network")
        self.seen.append((values, step, options))


def test_each_tracker_gets_pictures_as_it_takes_them(caplog):
    trackers = [Tracker("tensorboard"), Tracker("wandb"), Tracker("aim"), Tracker("swanlab", fails=True), object()]
    picture = np.zeros((4, 6, 3), np.uint8)
    track_picture(SimpleNamespace(trackers=trackers), "predictions", picture, 7)
    (values, step, options), wandb, aim = (tracker.seen[0] for tracker in trackers[:3])
    assert (values["predictions"].shape, step, options) == ((1, 4, 6, 3), 7, {"dataformats": "NHWC"})
    assert wandb == ({"predictions": [picture]}, 7, {})
    assert aim[0]["predictions"] is picture
    assert "tracker swanlab took no picture: no network" in caplog.text


def test_curves_show_each_term(tmp_path):
    terms = [{"iteration": n, "loss": 3.0 / n, "terms": {"ce": 2.0 / n, "dice": 1.0 / n}} for n in (1, 2, 3)]
    without = [{"iteration": r["iteration"], "loss": r["loss"]} for r in terms]
    for name, records in (("with", terms), ("without", without)):
        plot_curves(records, tmp_path / f"{name}.png")
    one, other = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    for colour in ((213, 94, 0), (0, 158, 115)):  # lines of their own, in the upper part
        counts = [(picture[:250, :, :3] == colour).all(-1).sum() for picture in (one, other)]
        assert counts[0] > 100
        assert counts[1] == 0


def test_a_bar_on_a_terminal(monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("iteration", 3) as progress:
        for _ in range(3):
            progress.update()
            progress.show({"loss": "0.5"})
    assert "iteration: 100%" in capsys.readouterr().err
    assert caplog.text == ""


def test_a_line_a_minute_elsewhere(monkeypatch, capsys, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with Progress("iteration", 8, initial=2) as progress:
        for _ in range(6):
            now[0] += 25.0
            progress.update()
            if progress.done == 4:
                progress.show({"loss": "0.5"})
    assert caplog.messages == [
        "iteration 4 of 8 (0:01:40 left): loss 0.5",  # the first that is known
        "iteration 7 of 8 (0:00:25 left): loss 0.5",
    ]
    caplog.clear()
    with Progress("image", 2, is_shown=False) as progress:
        now[0] += 1000
        progress.update()
    assert caplog.text == capsys.readouterr().err == ""


def test_records_of_probes_have_no_class_scores(monkeypatch):
    told = []
    accelerator = SimpleNamespace(is_main_process=False, log=lambda values, step: told.append(values))
    run = Run(config=None, accelerator=accelerator, folder=None, training_set=None, validation_set=Scenes("val"))
    run.log(1, {"scores": {"linear": {"mIoU": 0.5}}})
    run.log(2, {"mIoU": 0.5, "IoU": [0.25, None] + [0.5] * 10})
    assert told[0] == {"scores/mIoU/linear": 0.5}
    assert told[1]["IoU/sky"] == 0.25
    assert len(told[1]) == 12  # mIoU, and eleven classes that occur
