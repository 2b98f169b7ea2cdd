"""What the launcher says and what the options say."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from runs import SMALL_RUN
from torch import nn

import segheads
from segheads import create_model
from segheads.errors import OptionError
from segheads.functional.paths import Verdict
from segheads.mean_shift import MeanShift
from segheads.training import TrainingConfig, run_training
from segheads.training.config import as_launched
from segheads.training.machine import MachineConfig, environment, installed_version, paths_line, start_accelerator

SMALL = {**SMALL_RUN, "iterations": 1}


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass


def config(tmp_path, **changes):
    return TrainingConfig.from_flat(**{**SMALL, **changes}, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("launcher", "option", "expected"),
    [(None, None, "no"), ("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", "bf16", "bf16"), ("FP16", None, "fp16")],
)
def test_an_option_wins_over_the_launcher(tmp_path, monkeypatch, launcher, option, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert as_launched(config(tmp_path, mixed_precision=option)).machine.mixed_precision == expected


def test_the_precision_in_force_is_told_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run_training(config(tmp_path), lambda c, n: create_model(c.model.backbone, c.model.head, n, **c.model_options()))
    assert "1 process(es) on cpu, bf16" in caplog.text
    assert "paths: loss tiles, label map tiles\n" in caplog.text + "\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "launched with mixed_precision fp8; known are no, bf16, fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4, which is not used; give"),
    ],
)
def test_what_the_launcher_cannot_have_is_refused(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=message):
        as_launched(config(tmp_path))


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("nonsense", "no tracker is called 'nonsense'; Accelerate knows .*tensorboard.*, or none"),
        ("clearml", "tracker 'clearml' needs its package, which is not installed"),
    ],
)
def test_a_tracker_that_would_be_left_out_in_silence_is_refused(monkeypatch, tracker, message):
    monkeypatch.setattr("segheads.training.machine.get_available_trackers", list)
    with pytest.raises(OptionError, match=message):
        start_accelerator(MachineConfig(), tracker=tracker)


def test_without_tensorboard_it_is_said_that_nothing_is_tracked(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("segheads.training.machine.get_available_trackers", list)
    start_accelerator(MachineConfig(), tracker="tensorboard", folder=tmp_path)
    assert "tensorboard is not installed, so it tracks nothing" in caplog.text


def test_the_line_of_paths(monkeypatch):
    fused, tiled, none = MeanShift(8), MeanShift(8, shift_channels=64), MeanShift(8, num_layers=0)
    cpu = Accelerator(cpu=True)
    assert paths_line(cpu, [fused, none], 64) == "paths: loss tiles, label map tiles, mean shift fused"
    assert paths_line(cpu, [nn.Sequential(fused, tiled)], 64).endswith("mean shift fused and tiles")
    monkeypatch.setattr("segheads.functional.paths.verdict", lambda device, dtype: Verdict(dtype == torch.bfloat16))
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    on_gpu = SimpleNamespace(
        device=torch.device("cuda", 0), autocast=lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    )
    assert paths_line(on_gpu, [], 2) == "paths: loss triton, label map triton"


def test_the_same_accumulation_is_no_contradiction(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    as_launched(config(tmp_path, gradient_accumulation=2))
    weight = torch.ones(1, requires_grad=True)
    start_accelerator(MachineConfig()).backward(3 * weight.sum())
    assert weight.grad.item() == 3  # divided by nothing: train_step does it


@pytest.fixture
def _arithmetic():
    """PyTorch's own choice afterwards; these are no attributes that monkeypatch could put back."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(("tf32", "expected"), [(None, (False, True)), (True, (True, True)), (False, (False, False))])
@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.usefixtures("_arithmetic")
def test_arithmetic(tf32, expected, benchmark):
    start_accelerator(MachineConfig(tf32=tf32, cudnn_benchmark=benchmark, threads=1))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == expected
    assert torch.backends.cudnn.benchmark == benchmark


@pytest.mark.usefixtures("_arithmetic")
def test_arithmetic_and_environment_are_kept_and_may_be_others_later(tmp_path, monkeypatch):
    def build(c, n):
        return create_model(c.model.backbone, c.model.head, n, **c.model_options())

    run_training(config(tmp_path), build)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["tf32"], kept["cudnn_benchmark"]) == (None, False)
    flags = ("tf32_products", "tf32_convolutions", "cudnn_benchmark", "cudnn_deterministic")
    on_cpu = dict.fromkeys(("gpu", "driver", "cuda", "cudnn", "triton", *flags))
    versions = {"torch": torch.__version__, "timm": timm.__version__, "segheads": segheads.__version__}
    assert kept["environment"] == {**on_cpu, "processes": 1, **versions}
    monkeypatch.setattr("segheads.training.setup.environment", lambda device, processes: {"gpu": "another"})
    run_training(config(tmp_path, resume=True, cudnn_benchmark=True), build)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["environment"] == {"gpu": "another"}


def test_the_environment_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr("segheads.training.machine.driver_version", lambda: "580.1")
    found = environment(torch.device("cuda", 0))
    assert [found[name] for name in ("gpu", "driver", "cuda", "cudnn")] == ["H100", "580.1", "13.0", 91002]
    assert (found["tf32_products"], found["tf32_convolutions"], found["cudnn_benchmark"]) == (False, True, False)
    assert found["triton"] == installed_version("triton")
    assert installed_version("no-such-package-at-all") is None
