"""What the page shows of an image, saves and says, without a browser."""

import base64
import json
import math
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from segheads import Predictor, create_model
from segheads.classes import Classes
from segheads.cli import main
from segheads.data import Scenes
from segheads.errors import OptionError
from segheads.page.controls import Choice
from segheads.page.views import Viewer, kept, overlay_without, save, shown, words_of
from segheads.prediction import Prediction

NAMES = ("<b>sky</b>", "a & b", '"it\'s"', "x" * 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("test_vit", "mean_shift", 4, pretrained=False)
    model.classes = Classes(NAMES)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def viewer(model):
    return Viewer(Predictor.from_pretrained(model), max_pixels=50_000)


@pytest.fixture
def photo(tmp_path):
    """A photograph that was taken upright, with a palette and transparency besides."""
    image = Scenes("val", size=(48, 64)).read(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image.quantize(16).save(tmp_path / "palette.png", transparency=0)
    image.convert("L").save(tmp_path / "grey.png")
    return tmp_path / "photo.jpg"


def unpacked(text, kind, size):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind).reshape(size[1], size[0])


@pytest.mark.parametrize("name", ["photo.jpg", "palette.png", "grey.png"])
def test_labels_are_those_of_the_command(model, viewer, photo, name, tmp_path, monkeypatch):
    path = photo.with_name(name)
    answer, found = viewer.answer(path, {})
    monkeypatch.chdir(tmp_path)
    main(["predict", str(path), "--model", str(model), "--output", "out", "--threads", "1"])
    written = (tmp_path / "out" / "labels" / f"{path.stem}.png").read_bytes()
    assert save(found, tmp_path, name, kind="labels", opacity=0, hidden=[]).read_bytes() == written
    expected = Predictor.from_pretrained(model)(path)
    assert answer["size"] == answer["shown"] == list(expected.image.size)
    np.testing.assert_array_equal(unpacked(answer["labels"], np.uint8, answer["shown"]), expected.labels.numpy())
    assert [entry["label"] for entry in answer["classes"]] == [area.label for area in expected.areas]


def test_what_is_sent_is_json_with_names_as_they_are(viewer, photo):
    answer, _ = viewer.answer(photo, {"layers": 2, "bandwidth": 0.5})
    read = json.loads(json.dumps(answer, allow_nan=False))
    assert read["name"] == "photo.jpg"
    assert {entry["name"] for entry in read["classes"]} <= set(NAMES)
    picture = Image.open(BytesIO(base64.b64decode(read["image"].partition(",")[2])))
    assert list(picture.size) == read["shown"]


def test_uncertainty_is_in_steps_of_the_highest_there_can_be(viewer, photo):
    found = viewer.predict(photo, Choice())
    (entropy,) = shown(found, "photo")["maps"]
    assert entropy["most"] == math.log(4)
    values = unpacked(entropy["values"], np.uint8, found.image.size) * (entropy["most"] / 255)
    np.testing.assert_allclose(values, found.uncertainty.entropy.numpy(), atol=entropy["most"] / 500)


def test_an_ensemble_has_three_maps(photo):
    torch.manual_seed(0)
    model = create_model("test_convnext", "senformer", 4, pretrained=False, head_kwargs={"learner": "linear"})
    answer, _ = Viewer(Predictor(model)).answer(photo, {"levels": [0, 2], "merge": "product"})
    assert {x["name"]: x["most"] for x in answer["maps"]} == {
        "entropy": math.log(4),
        "mutual_information": math.log(4),
        "disagreement": math.log(4),
    }


def test_a_large_image_is_sampled_and_what_is_saved_is_whole(tmp_path):
    labels = torch.arange(4096).repeat(3, 1) // 2048
    image = Image.new("RGB", (4096, 3))
    found = Prediction(image, labels, Classes(("left", "right")))
    answer = shown(found, "wide")
    assert (answer["size"], answer["shown"], answer["maps"]) == ([4096, 3], [2048, 2], [])
    assert unpacked(answer["labels"], np.uint8, answer["shown"]).mean() == 0.5
    with Image.open(save(kept(found), tmp_path, "wide.jpg", kind="labels", opacity=1, hidden=[])) as written:
        np.testing.assert_array_equal(np.array(written), labels.numpy())


def test_more_than_256_classes_take_two_bytes(tmp_path):
    labels = torch.tensor([[0, 299], [256, 1]])
    found = Prediction(Image.new("RGB", (2, 2)), labels, Classes.numbered(300))
    answer = shown(found, "many")
    assert answer["bytes"] == 2
    np.testing.assert_array_equal(unpacked(answer["labels"], "<u2", (2, 2)), labels.numpy())
    with Image.open(save(kept(found), tmp_path, "many", kind="labels", opacity=1, hidden=[])) as written:
        np.testing.assert_array_equal(np.array(written), labels.numpy())


def test_a_session_keeps_little(viewer, photo):
    found = kept(viewer.predict(photo, Choice()))
    assert found.labels.dtype == torch.uint8
    assert found.uncertainty is None


@pytest.mark.parametrize("background", [False, True])
def test_hidden_classes_are_left_unpainted(background):
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    palette = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
    classes = Classes(("none", "red", "green"), palette, has_background=background)
    found = kept(Prediction(image, torch.tensor([[0, 1, 2]]), classes))
    painted = np.array(overlay_without(found, 0.5, [2]))
    assert painted.tolist() == [[[100] * 3 if background else [50] * 3, [150, 50, 50], [100] * 3]]
    assert overlay_without(found, 0.5, []).tobytes() == found.overlay(0.5).tobytes()
    with pytest.raises(OptionError, match="^opacity must be 0 to 1; got 2$"):
        overlay_without(found, 2, [])


def test_only_what_there_is_can_be_saved(tmp_path):
    found = Prediction(Image.new("RGB", (1, 1)), torch.zeros(1, 1, dtype=torch.long), Classes.numbered(2))
    with pytest.raises(OptionError, match="^labels or overlay can be saved; got ../../secret$"):
        save(found, tmp_path, "a.png", kind="../../secret", opacity=1, hidden=[])
    with pytest.raises(OptionError, match="^there is nothing to save; choose an image first$"):
        save(None, tmp_path, None, kind="labels", opacity=1, hidden=[])
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_images_are_told_by_name_alone(viewer, photo, tmp_path):
    (tmp_path / "text.jpg").write_text("no image", encoding="utf-8")
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:700])
    Image.new("RGB", (400, 400)).save(tmp_path / "large.png")
    words = {
        "text.jpg": "text.jpg (8 bytes) cannot be read as an image: cannot identify image file; replace",
        "cut.jpg": "cut.jpg (700 bytes) cannot be read as an image: ",
        "large.png": "large.png is an image of 400 x 400, 160,000 pixels, and 50,000 are the most that are decoded; ",
        "gone.png": "there is no gone.png, which should be an image",
    }
    for name, begin in words.items():
        answer, found = viewer.answer(tmp_path / name, {})
        assert found is None
        assert answer["error"].startswith(begin)
        assert str(tmp_path) not in answer["error"]
    assert viewer.answer(photo, {"layers": 99})[0] == {"error": "mean shift layers must be 0 to 8; got 99"}


def test_a_bug_is_no_stack_trace_on_the_page(caplog):
    assert words_of(KeyError("secret")).startswith("This failed for a reason that the page does not know")
    assert "KeyError: 'secret'" in caplog.text
    assert words_of(MemoryError()) == "The memory does not hold this image (out of memory); take a smaller one."
    assert "take a smaller one" in words_of(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


def test_a_threshold_of_one_class(photo):
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 1, pretrained=False, loss="bce")
    viewer = Viewer(Predictor(model))
    low, high = (viewer.predict(photo, Choice(threshold=x)).labels.sum() for x in (0.01, 0.99))
    assert low > high
    assert viewer.predictor.protocol.threshold == 0.5
