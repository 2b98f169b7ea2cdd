"""Every registered head: shapes, gradients, export, odd sizes, and what the documentation owes it."""

import copy
from pathlib import Path

import pytest
import torch

import segheads
from segheads import HEADS, create_model, list_heads
from segheads.heads import find_head

DOCS = Path(__file__).parents[2] / "docs"
ALL_HEADS = pytest.mark.parametrize("name", list(HEADS))


@ALL_HEADS
@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (1, 1)])
def test_shape(name, h, w):
    head = HEADS[name](24, 5)
    assert head(torch.randn(2, 24, h, w)).shape == (2, 5, h, w)
    assert head.predictions(torch.randn(2, 24, h, w))[0].shape == (2, 5, h, w)
    assert (head.in_channels, head.num_classes) == (24, 5)


@ALL_HEADS
def test_one_class_and_one_channel(name):
    assert HEADS[name](1, 1)(torch.randn(1, 1, 2, 2)).shape == (1, 1, 2, 2)


@ALL_HEADS
def test_gradients_reach_every_parameter_and_the_input(name):
    head, x = HEADS[name](24, 5).train(), torch.randn(2, 24, 3, 4, requires_grad=True)
    torch.manual_seed(0)  # stochastic depth may drop a block; not with this seed
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert x.grad.any()


@ALL_HEADS
def test_batch_equals_single(name):
    head, x = HEADS[name](24, 5).eval(), torch.randn(3, 24, 3, 4)
    torch.testing.assert_close(head(x), torch.cat([head(image[None]) for image in x]))


@ALL_HEADS
def test_export_and_compile(name):
    head, x = HEADS[name](24, 5).eval(), torch.randn(1, 24, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))
        torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))


@ALL_HEADS
def test_copies_are_equal_and_apart(name):
    head, x = HEADS[name](24, 5).eval(), torch.randn(1, 24, 3, 4)
    copied = copy.deepcopy(head)
    torch.testing.assert_close(copied(x), head(x))
    torch.nn.init.zeros_(next(copied.parameters()))
    assert next(head.parameters()).any()


@ALL_HEADS
def test_mixed_precision(name):
    head = HEADS[name](24, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(torch.randn(1, 24, 3, 4))
    assert logits.isfinite().all()


@ALL_HEADS
def test_saved_model_comes_back(name, tmp_path):
    model = create_model("test_vit", name, 5, pretrained=False).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(segheads.SegmentationModel.from_pretrained(tmp_path)(images), model(images))


@ALL_HEADS
def test_wrong_channels_are_named(name):
    with pytest.raises(ValueError, match=rf"{HEADS[name].__name__} takes .*\(B, 24, h, w\); got \(1, 23, 3, 4\)"):
        HEADS[name](24, 5)(torch.randn(1, 23, 3, 4))
    with pytest.raises(ValueError, match="must be 1 or more; got 24 and 0"):
        HEADS[name](24, 0)


@ALL_HEADS
def test_is_public_and_documented(name):
    class_name = HEADS[name].__name__
    assert getattr(segheads, class_name) is HEADS[name]
    pages = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert f"::: segheads.{class_name}" in pages, f"no page of docs/ has ::: segheads.{class_name}"


def test_unknown_names_list_the_known():
    assert list_heads() == list(HEADS)
    with pytest.raises(ValueError, match="'mean_shfit'; known: linear, .*did you mean 'mean_shift'"):
        find_head("mean_shfit")
