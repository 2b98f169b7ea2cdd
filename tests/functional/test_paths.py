"""Whether loss and label map take the kernels: a check in a process of its own, and what is remembered of it."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from segheads.errors import OptionError, RunError
from segheads.functional import paths, upsample_argmax, upsample_cross_entropy, upsample_triton

GPU, FP32 = torch.device("cuda", 0), torch.float32
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves every device")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A GPU of compute capability 9.0 that nobody has, and an empty cache."""
    monkeypatch.setattr(upsample_triton, "obstacle", lambda device, dtype: "")
    monkeypatch.setattr(upsample_triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(paths, "driver_version", lambda: "580.1")
    monkeypatch.delenv("SEGHEADS_TRITON", raising=False)
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "/bin/cc")
    paths._verdict.cache_clear()
    yield tmp_path / "cache" / "triton"
    paths._verdict.cache_clear()


def another_process():
    """What a new process would find."""
    paths._verdict.cache_clear()
    return paths.verdict(GPU, FP32)


@pytest.fixture
def runs(monkeypatch):
    """What the check's process is to end with, and how often it ran."""
    ends, commands = [], []

    def run(command, **options):
        commands.append((command, options))
        end = ends[min(len(commands), len(ends)) - 1]
        if isinstance(end, Exception):
            raise end
        return subprocess.CompletedProcess(command, end[0], "", end[1])

    monkeypatch.setattr(paths.subprocess, "run", run)
    return ends, commands


def test_each_type_is_checked_once_and_remembered(runs, cache, caplog):
    ends, commands = runs
    ends.append((0, ""))
    for _ in range(3):
        assert paths.path_of_loss(GPU, FP32) == "triton"
    assert another_process() == paths.Verdict(True)
    assert len(commands) == 1
    command, options = commands[0]
    assert command[-2:] == ["cuda:0", "float32"]
    assert options["timeout"] == paths.LIMIT
    paths.verdict(GPU, torch.bfloat16)
    assert commands[1][0][-1] == "bfloat16"
    kept = [json.loads(file.read_text()) for file in cache.glob("*.json")]
    assert {(record["dtype"], record["works"], record["driver"]) for record in kept} == {
        ("float32", True, "580.1"),
        ("bfloat16", True, "580.1"),
    }
    assert {"torch", "triton", "capability", "segheads", "compiler", "headers"} <= kept[0].keys()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["torch", "triton", "driver", "capability", "segheads", "compiler"])
def test_another_version_is_checked_again(runs, monkeypatch, name):
    ends, commands = runs
    ends.append((0, ""))
    another_process()
    {
        "torch": lambda: monkeypatch.setattr(torch, "__version__", "9.0"),
        "triton": lambda: monkeypatch.setattr(upsample_triton, "version", lambda: "9.0"),
        "driver": lambda: monkeypatch.setattr(paths, "driver_version", lambda: "9.0"),
        "capability": lambda: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0)),
        "segheads": lambda: monkeypatch.setattr(paths, "VERSION", "9.0"),
        "compiler": lambda: monkeypatch.setenv("CC", "/bin/another"),
    }[name]()
    another_process()
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ((1, "Traceback ...\nfatal error: Python.h: No such file or directory\n"), "fatal error: Python.h: No such"),
        ((-11, ""), "their check died of SIGSEGV"),
        ((1, ""), "no message"),
        (subprocess.TimeoutExpired("python", 180), "their check took more than 180 seconds"),
    ],
    ids=["headers", "crash", "mute", "slow"],
)
def test_one_warning_says_what_and_why(runs, cache, caplog, end, why):
    ends, commands = runs
    ends.append(end)
    for _ in range(3):
        assert not paths.verdict(GPU, FP32).works
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    message = record.getMessage()
    assert message.startswith("float32 on cuda:0: loss and label map take the slower tiles, because the Triton kernels")
    assert why in message
    assert paths.path_of_loss(GPU, FP32).startswith(f"tiles ({why}")
    is_sure = not isinstance(end, Exception)  # a busy machine is no reason to give up for good
    assert len(list(cache.glob("*.json"))) == is_sure
    assert ("to try again" in message) == is_sure
    assert not another_process().works
    assert len(commands) == 2 - is_sure


def test_without_a_compiler_nothing_is_tried(runs, monkeypatch, caplog):
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not paths.verdict(GPU, FP32).works
    assert "Triton needs a C compiler, and there is no gcc, no clang and no CC" in caplog.text
    assert not runs[1]


def test_what_is_as_documented_is_no_warning(runs, monkeypatch, caplog):
    monkeypatch.setattr(upsample_triton, "obstacle", lambda device, dtype: "there are no kernels for float64")
    assert paths.path_of_loss(GPU, torch.float64) == "tiles (there are no kernels for float64)"
    assert not caplog.records
    assert not runs[1]


@pytest.mark.parametrize(("value", "works"), [("0", False), ("1", True), ("auto", True)])
def test_the_switch(runs, monkeypatch, value, works):
    runs[0].append((0, ""))
    monkeypatch.setenv("SEGHEADS_TRITON", value)
    assert paths.verdict(GPU, FP32).works is works
    assert len(runs[1]) == works


def test_asked_for_by_name_a_failure_is_an_error(runs, monkeypatch):
    runs[0].append((1, "no driver\n"))
    monkeypatch.setenv("SEGHEADS_TRITON", "1")
    with pytest.raises(RunError, match=r"SEGHEADS_TRITON=1 asks for .* do not serve float32 on cuda:0: no driver"):
        paths.path_of_loss(GPU, FP32)


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_another_value_is_refused(monkeypatch, value):
    monkeypatch.setenv("SEGHEADS_TRITON", value)
    with pytest.raises(OptionError, match=f"SEGHEADS_TRITON must be auto, 0, 1; got '{value}'"):
        paths.path_of_loss(GPU, FP32)


@pytest.mark.parametrize("broken", ["not JSON", "[]", "{}"])
def test_a_damaged_memory_is_written_anew(runs, cache, broken):
    runs[0].append((0, ""))
    another_process()
    (file,) = cache.glob("*.json")
    file.write_text(broken)
    assert another_process().works
    assert json.loads(file.read_text())["works"] is True


def test_a_folder_that_cannot_be_written_is_no_error(runs, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path / "file"))  # for root, too, no folder
    runs[0].append((0, ""))
    assert another_process().works
    assert another_process().works
    assert len(runs[1]) == 2


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_for_one_process_alone_is_tried_in_this_one(runs, monkeypatch, cache, works):
    def check(device, dtype):
        if not works:
            raise RuntimeError("no")

    monkeypatch.setattr(paths, "check", check)
    runs[0].append((paths.UNUSABLE, "CUDA error: all CUDA-capable devices are busy or unavailable\n"))
    found = paths.verdict(GPU, FP32)
    assert found == (paths.Verdict(True) if works else paths.Verdict(False, "RuntimeError: no", True))
    assert len(list(cache.glob("*.json"))) == works


def test_a_compiler_that_fails_is_survived(monkeypatch, tmp_path, caplog):
    pytest.importorskip("triton")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    (tmp_path / "libcuda.so.1").write_text("")
    for name, value in {"CC": compiler, "TRITON_LIBCUDA_PATH": tmp_path, "TRITON_CACHE_DIR": tmp_path / "t"}.items():
        monkeypatch.setenv(name, str(value))
    code = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"  # what a first kernel begins with
    monkeypatch.setattr(paths, "CHECK", (sys.executable, "-c", code))
    assert not paths.verdict(GPU, FP32).works
    assert "CalledProcessError" in caplog.text
    assert str(compiler) in caplog.text


def test_a_crash_is_survived(monkeypatch):
    monkeypatch.setattr(paths, "CHECK", (sys.executable, "-c", "import os; os.abort()"))
    assert "their check died of SIGABRT" in paths.path_of_loss(GPU, FP32)


def test_the_check_itself_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = subprocess.run([*paths.CHECK, "cpu", "bfloat16"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("part", ["loss", "gradient", "label map", "probability"])
def test_the_check_sees_what_is_wrong(monkeypatch, part):
    def loss_and_gradient(logits, labels, *_, needs_gradient):
        exact = logits.float().requires_grad_()
        loss = upsample_cross_entropy(exact, labels) * (labels != 255).sum()
        (gradient,) = torch.autograd.grad(loss, exact)
        return loss.detach() + (part == "loss"), gradient + (part == "gradient")

    def label_map(logits, size, dtype, *, return_probability):
        labels, probability = upsample_argmax(logits, size, return_probability=True)
        return (labels + 1) % 5 if part == "label map" else labels, probability + 0.1 * (part == "probability")

    monkeypatch.setattr(upsample_triton, "loss_and_gradient", loss_and_gradient)
    monkeypatch.setattr(upsample_triton, "label_map", label_map)
    with pytest.raises(RuntimeError, match=f"the kernels' {part} differs"):
        paths.check(torch.device("cpu"), FP32)


def test_on_the_cpu_triton_is_not_even_imported():
    code = (
        "import sys, torch; from segheads.functional import upsample_argmax; "
        "upsample_argmax(torch.zeros(1, 2, 2, 2), (4, 4)); print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
