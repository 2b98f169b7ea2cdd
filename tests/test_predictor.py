"""From an image in any form to labels at its own size."""

import json
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import segheads.predictor as predictor_module
from segheads import Prediction, Predictor, SegmentationModel, create_model
from segheads.classes import Classes
from segheads.data import Scenes, to_input
from segheads.data.limits import pixel_limit
from segheads.errors import DataError, ImageFormError, SavedModelError, SavedModelMissingError, ScoresError
from segheads.inference import InferenceProtocol, predict_labels, predict_probabilities, predict_uncertainty

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


def test_bytes_are_read_as_the_file_is(model, photo, tmp_path):
    predictor = Predictor(model)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for path in (tmp_path / "turned.jpg", tmp_path / "pixels.npy", tmp_path / "a.tif"):
        if path.suffix == ".npy":
            np.save(path, np.array(photo))
        elif path.suffix == ".tif":
            photo.save(path)
        found = predictor(path.read_bytes())
        assert torch.equal(found.labels, predictor(path).labels)
        assert found.image.size == ((80, 120) if path.suffix == ".jpg" else (120, 80))
    with pytest.raises(DataError, match=r"^given \(8 bytes\) cannot be read as an image"):
        predictor(b"no image")
    with pytest.raises(DataError, match="^given .*cannot be read as an image"):
        predictor((tmp_path / "turned.jpg").read_bytes()[:900])


def test_several_images_are_as_each_alone_and_the_model_sees_them_together(model, photo, monkeypatch):
    calls, original = [], model.low_resolution
    monkeypatch.setattr(type(model), "low_resolution", lambda self, x: calls.append(len(x)) or original(x))
    upright = photo.transpose(Image.Transpose.ROTATE_90)
    images = [photo, np.array(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), upright, photo]
    for protocol, batches in [
        (InferenceProtocol(), [3, 1]),  # whole images of one size
        (InferenceProtocol(scale=(96, 64), window=48, stride=32), [8, 8, 4]),  # 6, 6, 6 and 6 windows but for overlap
        (InferenceProtocol(scales=(1.0, 0.5), flip=True), [3, 1] * 4),
    ]:
        predictor = Predictor(model, protocol=protocol)
        calls.clear()
        together = predictor(images, confidence=True)
        assert sum(calls) == sum(batches) if protocol.window is None else max(calls) == 8
        assert protocol.window is not None or calls == batches
        for found, image in zip(together, images, strict=True):
            alone = predictor(image, confidence=True)
            assert (found.labels != alone.labels).float().mean() < 1e-3
            torch.testing.assert_close(found.confidence, alone.confidence, rtol=1e-4, atol=1e-5)
            assert found.image.size == alone.image.size
    assert predictor([]) == []


def test_probability_and_entropy_are_those_of_the_logits(model, photo):
    for protocol in (InferenceProtocol(), InferenceProtocol(scales=(0.5, 1.0), flip=True)):
        found = Predictor(model, protocol=protocol)(photo, confidence=True, probability=True, uncertainty=True)
        x = to_input(photo, model.data_config["mean"], model.data_config["std"])
        expected = predict_probabilities(model, x, protocol)
        torch.testing.assert_close(found.probability, expected)
        torch.testing.assert_close(found.confidence, expected.amax(0))
        assert torch.equal(found.labels, Predictor(model, protocol=protocol)(photo).labels)
        torch.testing.assert_close(found.uncertainty.entropy, -(expected * expected.log()).sum(0))
        assert not found.uncertainty.disagreement.any()
    plain = Predictor(model)(photo)
    assert (plain.confidence, plain.probability, plain.uncertainty) == (None, None, None)


def test_a_model_of_one_class_is_unsure_where_its_probability_is_a_half(photo):
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 1, pretrained=False, loss="bce")
    found = Predictor(model)(photo, confidence=True, probability=True, uncertainty=True)
    p = found.probability
    assert p.shape == (1, 80, 120)
    torch.testing.assert_close(found.confidence, torch.where(found.labels == 1, p[0], 1 - p[0]))
    doubt = torch.special.entr(torch.cat([p, 1 - p])).sum(0)
    torch.testing.assert_close(found.uncertainty.entropy, doubt)
    assert doubt.max() <= math.log(2) + 1e-6


def test_an_ensemble_tells_where_its_learners_disagree(photo):
    torch.manual_seed(0)
    small = {"pyramid_kwargs": {"out_channels": 16}, "head_kwargs": {"learner": "linear"}}
    model = create_model("test_vit", "senformer", 3, pretrained=False, **small)
    model.protocol = InferenceProtocol(window=48, stride=32)
    (found,) = Predictor(model)([photo], uncertainty=True)
    x = to_input(photo, model.data_config["mean"], model.data_config["std"])
    torch.testing.assert_close(found.uncertainty, predict_uncertainty(model, x, model.protocol))
    assert found.uncertainty.mutual_information.any()


def test_an_image_that_fails_stops_no_other(model, photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    given = [tmp_path / "good.png", tmp_path / "bad.png", np.zeros((4, 4)), photo, tmp_path / "none.png"]
    for workers in (0, 2):
        found = list(Predictor(model).stream(given, workers=workers))
        assert [getattr(one, "labels", None) is not None for one in found] == [True, False, False, True, False]
        assert str(found[1]).startswith(f"{tmp_path / 'bad.png'} (8 bytes) cannot be read")
        assert str(found[2]).startswith("image 2: an image must be a path, bytes, ")
        assert isinstance(found[4], FileNotFoundError)
    with pytest.raises(DataError, match=r"bad\.png"):
        Predictor(model)(given)
    from segheads import predictor

    original = predictor.views_of_images

    def short_of_memory(model, images, *others, **options):
        if len(images) > 1:
            raise torch.OutOfMemoryError("too many")
        return original(model, images, *others, **options)

    monkeypatch.setattr(predictor, "views_of_images", short_of_memory)
    first, second = Predictor(model)([photo, photo])
    assert torch.equal(first.labels, second.labels)


def test_a_group_holds_no_more_values_than_memory_has_room_for(model, photo, monkeypatch):
    sizes = []
    original = Predictor._views
    monkeypatch.setattr(Predictor, "_views", lambda self, inputs: sizes.append(len(inputs)) or original(self, inputs))
    monkeypatch.setattr("segheads.predictor.MOST_VALUES", 2 * 3 * 64 * 96)
    Predictor(model, batch_size=4)([photo] * 5)
    assert sizes == [2, 2, 1]


def test_device_and_precision(model, photo):
    exact = Predictor(model)(photo).labels
    half = Predictor(model, device="cpu", mixed_precision="bf16")(photo, confidence=True)
    assert half.confidence.dtype == torch.float32
    assert 0 < (half.labels != exact).float().mean() < 0.05
    assert (Predictor(model.bfloat16())(photo).labels != exact).float().mean() < 0.1
    with pytest.raises(ValueError, match="mixed_precision must be one of no, bf16, fp16; got 'fp8'"):
        Predictor(model, mixed_precision="fp8")
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        Predictor(model, batch_size=0)


def test_areas_and_what_a_notebook_shows(photo):
    labels = torch.zeros(80, 120, dtype=torch.long)
    labels[:20] = 2
    prediction = Prediction(photo, labels, Classes(("sky", "road", "<car>")))
    assert prediction.areas == ((0, "sky", 7200, 0.75), (2, "<car>", 2400, 0.25))
    assert repr(prediction) == "Prediction(120 x 80: sky 75.0%, <car> 25.0%)"
    shown = Image.open(BytesIO(prediction._repr_png_()))
    np.testing.assert_array_equal(np.array(shown), np.array(prediction.overlay()))
    text = prediction._repr_html_()
    assert "&lt;car&gt; 25.0%" in text
    assert "road" not in text
    assert f"background:rgb{prediction.classes.palette[2]}" in text
    large = Prediction(photo.resize((3000, 2000)), torch.zeros(2000, 3000, dtype=torch.long), prediction.classes)
    assert Image.open(BytesIO(large._repr_png_())).size == (1024, 683)


def test_above_256_classes_labels_are_a_png_of_16_bit(photo, tmp_path):
    labels = torch.arange(9600).view(80, 120) % 300
    Prediction(photo, labels, Classes.numbered(300)).save(tmp_path / "new" / "labels.png")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "new" / "labels.png")), labels.numpy())


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

    monkeypatch.setattr("segheads.weights_file.save_file", full)
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


def test_a_limit_of_pixels_reaches_the_threads_that_read(model, photo, tmp_path):
    photo.save(tmp_path / "a.png")
    for workers in (0, 2):
        with pixel_limit(10):
            (found,) = Predictor(model).stream([tmp_path / "a.png"], workers=workers)
        assert isinstance(found, ImageFormError)


def test_bytes_that_are_no_image_are_named_by_their_number(model, photo):
    (_, found) = Predictor(model).stream([photo, b"nonsense"])
    assert str(found).startswith("image 1: given (8 bytes) cannot be read as an image: ")
    assert " at 0x" not in str(found)


def test_an_image_too_large_for_memory_stops_no_other(model, photo, monkeypatch):
    views, large = predictor_module.views_of_images, photo.resize((200, 160))

    def short(model, images, sizes, *arguments, **options):
        if (160, 200) in sizes:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return views(model, images, sizes, *arguments, **options)

    monkeypatch.setattr(predictor_module, "views_of_images", short)
    kinds = [type(found) for found in Predictor(model).stream([photo, large, photo])]
    assert kinds == [Prediction, RuntimeError, Prediction]
