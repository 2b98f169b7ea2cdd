"""Every registered loss: a scalar with a gradient, blind to ignored pixels; and cross-entropy against PyTorch's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segheads import LinearHead, SegmentationModel, TimmBackbone, create_model
from segheads.classes import ignored_label
from segheads.losses import LOSSES, CrossEntropy, PixelLoss, create_loss, find_loss, is_binary
from segheads.plan import ModelPlan

ALL = pytest.mark.parametrize("name", list(LOSSES))
REDUCTIONS = pytest.mark.parametrize("reduction", ["valid", "all"])


def some(K=5, grid=(3, 4), size=(48, 64)):
    """Logits of which a gradient is wanted, and labels with ignored rows."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, K, *grid, requires_grad=True), torch.randint(0, max(K, 2), (2, *size))
    labels[:, :16] = 255
    return logits, labels


def kind(name, K=5):
    """The number of classes that a loss takes."""
    return 1 if is_binary(name) else K


def gradient(loss, logits):
    (found,) = torch.autograd.grad(loss, logits)
    return found


# ---------------------------------------------------------------- every loss


@ALL
@REDUCTIONS
@pytest.mark.parametrize("K", [2, 5, 300])
def test_a_scalar_with_a_gradient(name, reduction, K):
    K = kind(name, K)
    logits, labels = some(K)
    criterion = create_loss(name, K, reduction=reduction, ignore_index=ignored_label(K))
    loss = criterion(logits, labels.where(labels != 255, ignored_label(K)))
    assert isinstance(criterion, PixelLoss)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    slope = gradient(loss, logits)
    assert slope.isfinite().all()
    assert slope.any()


@ALL
def test_training_makes_it_smaller(name):
    logits, labels = some(kind(name))
    criterion = create_loss(name, kind(name))
    start = criterion(logits, labels)
    with torch.no_grad():
        moved = logits - 0.1 * gradient(start, logits).sign()
        assert criterion(moved, labels) < start


@ALL
@REDUCTIONS
def test_logits_of_ignored_pixels_change_nothing(name, reduction):
    logits, labels = some(kind(name), grid=(4, 4), size=(64, 64))
    labels[:, 24:] = 255
    criterion = create_loss(name, kind(name), reduction=reduction)
    with torch.no_grad():
        other = logits.clone()
        other[:, :, 3] = 100.0  # cells from which no labelled pixel is interpolated
        torch.testing.assert_close(criterion(other, labels), criterion(logits, labels), rtol=0, atol=0)
    assert not gradient(criterion(logits, labels), logits)[:, :, 3].any()


@ALL
@REDUCTIONS
def test_all_ignored_is_no_loss(name, reduction):
    logits, labels = some(kind(name))
    loss = create_loss(name, kind(name), reduction=reduction)(logits, torch.full_like(labels, 255))
    assert loss == 0
    assert not gradient(loss, logits).any()


@ALL
def test_another_ignore_index(name):
    logits, labels = some(kind(name))
    expected = create_loss(name, kind(name))(logits, labels)
    torch.testing.assert_close(
        create_loss(name, kind(name), ignore_index=-1)(logits, labels.where(labels != 255, -1)), expected
    )


@ALL
def test_padding_counts_as_ignored_pixels(name):
    logits, labels = some(kind(name))
    criterion, cropped = create_loss(name, kind(name)), labels[:, :41, :50]
    by_hand = F.pad(cropped, (0, 14, 0, 7), value=255)
    torch.testing.assert_close(criterion(logits, cropped, (48, 64)), criterion(logits, by_hand))


@ALL
def test_mixed_precision(name):
    logits, labels = some(kind(name))
    expected = create_loss(name, kind(name))(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = create_loss(name, kind(name))(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert gradient(loss, logits).isfinite().all()


@ALL
def test_holds_no_logits_of_full_size(name):
    logits, labels = some(kind(name, 8), grid=(4, 4), size=(512, 512))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if is_wide(x))])
            return result

    def is_wide(x):
        return isinstance(x, torch.Tensor) and x.is_floating_point()

    with Sizes():
        gradient(create_loss(name, kind(name, 8))(logits, labels), logits)
    assert 0 < largest < 8 * 2 * 512 * 512 / 2


@ALL
def test_model_is_saved_with_its_loss(name, tmp_path):
    model = create_model("test_vit", "linear", kind(name), pretrained=False, loss=name).eval()
    model.save_pretrained(tmp_path)
    again = SegmentationModel.from_pretrained(tmp_path)
    images, labels = torch.randn(2, 3, 50, 75), torch.randint(0, 2, (2, 50, 75))
    assert type(again.criterion) is type(model.criterion) is LOSSES[name]
    torch.testing.assert_close(again(images, labels), model(images, labels))


@pytest.mark.parametrize("name", ["ce", "bce", "ohem", "focal"])  # lovasz looks at what it sorts
def test_compiles(name):
    model = create_model("test_vit", "linear", kind(name), pretrained=False, loss=name).eval()
    images, labels = torch.randn(2, 3, 40, 40), torch.randint(0, 2, (2, 40, 40))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), model(images, labels))


# ---------------------------------------------------------------- parts of an update

SOME_SUM = "ce(weight=[1, 2, 3, 0.5, 1]) + 0.5*dice + 2*focal(stride=3)"


@pytest.mark.parametrize("text", [*LOSSES, SOME_SUM])
@REDUCTIONS
def test_parts_with_their_shares_add_up(text, reduction):
    K = kind(text)
    criterion = create_loss(text, K, reduction=reduction)
    logits, labels = torch.randn(6, K, 4, 4, requires_grad=True), torch.randint(0, max(K, 2), (6, 32, 32))
    labels[0, 3:], labels[1], labels[4, :, :9] = 255, 255, 255
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    divisors = torch.stack([criterion.divisors(labels[part]).float() for part in parts])
    torch.testing.assert_close(divisors.sum(0), criterion.divisors(labels).float())
    shares = divisors / divisors.sum(0)
    whole = criterion(logits, labels)
    summed = sum(criterion(logits[p], labels[p], shares=share) for p, share in zip(parts, shares, strict=True))
    torch.testing.assert_close(summed, whole)
    torch.testing.assert_close(gradient(summed, logits), gradient(whole, logits))


@pytest.mark.parametrize("text", [*LOSSES, SOME_SUM])
@REDUCTIONS
def test_what_is_set_later_counts_as_if_it_had_been_given(text, reduction):
    K = kind(text)
    logits, labels = torch.randn(2, K, 4, 4), torch.randint(0, max(K, 2), (2, 32, 32))
    labels[0, 3:], labels[1, :, :9] = 77, 77
    criterion = create_loss(text, K)
    criterion.ignore_index, criterion.reduction = 77, reduction
    given = create_loss(text, K, ignore_index=77, reduction=reduction)
    torch.testing.assert_close(criterion(logits, labels), given(logits, labels))
    torch.testing.assert_close(criterion.divisors(labels), given.divisors(labels))


@pytest.mark.parametrize("text", [*LOSSES, SOME_SUM])
@pytest.mark.parametrize("value", [-3, 7])
def test_labels_out_of_range_are_named(text, value):
    K = kind(text)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[1, 2:5, 2:5] = value
    logits = torch.randn(2, K, 4, 4)
    with pytest.raises(ValueError, match=f"labels must be classes 0 to {max(K, 2) - 1} or 255 .*; got {value}"):
        create_loss(text, K)(logits, labels)


# ---------------------------------------------------------------- regions, hard pixels, sums


def by_hand(name, scores, labels, K=5, eps=1e-7):
    """The loss of one image from scores (K, n) and labels (n,) of the pixels that count, in float64, class by class."""
    valid = labels != 255
    scores, labels = scores[:, valid], labels[valid]
    p = scores.softmax(0)
    losses = []
    for k in range(K):
        mine, own = p[k], (labels == k).double()
        hit, miss, wrong = (mine * own).sum(), ((1 - mine) * own).sum(), (mine * (1 - own)).sum()
        if name == "focal":
            q = torch.where(labels == k, scores[k].sigmoid(), 1 - scores[k].sigmoid())
            losses.append(-((1 - q) ** 2 * q.log()).sum())
        elif own.sum() == 0:
            losses += [] if name == "lovasz" else [torch.zeros((), dtype=torch.float64)]
        elif name == "lovasz":
            errors, order = (own - mine).abs().sort(descending=True)
            union = own.sum() + (1 - own[order]).cumsum(0)
            jaccard = 1 - (own.sum() - own[order].cumsum(0)) / union
            losses.append((errors * jaccard.diff(prepend=torch.zeros(1))).sum())
        else:
            weight = {"dice": 0.5, "jaccard": 1.0, "tversky": 0.5}[name]
            losses.append(1 - hit / (hit + weight * (miss + wrong)).clamp(min=eps))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("stride", [1, 3, 4])
@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky", "lovasz", "focal"])
def test_regions_equal_the_slow_formula(name, stride):
    logits, labels = some()
    labels[0, 20:30, 5:40] = 255
    full = F.interpolate(logits.double(), (48, 64), mode="bilinear")
    at = slice(stride // 2, None, stride)
    pixels, classes = full[:, :, at, at].flatten(2), labels[:, at, at].flatten(1)
    images = torch.stack([by_hand(name, x, y) for x, y in zip(pixels, classes, strict=True)])
    expected = images.sum() / (classes != 255).sum() if name == "focal" else images.mean()
    loss = create_loss(name, 5, stride=stride)(logits, labels)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky", "lovasz", "focal"])
def test_regions_of_one_class_are_binary(name):
    import segmentation_models_pytorch.losses as smp

    logits, labels = some(K=2)
    logits = logits[:, :1].detach().requires_grad_()
    loss = create_loss(name, 1, stride=1)(logits, labels)
    inner = getattr(smp, f"{name.capitalize()}Loss")("binary", ignore_index=255)
    full = F.interpolate(logits, (48, 64), mode="bilinear")
    images = [inner(x if name != "lovasz" else x[0], y) for x, y in zip(full.split(1), labels.split(1), strict=True)]
    torch.testing.assert_close(loss, torch.stack(images).mean())
    assert gradient(loss, logits).any()


def test_weights_reach_the_regions():
    logits, labels = some()
    weight = [0.0, 0.0, 1.0, 0.0, 0.0]
    one = by_hand("dice", F.interpolate(logits.double(), (48, 64), mode="bilinear")[0].flatten(1), labels[0].flatten())
    weighted = create_loss("dice", 5, stride=1, weight=weight)(logits[:1], labels[:1])
    assert weighted.item() != pytest.approx(one.item())
    every = [create_loss("dice", 5, stride=1, weight=[float(k == j) for k in range(5)]) for j in range(5)]
    torch.testing.assert_close(torch.stack([f(logits[:1], labels[:1]) for f in every]).mean(), one.float())


@pytest.mark.parametrize(("threshold", "keep"), [(0.7, 0.2), (0.1, 0.5), (0.0, 0.0), (1.0, 0.0)])
def test_hard_pixels(threshold, keep):
    logits, labels = some()
    full = F.interpolate(logits.double(), (48, 64), mode="bilinear")
    expected = []
    for x, y in zip(full.flatten(2), labels.flatten(1), strict=True):
        x, y = x[:, y != 255], y[y != 255]
        own = x.softmax(0).gather(0, y[None])[0]
        order = own.argsort()
        chosen = order[: max(int((own < threshold).sum()), math.ceil(keep * len(y)))]
        expected.append(-own[chosen].log().mean() if len(chosen) else own.sum() * 0)
    loss = create_loss("ohem", 5, threshold=threshold, keep=keep)(logits, labels)
    # one of a thousand may lie on the other side of the line in fp32
    torch.testing.assert_close(loss, torch.stack(expected).mean().float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        gradient(loss, logits), gradient(torch.stack(expected).mean(), logits), rtol=1e-2, atol=1e-3
    )


def test_a_sum_is_the_sum_of_its_terms():
    logits, labels = some()
    text = "ce + 0.5 * dice(stride=2) + 2*ohem"
    criterion = create_loss(text, 5, weight=[1, 2, 3, 4, 5], label_smoothing=0.1)
    parts = [
        create_loss("ce", 5, weight=[1, 2, 3, 4, 5], label_smoothing=0.1),
        create_loss("dice", 5, weight=[1, 2, 3, 4, 5], stride=2),
        create_loss("ohem", 5, weight=[1, 2, 3, 4, 5]),
    ]
    terms = [part(logits, labels) for part in parts]
    torch.testing.assert_close(criterion(logits, labels), terms[0] + 0.5 * terms[1] + 2 * terms[2])
    again = create_loss("focal", 5, weight=[1, 2, 3, 4, 5])
    assert again.inner.class_weights.tolist() == [1, 2, 3, 4, 5]


def test_a_model_is_saved_with_a_sum(tmp_path):
    model = create_model("test_vit", "linear", 5, pretrained=False, loss="ce + 0.5*dice(stride=2)").eval()
    model.save_pretrained(tmp_path)
    again = SegmentationModel.from_pretrained(tmp_path)
    images, labels = torch.randn(2, 3, 50, 75), torch.randint(0, 5, (2, 50, 75))
    torch.testing.assert_close(again(images, labels), model(images, labels))
    assert again.criterion.factors == [1.0, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ce + dise", "no loss is called 'dise'; known: .*did you mean 'dice'"),
        ("ce - dice", "loss must be a name, or a sum such as \"ce [+] 0.5[*]dice\".*; got 'ce - dice'"),
        ("ce + dice*0.5", "loss must be a name, or a sum such as"),
        ("ce +", "loss must be a name, or a sum such as"),
        ("focal(gamma=x)", "loss must be a name, or a sum such as"),
        ("__import__('os').system('ls')", "loss must be a name, or a sum such as"),
        ("ce + 0*dice", "the factor of dice in loss 'ce [+] 0[*]dice' must be above 0; got 0"),
        ("dice(strid=2)", "loss 'dice' takes no strid; its options: stride, weight, log_loss, smooth$"),
        ("dice(stride=0)", "stride must be 1 or more pixels; got 0"),
        ("ohem(keep=2)", "keep must be between 0 and 1; got 2"),
        ("ohem(threshold=-1)", "threshold must be between 0 and 1; got -1"),
    ],
)
def test_wrong_sums_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        create_loss(text, 5)


def test_an_option_that_no_term_has_is_refused():
    with pytest.raises(ValueError, match="no term of loss 'dice [+] lovasz' takes label_smoothing"):
        create_loss("dice + lovasz", 5, label_smoothing=0.1)
    with pytest.raises(ValueError, match="DiceLoss of one class takes no weight"):
        create_loss("dice", 1, weight=[1.0])


# ---------------------------------------------------------------- cross-entropy

OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"weight": [1, 0.5, 0, 2, 3]},
        {"weight": [1, 0.5, 4, 2, 3], "label_smoothing": 0.1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)


def plain(scores, labels, reduction, options):
    """What papers write, on scores of full size."""
    options = {**options, "weight": torch.tensor(options["weight"]).float() if "weight" in options else None}
    if reduction == "all":
        return F.cross_entropy(scores, labels, ignore_index=255, reduction="sum", **options) / labels.numel()
    return F.cross_entropy(scores, labels, ignore_index=255, **options)


@OPTIONS
@REDUCTIONS
@pytest.mark.parametrize("head", ["linear", "senformer"])
def test_cross_entropy_through_the_model_is_the_plain_one(options, reduction, head):
    torch.manual_seed(0)
    model = create_model(
        "test_resnet", head, 5, pretrained=False, loss_kwargs=options, loss_reduction=reduction, auxiliary_weight=0.4
    ).eval()
    images, labels = torch.randn(2, 3, 50, 75), torch.randint(0, 5, (2, 50, 75))
    labels[:, :20] = 255
    maps = model.backbone(images)

    def at_full_size(logits, stride):
        size = [round(n * stride) for n in logits.shape[2:]]
        scores = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return plain(scores[:, :, :50, :75], labels, reduction, options)

    first, *rest = (at_full_size(x, model._stride) for x in model.head.predictions(model._for_head(maps)))
    expected = first + (sum(rest) / len(rest) if rest else 0)
    expected = expected + 0.4 * at_full_size(model.auxiliary_head(maps[-2]), model.backbone.strides[-2])
    loss = model(images, labels)
    torch.testing.assert_close(loss, expected)
    weight = next(p for p in model.head.parameters() if p.requires_grad)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected)), rtol=1e-4, atol=1e-6
    )


def test_all_pixels_are_those_of_the_image_without_its_padding():
    logits, labels = some()
    criterion, cropped = CrossEntropy(5, reduction="all"), labels[:, :41, :50]
    scores = F.interpolate(logits, size=(48, 64), mode="bilinear", align_corners=False)[:, :, :41, :50]
    torch.testing.assert_close(criterion(logits, cropped, (48, 64)), plain(scores, cropped, "all", {}))


def test_options_are_saved_and_are_no_weights(tmp_path):
    options = {"weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1}
    model = create_model("test_vit", "linear", 3, pretrained=False, loss_kwargs=options)
    assert not [key for key in model.state_dict() if "criterion" in key]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["loss_kwargs"] == options
    again = SegmentationModel.from_pretrained(tmp_path).criterion
    assert (again.weight.tolist(), again.label_smoothing) == ([1.0, 2.0, 3.0], 0.1)
    assert model.to(torch.device("meta")).criterion.weight.is_meta


def test_a_saved_model_without_a_loss_has_cross_entropy(tmp_path):
    model = create_model("test_vit", "linear", 3, pretrained=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["loss"], config["model"]["loss_kwargs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert repr(SegmentationModel.from_pretrained(tmp_path).criterion) == repr(CrossEntropy(3))


def test_options_can_be_read_and_set_on_the_model():
    model = create_model("test_vit", "linear", 3, pretrained=False, ignore_index=7)
    assert (model.ignore_index, model.loss_reduction) == (7, "valid")
    model.loss_reduction, model.ignore_index = "all", 9
    assert (model.criterion.reduction, model.criterion.ignore_index) == ("all", 9)


def test_a_loss_of_ones_own():
    class Margin(PixelLoss):
        """Hinge on the finest grid, with labels taken at its cells."""

        def __init__(self, num_classes, *, margin=1.0, **common):
            super().__init__(num_classes, **common)
            self.margin = margin

        def compute(self, logits, labels, pixels):
            return (self.margin - logits).relu().mean()

    backbone = TimmBackbone("test_vit", pretrained=False)
    head = LinearHead(backbone.channels[-1], 5)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    model = SegmentationModel(backbone, head, loss=Margin, loss_kwargs={"margin": 3.0})
    images, labels = torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
    torch.testing.assert_close(model(images, labels), torch.tensor(3.0))


# ---------------------------------------------------------------- errors


def test_unknown_names_list_the_known():
    known = ", ".join(LOSSES)
    with pytest.raises(ValueError, match=f"^no loss is called 'dise'; known: {known}; did you mean 'dice'"):
        find_loss("dise")
    with pytest.raises(ValueError, match="no loss is called 'cee'; .*did you mean 'ce'"):
        create_model("test_vit", "linear", 3, pretrained=False, loss="cee")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2.0}, "loss 'ce' takes no gamma; its options: weight, label_smoothing$"),
        ({"label_smoothing": 1.0}, "label_smoothing must be 0 or more and below 1; got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be 0 or more and below 1; got -0.1"),
        ({"weight": [1.0, 2.0]}, r"weight must have one value for each of 3 classes; got \[1.0, 2.0\]"),
        ({"weight": [1.0, -2.0, 1.0]}, r"weight must be finite numbers of 0 or more, .*; got \[1.0, -2.0, 1.0\]"),
        ({"weight": [1.0, float("nan"), 1.0]}, r"weight must be finite numbers of 0 or more"),
        ({"weight": [0, 0, 0]}, r"weight must be .* not all of them 0; got \[0, 0, 0\]"),
    ],
)
def test_wrong_options_are_named_before_anything_is_fetched(options, message):
    with pytest.raises(ValueError, match=message):
        create_loss("ce", 3, **options)
    with pytest.raises(ValueError, match=message):
        ModelPlan(backbone="no such backbone", head="linear", num_classes=3, loss_kwargs=options)


def test_wrong_common_options_are_named():
    with pytest.raises(ValueError, match="num_classes must be 1 or more; got 0"):
        create_loss("ce", 0)
    with pytest.raises(ValueError, match='reduction must be "valid" or "all"; got \'some\''):
        create_loss("ce", 3, reduction="some")
