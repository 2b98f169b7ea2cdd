"""Augmented runs: the picture of their crops, which costs nothing else, and the same update however it is cut."""

import json
import logging
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from runs import SMALL_RUN, build
from safetensors.torch import load_file

from segheads.cli.run import run as run_command
from segheads.data import PhotometricNormalize, Scenes
from segheads.data.dataset import SegmentationDataset
from segheads.data.images import ImageForm
from segheads.errors import OptionError
from segheads.probing import ProbeConfig, run_probing
from segheads.training import Run, RunFolder, TrainingConfig, changed, run_training
from segheads.training import crop_sheet as sheet_module
from segheads.training.batches import training_batches, training_loader, training_samples
from segheads.training.crop_sheet import CROP_SHEET, show_crops
from segheads.training.setup import open_run

AUGMENTED = {
    "rotation": 30.0,
    "jitter": (0.4, 0.4, 0.4, 0.1),
    "blur": 0.5,
    "erasing": 0.5,
    "cutmix": 0.5,
    "classmix": 0.5,
    "rare_class_temperature": 0.1,
    "rare_class_pixels": 20,
}
SMALL = {**SMALL_RUN, "batch_size": 4, "log_every": 1, "train_images": 12, **AUGMENTED}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    pass


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass


def config(folder, **options):
    return Config.from_flat(**{**SMALL, "output": folder, **options})


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_the_picture_changes_no_bit_and_is_not_drawn_again(tmp_path, caplog):
    run_training(config(tmp_path / "without"), build)
    assert not (tmp_path / "without" / CROP_SHEET).exists()
    assert "crops: rotation 30.0, jitter (0.4, 0.4, 0.4, 0.1), blur 0.5, erasing 0.5, cutmix 0.5" in caplog.text
    assert re.search(r"images are drawn for \w+ \S+ %, \w+ \S+ %, \w+ \S+ %", caplog.text)
    whole = config(tmp_path / "with", pictures=1, checkpoint_every=1)
    run_training(whole, build)
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=0, atol=0)
    with Image.open(tmp_path / "with" / CROP_SHEET) as picture:
        assert picture.width > 800
    (tmp_path / "with" / CROP_SHEET).unlink()
    for folder in ("checkpoints/00000002", "model"):  # as if killed after the first update
        (tmp_path / "with" / folder).rename(tmp_path / folder.replace("/", "-"))
    run_training(changed(whole, resume=True), build)
    assert not (tmp_path / "with" / CROP_SHEET).exists()
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=0, atol=0)


def test_an_update_in_two_parts_learns_from_the_same_crops(tmp_path):
    for parts in (1, 2):
        run_training(config(tmp_path / str(parts), gradient_accumulation=parts), build)
    torch.testing.assert_close(losses(tmp_path / "1"), losses(tmp_path / "2"))
    run_training(config(tmp_path / "plain", **dict.fromkeys(("cutmix", "classmix"), 0.0)), build)
    assert losses(tmp_path / "plain") != losses(tmp_path / "1")


def test_what_is_learned_from_is_drawn(tmp_path, monkeypatch):
    """The sheet's pixels and labels are those of the first batches, of 5 bands its first three."""

    class Bands(SegmentationDataset):
        image_form = ImageForm(5, 12)

        def __init__(self):
            super().__init__(("a", "b"), ((0, 0, 0), (255, 0, 0)))

        def __len__(self):
            return 6

        def name(self, index):
            return f"scene {index}"

        def read(self, index):
            rng = np.random.default_rng(index)
            labels = torch.from_numpy(rng.integers(0, 2, (32, 32)).astype(np.uint8))
            return rng.integers(0, 4096, (32, 32, 5)).astype(np.uint16), labels

    shown = []
    monkeypatch.setattr(sheet_module, "to_rgb", lambda picture: shown.append(picture) or np.zeros((2, 2, 3)))
    saved = []
    monkeypatch.setattr(sheet_module, "save_figure", lambda figure, path: saved.append(figure))
    numbers = config(tmp_path, pictures=1, iterations=9, rare_class_temperature=None, jitter=(0.2, 0.2, 0.0, 0.0))
    mean, std = [0.5] * 5, [0.2] * 5
    loader = training_loader(numbers, Bands(), 0, mean=mean)
    prepare = PhotometricNormalize(mean, std, bit_depth=12)
    run = Run(numbers, Accelerator(cpu=True), RunFolder(tmp_path, {}), Bands(), Bands())
    show_crops(run, loader.dataset, loader.batch_sampler, prepare)
    batches = list(training_batches(loader, prepare))[:4]
    images = torch.cat([images for images, _ in batches])
    assert len(shown) == 16
    expected = (images * 0.2 + 0.5) * 4095
    torch.testing.assert_close(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=0.05)
    (figure,) = saved
    labels = torch.cat([labels for _, labels in batches])
    drawn = [axis.images[0].get_array() for axis in figure.axes[1::2]]
    reds = torch.from_numpy(np.stack([picture[..., 0] for picture in drawn]))
    torch.testing.assert_close(reds, (labels != 0).double())  # class b is red, and what is ignored white
    assert figure.axes[0].get_title().startswith("scene ")


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheet_module, "save_figure", full)
    with open_run(config(tmp_path, pictures=1)) as run:
        run.look()
        loader = training_loader(run.config, run.training_set, 0, mean=[0.5] * 3, rare=run.rare_classes)
        prepare = PhotometricNormalize([0.5] * 3, [0.5] * 3)
        show_crops(run, loader.dataset, loader.batch_sampler, prepare)
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.getMessage().endswith("augment.png is not drawn: [Errno 28] No space left on device")
        monkeypatch.setattr(type(run.accelerator), "is_main_process", property(lambda self: False))
        show_crops(run, None, None, None)  # other processes do nothing, so that nothing fails
        assert [record for record in caplog.records if record.levelno == logging.WARNING] == [warning]


def test_probes_are_augmented_and_cached_as_they_are_shown(tmp_path):
    """With rare classes, mixed labels and rounds: with the cache, full or empty, the numbers are those without."""
    own = {name: value for name, value in SMALL.items() if name not in ("head", "learning_rate")}
    common = {**own, "head": "all", "learning_rate": 0.0, "heads": ("linear",), "learning_rates": (0.01,)}
    common |= {"iterations": 4, "distinct_batches": 2}

    def losses_of(name, **options):
        run_probing(ProbeConfig.from_flat(**{**common, "output": tmp_path / name, **options}))
        return losses(tmp_path / name)

    expected = losses_of("off", pictures=1)
    assert (tmp_path / "off" / CROP_SHEET).is_file()
    for name in ("empty", "full"):
        assert losses_of(name, cache=tmp_path / "cache") == expected
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert losses_of("other", cache=tmp_path / "cache", rotation=0.0) != expected
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation": 4},
            "cutmix and classmix take neighbours two by two: batch_size 4 over all 1 processes and 4 accumulated "
            "batches must be a multiple of 8",
        ),
        (
            {"dataset": "folder", "in_chans": 5, "jitter": (0, 0, 0, 0.1)},
            "the hue of jitter is of colours, 3 channels of 8 to 16 bit; got 0.1 for images of 5 channels, 8 bit",
        ),
        ({"rare_class_pixels": 2000}, "rare_class_pixels 2000: no training image has more pixels of sky, the most is"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, options, message):
    with pytest.raises(OptionError) as caught:
        run_training(config(tmp_path / "run", **options), build)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rotation", "200"], "error: rotation must be 0 to 180; got 200.0\n"),
        (["--cutmix", "0.7", "--classmix", "0.7"], "error: a crop is mixed in one way"),
        (["--rare-class-temperature", "0"], "error: rare_class_temperature must be above 0; got 0.0\n"),
    ],
)
def test_wrong_flags_are_a_line(tmp_path, capsys, words, message):
    default = config(tmp_path)
    with pytest.raises(SystemExit):
        run_command(lambda config: run_training(config, build), Config, demo=default, args=["--demo", *words])
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_flags_reach_the_samples(tmp_path):
    words = ["--demo", "--rotation", "5", "--jitter", "0.1", "0.2", "0.3", "0.05", "--no-distortion", "--blur", "0.1"]
    read = run_command(lambda config: config, Config, demo=config(tmp_path, rotation=0.0), args=words)
    samples = training_samples(read, Scenes(size=(32, 32), length=2))
    assert samples.distortion is None
    assert samples.augment is not None
    assert (samples.augment.config.rotation, samples.augment.config.jitter) == (5, (0.1, 0.2, 0.3, 0.05))
