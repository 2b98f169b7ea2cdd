"""Every registered head: shapes, gradients, export, odd sizes, saving."""

import copy

import pytest
import torch

import segheads
from segheads import HEADS, create_model, list_heads
from segheads.heads import find_head


def build(name, channels=24, num_classes=5):
    """The head, on one map or on four."""
    levels = [channels] * 4 if HEADS[name].multi_level else channels
    return HEADS[name](levels, num_classes)


def maps(name, batch, channels=24, h=3, w=4, **options):
    """What the head takes: a map, or four that shrink by half."""
    sizes = [(-(-h // n), -(-w // n)) for n in (1, 2, 4, 8)]
    x = [torch.randn(batch, channels, *size, **options) for size in sizes]
    return x if HEADS[name].multi_level else x[0]


def small(name):
    """A narrow pyramid, where the head has one on a plain ViT."""
    return {"out_channels": 16} if HEADS[name].multi_level else None


ALL_HEADS = pytest.mark.parametrize("name", list(HEADS))


@ALL_HEADS
@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (1, 1), (19, 26)])
def test_shape(name, h, w):
    head, x = build(name).eval(), maps(name, 2, h=h, w=w)
    assert head(x).shape == (2, 5, h * head.upsampling, w * head.upsampling)
    assert head.predictions(x)[0].shape == head(x).shape
    assert (head.in_channels, head.num_classes) == ([24] * 4 if HEADS[name].multi_level else 24, 5)


@ALL_HEADS
def test_one_class_and_one_channel(name):
    head = build(name, 1, 1).eval()
    assert head(maps(name, 1, 1)).shape == (1, 1, 3 * head.upsampling, 4 * head.upsampling)


@ALL_HEADS
def test_gradients_reach_every_parameter_and_the_input(name):
    head, x = build(name).train(), maps(name, 2, h=9, w=12, requires_grad=True)
    torch.manual_seed(0)  # stochastic depth may drop a block; not with this seed
    sum(prediction.square().sum() for prediction in head.predictions(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(level.grad.any() for level in (x if isinstance(x, list) else [x]))


@ALL_HEADS
def test_batch_equals_single(name):
    head, x = build(name).eval(), maps(name, 3)
    single = [[level[i : i + 1] for level in x] if isinstance(x, list) else x[i : i + 1] for i in range(3)]
    torch.testing.assert_close(head(x), torch.cat([head(image) for image in single]))


@ALL_HEADS
def test_export_and_compile(name):
    head, x = build(name).eval(), maps(name, 1)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), head(x))
        torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))


@ALL_HEADS
def test_copies_are_equal_and_apart(name):
    head, x = build(name).eval(), maps(name, 1)
    copied = copy.deepcopy(head)
    torch.testing.assert_close(copied(x), head(x))
    original, copied_to = (max(h.parameters(), key=torch.numel) for h in (head, copied))
    torch.nn.init.zeros_(copied_to)
    assert original.any()


@ALL_HEADS
def test_mixed_precision(name):
    head = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(maps(name, 2))
    assert logits.isfinite().all()


@ALL_HEADS
def test_saved_model_comes_back(name, tmp_path):
    model = create_model("test_vit", name, 5, pretrained=False, pyramid_kwargs=small(name)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(segheads.SegmentationModel.from_pretrained(tmp_path)(images), model(images))


@ALL_HEADS
def test_wrong_channels_are_named(name):
    if HEADS[name].multi_level:
        message = rf"{HEADS[name].__name__} takes a list of maps .* \[24, 24, 24, 24\]; got \[\(1, 23, 3, 4\), .*"
    else:
        message = rf"{HEADS[name].__name__} takes .*\(B, 24, h, w\); got \(1, 23, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        build(name)(maps(name, 1, 23))
    with pytest.raises(ValueError, match=r"must be 1 or more; got (24|\[24, 24, 24, 24\]) and 0"):
        build(name, num_classes=0)


@ALL_HEADS
def test_is_public(name):
    class_name = HEADS[name].__name__
    assert getattr(segheads, class_name) is HEADS[name]
    assert class_name in segheads.heads.__all__


def test_unknown_names_list_the_known():
    assert list_heads()[: len(HEADS)] == list(HEADS)
    with pytest.raises(ValueError, match="'mean_shfit'; known: linear, .*did you mean 'mean_shift'"):
        find_head("mean_shfit")
