"""SenFormer's recipe: the published numbers by backbone, its options, and short runs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from segheads import SegmentationModel
from segheads.cli.run import parse
from segheads.data import EvaluationSamples, Scenes
from segheads.errors import SegheadsError
from segheads.evaluation import evaluate
from segheads.training import changed, flat
from segheads.training.batches import training_samples
from segheads.training.machine import share_batch_norms

RECIPE = Path(__file__).parents[2] / "recipes" / "senformer_ade20k.py"
TINY = ["--backbone", "test_resnet", "--scenes-size", "32", "--scale", "32", "32", "--crop-size", "32"]
TINY += ["--width", "16", "--num-layers", "1", "--batch-size", "2", "--iterations", "2", "--pictures", "1"]
TINY += ["--tracker", "none", "--threads", "1"]


def tiny(recipe, *options):
    return parse(recipe.Config, ["--demo", *TINY, *options], demo=recipe.DEMO)


def test_defaults_are_the_published_ones(recipe):
    config = SimpleNamespace(**flat(recipe.Config()))
    assert (config.backbone.split(".")[0], config.head, config.learner) == ("resnet50", "senformer", "class_attention")
    assert (config.num_layers, config.shared_block, config.merge, config.share) == (6, True, "average", "none")
    assert (config.width, config.pyramid, config.auxiliary_weight) == (512, "auto", 0.4)
    assert (config.mean_shift_layers, config.levels, config.learners_per_level) == (0, None, 1)
    assert (config.optimizer, config.power, config.min_learning_rate) == ("adamw", 1.0, 0.0)
    assert (config.warmup_iterations, config.iterations, config.batch_size) == (1500, 160_000, 16)
    assert (config.crop_size, config.scale, config.window, config.stride) == (512, (2048, 512), None, None)
    assert (config.loss_reduction, config.auxiliary_reduction) == ("valid", "all")


RESNET, OTHERS = (1e-4, 0.1, 1e-4, 3.0, 0.0), (6e-5, 1.0, 0.01, 1.0, 0.3)


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet50.tv_in1k", RESNET),
        ("resnet50c.gluon_in1k", RESNET),
        ("resnet101", RESNET),
        ("swin_tiny_patch4_window7_224.ms_in1k", OTHERS),
        ("vit_tiny_patch16_384", OTHERS),
        ("hf-hub:somebody/some_resnet", OTHERS),  # not looked up
        ("no_such_thing", OTHERS),  # create_model will say so
    ],
)
def test_what_the_backbone_decides(recipe, backbone, expected):
    config = recipe.resolve(recipe.Config.from_flat(backbone=backbone))
    names = ("learning_rate", "backbone_lr_scale", "weight_decay", "max_grad_norm", "drop_path_rate")
    assert tuple(flat(config)[name] for name in names) == expected


def test_what_is_given_is_kept(recipe):
    given = {"learning_rate": 0.5, "backbone_lr_scale": 0.0, "weight_decay": 0.0, "max_grad_norm": 9.0}
    config = recipe.resolve(recipe.Config.from_flat(backbone="resnet18", drop_path_rate=0.2, **given))
    assert {name: flat(config)[name] for name in given} == given
    assert config.model.drop_path_rate == 0.2
    assert recipe.resolve(config) == config


def test_options_of_the_ensemble_reach_the_model(recipe):
    options = ["--levels", "0", "2", "--learners-per-level", "2", "--merge", "product", "--share", "class_embeddings"]
    options += ["--mean-shift-layers", "1", "--shift-channels", "8", "--no-shared-block", "--num-layers", "2"]
    model = recipe.build_model(tiny(recipe, *options), 5)
    head = model.head
    assert (head.levels, head.learners_per_level, head.merge, head.mean_shift_layers) == ([0, 2], 2, "product", 1)
    assert len(head.learners) == 4
    assert [len(learner.blocks) for learner in head.learners] == [2] * 4
    assert head.learners[0].class_embeddings is head.learners[3].class_embeddings
    assert head.in_channels == [16] * 4
    assert model.auxiliary_weight == 0.4
    assert model.auxiliary_head is not None
    json.dumps(dataclasses.asdict(model.plan))  # can be saved


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--learner", "linear"], {"learner": "linear", "learner_kwargs": {}}),
        (["--head", "class_attention", "--num-layers", "2"], {"num_layers": 2, "shared_block": True}),
        (["--head", "feature_fusion"], {"decoder_kwargs": {"num_layers": 1, "shared_block": True}}),
        (["--head", "uper"], {"channels": 16, "init": "published"}),
        (
            ["--head", "sen_uper", "--merge", "product"],
            {"channels": 16, "init": "published", "merge": "product", "levels": None},
        ),
        (["--head", "linear"], {}),
    ],
)
def test_options_of_other_heads_and_learners(recipe, options, expected):
    config = tiny(recipe, *options, "--auxiliary-weight", "0")
    made = recipe.head_options(config)
    assert {name: made[name] for name in expected} == expected
    assert len(made) == len(expected) or config.model.head == "senformer"


@pytest.mark.parametrize(
    ("options", "pyramid", "channels"),
    [
        ([], "FPNT", [16] * 4),
        (["--pyramid", "fpn"], "FPN", [16] * 4),
        (["--pyramid", "none", "--learner", "linear"], "NoneType", [32, 48, 192, 96]),
        (["--backbone", "test_vit"], "SimplePyramid", [16] * 4),
        (["--head", "class_attention", "--pyramid", "fpn"], "FPN", 16),
    ],
)
def test_pyramid_and_width(recipe, options, pyramid, channels):
    model = recipe.build_model(tiny(recipe, *options, "--auxiliary-weight", "0"), 5)
    assert type(model.pyramid).__name__ == pyramid
    assert model.head.in_channels == channels
    assert model.auxiliary_head is None


@pytest.mark.parametrize(
    "options", [[], ["--backbone", "test_vit", "--mean-shift-layers", "1", "--merge", "hierarchical_attention"]]
)
def test_a_short_run(recipe, tmp_path, caplog, options):
    config = changed(
        tiny(recipe, "--output", str(tmp_path), *options), learning_rate=None, drop_path_rate=None, weight_decay=None
    )
    recipe.main(config)
    kept = json.loads((tmp_path / "config.json").read_text())
    rate, _, decay, _, drop_path = OTHERS if options else RESNET
    assert (kept["learning_rate"], kept["weight_decay"], kept["drop_path_rate"]) == (rate, decay, drop_path)
    assert f"learning rate {rate:g} poly (backbone times 1), weight decay {decay:g}" in caplog.text
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["mIoU"] <= 1
    model = SegmentationModel.from_pretrained(tmp_path / "model")
    assert model.predict(torch.randn(1, 3, 40, 50)).shape == (1, 40, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "0", "7"], r"levels must be some of \[0, 1, 2, 3\].* got \[0, 7\]"),
        (["--learner", "nothing"], "no head is called 'nothing'"),
        (["--merge", "nothing"], "no merge is called 'nothing'"),
        (["--auxiliary-weight", "-1"], "auxiliary_weight must be 0 or more; got -1"),
        (["--backbone", "resnet5O"], "name must be one of timm's"),
    ],
)
def test_mistakes_are_named(recipe, tmp_path, options, message):
    with pytest.raises(SegheadsError, match=message):
        recipe.main(tiny(recipe, "--output", str(tmp_path / "run"), *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processes", "device", "shared"), [(2, "cuda", True), (1, "cuda", False), (2, "cpu", False)])
def test_batch_norms_are_shared_by_processes_on_gpus(recipe, processes, device, shared):
    assert tiny(recipe).machine.sync_batchnorm  # as published
    connected = SimpleNamespace(num_processes=processes, device=torch.device(device))
    model = share_batch_norms(recipe.build_model(tiny(recipe), 5), connected)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) == shared for kind in kinds)
    assert kinds
    assert isinstance(model, SegmentationModel)


def test_help_describes_inherited_options(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(recipe.Config, ["--help"], description=recipe.__doc__)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The rate at the start of the decay. None: 1e-4 for ResNets, 6e-5 for others. (default: None)" in text
    assert "Images of one update, over all processes and accumulated batches. (default: 16)" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_scores_are_those_of_the_saved_model(recipe, tmp_path, processes, own_run):
    """Batch norms see the images of their own process alone; what is measured and saved are the first one's."""
    options = ["--head", "fcn", "--auxiliary-weight", "0", "--learning-rate", "0.01", "--batch-size", "4"]
    options += ["--evaluate-every", "1", "--output", str(tmp_path)]
    if processes == 1:
        recipe.main(tiny(recipe, *options))
    else:  # accelerate launch starts several CPU processes through MPI only
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [*launch, str(RECIPE), "--demo", *TINY, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    model = SegmentationModel.from_pretrained(tmp_path / "model")
    mean, std = (model.data_config[key] for key in ("mean", "std"))
    found = evaluate(
        Accelerator(cpu=True), model, EvaluationSamples(Scenes("val", size=(32, 32), length=100), mean, std)
    )
    reported = json.loads((tmp_path / "results.json").read_text())
    for name in ("aAcc", "mAcc", "mIoU"):
        assert reported[name] == pytest.approx(float(found[name]), abs=1e-7)


def test_crops_and_windows_may_be_rectangles(recipe, tmp_path, own_run):
    options = ["--crop-size", "16", "32", "--window", "16", "32", "--stride", "16", "24", "--output", str(tmp_path)]
    config = tiny(recipe, *options)
    recipe.main(config)
    assert training_samples(config, Scenes(length=2))[0, 1]["image"].shape == (3, 16, 32)
    assert json.loads((tmp_path / "config.json").read_text())["crop_size"] == [16, 32]
    assert SegmentationModel.from_pretrained(tmp_path / "model").protocol.window == (16, 32)


def test_an_older_run_keeps_its_auxiliary_loss(recipe, tmp_path, own_run):
    options = ["--head", "fcn", "--output", str(tmp_path)]
    recipe.main(tiny(recipe, *options))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["auxiliary_reduction"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SegheadsError, match="auxiliary_reduction was 'valid' and is 'all'"):
        recipe.main(tiny(recipe, *options, "--resume"))
