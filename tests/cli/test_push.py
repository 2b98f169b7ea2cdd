"""`segheads push`: what a run and a saved model become on a local server that speaks the hub's API."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hub_server import OWNER
from huggingface_hub import ModelCard
from miniatures import own_folder
from safetensors.torch import load_file, save_file

from segheads import Predictor, SegmentationModel, create_model
from segheads.card.card import CARD, is_edited
from segheads.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=")  # huggingface_hub's own way to send a file
RECIPE = Path("push.py")
NAME = f"{OWNER}/tiny"
ODD = ("a|b", "<b>*bold*</b>", "$x$ `y` [z](http://e.vil)", "two\nlines 🌳", "---", "no: 'yaml' # {here}")
SMALL = ["--backbone", "test_vit", "--no-pretrained", "--crop-size", "32", "--scale", "48", "40", "--batch-size", "2"]
SMALL += ["--iterations", "2", "--workers", "0", "--threads", "1", "--pictures", "1", "--evaluate-every", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on classes with odd names, started by a command."""
    root = tmp_path_factory.mktemp("machine of its own")
    data, out = own_folder(root / "own data", tuple(range(len(ODD)))), root / "run"
    words = ["train", "--data-root", str(data), "--output", str(out), *SMALL, "--class-names", *ODD]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/usr/bin/segheads", *words])
        main(words)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def saved(tmp_path):
    """The folder of a model that no run made."""
    create_model("test_vit", "linear", 2, pretrained=False).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def push(*words):
    main(["push", *map(str, words)])


def refused(capsys, *words):
    """The line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        push(*words)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_comes_back_by_its_name(hub, run, capsys):
    push(run, NAME, "--message", "the first")
    files = hub.files(NAME)
    pictures = {"predictions.jpg", "curves.jpg"}
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors", *pictures}
    (commit,) = [key for key, words in hub.repos[NAME].messages.items() if words == "the first"]
    said = capsys.readouterr().out
    assert f"to {hub.url}/{NAME}, public: README.md (" in said
    assert f"{hub.url}/{NAME}\ncommit {commit}: {hub.url}/{NAME}/commit/{commit}\n" in said
    mine, theirs = SegmentationModel.from_pretrained(run / "model"), SegmentationModel.from_pretrained(NAME)
    for key, value in mine.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[key], value, rtol=0, atol=0)
    assert (theirs.classes, theirs.protocol) == (mine.classes, mine.protocol)
    assert theirs.classes.names == ODD
    image = next((run.parent / "run").glob("predictions.png"))
    labels = Predictor.from_pretrained(f"{NAME}@{commit}")(image).labels
    torch.testing.assert_close(labels, Predictor.from_pretrained(run)(image).labels)


def test_the_card_tells_scores_and_terms(hub, run):
    push(run, NAME, "--licence", "cc-by-4.0")
    card, results = ModelCard(hub.files(NAME)[CARD].decode()), json.loads((run / "results.json").read_text())
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "segheads")
    assert card.data.model_name == "tiny"
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {key: round(results[key], 4) for key in ("mIoU", "mAcc", "aAcc")}
    assert f"| {100 * results['mIoU']:.2f} | {100 * results['mAcc']:.2f} | {100 * results['aAcc']:.2f} |" in card.text
    assert "In percent, on 2 images of its author's own data (val), after 2 updates." in card.text
    assert "| resized into | 48 x 40 |" in card.text
    assert f'Predictor.from_pretrained("{NAME}")("photo.jpg")' in card.text
    assert "](predictions.jpg)" in card.text
    assert "began from random weights" in card.text
    assert "OWNER/NAME" not in card.text
    assert not is_edited(hub.files(NAME)[CARD].decode())


def test_without_a_licence_none_is_claimed(hub, run):
    push(run, NAME)
    card = ModelCard(hub.files(NAME)[CARD].decode())
    assert card.data.license is None
    assert "without that, none was given" in card.text


def test_nothing_of_the_users_machine_is_uploaded(hub, run, trained):
    config = json.loads((run / "config.json").read_text())
    assert str(trained.parent) in config["data_root"]
    assert config["environment"]["command"][:2] == ["segheads", "train"]
    push(run, NAME)
    for name, content in hub.files(NAME).items():
        for place in (trained.parent, run.parent, Path.home()):
            assert str(place).encode() not in content or str(place) == "/", name
    assert "segheads train --data-root 'own data' --output run --backbone test_vit" in hub.files(NAME)[CARD].decode()


def test_pictures_can_stay_at_home(hub, run):
    push(run, NAME, "--no-pictures")
    assert not [name for name in hub.files(NAME) if name.endswith("jpg")]
    assert "jpg)" not in hub.files(NAME)[CARD].decode()


def test_a_card_that_was_edited_is_uploaded_as_it_is(hub, run):
    path = run / "model" / CARD
    text = path.read_text(encoding="utf-8").replace("## Limits", "I like it.\n\n## Limits")
    path.write_text(text, encoding="utf-8")
    push(run, NAME)
    assert hub.files(NAME)[CARD].decode() == text.replace("OWNER/NAME", NAME)
    path.write_text(text + "More words.\n", encoding="utf-8")  # again, which is no reason to keep the hub's
    push(run, NAME, "--licence", "mit")
    assert "More words." in hub.files(NAME)[CARD].decode()
    assert ModelCard(hub.files(NAME)[CARD].decode()).data.license == "mit"
    push(run, NAME, "--new-card")
    assert "I like it." not in hub.files(NAME)[CARD].decode() + path.read_text(encoding="utf-8")


def test_the_folder_of_the_runs_model_is_the_run(hub, run):
    push(run / "model", NAME)
    assert "| mIoU |" in hub.files(NAME)[CARD].decode()


def test_a_copy_of_the_runs_model_keeps_its_card(hub, run, tmp_path):
    copy = shutil.copytree(run / "model", tmp_path / "copy")
    push(copy, NAME)
    assert "| mIoU |" in hub.files(NAME)[CARD].decode()
    assert "predictions.jpg" in hub.files(NAME)


def test_a_run_of_an_older_version_gets_a_card(hub, run):
    for path in (run / "model").iterdir():
        if path.suffix == ".jpg":
            path.unlink()
    old = "---\nlibrary_name: segheads\n---\n\nThis model has been pushed to the Hub using the [PytorchModelHubMixin]"
    (run / "model" / CARD).write_text(old + "(https://huggingface.co) integration:\n", encoding="utf-8")
    push(run, NAME)
    assert "| mIoU |" in hub.files(NAME)[CARD].decode()
    assert "curves.jpg" in hub.files(NAME)


def test_a_saved_model_is_scored_by_its_evaluation(hub, saved):
    push(saved, NAME)
    assert "Not scored" in hub.files(NAME)[CARD].decode()
    results = {
        "protocol": {"model": str(saved), "dataset": "camvid", "split": "test", "images": 233, "scales": [1.0]},
        **{"aAcc": 0.9, "mAcc": 0.6, "mIoU": 0.5, "absent_classes": ["b"]},
        "classes": [{"name": "a", "IoU": 0.5, "Acc": 0.6, "pixels": 10}, {"name": "b", "IoU": None, "pixels": 0}],
    }
    path = saved / "evaluation" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(results))
    push(saved, NAME)
    card = hub.files(NAME)[CARD].decode()
    assert "on 233 images of CamVid (test)" in card
    assert "mIoU leaves out the classes that do not occur: b." in card
    assert str(saved) not in card
    os.utime(path, (0, 0))  # older than the weights
    (saved / CARD).unlink()
    push(saved, NAME)
    assert "Not scored" in hub.files(NAME)[CARD].decode()


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_not_uploaded(hub, saved, capsys, damage):
    (saved / damage).write_bytes((saved / damage).read_bytes()[:100])
    assert damage in refused(capsys, saved, NAME)
    assert hub.asked == []


def test_weights_that_are_not_finite_are_not_uploaded(hub, saved, capsys):
    state = load_file(saved / "model.safetensors")
    state["head.classifier.weight"][0] = torch.inf
    save_file(state, saved / "model.safetensors")
    assert "are NaN or infinite" in refused(capsys, saved, NAME)
    assert hub.asked == []


def test_what_is_no_model(hub, tmp_path, capsys):
    assert "is no folder; give that of a run" in refused(capsys, tmp_path / "nothing", NAME)
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused(capsys, tmp_path / "empty", NAME)
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert "has no folder model yet" in refused(capsys, tmp_path / "empty", NAME)
    assert hub.asked == []


def test_the_line_that_a_push_ends_with(hub, saved, capsys, monkeypatch):
    assert "'a/b/c' is no name on the hub" in refused(capsys, saved, "a/b/c")
    assert "the hub answers 403" in refused(capsys, saved, "others/theirs")
    hub.fails = {"/commit/": 503}
    assert refused(capsys, saved, NAME).endswith("try again later")
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token" in refused(capsys, saved, NAME)
    monkeypatch.setenv("HF_TOKEN", "x")
    hub.close()
    assert "is out of reach" in refused(capsys, saved, NAME)


def test_private_branches_and_pull_requests(hub, saved, capsys):
    push(saved, NAME, "--private", "--branch", "longer")
    assert hub.repos[NAME].private
    assert "model.safetensors" in hub.files(NAME, "longer")
    assert "model.safetensors" not in hub.files(NAME)
    capsys.readouterr()
    push(saved, NAME, "--create-pr")
    said = capsys.readouterr().out
    assert f"{NAME}, private: " in said
    assert f"{hub.url}/{NAME}/discussions/1" in said
