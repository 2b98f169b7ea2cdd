"""What a loss is made of, told apart in the log."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from segheads import create_model
from segheads.losses import create_loss
from segheads.training import ModelLearner, update_shares

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (4, 32, 32), generator=torch.Generator().manual_seed(1))
LABELS[0, :20], LABELS[3] = 255, 255


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def built(head="linear", loss="ce + 0.5*dice", auxiliary=0.0, backbone="test_resnet"):
    torch.manual_seed(0)
    options = {"auxiliary_kwargs": {"num_layers": 0}} if auxiliary else {}
    width = {"head_kwargs": {"channels": 16}} if head == "sen_uper" else {"pyramid_kwargs": {"out_channels": 16}}
    options |= {} if backbone == "test_vit" else width
    return create_model(
        backbone, head, 4, pretrained=False, loss=loss, auxiliary_weight=auxiliary, **options
    ).eval()  # nothing is dropped


def test_terms_of_a_sum():
    model = built(loss="ce + 0.5*dice + 0.25*dice(stride=2)")
    loss, terms = model(IMAGES, LABELS, with_terms=True)
    logits, covered = model.low_resolution(IMAGES)
    assert list(terms) == ["ce", "dice", "dice_2"]
    for name, words in zip(terms, ("ce", "dice", "dice(stride=2)"), strict=True):
        torch.testing.assert_close(terms[name], create_loss(words, 4)(logits, LABELS, covered).detach())
        assert not terms[name].requires_grad
    torch.testing.assert_close(loss, terms["ce"] + 0.5 * terms["dice"] + 0.25 * terms["dice_2"])
    assert torch.equal(loss, model(IMAGES, LABELS))


def test_terms_of_an_ensemble_and_an_auxiliary_head():
    model = built("senformer", "ce", 0.4)
    loss, terms = model(IMAGES, LABELS, with_terms=True)
    assert list(terms) == ["ensemble", "learners", "auxiliary"]
    (first, *learners), covered = model.predictions(IMAGES)
    ce = create_loss("ce", 4)
    torch.testing.assert_close(terms["ensemble"], ce(first, LABELS, covered).detach())
    of_learners = torch.stack([ce(x, LABELS, covered) for x in learners])
    torch.testing.assert_close(terms["learners"], of_learners.mean().detach())
    torch.testing.assert_close(loss, terms["ensemble"] + terms["learners"] + 0.4 * terms["auxiliary"])
    assert list(built("sen_uper")(IMAGES, LABELS, with_terms=True)[1]) == [
        *("ensemble_ce", "ensemble_dice", "learners_ce", "learners_dice")
    ]
    assert list(built(auxiliary=0.4)(IMAGES, LABELS, with_terms=True)[1]) == [
        *("final_ce", "final_dice", "auxiliary_ce", "auxiliary_dice")
    ]


def test_one_term_needs_no_name():
    assert built(loss="ce")(IMAGES, LABELS, with_terms=True)[1] == {}


def test_terms_of_parts_add_up():
    model, accelerator = built(auxiliary=0.4), Accelerator(cpu=True)
    loss, whole = model(IMAGES, LABELS, with_terms=True)
    parts = list(zip(IMAGES.split(2), LABELS.split(2), strict=True))
    shares = update_shares(accelerator, model, [labels for _, labels in parts])
    found = [model(*part, own, with_terms=True) for part, own in zip(parts, shares, strict=True)]
    torch.testing.assert_close(sum(own for own, _ in found), loss)
    for name, value in whole.items():
        torch.testing.assert_close(sum(terms[name] for _, terms in found), value)


def test_the_log_has_the_means_of_finite_values(monkeypatch):
    model, accelerator = built(), Accelerator(cpu=True)
    learner = ModelLearner(accelerator, model, torch.optim.SGD(model.parameters(), 0.0), schedule=lambda _: 0.0)
    values = [1.0, 3.0, torch.inf]
    monkeypatch.setattr(
        type(model.criterion),
        "compute_terms",
        lambda self, logits, *_: [0 * logits.sum() + values.pop(0), 0 * logits.sum() + 2.0],
    )
    for iteration in range(3):
        learner.step(iteration, [(IMAGES, LABELS)])
    assert learner.record(3, [0.5], [None])["terms"] == {"ce": 2.0, "dice": 2.0}
    assert "terms" not in learner.record(4, [0.5], [None])


def test_terms_leave_the_compiled_step_one_graph():
    model = built(backbone="test_vit")
    loss, terms = model(IMAGES, LABELS, with_terms=True)
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    again, same_terms = model(IMAGES, LABELS, with_terms=True)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same_terms, terms)
