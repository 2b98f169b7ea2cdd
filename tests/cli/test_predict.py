"""`segheads predict`, from files, folders and patterns to a folder of labels."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from segheads import Predictor, create_model
from segheads.classes import Classes
from segheads.cli import main
from segheads.cli.predict import Views
from segheads.data import Scenes
from segheads.errors import DataError, DataMissingError, OptionError
from segheads.inference import InferenceProtocol
from segheads.labelling import Kinds, Record, Source, find_images, key_of, name_results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 3, pretrained=False)
    model.classes = Classes(("sky", "road", "car"))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("a.png", "city/a.png", "city/b.jpg")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Scenes("val", size=(24, 32)).read(index)[0].save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def labelled(monkeypatch):
    """Names of the files that a model was shown."""
    seen, original = [], Predictor._read

    def read(self, image, number=None):
        seen.append(image.name)
        return original(self, image, number)

    monkeypatch.setattr(Predictor, "_read", read)
    return seen


def predict(model, *words):
    """The exit status."""
    try:
        main(["predict", *map(str, words), "--model", str(model), "--output", "out", "--threads", "1"])
    except SystemExit as stop:
        return stop.code
    return 0


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_becomes_a_folder_of_labels(model, photos, tmp_path):
    assert predict(model, "photos", "--overlay", "--opacity", "1", "--probability", "--uncertainty") == 0
    names = ("a", "city/a", "city/b")
    kinds = {"labels": "png", "overlay": "jpg", "probability": "npy", "uncertainty": "png"}
    expected = [f"{kind}/{name}.{ending}" for kind, ending in kinds.items() for name in names]
    assert files(tmp_path / "out") == sorted([*expected, ".lock", "record.jsonl", "shares.csv"])
    predictor = Predictor.from_pretrained(model)
    for name, path in zip(names, sorted(photos.rglob("*.*")), strict=True):
        found = predictor(path, probability=True, uncertainty=True)
        with Image.open(tmp_path / "out" / "labels" / f"{name}.png") as written:
            assert (written.mode, written.getpalette()[:9]) == ("P", [x for c in found.classes.palette for x in c])
            np.testing.assert_array_equal(np.array(written), found.labels.numpy())
        probability = np.load(tmp_path / "out" / "probability" / f"{name}.npy")
        assert probability.dtype == np.float16
        np.testing.assert_allclose(probability, found.probability.numpy(), atol=1e-3)
        grey = np.array(Image.open(tmp_path / "out" / "uncertainty" / f"{name}.png"))
        np.testing.assert_allclose(grey, found.uncertainty.entropy.numpy() * 255 / np.log(3), atol=0.51)
        painted = np.array(Image.open(tmp_path / "out" / "overlay" / f"{name}.jpg")).astype(int)
        assert np.abs(painted - np.array(found.colours())).mean() < 30  # JPEG
    rows = list(csv.reader((tmp_path / "out" / "shares.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["name", "image", "width", "height", "sky", "road", "car"]
    assert rows[1][:4] == ["a", str(photos / "a.png"), "32", "24"]
    assert [sum(map(float, row[4:])) for row in rows[1:]] == pytest.approx([1, 1, 1], abs=1e-5)
    areas = {area.name: area.share for area in predictor(photos / "a.png").areas}
    assert [float(x) for x in rows[1][4:]] == pytest.approx([areas.get(x, 0) for x in rows[0][4:]], abs=1e-6)


def test_what_is_done_is_not_done_again(model, photos, tmp_path, labelled, capsys):
    assert predict(model, "photos", "--overlay") == 0
    assert len(labelled) == 3
    for changes, again in [
        ([], 0),
        (["--overlay", "--opacity", "0.3"], 3),
        (["--uncertainty"], 3),
        (["--scales", "0.5"], 3),  # another protocol: the pictures of the first are gone
        (["--scales", "0.5", "--redo"], 3),
    ]:
        labelled.clear()
        assert predict(model, "photos", *changes) == 0
        assert len(labelled) == again, changes
    assert not [name for name in files(tmp_path / "out") if name.startswith(("overlay", "uncertainty"))]
    labelled.clear()
    os.utime(photos / "a.png", ns=(1, 1))
    (tmp_path / "out" / "labels" / "city" / "b.png").unlink()
    with (tmp_path / "out" / "record.jsonl").open("a") as record:
        record.write('{"cut')
    predict(model, "photos", "--scales", "0.5")
    assert sorted(labelled) == ["a.png", "b.jpg"]
    labelled.clear()
    capsys.readouterr()
    predict(model, "photos", "--scales", "0.5")
    assert not labelled
    assert (
        "0 of 3 images to label, 3 are done; 1 process(es) on cpu, whole images, scales 0.5\n"
        in capsys.readouterr().out
    )


def test_another_model_labels_all_again(model, photos, tmp_path, labelled):
    predict(model, "photos/a.png")
    other = create_model("test_vit", "linear", 3, pretrained=False)
    other.save_pretrained(tmp_path / "other")
    predict(tmp_path / "other", "photos/a.png")
    assert labelled == ["a.png", "a.png"]
    keys = {key_of(Predictor(other)), key_of(Predictor(other, mixed_precision="bf16"))}
    other.head.classifier.bias.data += 1
    assert len(keys | {key_of(Predictor(other)), key_of(Predictor(other, classes=Classes(("a", "b", "c"))))}) == 4


def test_one_broken_file_stops_no_other(model, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no image")
    assert predict(model, "photos") == 1
    out, error = capsys.readouterr()
    assert "3 labelled, 0 were done before, 1 failed; results are in out" in out
    assert error.startswith(f"error: {photos / 'broken.jpg'} (8 bytes) cannot be read as an image")
    assert predict(model, "photos", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["labelled"], told["unchanged"], told["output"]) == (0, 3, "out")
    assert [entry["input"] for entry in told["failed"]] == [str(photos / "broken.jpg")]


def test_a_result_that_cannot_be_written_is_not_there(model, photos, tmp_path, monkeypatch, capsys):
    original = Image.Image.save

    def full(self, path, *others, **options):
        original(self, path, *others, **options)
        if "b.png" in str(path):
            raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    assert predict(model, "photos") == 1
    assert "b.jpg: no space left" in capsys.readouterr().err
    assert [name for name in files(tmp_path / "out") if "labels" in name] == ["labels/a.png", "labels/city/a.png"]


def test_words_become_images(photos, tmp_path):
    for name in (".hidden.jpg", "notes.txt", "out/labels/a.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()

    def found(*words):
        return [path.relative_to(photos).as_posix() for path in find_images(words, photos / "out")]

    assert found("photos") == ["a.png", "city/a.png", "city/b.jpg"]
    assert found("photos/city/b.jpg", "photos", "photos/notes.txt") == [
        "city/b.jpg",
        "a.png",
        "city/a.png",
        "notes.txt",
    ]
    assert found("photos/**/*.*") == ["a.png", "city/a.png", "city/b.jpg"]
    assert found("photos/c*") == ["city/a.png", "city/b.jpg"]
    (photos / "odd[1].png").touch()
    assert found("photos/odd[1].png") == ["odd[1].png"]
    for word, message in [
        ("photos/none.jpg", "there is no photos/none.jpg; give image files, folders or patterns"),
        ("photos/*.gif", r"nothing fits the pattern photos/\*\.gif; give"),
    ]:
        with pytest.raises(DataMissingError, match=message):
            found(word)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no image files in empty; give files, folders or patterns"):
        found("empty")
    (photos / "city" / "loop").symlink_to(photos)
    with pytest.raises(DataError, match="a loop without end"):
        found("photos")


def test_names_keep_sub_folders_and_never_collide(tmp_path):
    def named(*paths, known=()):
        sources = name_results([tmp_path / path for path in paths], {str(tmp_path / p): {"name": n} for p, n in known})
        return [source.name for source in sources]

    assert named("a/1.jpg", "a/2.jpg") == ["1", "2"]
    assert named("a/1.jpg", "b/1.jpg") == ["a/1", "b/1"]
    assert named("a/1.jpg", "a/1.png", "a/sub/1.png") == ["1.jpg", "1.png", "sub/1"]
    assert named("1.jpg", "1.JPG") == ["1.jpg", "1.JPG_"]  # one file where the system takes no notice of capitals
    assert named("a/1.jpg", "b/2.jpg", known=[("a/1.jpg", "1")]) == ["1", "b/2"]
    assert named("b/1.jpg", known=[("a/1.jpg", "1")]) == ["1.jpg"]
    assert named("b/1.jpg", known=[("a/1.jpg", "1"), ("c/1.jpg", "1.jpg")]) == ["1.jpg_"]


def test_a_record_of_half_done_work_does_not_count(model, photos, tmp_path):
    """A kill between the first and the last file of an image, by another model than before."""
    predict(model, "photos/a.png", "--overlay")
    key, source = key_of(Predictor.from_pretrained(model)), Source(photos / "a.png", "a")
    wanted = Kinds(overlay=True).wanted()
    assert Record.read(tmp_path / "out", key).is_done(source, wanted)
    Record.read(tmp_path / "out", "another").begin(source)
    assert not Record.read(tmp_path / "out", key).is_done(source, wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no INPUT was given"),
        (["photos", "--opacity", "2"], "opacity must be 0 to 1; got 2.0"),
        (["photos", "--batch-size", "0"], "batch_size must be 1 or more; got 0"),
        (["photos", "--workers", "-1"], "workers must be 0 or more; got -1"),
        (["photos", "--device", "gpu"], "--device gpu cannot be used: "),
        (["photos", "--output", "photos/a.png"], "--output photos/a.png is a file; give a folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(model, photos, tmp_path, capsys, words, message):
    out = [] if "--output" in words else ["--output", "out"]
    with pytest.raises(SystemExit) as stop:
        main(["predict", *words, "--model", str(model), *out])
    assert stop.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_views_are_the_models_own_but_for_what_is_given():
    own = InferenceProtocol(scale=(64, 48), window=32, stride=24, flip=True)
    assert Views().of(own) == own
    assert Views(scales=(0.5, 1.0), threshold=0.3).of(own).scales == (0.5, 1.0)
    assert Views(window=40).of(own) == InferenceProtocol(scale=(64, 48), window=40, flip=True)
    assert Views(whole=True).of(own) == InferenceProtocol(scale=(64, 48), flip=True)
    assert Views(stride=16).of(own).stride == 16
    for views, message in [
        (Views(whole=True, window=32), "--whole shows no windows, and --window and --stride do; leave one out"),
        (Views(whole=False, stride=40), r"stride must be at most the window \(32, 32\), got \(40, 40\)"),
    ]:
        with pytest.raises(OptionError, match=message):
            views.of(own)


HOLD = """import sys
from segheads.locks import only_process
with only_process(sys.argv[1], "folder of results"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_one_in_a_folder_is_refused(model, photos, tmp_path, capsys):
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii") as first:
        assert first.stdout.readline() == "held\n"
        assert predict(model, photos) == 2
        first.stdin.close()
    assert "out is in use, a folder of results of process" in capsys.readouterr().err
    assert predict(model, photos) == 0


def test_results_are_no_images_by_whatever_link_they_are_found(model, photos, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    main(["predict", "link", "--model", str(model), "--output", str(photos / "out")])
    assert len(find_images(["link", "link/**/*"], photos / "out")) == 3
