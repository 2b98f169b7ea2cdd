"""Uploads to and downloads from a local server that speaks the hub's API."""

import numpy as np
import pytest
import torch
from hub_server import OWNER, TOKEN, Repo
from PIL import Image

from segheads import Predictor, SegmentationModel, create_model
from segheads.card.card import CARD
from segheads.classes import Classes
from segheads.cli import main as segheads
from segheads.errors import HubError, OptionError, SavedModelError, SavedModelMissingError

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=")  # huggingface_hub's own way to send a file
NAME = f"{OWNER}/tiny"
SMALL = {"model_kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 1}}
FILES = {".gitattributes", "README.md", "config.json", "model.safetensors"}


def tiny(seed=0, classes=3):
    torch.manual_seed(seed)
    model = create_model("test_vit", "linear", classes, pretrained=False, backbone_kwargs=SMALL).eval()
    model.classes = Classes(tuple(f"class {k}" for k in range(classes)))
    return model


def assert_same(model, other):
    expected = model.state_dict()
    assert expected.keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_a_model_comes_back_as_it_was_by_name_and_by_revision(hub):
    first, second = tiny(0), tiny(1)
    commits = [model.push_to_hub(NAME, commit_message=f"number {k}") for k, model in enumerate((first, second))]
    assert commits == [f"{hub.url}/{NAME}/commit/{commit.oid}" for commit in commits]
    assert hub.files(NAME).keys() == FILES
    assert list(hub.repos[NAME].messages.values()) == ["initial commit", "number 0", "number 1"]
    images = torch.randn(1, 3, 40, 56)
    for model, commit in zip((first, second), commits, strict=True):
        for loaded in (
            SegmentationModel.from_pretrained(NAME, revision=commit.oid),
            SegmentationModel.from_pretrained(f"{NAME}@{commit.oid}"),
        ):
            assert_same(model, loaded)
            assert (loaded.revision, loaded.classes) == (commit.oid, model.classes)
            torch.testing.assert_close(loaded.predict(images), model.predict(images), rtol=0, atol=0)
    newest = SegmentationModel.from_pretrained(NAME)
    assert_same(second, newest)
    assert newest.revision == commits[1].oid != commits[0].oid


def test_the_same_again_makes_no_commit(hub):
    model = tiny()
    first, second = model.push_to_hub(NAME), model.push_to_hub(NAME)
    assert first.oid == second.oid
    assert len(hub.repos[NAME].commits) == 2


def test_a_bare_name_is_of_the_tokens_account(hub):
    tiny().push_to_hub("tiny")
    assert f'Predictor.from_pretrained("{NAME}")' in hub.files(NAME)[CARD].decode()


def test_saving_can_push(hub, tmp_path):
    tiny().save_pretrained(tmp_path / "here", repo_id=NAME, push_to_hub=True, model_card_kwargs={"license": "mit"})
    assert "\nlicense: mit\n" in hub.files(NAME)[CARD].decode()
    assert "OWNER/NAME" in (tmp_path / "here" / CARD).read_text(encoding="utf-8")


def test_private_repositories(hub, monkeypatch):
    tiny().push_to_hub(NAME, private=True)
    assert hub.repos[NAME].private
    assert SegmentationModel.from_pretrained(NAME).revision
    monkeypatch.setenv("HF_TOKEN", "")
    assert SegmentationModel.from_pretrained(NAME, token=TOKEN, force_download=True).revision
    tiny().push_to_hub(f"{OWNER}/open", token=TOKEN)
    with pytest.raises(OptionError, match="somebody/open is there and public; make it private on the hub"):
        tiny(1).push_to_hub(f"{OWNER}/open", private=True, token=TOKEN)
    assert len(hub.repos[f"{OWNER}/open"].commits) == 2


def test_branches_and_pull_requests(hub):
    first, second = tiny(0), tiny(1)
    first.push_to_hub(NAME)
    second.push_to_hub(NAME, branch="longer")
    third = tiny(2).push_to_hub(NAME, create_pr=True)
    assert_same(first, SegmentationModel.from_pretrained(NAME))
    assert_same(second, SegmentationModel.from_pretrained(f"{NAME}@longer"))
    assert (third.pr_url, third.pr_revision) == (f"{hub.url}/{NAME}/discussions/1", "refs/pr/1")
    assert_same(tiny(2), SegmentationModel.from_pretrained(NAME, revision="refs/pr/1"))


def test_a_card_that_was_edited_on_the_hub_is_kept(hub, caplog):
    tiny(0).push_to_hub(NAME)
    first = hub.files(NAME)[CARD]
    hub.repos[NAME].commit("main", {CARD: first + b"\nMy own words.\n"}, "edited in the browser")
    tiny(1).push_to_hub(NAME)
    assert hub.files(NAME)[CARD].endswith(b"My own words.\n")
    assert "README.md of somebody/tiny was edited on the hub and is kept" in caplog.text
    assert_same(tiny(1), SegmentationModel.from_pretrained(NAME))
    tiny(2).push_to_hub(NAME, new_card=True)
    assert hub.files(NAME)[CARD] == first


def test_a_card_that_nobody_edited_is_renewed(hub):
    tiny(0).push_to_hub(NAME)
    tiny(0, classes=5).push_to_hub(NAME)
    assert "class 4" in hub.files(NAME)[CARD].decode()


def pushed(name=NAME, **options):
    """The line with which a push is refused."""
    with pytest.raises((HubError, OptionError)) as error:
        tiny().push_to_hub(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_not_asked_of_a_hub_without_a_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token to upload; log in with `hf auth login`, or set HF_TOKEN" in pushed()
    assert hub.asked == []


@pytest.mark.parametrize("name", ["a/b/c", "a b", "owner/", "-x", ""])
def test_names_that_are_none(hub, name):
    assert pushed(name).startswith(f"{name!r} is no name on the hub, OWNER/NAME: ")
    assert hub.asked == []


def test_a_hub_that_is_out_of_reach(hub):
    hub.close()
    assert pushed().startswith(f"nothing was uploaded: {hub.url} is out of reach: ")
    with pytest.raises(SavedModelMissingError, match=f"could not be had from .* hub: {hub.url} is out of reach"):
        SegmentationModel.from_pretrained(NAME)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": "wrong"}, "the hub answers 401 (Invalid credentials in Authorization header): it does not know"),
        ({"name": "others/theirs"}, "the hub answers 403 (You don't have the rights to write to others/theirs): the"),
    ],
)
def test_tokens_that_may_not(hub, options, words):
    line = pushed(**options)
    assert line.startswith(f"{options.get('name', NAME)}: nothing was committed: {words}")
    assert hub.repos == {}


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
@pytest.mark.parametrize(
    "part", ["repos/create", "preupload", "lfs/objects", "PUT /blobs", "/commit/", "POST /api/val"]
)
def test_answers_of_a_hub_that_does_not_work(hub, part, status):
    hub.fails = {part: status}
    assert f"nothing was committed: the hub answers {status}" in pushed()
    assert [len(repo.commits) for repo in hub.repos.values()] in ([], [1])


def test_a_hub_that_refuses_the_front_matter(hub):
    hub.yaml_errors = ['"license" must be one of apache-2.0, mit']
    words = 'nothing was committed: the hub answers 400 ("license" must be one of apache-2.0, mit): it refuses'
    assert words in pushed(model_card_kwargs={"license": "own"})


@pytest.mark.parametrize(
    ("name", "fails", "words"),
    [
        ("somebody/else", {}, "the hub answers 404 \\(Repository not found\\): there is no such repository"),
        (f"{NAME}@nowhere", {}, "the hub answers 404 \\(Invalid rev id\\): there is no such"),
        (NAME, {"HEAD /somebody": 403}, "the hub answers 403"),
        (NAME, {"HEAD /somebody": 503}, "the hub answers 503 .* try again later"),
        (NAME, {"GET /somebody": 500}, "the hub answers 500 .* try again later"),
    ],
)
def test_models_that_the_hub_does_not_give(hub, name, fails, words):
    tiny().push_to_hub(NAME)
    hub.fails = fails
    with pytest.raises(SavedModelMissingError, match=f"is no local folder, and could not be had .*{words}") as error:
        SegmentationModel.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_a_repository_without_a_model(hub):
    hub.repos[NAME] = Repo()
    with pytest.raises(SavedModelMissingError, match="config.json: the hub answers 404"):
        SegmentationModel.from_pretrained(NAME)


def test_without_the_hub_the_cache_serves(hub):
    model = tiny()
    model.push_to_hub(NAME)
    SegmentationModel.from_pretrained(NAME)
    hub.close()
    assert_same(model, SegmentationModel.from_pretrained(NAME))


def test_predictions_and_commands_take_names(hub, tmp_path, capsys):
    model = tiny()
    commit = model.push_to_hub(NAME)
    photo = Image.new("RGB", (40, 30), (90, 120, 200))
    photo.save(tmp_path / "a.png")
    labels = Predictor(model)(photo).labels
    torch.testing.assert_close(Predictor.from_pretrained(NAME, revision=commit.oid)(photo).labels, labels)
    words = ["--output", str(tmp_path / "out"), "--device", "cpu", "--threads", "1"]
    segheads(["predict", str(tmp_path / "a.png"), "--model", f"{NAME}@{commit.oid}", *words])
    with Image.open(tmp_path / "out" / "labels" / "a.png") as written:
        assert (np.array(written) == labels.numpy()).all()
    segheads(["info", NAME])
    assert "linear" in capsys.readouterr().out


def test_weights_that_are_not_finite_reach_no_hub(hub):
    model = tiny()
    torch.nn.init.constant_(model.head.classifier.weight, torch.nan)
    with pytest.raises(SavedModelError, match="are NaN or infinite"):
        model.push_to_hub(NAME)
    assert hub.asked == []
