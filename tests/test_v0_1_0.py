"""What version 0.1.0 wrote still loads, and its options and files keep their meaning; see fixtures/v0_1_0/README.md."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import segheads
from segheads.cli.evaluate import Config as EvaluateConfig
from segheads.cli.evaluate import main as evaluate
from segheads.cli.run import parse
from segheads.errors import OptionError

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "v0_1_0"
FLAGS = json.loads((FIXTURES / "flags.json").read_text())
RUN = """--demo --backbone test_vit --depth 1 --patch-size 8 --shift-channels 16 --iterations 4 --checkpoint-every 2
    --log-every 1 --batch-size 2 --optimizer momentum --learning-rate 0.1 --warmup-iterations 0 --scenes-size 48
    --scale 48 48 --crop-size 48 --tracker none --pictures 0 --threads 1 --workers 0"""
MOVED = {  # what was recipes/NAME.py in 0.1.0
    "evaluate": ["-m", "segheads", "evaluate"],
    "analyse": ["-m", "segheads", "analyse"],
    "benchmark": ["recipes/benchmark/__main__.py"],
    "benchmark_probe": ["recipes/benchmark/probe.py"],
    "benchmark_input": ["recipes/benchmark/input.py"],
}


def run(*arguments):
    """Run Python at the top of the checkout; returns what it prints, without colours or narrow columns."""
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recipe_module(name):
    spec = importlib.util.spec_from_file_location(f"old_{name}", ROOT / "recipes" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def flags(text):
    """Long options of a `--help`: the first column of the options part, where words about an option are left out."""
    found = set()
    for cell in re.split("[│\n]", text):  # boxes may stand side by side
        if re.match(r" --?\w", cell):
            names = re.split(r"\s{2,}", cell.strip())[0]
            found.update(re.findall(r"(?:^|, )(--[a-z][\w-]*)", names))
    return found


def check_logits(model, expected):
    """Upsampled as in 0.1.0, which interpolated the logarithms of an ensemble's probabilities."""
    H, W = expected["images"].shape[2:]
    with torch.no_grad():
        logits = segheads.functional.upsample(*model.low_resolution(expected["images"]))[:, :, :H, :W]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["auxiliary", "linear", "mean_shift", "old_settings", "senformer", "smp_unet"])
def test_model_gives_the_logits_of_0_1_0(name):
    model = segheads.SegmentationModel.from_pretrained(FIXTURES / "models" / name)
    check_logits(model, load_file(FIXTURES / "models" / name / "expected.safetensors"))


@pytest.mark.parametrize("merge", ["hierarchical_attention", "explicit_attention"])
def test_learned_merges_of_0_1_0_are_what_they_were(tmp_path, merge):
    """They had one convolution before the last, without a norm, and no number of a format in config.json."""
    kwargs = {"head_kwargs": {"merge": f"light_{merge}"}, "pyramid_kwargs": {"out_channels": 16}}
    model = segheads.create_model("test_resnet", "senformer", 3, pretrained=False, **kwargs).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["format"]
    config["model"]["head_kwargs"]["merge"] = config["settings"]["head"]["merge"] = merge
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, images = segheads.SegmentationModel.from_pretrained(tmp_path), torch.randn(1, 3, 40, 50)
    assert again.plan.head_kwargs["merge"] == again.head.merge == f"light_{merge}"
    assert not any("norm" in name or "running" in name for name in again.head.learned_merge.state_dict())
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_feature_fusion_of_0_1_0_is_what_it_was(tmp_path):
    """It had neither norm nor activation after its convolution."""
    kwargs = {"head_kwargs": {"norm": False}, "pyramid_kwargs": {"out_channels": 16}}
    model = segheads.create_model("test_resnet", "feature_fusion", 3, pretrained=False, **kwargs).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["format"]
    config["model"]["head_kwargs"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {"head.fuse.weight", "head.fuse.bias"} <= set(model.state_dict())
    again, images = segheads.SegmentationModel.from_pretrained(tmp_path), torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_run_resumes_and_ends_as_the_uninterrupted_one(tmp_path):
    """With its crops, whose stream of random numbers is another one now."""
    program = "import runpy; from segheads.data import samples; samples.CROPS = 0; "
    program += "runpy.run_path('recipes/meanshifter_ade20k.py', run_name='__main__')"
    output, final = tmp_path / "run", load_file(FIXTURES / "run" / "final.safetensors")
    shutil.copytree(FIXTURES / "run", output)
    shown = run("-c", program, *RUN.split(), "--output", output, "--resume")
    assert "at iteration 2 of 4" in shown
    torch.testing.assert_close(load_file(output / "model" / "model.safetensors"), final, rtol=1e-4, atol=1e-4)
    before = load_file(FIXTURES / "run" / "checkpoints" / "00000002" / "model.safetensors")
    assert max((final[key] - before[key]).abs().max() for key in final) > 0.01  # else resuming would show nothing


def test_own_folder_with_ignore_index_0_goes_on(tmp_path, own_run, caplog):
    """In 0.1.0 it meant that 1 is the first class; its checkpoint, with the config.json of such a run."""
    values = [*range(13)]  # 0 is no class, 1 to 12 are the classes of the checkpoint
    root, output = miniatures.own_folder(tmp_path / "own", values), tmp_path / "run"
    shutil.copytree(FIXTURES / "run", output)
    old = json.loads((output / "config.json").read_text())
    old |= {"dataset": "folder", "data_root": str(root), "num_classes": 12, "ignore_index": 0, "output": str(output)}
    (output / "config.json").write_text(json.dumps(old))
    recipe = recipe_module("meanshifter_ade20k")
    words = [*RUN.split(), "--resume", "--no-scan", "--output", str(output), "--data-root", str(root)]
    words += ["--dataset", "folder", "--num-classes", "12"]
    with pytest.raises(OptionError, match="ignore_index was None and is 0; reduce_zero_label was True and is False"):
        recipe.main(parse(recipe.Config, [*words, "--ignore-index", "0"], demo=recipe.DEMO))
    recipe.main(parse(recipe.Config, [*words, "--reduce-zero-label"], demo=recipe.DEMO))
    assert f"resuming {output} at iteration 2 of 4" in caplog.messages
    kept = json.loads((output / "config.json").read_text())
    assert (kept["ignore_index"], kept["reduce_zero_label"]) == (None, True)
    (output / "config.json").write_text(json.dumps(old))  # evaluations read either
    found = evaluate(EvaluateConfig(model=str(output), window=48, stride=48, workers=0))
    counted = np.bincount(miniatures.label_map(values).ravel(), minlength=13)
    assert found["pixels"].tolist() == (2 * counted[1:]).tolist()


@pytest.mark.parametrize("slug", sorted(path.name for path in (FIXTURES / "probes" / "heads").iterdir()))
def test_probed_head_joins_its_backbone(slug):
    from segheads.probing import join_head

    expected = load_file(FIXTURES / "probes" / "heads" / slug / "expected.safetensors")
    check_logits(join_head(FIXTURES / "probes", slug), expected)


HELPS = """import contextlib, io, json, os, runpy, sys
texts = {}
for name, words in json.loads(sys.argv[1]).items():
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # boxes need their letters
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        if words[0] == "-m":
            sys.argv = [*words[1:], "--help"]
            runpy.run_module(words[1], run_name="__main__")
        else:
            sys.argv = [words[0], "--help"]
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    said.flush()
    texts[name] = said.buffer.getvalue().decode()
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def helps():
    """What each command says of its options, all asked for in one process: the imports take seconds."""
    return json.loads(run("-c", HELPS, json.dumps({name: MOVED.get(name, [f"recipes/{name}.py"]) for name in FLAGS})))


@pytest.mark.parametrize("name", FLAGS)
def test_no_option_is_lost(name, helps):
    missing = sorted(set(FLAGS[name]) - flags(helps[name]))
    assert not missing
