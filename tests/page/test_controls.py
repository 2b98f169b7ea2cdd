"""What the page lets people change of a model, and that the model is the same afterwards."""

import threading

import pytest
import torch

from segheads import Predictor, create_model
from segheads.data import Scenes
from segheads.errors import OptionError
from segheads.inference import InferenceProtocol
from segheads.modules import weights_hash
from segheads.page.controls import Choice, Controls, changed, choose, find_controls
from segheads.page.views import Viewer
from segheads.saving import settings_of

SHIFT = {"num_layers": 1, "kernel": "cosine"}


def predictor_of(head, backbone="test_vit", num_classes=4, **head_kwargs):
    torch.manual_seed(0)
    return Predictor(create_model(backbone, head, num_classes, pretrained=False, head_kwargs=head_kwargs))


def senformer(**head_kwargs):
    return predictor_of("senformer", "test_convnext", learner="linear", **head_kwargs)


def state(model):
    return settings_of(model), weights_hash(model)


def test_a_plain_head_has_nothing_to_change():
    assert find_controls(predictor_of("linear")) == Controls()


def test_a_head_with_mean_shift():
    found = find_controls(predictor_of("mean_shift", **{**SHIFT, "num_layers": 5, "bandwidth": 0.5}))
    assert found == Controls(layers=5, bandwidths=(0.5,))
    assert found.most_layers == 10
    assert find_controls(predictor_of("mean_shift", num_layers=0)) == Controls()  # its weights are random


def test_an_ensemble():
    found = find_controls(senformer(shift=SHIFT))
    assert (found.layers, len(found.bandwidths), found.num_learners) == (1, 4, 4)
    assert found.levels == found.built_levels == (0, 1, 2, 3)
    assert (found.merge, found.merges) == ("average", ("average", "product", "majority_vote"))


def test_of_learned_merges_the_own_one_alone_is_offered():
    found = find_controls(senformer(merge="explicit_attention"))
    assert found.merges == ("average", "product", "majority_vote", "explicit_attention")


def test_an_ensemble_inside_a_head_and_levels_that_were_chosen():
    predictor = predictor_of("sen_uper", "test_convnext", channels=16)
    predictor.model.head.levels = [1, 2]
    found = find_controls(predictor)
    assert (found.levels, found.built_levels) == ((1, 2), (0, 1, 2, 3))
    assert predictor.model.head.levels == [1, 2]


def test_one_class_has_a_threshold():
    model = create_model("test_vit", "linear", 1, pretrained=False, loss="bce")
    assert find_controls(Predictor(model, protocol=InferenceProtocol(threshold=0.3))).threshold == 0.3


def test_what_is_chosen_changes_and_comes_back_to_the_last_bit():
    model = predictor_of("mean_shift", **SHIFT, learn_bandwidth=True).model
    shift = model.head.shift
    with torch.no_grad():
        shift.log_bandwidth.fill_(0.1234567)  # exp and log of it differ from it
    before = state(model)
    with changed(model, Choice(layers=3, bandwidth=2.0)):
        assert shift.num_layers == 3
        assert shift.bandwidth == pytest.approx(2 * torch.tensor(0.1234567).exp().item())
    assert state(model) == before
    with pytest.raises(KeyError), changed(model, Choice(layers=2)):
        raise KeyError
    assert state(model) == before


@pytest.mark.parametrize(
    ("own", "choice"),
    [
        (("average", [2]), Choice(levels=(0, 1, 2, 3), merge="product")),
        (("product", [0, 1]), Choice(levels=(3,), merge="average")),
        (("majority_vote", [0, 1, 2, 3]), Choice(levels=(1,))),
    ],
)
def test_merge_and_levels_change_together(own, choice):
    model = senformer().model
    model.head.merge = own[0]
    model.head.levels = own[1]
    before = state(model)
    with changed(model, choice):
        assert model.head.levels == list(choice.levels)
        assert model.head.merge == (choice.merge or own[0])
    assert state(model) == before


def test_merges_and_levels_that_do_not_go_together_are_told():
    model = senformer(merge="explicit_attention").model
    before = state(model)
    for choice, words in (
        (Choice(levels=(0,), merge="product"), "merge 'product' needs two learners or more; got 1"),
        (Choice(levels=(0, 1)), r"merge 'explicit_attention' was built for levels \[0, 1, 2, 3\]; got \[0, 1\]"),
    ):
        with pytest.raises(OptionError, match=words), changed(model, choice):
            pass
        assert state(model) == before


CONTROLS = Controls(
    layers=1, bandwidths=(2.0,), levels=(0, 1), built_levels=(0, 1), merge="average", merges=("average",), threshold=0.5
)


def test_the_models_own_values_change_nothing():
    values = {"layers": 1.0, "bandwidth": 1, "levels": [1, 0], "merge": "average", "threshold": 0.5}
    assert choose(CONTROLS, values) == Choice(levels=(0, 1), merge="average", threshold=0.5)
    assert choose(CONTROLS, {}) == choose(CONTROLS, dict.fromkeys(values)) == Choice()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers", 9, "mean shift layers must be 0 to 8; got 9"),
        ("layers", -1, "mean shift layers must be 0 to 8; got -1"),
        ("bandwidth", 1e9, "bandwidth must be 0.1 to 4; got 1000000000.0"),
        ("bandwidth", float("nan"), "bandwidth must be 0.1 to 4; got nan"),
        ("threshold", 0, "threshold must be 0.01 to 0.99; got 0.0"),
        ("levels", [], r"choose one learner or more of the levels \[0, 1\]"),
        ("levels", [0, 7], r"choose one learner or more of the levels \[0, 1\]"),
        ("merge", "explicit_attention", "merge must be one of average; got explicit_attention"),
        ("layers", "many", "a setting is of another kind than the page sends: "),
        ("layers", float("inf"), "a setting is of another kind than the page sends: "),
        ("levels", 3, "a setting is of another kind than the page sends: "),
    ],
)
def test_what_the_page_does_not_offer_is_refused(name, value, words):
    with pytest.raises(OptionError, match=f"^{words}"):
        choose(CONTROLS, {name: value})


def test_people_do_not_disturb_one_another(tmp_path):
    """Each of several threads sees labels of its own settings, and the model ends as it began."""
    predictor = predictor_of("mean_shift", **SHIFT)
    path = tmp_path / "photo.png"
    Scenes("val", size=(48, 64)).read(0)[0].save(path)
    viewer = Viewer(predictor)
    choices = [Choice(), Choice(layers=6, bandwidth=0.1), Choice(layers=0)]
    alone = [viewer.predict(path, choice).labels for choice in choices]
    assert not alone[0].equal(alone[1])
    before, wrong = state(predictor.model), []

    def look(choice, labels):
        wrong.extend(not viewer.predict(path, choice).labels.equal(labels) for _ in range(5))

    threads = [threading.Thread(target=look, args=pair) for pair in zip(choices, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 15
    assert state(predictor.model) == before
