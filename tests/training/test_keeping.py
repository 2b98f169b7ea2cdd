"""Which weights a run ends with."""

import json
import shutil

import pytest
import torch
from runs import SMALL_RUN, build, untimed

from segheads import SegmentationModel
from segheads.data import Scenes
from segheads.errors import OptionError
from segheads.training import TrainingConfig, changed, run_training
from segheads.training.keeping import Keeper

EACH = {**SMALL_RUN, "iterations": 4, "evaluate_every": 1, "checkpoint_every": 2, "log_every": 1, "evaluate_images": 2}


@pytest.fixture(autouse=True)
def _set_up(own_run, monkeypatch):
    monkeypatch.setattr(Scenes, "__len__", lambda self: 6)  # the last evaluation is of all


def config(folder, **options):
    return TrainingConfig.from_flat(**{**EACH, **options}, output=folder)


def trained(folder, **options):
    """The run's model, results.json and records."""
    run_training(config(folder, **options), build)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = SegmentationModel.from_pretrained(folder / "model").state_dict()
    return weights, json.loads((folder / "results.json").read_text()), records


@pytest.fixture
def scored(monkeypatch):
    """Evaluations on the way and at the end give these mIoU, one after another."""
    given = []

    def give(*values):
        given.extend(values)

    def record(results, names):
        return {"mIoU": given.pop(0)}

    monkeypatch.setattr("segheads.training.run.validation_record", record)
    return give


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in other)


def test_the_best_or_the_last_model_is_kept(tmp_path, scored, caplog):
    scored(0.1, 0.1, 0.1, 0.1)
    plain, _, _ = trained(tmp_path / "plain")
    scored(0.1, 0.4, 0.2, 0.3, 0.35)
    best, results, records = trained(tmp_path / "best", best="mIoU")
    assert "model/ is of iteration 2, the best: mIoU 0.4000" in caplog.text
    assert results["iteration"] == records[-1]["of_iteration"] == 2
    checkpoint = torch.load(tmp_path / "best" / "checkpoints" / "00000002" / "custom_checkpoint_0.pkl")
    assert same(best, checkpoint["best_weights"])
    assert not same(best, plain)
    scored(0.1, 0.4, 0.2, 0.3, 0.35)
    last, results, _ = trained(tmp_path / "last", best="mIoU", keep="last")
    assert results["iteration"] == 4
    assert same(last, plain)  # watching changes nothing


def test_a_run_without_better_scores_ends_as_a_finished_one(tmp_path, scored, caplog):
    scored(0.5, 0.4, float("nan"), 0.5)
    options = {"best": "mIoU", "patience": 2, "iterations": 50}
    _, results, _ = trained(tmp_path, **options)
    assert "the run ends at iteration 3: 2 evaluations without a mIoU above 0.5000, that of iteration 1" in caplog.text
    assert results["iteration"] == 1
    assert (tmp_path / "checkpoints" / "00000003").is_dir()
    scored(0.5)
    trained(tmp_path, **options, resume=True)  # has nothing to do but report
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(line) for line in lines) == 3


def test_the_average_is_timms(tmp_path, monkeypatch, caplog):
    """By hand: 1 - (1 + n)^(-3/4) of it stays, the given share at most; statistics are averaged, too."""
    steps = []
    step = Keeper.step

    def follow(self, iteration, batches):
        found = step(self, iteration, batches)
        steps.append({key: value.clone() for key, value in self.model.state_dict().items()})
        return found

    monkeypatch.setattr(Keeper, "step", follow)
    weights, _, _ = trained(tmp_path, backbone="test_resnet", ema=0.5, evaluate_every=3)
    assert "model/ is of iteration 4, averaged over updates (ema 0.5)" in caplog.text
    for key, value in weights.items():
        expected = steps[0][key]
        for number, now in enumerate(steps[1:], 1):
            share = min(0.5, 1 - (1 + number) ** -0.75)
            expected = share * expected + (1 - share) * now[key] if now[key].is_floating_point() else now[key]
        torch.testing.assert_close(value, expected)
    assert not same(weights, steps[-1])


@pytest.mark.parametrize(
    ("schedule", "backbone"),
    [("poly", "test_resnet"), ("cosine", "test_vit"), ("one_cycle", "test_vit"), ("constant", "test_vit")],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, schedule, backbone):
    """With an average, a best model, patience, drop path, and every schedule."""
    keeping = {"ema": 0.9, "best": "mIoU", "patience": 9}
    warmup = {"warmup_iterations": 0 if schedule == "one_cycle" else 2}
    options = {**keeping, **warmup, "backbone": backbone, "schedule": schedule, "drop_path_rate": 0.2}
    weights, results, records = trained(tmp_path, **options)
    state = torch.load(tmp_path / "checkpoints" / "00000004" / "custom_checkpoint_0.pkl")
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    again, same_results, same_records = trained(tmp_path, **options, resume=True)
    assert same(again, weights)
    assert same_results == results
    assert untimed(same_records) == untimed(records)
    resumed = torch.load(tmp_path / "checkpoints" / "00000004" / "custom_checkpoint_0.pkl")
    assert resumed["best"] == state["best"]
    for part in ("average", "best_weights"):
        assert same(resumed[part], state[part])


def test_a_killed_run_has_as_much_patience_as_another(tmp_path, scored):
    options = {"best": "mIoU", "patience": 3, "iterations": 9, "checkpoint_every": 1}
    scored(0.5, 0.4, 0.3, 0.2, 0.5)
    _, results, records = trained(tmp_path / "whole", **options)
    assert (results["iteration"], records[-1]["iteration"]) == (1, 4)
    scored(0.5, 0.4, 0.3, 0.2, 0.5)
    trained(tmp_path / "killed", **options)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "00000004")
    scored(0.2, 0.5)  # of iteration 4 and of the end
    _, again, same_records = trained(tmp_path / "killed", **options, resume=True)
    assert again == results
    assert [r["iteration"] for r in same_records] == [r["iteration"] for r in records]


def test_what_judges_may_not_change_where_there_is_a_best_one(tmp_path):
    trained(tmp_path, best="mIoU", iterations=2)
    with pytest.raises(OptionError, match="evaluate_images was 2 and is 3"):
        trained(tmp_path, best="mIoU", iterations=2, evaluate_images=3, resume=True)
    with pytest.raises(OptionError, match=r"ema was None and is 0\.5"):
        trained(tmp_path, best="mIoU", iterations=2, ema=0.5, resume=True)


def test_the_model_is_there_when_the_report_fails(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise ValueError("no picture")

    with monkeypatch.context() as patch:
        patch.setattr("segheads.training.watching.predict", fail)
        run_training(config(tmp_path / "predict", iterations=1, pictures=1), build)
    assert f"{tmp_path / 'predict' / 'predictions.png'} is not drawn: no picture" in caplog.messages
    assert (tmp_path / "predict" / "results.json").is_file()
    monkeypatch.setattr("segheads.training.run.write_report", fail)
    with pytest.raises(ValueError, match="no picture"):
        run_training(config(tmp_path / "report", iterations=1), build)
    for name in ("predict", "report"):
        SegmentationModel.from_pretrained(tmp_path / name / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best": "miou"}, "^best 'miou' is no score of the evaluations; known are .*mIoU"),
        ({"best": "loss"}, "^best 'loss' is no score"),
        ({"best": ""}, "^best '' is no score"),
        ({"keep": "best"}, "^keep best needs a score to judge by, got best None"),
        ({"ema": 1.0}, r"^ema must be above 0 and below 1; got 1\.0"),
        ({"ema": 0.0}, r"^ema must be above 0 and below 1; got 0\.0"),
        ({"ema": 9998.0}, r"^ema must be above 0 and below 1; got 9998\.0"),
        ({"patience": 0}, "^patience must be 1 or more; got 0"),
        ({"patience": 3}, "^patience 3 needs a score and evaluations on the way, got best None"),
        ({"patience": 3, "best": "mIoU", "evaluate_every": 0}, "got best mIoU and evaluate_every 0"),
    ],
)
def test_mistakes_leave_no_folder(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        run_training(changed(config(tmp_path / "run"), **options), build)
    assert not (tmp_path / "run").exists()
