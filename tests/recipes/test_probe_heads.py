"""The probe's recipe: a table of heads, with and without the cache, resumed, and in two processes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from segheads import SegmentationModel
from segheads.cli.run import parse
from segheads.data import EvaluationSamples, RandomScaleCrop, Scenes, TrainingSamples
from segheads.errors import SegheadsError
from segheads.evaluation import evaluate
from segheads.heads import list_heads
from segheads.plan import parse_head
from segheads.probing import SharedBackbone, build_probes, join_head, run_probing
from segheads.probing import run as probing
from segheads.training import RunFolder, changed, setup

RECIPE = Path(__file__).parents[2] / "recipes" / "probe_heads.py"
TINY = ["--backbone", "test_vit", "--scenes-size", "32", "--scale", "32", "32", "--crop-size", "32"]
TINY += ["--heads", "linear", "mask_transformer(num_layers=1)", "--learning-rates", "1e-3", "1e-2"]
TINY += ["--batch-size", "2", "--iterations", "4", "--log-every", "1", "--threads", "1", "--pictures", "0"]
SLUGS = ["linear_at_0.001", "linear_at_0.01"]
SLUGS += ["mask_transformer_num_layers=1_at_0.001", "mask_transformer_num_layers=1_at_0.01"]


def tiny(recipe, *options):
    return parse(recipe.Config, ["--demo", *TINY, *options], demo=recipe.DEMO)


def run(recipe, folder, *options, validation=3, **changes):
    """A run of its own, evaluated on the first few images."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    config = changed(tiny(recipe, "--output", str(folder), *options), **changes)

    def small(accelerator, config):
        training_set, validation_set = open_data(accelerator, config)
        validation_set.length = validation
        return training_set, validation_set

    open_data, setup.open_data = setup.open_data, small
    try:
        return run_probing(config)
    finally:
        setup.open_data = open_data


def weights(folder):
    return {path.parent.name: load_file(path) for path in folder.glob("heads/*/head.safetensors")}


def assert_same_bits(one, two):
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, state in theirs.items():
        assert state.keys() == ours[name].keys()
        assert all(torch.equal(ours[name][key], value) for key, value in state.items()), name


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_table_of_heads(recipe, tmp_path, caplog):
    rows = run(recipe, tmp_path / "all", "--evaluate-every", "2")
    assert [row["folder"] for row in rows] == SLUGS
    printed = "\n".join(caplog.messages)
    assert "4 heads on test_vit, which is frozen: 2000 training and 3 validation images of 12 classes" in printed
    assert (tmp_path / "all" / "heads.md").read_text() in printed
    assert json.loads((tmp_path / "all" / "heads.json").read_text()) == rows
    with (tmp_path / "all" / "heads.csv").open() as file:
        assert [float(line["mIoU"]) for line in csv.DictReader(file)] == [row["mIoU"] for row in rows]
    assert (tmp_path / "all" / "curves.png").stat().st_size > 10_000
    scored = [r for r in records(tmp_path / "all") if "scores" in r]
    assert [r["iteration"] for r in scored] == [2]
    assert len(scored[0]["scores"]) == 4
    best = [row for row in rows if row["best"]]
    models = sorted(path.name for path in (tmp_path / "all" / "models").iterdir())
    assert models == ["linear", "mask_transformer_num_layers=1_"]
    assert len(best) == 2
    model = SegmentationModel.from_pretrained(tmp_path / "all" / "models" / "linear")
    state = weights(tmp_path / "all")[best[0]["folder"]]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.classes.names == Scenes("val").class_names
    measured = json.loads((tmp_path / "all" / "models" / "linear" / "results.json").read_text())
    assert measured["mIoU"] == pytest.approx(best[0]["mIoU"] / 100)
    card = (tmp_path / "all" / "models" / "linear" / "README.md").read_text()
    assert f"| {100 * measured['mIoU']:.2f} |" in card
    assert "the best of learning rates 0.001, 0.01" in card
    assert "It began from random weights." in card
    assert load_file(tmp_path / "all" / "backbone.safetensors").keys() == {
        key.removeprefix("backbone.") for key in model.state_dict() if key.startswith("backbone.")
    }
    # one head alone, in a run of its own
    alone = run(recipe, tmp_path / "one", heads=("mask_transformer(num_layers=1)",), learning_rates=(1e-2,))
    assert {key: alone[0][key] for key in ("mIoU", "aAcc", "mAcc")} == {
        key: rows[3][key] for key in ("mIoU", "aAcc", "mAcc")
    }
    state = weights(tmp_path / "one")[SLUGS[3]]
    assert all(torch.equal(weights(tmp_path / "all")[SLUGS[3]][key], value) for key, value in state.items())


def test_with_the_cache_the_backbone_sees_each_batch_once(recipe, tmp_path, monkeypatch):
    rounds = ["--distinct-batches", "2", "--iterations", "5", "--batch-size", "4", "--gradient-accumulation", "2"]
    cached = [*rounds, "--cache", str(tmp_path / "cache")]
    expected = run(recipe, tmp_path / "off", *rounds)
    seen, compute = [], SharedBackbone.compute
    monkeypatch.setattr(SharedBackbone, "compute", lambda self, x: (seen.append(tuple(x.shape)), compute(self, x))[1])
    # the size of a map, two batches, and three images of the evaluation
    for times in (2, 0):
        assert run(recipe, tmp_path / f"on{times}", *cached) == expected
        assert_same_bits(tmp_path / "off", tmp_path / f"on{times}")
        assert seen.count((2, 3, 32, 32)) <= times + 1  # a loader is a batch ahead of what is kept
        assert len(seen) == 1 + seen.count((2, 3, 32, 32)) + 3
        seen.clear()
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2
    # other heads learn from the same maps; other crops and other weights do not
    run(recipe, tmp_path / "others", *cached, heads=("fcn(channels=4)",))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    run(recipe, tmp_path / "seed", *cached, seed=1)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_what_names_the_folder_of_the_features(recipe, tmp_path):
    config = tiny(recipe, "--cache", str(tmp_path / "cache"))
    samples = TrainingSamples(Scenes(size=(32, 32), length=8), RandomScaleCrop(32, scale=(32, 32)), seed=0)
    create = partial(probing.create_head, config, 12)
    shared, _ = build_probes(create, config.choices()[:1], [1], seed=0)

    def folder(**changes):
        return probing.open_cache(Accelerator(cpu=True), changed(config, **changes), shared, samples).folder

    before = folder()
    for same in (
        {"iterations": 9},
        {"heads": ("fcn",)},
        {"batch_size": 4},
        {"learning_rates": (1.0,)},
        {"cache_gb": 1},
    ):
        assert folder(**same) == before
    others = [{"seed": 1}, {"scale": (48, 48)}, {"crop_size": 48}, {"mixed_precision": "bf16"}, {"blur": 0.5}]
    folders = {before, *(folder(**other) for other in others)}
    shared.backbone.model.patch_embed.proj.bias.data[0] += 1
    folders.add(folder())
    shared.channels_last = True
    folders.add(folder())
    assert len(folders) == 8


def test_a_killed_run_goes_on_with_the_same_bits(recipe, tmp_path, monkeypatch):
    options = ["--checkpoint-every", "2", "--cache", str(tmp_path / "cache"), "--distinct-batches", "3"]
    expected = run(recipe, tmp_path / "whole", *options)
    save, step = RunFolder.save, []

    class Killed(BaseException):
        pass

    def killed(self, accelerator, iteration):
        save(self, accelerator, iteration)
        step.append(iteration)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", killed)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "killed", *options)
    assert step == [2]
    shutil.rmtree(tmp_path / "cache")  # it may go, too
    assert run(recipe, tmp_path / "killed", *options, "--resume", "--cache-gb", "1") == expected
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    with pytest.raises(SegheadsError, match="heads was .* and is "):
        run(recipe, tmp_path / "killed", *options, "--resume", heads=("linear",))
    with pytest.raises(SegheadsError, match="backbone_weights was None and is 'other.pth'"):
        run(recipe, tmp_path / "killed", *options, "--resume", backbone_weights=Path("other.pth"))
    with pytest.raises(SegheadsError, match="holds a run .iteration 4.; resume it"):
        run(recipe, tmp_path / "killed", *options)


def test_two_processes_are_one_run(recipe, tmp_path):
    """Gradients are averaged over processes, and each caches its own part of a batch."""
    options = ["--heads", "linear", "fcn(channels=4)", "--batch-size", "4", "--optimizer", "momentum"]
    options += ["--loss-reduction", "all", "--distinct-batches", "2", "--cache", str(tmp_path / "cache")]
    run(recipe, tmp_path / "1", *options)
    # accelerate launch starts several CPU processes through MPI only
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(RECIPE), "--demo", *TINY, *options, "--output", str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    losses = [[list(r["loss"].values()) for r in records(tmp_path / name)] for name in "12"]
    linear = [[row[:2] for row in rows] for rows in losses]  # an FCN's batch norm sees its own process alone
    torch.testing.assert_close(torch.tensor(linear[0]), torch.tensor(linear[1]), rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 + 4
    one, two = (weights(tmp_path / name)[SLUGS[1]] for name in "12")
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    # the scores are the saved head's, whose batch norms saw the first process' images
    model = join_head(tmp_path / "2", "fcn_channels=4_at_0.01")
    mean, std = (model.data_config[key] for key in ("mean", "std"))
    samples = EvaluationSamples(Scenes("val", size=(32, 32), length=100), mean, std)
    found = evaluate(Accelerator(cpu=True), model, samples)
    rows = json.loads((tmp_path / "2" / "heads.json").read_text())
    (row,) = (row for row in rows if (row["head"], row["learning_rate"]) == ("fcn(channels=4)", 0.01))
    assert row["mIoU"] == pytest.approx(100 * float(found["mIoU"]), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ("liner",)}, "no head is called 'liner'"),
        ({"heads": ("fcn(channels=0)",)}, r"head fcn\(channels=0\): "),
        ({"heads": ()}, "needs one head and one learning rate or more; got 0 and 2"),
        ({"batch_size": 3, "gradient_accumulation": 2}, "^batch_size 3 .* must be a multiple of 2"),
        ({"mixed_precision": "fp16"}, "^mixed_precision fp16 .* use bf16 or no"),
        ({"compile": True}, "^compile is for one model"),
        ({"calibration": True}, "^calibration is for one model"),
        ({"cache": Path("c"), "cache_gb": 1e-9}, r"the features .* may take 1e-09 GB; raise cache_gb"),
        ({"head": "linear"}, "^head and learning_rate are for one model; give heads and learning_rates"),
        ({"learning_rate": 0.1}, "^head and learning_rate are for one model"),
        ({"distinct_batches": 0}, "distinct_batches must be 1 or more; got 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(recipe, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SegheadsError, match=message):
        run(recipe, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "c").exists()


def test_all_means_every_head_that_fits(recipe, caplog):
    config = changed(recipe.DEMO, heads=("all",))
    assert [choice.head for choice in config.choices()] == list_heads()
    choice = parse_head("smp:dpt")
    assert probing._leave_out(config, choice, ValueError("no maps"))
    assert caplog.messages == ["left out: smp:dpt, because no maps"]
    assert not probing._leave_out(changed(config, heads=("all", "smp:dpt")), choice, ValueError("no maps"))
