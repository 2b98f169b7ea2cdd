"""Parity with the published implementations, through the way in that their users have."""

import pytest
import torch
from parity import as_map, assert_parity, levels

from segheads import (
    FPN,
    FPNT,
    LinearHead,
    MaskTransformerHead,
    MeanShiftHead,
    SegmentationModel,
    SenFormerHead,
    from_reference,
)
from segheads.functional import upsample, upsample_cross_entropy


def check_gradients(head, vectors, output, x, prefix, cotangent):
    """Loads the reference's gradients as if they were weights, and compares them with ours name by name."""
    (output * cotangent).sum().backward()
    expected = vectors.tensors(f"{prefix}.state.")
    source, kwargs = head
    as_weights = from_reference({**vectors.tensors("state."), **expected}, source, **kwargs["sizes"])
    for name, parameter in kwargs["model"].named_parameters():
        assert_parity(parameter.grad, as_weights.get_parameter(name).detach(), 2e-5)
    grad_x = vectors.tensors(f"{prefix}.input.")
    (expected_x,) = grad_x.values()
    actual = x.grad if x.grad.shape == expected_x.shape else x.grad.flatten(2).mT
    assert_parity(actual, expected_x, 2e-5)


@pytest.mark.parametrize("name", ["dms_equal", "dms_larger", "dms_smaller"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_mean_shift(golden, name, num_layers):
    vectors = golden(f"mean_shift__{name}")
    head = from_reference(vectors.tensors("state."), source="meanshifter", num_layers=num_layers)
    assert isinstance(head, MeanShiftHead)
    x = vectors["input.x"].requires_grad_()
    logits = head(x)
    assert_parity(logits, vectors[f"output.layers_{num_layers}"])
    kwargs = {"sizes": {"num_layers": num_layers}, "model": head}
    cotangent = vectors[f"cotangent.layers_{num_layers}"]
    check_gradients(("meanshifter", kwargs), vectors, logits, x, f"grad.layers_{num_layers}", cotangent)


@pytest.mark.parametrize("name", ["dms_equal", "dms_larger", "dms_smaller"])
def test_mean_shift_with_other_layers_than_it_was_built_with(golden, name):
    vectors = golden(f"mean_shift__{name}")
    outputs = vectors.tensors("output.built_")
    assert outputs
    for key, expected in outputs.items():
        built, override = key.split(".override_")
        head = from_reference(vectors.tensors("state."), source="meanshifter", num_layers=int(built))
        head.num_layers = int(override)
        assert_parity(head(vectors["input.x"]), expected)


@pytest.mark.parametrize(("name", "source"), [("fcn_head", "meanshifter"), ("segm_decoder", "segmenter")])
def test_linear(golden, name, source):
    vectors = golden(f"linear__{name}")
    head = from_reference(vectors.tensors("state."), source=source)
    assert isinstance(head, LinearHead)
    x = as_map(vectors).requires_grad_()
    logits = head(x)
    assert_parity(logits, vectors["output.logits"])
    kwargs = {"sizes": {}, "model": head}
    check_gradients((source, kwargs), vectors, logits, x, "grad", vectors["cotangent.logits"])


@pytest.mark.parametrize("source", ["segmenter", "mmseg_segmenter"])
@pytest.mark.parametrize("name", ["l1_same", "l2_proj", "eps_probe"])
def test_mask_transformer(golden, source, name):
    kind = {"segmenter": "segm", "mmseg_segmenter": "mmseg"}[source]
    file = f"eps_probe__mask_transformer_{kind}" if name == "eps_probe" else f"mask_transformer_{kind}__{name}"
    vectors = golden(file)
    num_heads = vectors.config.get("n_heads") or vectors.config["num_heads"]
    head = from_reference(vectors.tensors("state."), source=source, num_heads=num_heads).eval()
    assert isinstance(head, MaskTransformerHead)
    x = as_map(vectors).requires_grad_()
    masks = head(x)
    assert_parity(masks, vectors["output.masks"])
    if vectors.tensors("grad."):
        kwargs = {"sizes": {"num_heads": num_heads}, "model": head}
        check_gradients((source, kwargs), vectors, masks, x, "grad", vectors["cotangent.masks"])


SEGMENTER_FILES = [
    "segmenter_e2e__linear",
    "segmenter_e2e__linear_distilled",
    "segmenter_e2e__mask",
    "eps_probe__segmenter_vit",
]


@pytest.mark.parametrize("file", SEGMENTER_FILES)
def test_segmenter_end_to_end(golden, file):
    vectors = golden(file)
    config = vectors.config
    model = from_reference(
        vectors.tensors("state."), "segmenter", num_heads=config["n_heads"], img_size=tuple(config["image_size"])
    ).eval()
    assert isinstance(model, SegmentationModel)
    sizes = [size for size in config["sizes"] if size != "quirk_same_count"]  # see the docstring of from_reference
    with torch.no_grad():
        for size in sizes:
            assert_parity(model(vectors[f"input.image_{size}"]), vectors[f"output.logits_{size}"])
        if "ragged" in sizes:
            assert_parity(model.logits(vectors["input.image_ragged"]), vectors["output.masks_ragged"])


@pytest.mark.parametrize("file", ["meanshifter_e2e__vit", "eps_probe__meanshifter_vit"])
def test_meanshifter_end_to_end(golden, file):
    vectors = golden(file)
    config = vectors.config
    model = from_reference(
        vectors.tensors("state."), "meanshifter", num_heads=config["num_heads"], num_layers=config["meanshift_layers"]
    ).eval()
    assert isinstance(model, SegmentationModel)
    with torch.no_grad():
        for size in (size for size in config["sizes"] if size != "quirk_same_count"):
            image = vectors[f"input.image_{size}"]
            assert_parity(model.logits(image), vectors[f"output.head_logits_{size}"])
            assert_parity(model(image), vectors[f"output.logits_{size}"])
            if f"output.features_{size}" in vectors.all:
                assert_parity(model.backbone(image)[-1], vectors[f"output.features_{size}"])


def test_quirk_of_equal_token_count_is_not_imitated(golden):
    """A 2x8 grid resizes the 4x4 table; the published code adds it in the wrong order."""
    vectors = golden("meanshifter_e2e__vit")
    model = from_reference(vectors.tensors("state."), "meanshifter", num_heads=2, num_layers=2).eval()
    with torch.no_grad():
        logits = model(vectors["input.image_quirk_same_count"])
    assert not torch.allclose(logits, vectors["output.logits_quirk_same_count"], atol=1e-3)


def test_mmseg_segmenter_with_a_backbone(golden):
    """No golden vector has one: the MeanShifter's backbone is the same class, and the head has its own vectors."""
    backbone = golden("eps_probe__meanshifter_vit").tensors("state.backbone.")
    state = {f"backbone.{key}": value for key, value in backbone.items()}
    state |= {"decode_head.conv_seg.weight": torch.randn(4, 16, 1, 1), "decode_head.conv_seg.bias": torch.randn(4)}
    model = from_reference({"meta": {}, "state_dict": state}, "mmseg_segmenter", num_heads=2)
    assert isinstance(model.head, LinearHead)
    assert model.stretch_logits
    assert model.loss_reduction == "all"


def test_converted_model_is_saved_and_loaded(golden, tmp_path):
    vectors = golden("eps_probe__meanshifter_vit")
    model = from_reference(vectors.tensors("state."), "meanshifter", num_heads=2)
    model.save_pretrained(tmp_path)
    again = SegmentationModel.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 40, 50)
    torch.testing.assert_close(again(image), model.eval()(image), rtol=0, atol=0)


def test_bad_states_are_named(golden):
    linear = {"head.weight": torch.randn(3, 8), "head.bias": torch.randn(3)}
    with pytest.raises(ValueError, match="one of segmenter, mmseg, mmseg_segmenter, meanshifter, senformer; got 'x'"):
        from_reference(linear, "x")
    with pytest.raises(ValueError, match=r"meanshifter head has conv_seg.weight or cls_emb; got \['head.bias'"):
        from_reference(linear, "meanshifter")
    with pytest.raises(ValueError, match=r"encoder.\* and decoder.\*; got \['decoder.head.bias'.*'stray'"):
        from_reference(
            {f"decoder.{key}": value for key, value in linear.items()} | {"stray": torch.ones(1)}, "segmenter"
        )
    with pytest.raises(ValueError, match="does not fit a LinearHead: .*stray"):
        from_reference(linear | {"stray": torch.ones(1)}, "segmenter")
    state = golden("eps_probe__meanshifter_vit").tensors("state.")
    with pytest.raises(ValueError, match="backbone of width 16 does not tell its attention heads; give num_heads"):
        from_reference(state, "meanshifter")
    with pytest.raises(ValueError, match=r"img_size \(32, 48\) with patch size 16 does not make the state's 4 patches"):
        from_reference(state, "meanshifter", num_heads=2, img_size=(32, 48))


SENFORMER_HEADS = ["senformer_head__grad", "senformer_head__odd", "senformer_head__tied_blocks"]


@pytest.mark.parametrize("file", [*SENFORMER_HEADS, "eps_probe__senformer_head"])
def test_senformer_head(golden, file):
    vectors = golden(file)
    config = vectors.config
    head = from_reference(
        vectors.tensors("state."), "senformer", num_heads=config["num_heads"], num_layers=config["branch_depth"]
    ).eval()
    assert isinstance(head, SenFormerHead)
    x = [level.requires_grad_() for level in levels(vectors)]
    for learner, level, i in zip(head.learners, x, range(4), strict=True):
        assert_parity(learner(level), vectors[f"output.raw_logits_{i}"])
    merged, *logits = head.predictions(x)
    assert_parity(logits[2], vectors["output.logits_2"])
    assert_parity(4 * merged.exp(), vectors["output.ensemble"])  # published: the sum of the learners

    labels = vectors["input.label"][:, 0].long()
    merged_loss = upsample_cross_entropy(merged, labels)
    learners_loss = sum(upsample_cross_entropy(each, labels) for each in logits) / 4
    assert_parity(merged_loss, vectors["output.loss_classic"])
    assert_parity(learners_loss, vectors["output.loss_seg"])

    size = labels.shape[1:]
    scores = upsample(merged.exp(), size)
    best = scores.topk(2, dim=1).values
    clear = 4 * (best[:, 0] - best[:, 1]) > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(scores.argmax(1)[clear], vectors["output.prediction"].long()[clear])

    if vectors.tensors("grad.loss."):
        (merged_loss + learners_loss).backward(retain_graph=True)
        published = from_reference(
            {**vectors.tensors("state."), **vectors.tensors("grad.loss.state.")}, "senformer", num_heads=2
        )
        for name, parameter in head.named_parameters():
            expected = published.get_parameter(name).detach()
            if name.endswith(".norm.bias"):  # zero but for rounding: it adds the same to all classes
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-7)
            else:
                assert_parity(parameter.grad, expected, 2e-5)
        for i, level in enumerate(x):
            assert_parity(level.grad, vectors[f"grad.loss.input.level_{i}"], 2e-5)
        grads = torch.autograd.grad((4 * merged.exp() * vectors["cotangent.ensemble"]).sum(), x)
        for i, grad in enumerate(grads):
            assert_parity(grad, vectors[f"grad.ensemble.input.level_{i}"], 2e-5)


@pytest.mark.parametrize("file", ["fpn_neck", "fpnt_neck__odd", "fpnt_neck__shift", "eps_probe__fpnt_neck"])
def test_senformer_neck(golden, file):
    vectors = golden(file)
    kwargs = {"neck_heads": vectors.config.get("num_heads"), "window_size": vectors.config.get("window_size")}
    neck = from_reference(vectors.tensors("state."), "senformer", **kwargs).eval()
    assert isinstance(neck, FPN if file == "fpn_neck" else FPNT)
    x = [level.requires_grad_() for level in levels(vectors)]
    maps = neck(x)
    for i, level in enumerate(maps):
        assert_parity(level, vectors[f"output.level_{i}"])
    if vectors.tensors("grad."):
        sum((level * vectors[f"cotangent.level_{i}"]).sum() for i, level in enumerate(maps)).backward()
        published = from_reference({**vectors.tensors("state."), **vectors.tensors("grad.state.")}, "senformer")
        for name, parameter in neck.named_parameters():
            assert_parity(parameter.grad, published.get_parameter(name).detach(), 2e-5)
        for i, level in enumerate(x):
            assert_parity(level.grad, vectors[f"grad.input.level_{i}"], 2e-5)


def test_senformer_neck_and_head(golden):
    vectors = golden("senformer_neck_head")
    config = vectors.config
    state = vectors.tensors("state.") | {"auxiliary_head.conv_seg.bias": torch.zeros(5)}
    model = from_reference(
        {"state_dict": state},
        "senformer",
        num_heads=config["head_heads"],
        neck_heads=config["neck_heads"],
        window_size=config["window_size"],
        num_layers=config["branch_depth"],
    ).eval()
    with torch.no_grad():
        ensemble = 4 * model(levels(vectors)).exp()
    assert_parity(ensemble, vectors["output.ensemble"])
    assert_parity(upsample(ensemble, tuple(config["image_size"])), vectors["output.ensemble_image"])


def test_bad_senformer_states_are_named(golden):
    state = golden("senformer_head__grad").tensors("state.")
    with pytest.raises(ValueError, match="num_layers is 3, but the state has 2 blocks of their own in each learner"):
        from_reference(state, "senformer", num_heads=2, num_layers=3)
    with pytest.raises(ValueError, match=r"keys backbone.\*, neck.\* and decode_head.\*, .*learners.* and backbone"):
        from_reference(state | {"backbone.conv1.weight": torch.ones(1)}, "senformer")
    with pytest.raises(ValueError, match=r"one of them .*; got \['stray'\]"):
        from_reference({"stray": torch.ones(1)}, "senformer")
    with pytest.raises(ValueError, match="does not fit a SenFormerHead: .*learners.0.stray"):
        from_reference(state | {"learners.0.stray": torch.ones(1)}, "senformer", num_heads=2)
    neck = golden("fpnt_neck__odd").tensors("state.")
    with pytest.raises(ValueError, match=r"window_size is 5, but the state's position tables \(169, 2\) say 7"):
        from_reference(neck, "senformer", window_size=5)
    with pytest.raises(ValueError, match=r"neck_heads is 4, but the state's position tables \(169, 2\) say 2"):
        from_reference(neck, "senformer", neck_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix):
    state = {"conv_seg.weight": torch.randn(3, 8, 1, 1), "conv_seg.bias": torch.randn(3)}
    expected = from_reference(state, source="meanshifter").state_dict()
    wrapped = {f"{prefix}{key}": value for key, value in state.items()}
    for checkpoint in (wrapped, {"epoch": 3, "state_dict": wrapped}, {"ema": wrapped}):
        found = from_reference(checkpoint, source="meanshifter").state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
