"""The card of a model: what it says, and that text of users does nothing in it."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from runs import SMALL_RUN, build

from segheads import create_model
from segheads.card import Record, model_card, read_record, write_card_of
from segheads.card.card import CARD, addressed, is_edited
from segheads.card.text import code, escaped, fence, placeless
from segheads.classes import Classes
from segheads.data import DATASETS
from segheads.errors import RunError
from segheads.training import TrainingConfig, run_training
from segheads.training.machine import command_line

ODD = ("a|b", "<script>alert(1)</script>", "$x^2$", "[x](http://e.vil)", "two\nlines", "*bold* _it_", "\u202eabc", "🌳")


@pytest.fixture(scope="module")
def model():
    model = create_model("test_vit", "linear", len(ODD), pretrained=False)
    model.classes = Classes(ODD)
    return model


def results(*, iou=0.5):
    rows = [{"name": name, "IoU": iou * k / len(ODD), "Acc": 0.5, "pixels": k} for k, name in enumerate(ODD)]
    return {"aAcc": 0.75, "mAcc": 0.5, "mIoU": iou, "absent_classes": [], "classes": rows}


def run_of(**values):
    return {
        "dataset": "camvid",
        "pretrained": True,
        "iterations": 60,
        "batch_size": 8,
        "crop_size": [96, 128],
        **values,
    }


def test_text_of_users_shows_as_it_is_and_does_nothing(model):
    text = model_card(model, Record(results=results())).text
    assert "<script" not in text
    (table,) = re.findall(r"## Classes\n\n(.*?)\n\n?\Z", text, flags=re.DOTALL)
    rows = table.splitlines()[2:]
    assert len(rows) == len(ODD)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert [row.split(" | ")[1] for row in rows[1:]] == [
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        r"\$x^2\$",
        r"\[x\](http://e.vil)",
        "two lines",
        r"\*bold\* \_it\_",
        "abc",
        "🌳",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\\b", "a\\\\b"), ("# a", "\\# a"), ("~~a~~", "\\~\\~a\\~\\~"), ("&lt;", "&amp;lt;"), ("a\x00\x1bb", "a b")],
)
def test_escapes(text, expected):
    assert escaped(text) == expected


def test_code_ends_where_it_should():
    assert code("a`b\nc") == "`a'b c`"
    assert fence(["a ``` b", "c\nd"], "sh") == "````sh\na ``` b\nc d\n````"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/me/data/", "data"),
        ("--data-root=/home/me/my data", "--data-root=my data"),
        ("~/data", "data"),
        ("~me/data", "data"),
        ("C:\\Users\\me\\data", "data"),
        ("\\\\server\\share", "share"),
        ("file:///home/me/x.pth", "x.pth"),
        ("head(weights='/home/me/w.pth', n=1)", "head(weights='w.pth', n=1)"),
        ("data/camvid", "data/camvid"),
        ("OWNER/NAME@main", "OWNER/NAME@main"),
        ("ce + 0.5*dice", "ce + 0.5*dice"),
        ("1/4", "1/4"),
    ],
)
def test_paths_from_the_root_on_are_not_told(word, expected):
    assert placeless(word) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/segheads", "train"], ["segheads", "train"]),
        (["/lib/segheads/__main__.py", "train"], ["segheads", "train"]),
        (["recipes/segmenter_ade20k.py", "--demo"], ["python", "recipes/segmenter_ade20k.py", "--demo"]),
        (["/usr/lib/ipykernel_launcher.py", "-f", "x.json"], None),
        (["-c"], None),
    ],
)
def test_the_command_of_a_run(words, expected):
    assert command_line(words) == expected


def test_scores_stand_in_the_front_matter(model):
    card = ModelCard(str(model_card(model, Record(run_of(), results(iou=0.123456)))))
    first = card.data.eval_results[0]
    assert (first.metric_type, first.metric_value, first.metric_name) == ("mean_iou", 0.1235, "mIoU")
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("camvid", "CamVid", "val")
    assert card.data.metrics == ["mean_iou", "mean_accuracy", "accuracy"]
    assert card.data.get("license") is None


def test_without_scores_the_card_says_so(model):
    card = model_card(model, license="mit")
    assert "Not scored: nothing had been measured" in card.text
    assert (card.data.eval_results, card.data.license) == (None, "mit")
    assert not {"model_name", "metrics", "datasets", "base_model"} & card.data.to_dict().keys()


@pytest.mark.parametrize(
    ("run", "words", "base"),
    [
        ({}, "its backbone began from weights as of timm's test_vit.r160_in1k, whose licence is apache-2.0", "timm/"),
        ({"pretrained": False}, "It began from random weights.", None),
        ({"backbone_weights": "/home/me/w.pth"}, "It began from a file of weights whose terms are not known", None),
        ({"init_from": "runs/first", "environment": {"weights_from": "runs/first"}}, "a file of weights whose", None),
        ({"init_from": "me/x", "environment": {"weights_from": f"me/x@{'a' * 40}"}}, "as those of me/x@aaa", "me/x"),
        ({"pretrained": None}, "What it began from is not known here.", None),
    ],
)
def test_where_the_weights_began(model, run, words, base):
    card = model_card(model, Record(run_of(**run)))
    assert words.lower() in card.text.replace("\\", "").lower()
    assert (card.data.base_model or "").startswith(base or "")
    assert (card.data.base_model is None) == (base is None)
    assert "/home/me" not in card.text


def test_licences_that_python_knows_are_told(model):
    model.backbone.licence = "apache-2.0"
    assert "whose licence is apache-2.0" in model_card(model).text
    model.backbone.licence = None
    assert "What it began from is not known here" in model_card(model).text


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_words_for_its_terms(model, name):
    record = Record(run_of(dataset=name), results())
    text, terms = model_card(model, record).text, DATASETS[name].terms
    assert record.data in text
    if terms:
        assert f"has [terms of its own]({terms})" in text
    elif name == "scenes":
        assert "Its images were drawn by segheads." in text
        assert "it is a demonstration" in text
    else:
        assert "The terms of the images that it learned from are not known here." in text


def test_published_sets_have_terms_and_own_ones_have_none():
    assert {name for name, kind in DATASETS.items() if kind.terms is None} == {"scenes", "folder", "coco"}


def test_limits_name_the_worst_classes_and_what_flatters(model):
    text = model_card(model, Record(run_of(best="mIoU"), results())).text
    assert "It is worst at a\\|b (0.00), &lt;script&gt;alert(1)&lt;/script&gt; (6.25), \\$x^2\\$ (12.50)" in text
    assert "the best of several on the images of the scores" in text
    assert "the best of several" not in model_card(model, Record(run_of(), results())).text


def test_one_class_and_its_background():
    model = create_model("test_vit", "linear", 1, pretrained=False, loss="bce")
    model.classes = Classes.binary("house")
    text = model_card(model, Record(results={"mIoU": 0.5})).text
    assert "becomes the background, without a warning" in text
    assert "| threshold | 0.5 |" in text
    assert "| 1 | house |" in text


def test_a_stamp_tells_who_wrote(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text(encoding="utf-8")
    assert not is_edited(text)
    assert not is_edited(text.replace("\n", "\r\n"))
    assert not is_edited("")
    for other in (
        text.replace("Limits", "limits"),
        text + "Mine.",
        "# Mine",
        text.replace("tags:", "license: mit\ntags:"),
    ):
        assert is_edited(other)
        assert is_edited(addressed(other, "me/x", {"license": "mit"}))
    sent = addressed(text, "me/x", {"license": "mit"})
    assert not is_edited(sent)
    assert 'from_pretrained("me/x")' in sent


def test_saving_keeps_a_card_that_was_edited_and_renews_its_own(model, tmp_path, caplog):
    caplog.set_level("INFO", "segheads")
    model.save_pretrained(tmp_path)
    first = (tmp_path / CARD).read_text(encoding="utf-8")
    create_model("test_vit", "linear", 3, pretrained=False).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") != first
    (tmp_path / CARD).write_text("# Mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "# Mine"
    assert f"{tmp_path / CARD} was edited and is kept" in caplog.text


def broken(*_, **__):
    raise RuntimeError("no card\ntoday")


def test_a_card_that_cannot_be_made_fails_no_training(tmp_path, own_run, monkeypatch, caplog):
    monkeypatch.setattr("segheads.card.card.SECTIONS", (broken,))
    run_training(TrainingConfig.from_flat(**SMALL_RUN, output=tmp_path), build)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert f"{tmp_path / 'model' / CARD} is not written: no card today" in caplog.text


def test_a_run_keeps_the_card_that_was_edited(tmp_path, own_run):
    options = {**SMALL_RUN, "pictures": 1}
    run_training(TrainingConfig.from_flat(**options, output=tmp_path), build)
    path = tmp_path / "model" / CARD
    assert "on 100 images of drawn scenes (val), after 2 updates" in path.read_text(encoding="utf-8")
    assert {"predictions.jpg", "curves.jpg"} <= {file.name for file in path.parent.iterdir()}
    path.write_text("# Mine", encoding="utf-8")
    run_training(TrainingConfig.from_flat(**options, output=tmp_path, extend=3), build)
    assert path.read_text(encoding="utf-8") == "# Mine"


def test_damaged_files_of_a_run_are_named(model, tmp_path, caplog):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(RunError, match="results.json cannot be read"):
        read_record(tmp_path)
    (tmp_path / "model" / CARD).unlink()
    write_card_of(tmp_path, tmp_path / "model", model)
    assert "README.md is not written" in caplog.text
    (tmp_path / "results.json").write_text(json.dumps({"mIoU": "high", "classes": 3}))
    write_card_of(tmp_path, tmp_path / "model", model)
    assert "README.md is not written" in caplog.messages[-1] or (tmp_path / "model" / CARD).is_file()
