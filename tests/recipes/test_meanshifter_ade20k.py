"""The recipe as its users run it: end to end, killed and resumed, and with everything missing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from runs import untimed
from safetensors.torch import load_file

from segheads import SegmentationModel
from segheads.cli.run import advise, parse
from segheads.errors import DataMissingError, DivergedError, PretrainedWeightsError, SegheadsError
from segheads.training import changed

RECIPE = Path(__file__).parents[2] / "recipes" / "meanshifter_ade20k.py"
TINY = ["--demo", "--backbone", "test_vit", "--depth", "2", "--scenes-size", "32"]
TINY += ["--scale", "32", "32", "--crop-size", "32", "--batch-size", "4", "--drop-path-rate", "0.5"]
TINY += ["--checkpoint-every", "5", "--log-every", "2", "--pictures", "2", "--tracker", "none"]


def tiny(recipe, output, *options):
    return parse(recipe.Config, [*TINY, "--output", str(output), *options], demo=recipe.DEMO)


def run(recipe, output, *options):
    recipe.main(tiny(recipe, output, *options))
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def records(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return untimed(map(json.loads, lines))


def test_end_to_end(recipe, tmp_path, caplog):
    run(recipe, tmp_path, "--iterations", "6", "--tracker", "tensorboard", "--evaluate-every", "3", "--workers", "1")
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "results.json", "per_class.md", "curves.png", "predictions.png"}
    assert "aAcc" in caplog.text
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["mIoU"] <= results["mAcc"] <= 1
    assert len(results["classes"]) == 12
    assert [r["iteration"] for r in records(tmp_path) if "mIoU" in r] == [3, 6]
    assert list((tmp_path / "tensorboard").glob("events*"))
    for picture in ("augment.png", "curves.png", "predictions.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 200
    model = SegmentationModel.from_pretrained(tmp_path / "model")
    assert model.predict(torch.randn(1, 3, 40, 50)).shape == (1, 40, 50)


def test_options_of_the_shift_reach_the_head(recipe, tmp_path):
    options = ["--kernel", "gaussian", "--bandwidth", "2.5", "--spatial-bandwidth", "1.5", "--no-blurring"]
    options += ["--learn-bandwidth", "--learn-step", "--step", "0.5", "--shift-layers", "3", "--shift-channels", "16"]
    shift = recipe.build_model(tiny(recipe, tmp_path, *options), 5).head.shift
    assert (shift.kernel, shift.blurring, shift.num_layers) == ("gaussian", False, 3)
    assert (shift.bandwidth, shift.spatial_bandwidth, shift.step.item()) == pytest.approx((2.5, 1.5, 0.5))
    assert shift.learns_bandwidth
    assert isinstance(shift.step, torch.nn.Parameter)
    assert shift.projection.out_features == 16
    thesis = recipe.build_model(tiny(recipe, tmp_path), 5).head.shift
    assert (thesis.kernel, thesis.blurring, thesis.step, thesis.spatial_bandwidth) == ("dot", True, 1.0, None)


def test_options_of_the_loss_reach_the_model(recipe, tmp_path):
    criterion = recipe.build_model(tiny(recipe, tmp_path, "--loss", "ce", "--label-smoothing", "0.1"), 5).criterion
    assert (criterion.label_smoothing, criterion.reduction) == (0.1, "all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kernel flat", "kernel must be one of dot, gaussian, cosine; got 'flat'"),
        ("--loss cee", "no loss is called 'cee'; known: ce.*did you mean 'ce'"),
        ("--label-smoothing 1", "label_smoothing must be 0 or more and below 1; got 1.0"),
    ],
)
def test_unknown_names_of_parts_are_named(recipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        recipe.build_model(tiny(recipe, tmp_path, *options.split()), 5)


def test_a_killed_run_goes_on_bit_for_bit(recipe, tmp_path):
    run(recipe, tmp_path / "whole", "--iterations", "23")
    killed = tmp_path / "killed"
    command = [sys.executable, str(RECIPE), *TINY, "--iterations", "23", "--output", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and '"iteration": 8,' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "results.json").exists()
    run(recipe, killed, "--iterations", "23", "--resume")
    expected, actual = weights(tmp_path / "whole"), weights(killed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert records(killed) == records(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_workers_and_accumulation_change_no_sample(recipe, tmp_path):
    run(recipe, tmp_path / "one", "--iterations", "3", "--drop-path-rate", "0")
    run(recipe, tmp_path / "two", "--iterations", "3", "--drop-path-rate", "0", "--workers", "2")
    assert all(torch.equal(value, weights(tmp_path / "two")[key]) for key, value in weights(tmp_path / "one").items())
    run(recipe, tmp_path / "halves", "--iterations", "3", "--drop-path-rate", "0", "--gradient-accumulation", "2")
    losses = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("one", "halves")]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "mask_transformer"])
def test_other_heads(recipe, tmp_path, head):
    run(recipe, tmp_path, "--iterations", "1", "--head", head, "--mixed-precision", "bf16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model"]["head"] == head


def test_real_images_of_150_classes(recipe, tmp_path, shared_data):
    config = changed(
        tiny(recipe, tmp_path, "--iterations", "2"),
        dataset="ade20k",
        data_root=shared_data("ade20k_sample"),
        scale=(128, 64),
        window=32,
        stride=24,
    )
    recipe.main(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["classes"]) == 150
    assert sum(c["pixels"] for c in results["classes"]) > 10_000


def test_two_processes_are_one_run(recipe, tmp_path):
    """Sharded batches and evaluation under DDP: the same losses and scores as one process, and no image twice."""
    options = ["--drop-path-rate", "0", "--iterations", "3", "--optimizer", "momentum"]
    run(recipe, tmp_path / "1", *options)
    # accelerate launch starts several CPU processes through MPI only
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(RECIPE), *TINY, *options, "--output", str(tmp_path / "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process" in done.stdout
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "12")
    assert [c["pixels"] for c in one["classes"]] == [c["pixels"] for c in two["classes"]]
    losses = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in "12"]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)


def test_no_data_is_said_before_any_model_is_built(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "create_model", None)
    config = recipe.Config.from_flat(data_root=tmp_path / "nothing", output=tmp_path / "run", tracker="none")
    with pytest.raises(DataMissingError, match="nothing"):
        recipe.main(config)
    assert not (tmp_path / "run").exists()  # or the next try would be told that there is a run already


def test_no_weights_name_the_ways_out(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = changed(recipe.DEMO, output=tmp_path / "a", tracker="none", pretrained=True)
    for weights_path in (None, tmp_path / "no.safetensors"):
        config = changed(config, backbone_weights=weights_path, output=tmp_path / str(weights_path is None))
        with pytest.raises(PretrainedWeightsError) as stop:
            recipe.main(config)
        assert "--backbone-weights PATH takes a local checkpoint, and --no-pretrained" in advise(stop.value, config)


def test_a_run_that_diverges_says_where_and_keeps_its_checkpoint(recipe, tmp_path):
    options = ["--optimizer", "momentum", "--learning-rate", "1e30", "--max-grad-norm", "1e30"]
    options += ["--warmup-iterations", "0", "--iterations", "20", "--checkpoint-every", "1"]
    with pytest.raises(DivergedError, match=r"not finite.* iteration \d+.*\(iteration \d+ in .*checkpoints\)"):
        run(recipe, tmp_path, *options)
    assert not (tmp_path / "results.json").exists()
    for state in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(state).values())


def test_other_mistakes_are_named(recipe, tmp_path):
    run(recipe, tmp_path / "run", "--iterations", "1")
    with pytest.raises(SegheadsError, match=r"run holds a run \(iteration 1\); resume it"):
        run(recipe, tmp_path / "run", "--iterations", "1")
    with pytest.raises(SegheadsError, match="learning_rate was 0.001 and is 0.5"):
        run(recipe, tmp_path / "run", "--iterations", "1", "--resume", "--learning-rate", "0.5")
    with pytest.raises(SegheadsError, match="^batch_size 4 is over all 1 processes and 3 accumulated .* multiple of 3"):
        run(recipe, tmp_path / "new", "--gradient-accumulation", "3")
    with pytest.raises(SegheadsError, match="no head is called 'foo'; known: linear"):
        run(recipe, tmp_path / "new", "--head", "foo")
