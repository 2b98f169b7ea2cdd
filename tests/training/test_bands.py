"""Images of other than 3 channels of 8 bit, from the files to a trained model and what it predicts."""

import json
import logging

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from miniatures import camvid
from PIL import Image
from runs import SMALL_RUN

from segheads import Predictor, SegmentationModel, create_model
from segheads.cli.analyse import load_model
from segheads.cli.check_data import Config as CheckConfig
from segheads.cli.check_data import main as check_data
from segheads.cli.evaluate import Config as EvaluateConfig
from segheads.cli.evaluate import main as evaluate
from segheads.data import DataConfig, EvaluationSamples, FolderDataset, RandomScaleCrop, TrainingSamples, open_dataset
from segheads.data.images import ImageForm
from segheads.errors import DataError, OptionError
from segheads.probing import ProbeConfig
from segheads.training import TrainingConfig, changed, run_training

tifffile = pytest.importorskip("tifffile")

MEAN, STD = (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.25)
BANDS = {"in_chans": 5, "bit_depth": 12, "band_mean": MEAN, "band_std": STD}
SMALL = {
    **SMALL_RUN,
    "dataset": "folder",
    "scale": (48, 40),
    "window": 32,
    "stride": 16,
    "label_values": (0, 7),
    "pictures": 1,
}


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def root(tmp_path):
    """Two images of 5 bands of 12 bit in 16 a split, and labels of 0 and 7."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(2):
            labels = np.tile(np.repeat([0, 7], 24).astype(np.uint8), (40, 1))
            values = rng.integers(0, 4096, (40, 48, 5)) // np.where(labels == 7, 1, 4)[..., None]
            for kind in ("images", "labels"):
                (tmp_path / "own" / kind / split).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "own/images" / split / f"{index}.tif"
            tifffile.imwrite(path, values.astype(np.uint16), photometric="minisblack", planarconfig="contig")
            Image.fromarray(labels).save(tmp_path / "own/labels" / split / f"{index}.png")
    return tmp_path / "own"


def config(root, **options):
    return TrainingConfig.from_flat(**SMALL | BANDS | {"data_root": root, "output": root.parent / "run"} | options)


def build(config, num_classes):
    return create_model(config.model.backbone, "linear", num_classes, **config.model_options(num_classes))


def test_five_bands_of_12_bit_from_files_to_predictions(root, caplog):
    with caplog.at_level(logging.INFO, "segheads"):
        run_training(config(root), build)
    assert "images of 5 channels, 12 bit: crops are resized and mirrored, no colours are changed" in caplog.text
    run = root.parent / "run"
    saved = json.loads((run / "model/config.json").read_text())
    assert saved["input"]["in_chans"] == 5
    assert saved["input"]["bit_depth"] == 12
    assert saved["input"]["mean"] == saved["input"]["band_mean"] == list(MEAN)
    assert saved["input"]["std"] == saved["input"]["band_std"] == list(STD)
    assert saved["label_map"] == {"0": 0, "7": 1}
    assert (run / "predictions.png").is_file()

    results = evaluate(EvaluateConfig(model=str(run), workers=0, threads=1, pictures=1))
    assert 0 <= results["mIoU"].item() <= 1
    assert (run / "evaluation/worst.png").is_file()

    predictor, path = Predictor.from_pretrained(run), root / "images/val/0.tif"
    assert predictor.model.image_form == ImageForm(5, 12)
    assert predictor.model.label_map.classes == {0: 0, 7: 1}
    values = tifffile.imread(path)
    tensor = torch.from_numpy(values.astype(np.int32)).permute(2, 0, 1)
    labels = [predictor(image).labels for image in (path, values, tensor)]
    assert labels[0].shape == (40, 48)
    assert all(torch.equal(labels[0], other) for other in labels)
    assert predictor(path).overlay().size == (48, 40)
    with pytest.raises(ValueError, match=r"the model takes 5 channels, 12 bit: .* got uint16 \(40, 48, 3\)"):
        predictor(values[..., :3])


def test_what_the_model_is_shown_is_stored_values_over_the_range(root):
    dataset = open_dataset(DataConfig(dataset="folder", data_root=root, label_values=(0, 7), **BANDS), "val")
    stored = tifffile.imread(root / "images/val/0.tif")
    image, _ = EvaluationSamples(dataset, MEAN, STD)[0]
    expected = ((stored / 4095 - MEAN) / STD).transpose(2, 0, 1)
    torch.testing.assert_close(image, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dataset[0][0], torch.from_numpy(stored / 4095).float().permute(2, 0, 1))

    crop = RandomScaleCrop((40, 60), scale=(48, 40), ratio_range=(1, 1), flip_probability=0, max_class_ratio=1)
    sample = TrainingSamples(dataset, crop, seed=0)[0, 0]
    assert sample["image"].dtype == torch.float32
    torch.testing.assert_close(sample["image"][:, :40, :48], torch.from_numpy(stored).float().permute(2, 0, 1))
    assert not sample["image"][:, :, 48:].any()
    assert sample["distortion"].tolist() == [0, 1, 1, 1, 0]


def test_evaluation_of_bands_resizes_each(root):
    dataset = open_dataset(DataConfig(dataset="folder", data_root=root, label_values=(0, 7), **BANDS), "val")
    image, _ = EvaluationSamples(dataset, (0.0,) * 5, (1.0,) * 5, (24, 20))[0]
    assert image.shape == (5, 20, 24)
    band = Image.fromarray(tifffile.imread(root / "images/val/0.tif")[..., 3].astype(np.float32))
    expected = np.asarray(band.resize((24, 20), Image.Resampling.BILINEAR)) / 4095
    torch.testing.assert_close(image[3], torch.from_numpy(expected))


def test_the_scan_stops_a_run_whose_bit_depth_is_not_told(root):
    with pytest.raises(DataError, match=r"largest value in all images is 40\d\d: --bit-depth 12"):
        run_training(config(root, bit_depth=None), build)
    with pytest.raises(DataError, match=r"in_chans is 3; give in_chans 5.*channels in all: 5 in 4 images"):
        run_training(config(root, in_chans=None, band_mean=None, band_std=None), build)


def test_bands_without_statistics_are_refused(root):
    with pytest.raises(OptionError, match="images of 5 channels, 12 bit need band_mean and band_std"):
        run_training(config(root, band_mean=None, band_std=None), build)


def test_a_model_of_other_channels_is_refused(root):
    def rgb(config, num_classes):
        return create_model("test_vit", "linear", num_classes, pretrained=False)

    with pytest.raises(OptionError, match="the model takes 3 channels, and images have 5"):
        run_training(config(root), rgb)


def test_check_data_measures_the_options(root, capsys):
    data = {"dataset": "folder", "data_root": root, "label_values": (0, 7)}
    with pytest.raises(SystemExit) as exit_:
        check_data(CheckConfig(data=DataConfig(**data), workers=0))
    assert exit_.value.code == 2
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("options for these images"))
    assert "--in-chans 5 --bit-depth 12 --band-mean" in line
    stored = np.stack([tifffile.imread(path) for path in sorted((root / "images/train").iterdir())]) / 4095
    words = line.split()
    found = [[float(x) for x in words[words.index(f"--band-{name}") + 1 :][:5]] for name in ("mean", "std")]
    np.testing.assert_allclose(found[0], stored.mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(found[1], stored.std((0, 1, 2)), rtol=1e-3)

    options = {"in_chans": 5, "bit_depth": 12, "band_mean": tuple(found[0]), "band_std": tuple(found[1])}
    check_data(CheckConfig(data=DataConfig(**data, **options), workers=0))
    assert "nothing is wrong" in capsys.readouterr().out


def test_unused_bits_are_a_warning(root, capsys):
    data = DataConfig(dataset="folder", data_root=root, label_values=(0, 7), in_chans=5, bit_depth=16)
    with pytest.raises(SystemExit) as exit_:
        check_data(CheckConfig(data=data, workers=0))
    assert exit_.value.code == 1
    assert "of 65535 that bit_depth 16 has: they are dark; --bit-depth 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 5, "band_mean": MEAN}, "band_mean and band_std go together"),
        ({"band_mean": MEAN, "band_std": STD}, "band_mean has 5 values for 3 channels"),
        ({"in_chans": 1, "band_mean": (0.5,), "band_std": (0.0,)}, "band_std must be above 0"),
        ({"in_chans": 1, "band_mean": (1800.0,), "band_std": (9.0,)}, "divided by 255, .* at most 1"),
        ({"bit_depth": 7}, "bit_depth must be 8 to 16"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        DataConfig(**options).image_form  # noqa: B018


def test_where_bands_are_not_supported_one_line_says_so(root, tmp_path):
    model = create_model("test_vit", "linear", 11, pretrained=False, backbone_kwargs={"in_chans": 5})
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(OptionError, match="analyse takes models of images of 3 channels and 8 bit; .* 5 channels"):
        load_model(str(tmp_path), "cpu")
    camvid(tmp_path / "camvid")
    data = {"dataset": "camvid", "data_root": tmp_path / "camvid"}
    with pytest.raises(OptionError, match="takes images of 5 channels, 8 bit, and those of --dataset camvid .* 3 ch"):
        evaluate(EvaluateConfig(model=str(tmp_path / "model"), workers=0, threads=1, **data))
    probes = {"output": tmp_path / "probes", "heads": ("linear",), "learning_rates": (1e-3,)}
    with pytest.raises(OptionError, match="probes take images of 3 channels and 8 bit .* got 5 channels, 12 bit"):
        ProbeConfig.from_flat(**SMALL | BANDS | probes).check()


def test_published_sets_take_no_bands():
    with pytest.raises(OptionError, match="camvid takes no in_chans"):
        open_dataset(DataConfig(dataset="camvid", in_chans=5), "val")


def test_input_is_kept_by_a_saved_model(tmp_path):
    model = create_model("test_vit", "linear", 3, pretrained=False)
    model.save_pretrained(tmp_path / "plain")
    assert SegmentationModel.from_pretrained(tmp_path / "plain").data_config == model.data_config
    model.set_input(bit_depth=12, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model.save_pretrained(tmp_path / "wide")
    again = SegmentationModel.from_pretrained(tmp_path / "wide")
    assert again.data_config == model.data_config
    assert again.image_form == ImageForm(3, 12)
    with pytest.raises(ValueError, match=r"mean must be a number for each of 3 channels; got \[0.1\]"):
        model.set_input(mean=(0.1,))


def test_channels_of_model_and_data_must_agree(root):
    dataset = FolderDataset(root / "images/val", root / "labels/val", 2, image_form=ImageForm(5, 12))
    with pytest.raises(ValueError, match="takes images of 3 channels, and those of FolderDataset have 5"):
        EvaluationSamples(dataset, (0.5,) * 3, (0.5,) * 3)


def test_a_config_of_bands_can_be_changed():
    assert changed(DataConfig(), in_chans=4).image_form.channels == 4
