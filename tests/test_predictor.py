"""From an image in any form to labels at its own size."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segheads import Predictor, SegmentationModel, create_model
from segheads.classes import Classes
from segheads.data import Scenes, to_input
from segheads.errors import DataError, SavedModelError, SavedModelMissingError, ScoresError
from segheads.inference import InferenceProtocol, predict_labels

CLASSES = Classes(("sky", "road", "car"), ((0, 0, 255), (90, 90, 90), (255, 0, 0)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 3, pretrained=False)
    model.classes, model.protocol = CLASSES, InferenceProtocol(scale=(96, 64), window=48, stride=32)
    return model


@pytest.fixture
def photo():
    return Scenes("val", size=(80, 120)).read(3)[0]


def test_every_form_of_an_image_gives_the_same_labels(model, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    pixels = np.array(photo)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), photo, photo.convert("RGBA"), pixels, tensor]
    forms.append(tensor.float() / 255)
    predictor = Predictor(model)
    first, *others = (predictor(form).labels for form in forms)
    assert first.shape == (80, 120)
    assert not first.is_inference()
    for labels in others:
        torch.testing.assert_close(labels, first, rtol=0, atol=0)


def test_the_protocol_is_the_models(model, photo):
    config = model.data_config
    x = to_input(photo.resize((96, 64), Image.Resampling.BILINEAR), config["mean"], config["std"])
    expected = predict_labels(model, x, InferenceProtocol(window=48, stride=32), size=(80, 120))
    torch.testing.assert_close(Predictor(model)(photo).labels, expected.clone(), rtol=0, atol=0)
    whole = Predictor(model, protocol=InferenceProtocol())(photo).labels
    assert (whole != expected).any()


def test_classes_and_protocol_are_saved_with_the_model(model, photo, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    names = config["classes"]["names"]
    assert (config["format"], names, config["protocol"]["window"]) == (2, ["sky", "road", "car"], 48)
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        predictor = Predictor.from_pretrained(place)
        assert predictor.classes == CLASSES
        assert predictor.protocol == model.protocol
        torch.testing.assert_close(predictor(photo).labels, Predictor(model)(photo).labels, rtol=0, atol=0)


def test_a_run_of_0_1_0_tells_its_protocol(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    old = {"model": {k: config["model"][k] for k in ("backbone", "head", "num_classes")}, "settings": {}}
    (tmp_path / "model/config.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text(json.dumps({"scale": [96, 64], "window": 48, "stride": 32}))
    predictor = Predictor.from_pretrained(tmp_path)
    assert predictor.protocol == model.protocol
    assert predictor.classes.names == ("class 0", "class 1", "class 2")


def test_pictures_and_label_files(model, photo, tmp_path):
    prediction = Predictor(model)(photo, confidence=True)
    prediction.save(tmp_path / "labels.png")
    written = Image.open(tmp_path / "labels.png")
    assert written.mode == "P"
    np.testing.assert_array_equal(np.array(written), prediction.labels.numpy())
    colours = np.array(CLASSES.palette, np.uint8)[prediction.labels.numpy()]
    np.testing.assert_array_equal(np.array(written.convert("RGB")), colours)
    np.testing.assert_array_equal(np.array(prediction.overlay(1.0)), colours)
    np.testing.assert_array_equal(np.array(prediction.overlay(0.0)), np.array(photo))
    assert prediction.names == tuple(CLASSES.names[k] for k in sorted(set(prediction.labels.flatten().tolist())))
    assert prediction.confidence.shape == (80, 120)
    assert ((prediction.confidence >= 1 / 3 - 1e-6) & (prediction.confidence <= 1)).all()
    with pytest.raises(ValueError, match=r"saved as PNG, which keeps every value; got '.*labels\.jpg'"):
        prediction.save(tmp_path / "labels.jpg")
    with pytest.raises(ValueError, match="opacity must be from 0 to 1; got 2"):
        prediction.overlay(2)


def test_scores_that_are_nan_are_an_error_that_names_the_file(model, photo, tmp_path):
    with torch.no_grad():
        model.head.classifier.weight[0, 0] = torch.nan
    photo.save(tmp_path / "photo.png")
    with pytest.raises(ScoresError, match=r"photo\.png: the model's scores are NaN or infinite"):
        Predictor(model)(tmp_path / "photo.png")
    with pytest.raises(ScoresError, match="^the model's scores are NaN or infinite"):
        Predictor(model)(photo, confidence=True)


def test_every_part_keeps_its_mode(model, photo):
    model.train()
    model.backbone.eval()
    before = [module.training for module in model.modules()]
    Predictor(model)(photo)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"got uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3)), r"got float64 \(4, 4, 3\)"),
        (torch.full((3, 4, 4), -1.0), r"in \[0, 1\], not normalised; got values from -1 to -1"),
        (torch.full((3, 4, 4), torch.nan), r"got values from nan to nan"),
        (torch.zeros(4, 4, 3), r"a tensor must be \(3, H, W\); got \(4, 4, 3\)"),
        (7, "got int"),
    ],
    ids=["grey", "float array", "normalised", "not a number", "channels last", "number"],
)
def test_what_is_no_image_is_named(model, image, message):
    with pytest.raises(ValueError, match=message):
        Predictor(model)(image)


def test_files_and_folders_that_do_not_fit_are_named(model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg"):
        Predictor(model)(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="the model has 3 classes; got 2 names"):
        Predictor(model, classes=Classes(("a", "b")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SavedModelMissingError, match=r"empty holds no config\.json"):
        Predictor.from_pretrained(tmp_path / "empty")


def test_only_settings_are_restored(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for settings, message in [
        ({"": {"forward": 1}}, r"config\.json: \.forward cannot be set to 1: SegmentationModel has the settings none"),
        ({"head": {"forward": 1}}, "LinearHead has the settings none"),
        ({"nothing": {"x": 1}}, "nothing.x cannot be set"),
    ]:
        path.write_text(json.dumps({**config, "settings": settings}))
        with pytest.raises(SavedModelError, match=message):
            SegmentationModel.from_pretrained(tmp_path)
    for text in ("{", "[]", json.dumps({**config, "model": {**config["model"], "depth": 3}})):
        path.write_text(text)
        with pytest.raises(SavedModelError, match=r"config\.json (does not describe a model|cannot be read)"):
            SegmentationModel.from_pretrained(tmp_path)


def test_settings_of_inner_shifts_are_saved(tmp_path):
    options = {"learner": "linear", "shift": {"num_layers": 1, "kernel": "gaussian"}}
    model = create_model(
        "test_vit", "senformer", 3, pretrained=False, pyramid_kwargs={"out_channels": 16}, head_kwargs=options
    ).eval()
    images = torch.randn(1, 3, 40, 50)
    before = model(images)
    for shift in model.head.shifts:
        shift.num_layers, shift.bandwidth = 2, 0.05
    assert (model(images) - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SegmentationModel.from_pretrained(tmp_path)(images), model(images), rtol=0, atol=0)


def test_predict_gives_every_part_its_own_mode_back():
    model = create_model("test_resnet", "linear", 3, pretrained=False).train()
    model.backbone.eval()  # frozen statistics
    model.predict(torch.randn(1, 3, 64, 64))
    assert model.training
    assert not any(module.training for module in model.backbone.modules())


def test_a_save_that_fails_leaves_the_model_that_was_there(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("segheads.saving.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_and_pil_images_are_turned_upright(tmp_path):
    predictor = Predictor(create_model("test_vit", "linear", 3, pretrained=False))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = predictor(np.rot90(pixels, -1).copy())
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        found = predictor(image)
        assert found.image.size == (40, 60)
        assert torch.equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.image, np.rot90(pixels, -1))


def test_a_wide_pil_image_is_refused_rather_than_clipped():
    predictor = Predictor(create_model("test_vit", "linear", 3, pretrained=False))
    with pytest.raises(ValueError, match="16 bit a value, the largest is 4000"):
        predictor(Image.fromarray(np.full((40, 60), 4000, np.uint16)))
