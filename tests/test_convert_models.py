"""Models of other libraries: the same numbers, through `convert_checkpoint`, `segheads convert` and a saved folder."""

import json
import re

import pytest
import segmentation_models_pytorch as smp
import torch
from parity import assert_parity
from safetensors.torch import save_file
from torch import nn

from segheads import SegmentationModel, from_reference
from segheads.cli import main
from segheads.convert import convert_checkpoint
from segheads.convert.backbones import read_backbone
from segheads.errors import CheckpointError
from segheads.predictor import Predictor

MMSEG = {"mmseg_uper_resnet": "uper", "mmseg_fcn_resnet": "fcn", "mmseg_uper_swin": "uper"}


@pytest.mark.parametrize("file", MMSEG)
def test_mmseg(golden, file):
    vectors = golden(file)
    model = from_reference({"state_dict": vectors.tensors("state.")}, "mmseg").eval()
    assert model.plan.head == MMSEG[file]
    assert model.stretch_logits
    with torch.no_grad():
        assert_parity(model.logits(vectors["input.image"]), vectors["output.head_logits"])


def test_a_dilated_resnet_is_told(golden):
    vectors = golden("mmseg_fcn_resnet")
    plain = from_reference(vectors.tensors("state."), "mmseg", output_stride=32)
    assert plain.backbone.strides == [32]
    assert from_reference(vectors.tensors("state."), "mmseg").backbone.strides == [8]


def folder_of(vectors, folder, **changed):
    """What transformers' `save_pretrained` writes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**vectors.config, **changed}))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    save_file(vectors.tensors("state."), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["uper_convnext", "uper_swin", "dpt"])
def test_transformers(golden, kind, tmp_path):
    vectors = golden(f"transformers_{kind}")
    folder = folder_of(vectors, tmp_path / "hf")
    main(["convert", str(folder), "--from", "hf", "--output", str(tmp_path / "model")])
    model = SegmentationModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_parity(model(vectors["input.image"])[..., ::4, ::4], vectors["output.logits"])
    assert model.classes.names == ("wall", "floor", "sky", "tree", "road")
    assert model.data_config["mean"] == [0.1, 0.2, 0.3]


SMP = [
    ("Unet", "tu-test_resnet", {"decoder_channels": (16, 8, 8, 8, 4)}),
    ("FPN", "tu-test_resnet", {}),
    ("Segformer", "resnet18", {"decoder_segmentation_channels": 16}),
    ("Unet", "tu-test_convnext", {"decoder_channels": (16, 8, 8, 8, 4), "classes": 1}),
    ("PSPNet", "resnet18", {"psp_out_channels": 16}),
    ("PSPNet", "tu-test_resnet", {"psp_out_channels": 16, "encoder_depth": 4, "upsampling": 16}),
    ("PAN", "tu-test_resnet", {"encoder_output_stride": 32, "decoder_channels": 8}),
    ("PAN", "resnet18", {"decoder_channels": 8}),
    ("PAN", "tu-test_resnet", {"decoder_channels": 8}),
    ("DeepLabV3", "resnet18", {"decoder_channels": 8}),
    ("DeepLabV3", "tu-test_resnet", {"decoder_channels": 8, "encoder_output_stride": 16}),
    ("DeepLabV3Plus", "resnet50", {"decoder_channels": 8}),
    ("DeepLabV3Plus", "resnet18", {"decoder_channels": 8, "encoder_output_stride": 8}),
    ("DeepLabV3Plus", "tu-test_resnet", {"decoder_channels": 8}),
]


@pytest.mark.parametrize(("kind", "encoder", "options"), SMP)
def test_smp(kind, encoder, options, tmp_path):
    theirs = getattr(smp, kind)(encoder_name=encoder, encoder_weights=None, **{"classes": 5, **options}).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "smp")
    convert_checkpoint(tmp_path / "smp", "smp").save_pretrained(tmp_path / "model")
    ours = SegmentationModel.from_pretrained(tmp_path / "model").eval()
    images = torch.randn(1, 3, *((256, 288) if kind == "PAN" else (64, 96)))  # which pools the last map three times
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


DPT = {"decoder_intermediate_channels": (8, 8, 8, 8), "decoder_fusion_channels": 8, "dynamic_img_size": True}


@pytest.mark.parametrize("readout", ["cat", "add", "ignore"])
def test_dpt_of_smp(readout, tmp_path):
    theirs = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=5, decoder_readout=readout, **DPT).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    nn.init.normal_(theirs.encoder.model.cls_token)
    theirs.save_pretrained(tmp_path / "smp")
    convert_checkpoint(tmp_path / "smp", "smp").save_pretrained(tmp_path / "model")
    ours = SegmentationModel.from_pretrained(tmp_path / "model").eval()
    assert ours.head.needs_class_token == (readout != "ignore")
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_dpt_that_reads_other_blocks_or_tokens_is_refused(golden, tmp_path):
    for name, encoder, options, message in (
        ("blocks", "tu-test_vit", {"encoder_output_indices": [0, 1, 2, 3]}, r"of blocks \[0, 1, 2, 3\] .* only of"),
        ("tokens", "tu-deit_tiny_distilled_patch16_224", {"decoder_readout": "add"}, "adds the mean of [0-9] tokens"),
        ("default", "tu-test_vit", {}, r"of blocks \[0, 2, 3, 5\] .*, only of \[1, 2, 3, 5\]"),
        ("depth", "tu-test_vit", {"encoder_depth": 3}, "encoder_depth 3 cannot be converted, only with 4"),
    ):
        options = {"encoder_depth": 4, **DPT, **options}
        theirs = smp.DPT("tu-test_vit", encoder_weights=None, **DPT)
        theirs.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **options, "encoder_name": encoder}))
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / name, "smp")
    vectors = golden("transformers_dpt")
    for key, value in (
        *(
            ("is_hybrid", True),
            ("readout_type", "x"),
            ("hidden_act", "relu"),
            ("backbone_config", {"model_type": "bit"}),
        ),
        *(("use_batch_norm_in_fusion_residual", False), ("backbone_out_indices", [0, 0, 1, 3])),
    ):
        folder = folder_of(vectors, tmp_path / key, **{key: value})
        with pytest.raises(
            CheckpointError, match=f"DPT (with {key}|of blocks .0, 0, 1, 3.) .*cannot be converted, only"
        ):
            convert_checkpoint(folder, "hf")


def test_a_converted_model_predicts_the_golden_labels(golden, tmp_path):
    vectors = golden("mmseg_uper_swin")
    meta = {"CLASSES": ("a", "b", "c", "d", "e"), "PALETTE": [[index, 0, 0] for index in range(5)]}
    torch.save({"meta": meta, "state_dict": vectors.tensors("state.")}, tmp_path / "swin.pth")
    main(["convert", str(tmp_path / "swin.pth"), "--from", "mmseg", "--output", str(tmp_path / "model")])
    predictor = Predictor.from_pretrained(tmp_path / "model")
    assert predictor.model.classes.palette[3] == (3, 0, 0)
    mean, std = (torch.tensor(predictor.model.data_config[key])[:, None, None] for key in ("mean", "std"))
    image = vectors["input.image"][0] * std + mean  # as the model normalises it again
    scores = nn.functional.interpolate(vectors["output.head_logits"], image.shape[1:], mode="bilinear")
    best = scores.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1])[0] > 1e-4
    with torch.no_grad():
        labels = predictor.model.predict(((image - mean) / std)[None])[0]
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], scores.argmax(1)[0][clear])


def test_names_of_swins_authors(golden):
    """SenFormer's backbone: merging of cells stands behind a stage, and rows come before columns."""
    state = golden("mmseg_uper_swin").tensors("state.backbone.")
    own = read_backbone(state, "mmseg").state
    authors = {}
    for key, value in own.items():
        key = re.sub(r"^norms\.", "norm", key.removeprefix("model."))
        if match := re.match(r"layers\.(\d)\.downsample(.*)", key):
            key = f"layers.{int(match[1]) - 1}.downsample{match[2]}"
        authors[key] = value
    again = read_backbone(authors, "senformer")
    assert again.name.startswith("swin")
    assert all(torch.equal(again.state[key], value) for key, value in own.items())


@pytest.mark.parametrize("file", ["mmseg_uper_resnet", "mmseg_uper_swin"])
def test_senformer_with_its_backbone(golden, file):
    """No golden vector has a whole one: backbone, neck and head, each of which has its own, in a row."""
    parts = golden("senformer_neck_head")
    body = golden(file).tensors("state.backbone.")
    state = {key: value[:, :1] if "lateral" in key and value.ndim == 4 else value for key, value in parts.all.items()}
    state = {key.removeprefix("state."): value for key, value in state.items() if key.startswith("state.")}
    channels = from_reference(golden(file).tensors("state."), "mmseg").backbone.channels
    for index, C in enumerate(channels):
        key = f"neck.lateral_convs.{index}.conv.weight"
        state[key] = torch.randn(state[key].shape[0], C, 1, 1)
    options = {"num_heads": parts.config["head_heads"], "num_layers": parts.config["branch_depth"]}
    whole = from_reference(state | {f"backbone.{key}": x for key, x in body.items()}, "senformer", **options).eval()
    in_a_row = from_reference(state, "senformer", **options).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(whole.logits(images), in_a_row(whole.backbone(images)))


def broken(tmp_path, vectors):
    state = vectors.tensors("state.")
    save_file(state | {"decode_head.stray": torch.ones(1)}, tmp_path / "stray.safetensors")
    save_file({key: x for key, x in state.items() if "fpn_bottleneck" not in key}, tmp_path / "lacks.safetensors")
    save_file({f"backbone.{key}": x for key, x in state.items()}, tmp_path / "odd.safetensors")
    save_file({"decode_head.convs.0.conv.weight": torch.ones(2, 2, 1, 1)}, tmp_path / "head.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678{")
    torch.save({"state_dict": state, "hook": nn.Linear}, tmp_path / "code.pth")
    for name, config in {
        "pan": {"_model_class": "PAN", "encoder_name": "resnet18", "encoder_depth": 4},
        "other": {"_model_class": "Sharpener", "encoder_name": "resnet18"},
        "segformer": {"model_type": "segformer"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / name / "model.safetensors")


BROKEN = {
    ("stray.safetensors", "mmseg"): "does not fit a UPerHead: .*stray",
    ("lacks.safetensors", "mmseg"): "lacks 'decoder.fusion_block.0.weight'",
    ("odd.safetensors", "mmseg"): r"got \['backbone",
    ("head.safetensors", "mmseg"): "mmseg head has conv_seg.weight or cls_emb",
    ("damaged.safetensors", "mmseg"): "damaged",
    ("code.pth", "mmseg"): "holds other objects than tensors and plain values, which are not run",
    ("none.pth", "mmseg"): "there is no such file",
    ("pan", "smp"): "smp's PAN with encoder_depth 4 cannot be converted, only with 5",
    ("other", "smp"): "smp's Sharpener cannot be converted; Unet, .* can",
    ("segformer", "hf"): "model_type 'segformer' cannot be converted .*timm has no Mix Transformer.; upernet, dpt can",
    ("none", "hf"): "config.json cannot be read",
}


def test_what_cannot_be_converted_is_named(golden, tmp_path, capsys):
    broken(tmp_path, golden("mmseg_uper_resnet"))
    for (name, source), message in BROKEN.items():
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} cannot be converted from {source}: .*{message}"):
            convert_checkpoint(tmp_path / name, source)
    with pytest.raises(ValueError, match="source must be one of segmenter, mmseg, .*; got 'x'"):
        convert_checkpoint(tmp_path, "x")
    with pytest.raises(ValueError, match="source 'smp' takes no num_heads"):
        convert_checkpoint(tmp_path / "pan", "smp", num_heads=2)
    with pytest.raises(SystemExit) as exit_status:
        main(["convert", str(tmp_path / "none.pth"), "--from", "mmseg", "--output", str(tmp_path / "model")])
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_classes_that_do_not_fit_are_named(golden, tmp_path, capsys):
    save_file(golden("mmseg_uper_resnet").tensors("state."), tmp_path / "model.safetensors")
    words = ["convert", str(tmp_path / "model.safetensors"), "--from", "mmseg", "--output", str(tmp_path / "model")]
    for given, message in (
        (["--dataset", "camvid"], "11 classes were named, but the model has 5"),
        (["--dataset", "camvid", "--class-names", "a"], "dataset and class_names both"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *given])
        assert message in capsys.readouterr().err
    main([*words, "--class-names", "a", "b", "c", "d", "e"])
    assert SegmentationModel.from_pretrained(tmp_path / "model").classes.names[4] == "e"


def test_what_no_weight_tells_is_said(golden, tmp_path, capsys):
    save_file(golden("mmseg_fcn_resnet").tensors("state."), tmp_path / "fcn.safetensors")
    words = ["convert", str(tmp_path / "fcn.safetensors"), "--from", "mmseg", "--output", str(tmp_path / "model")]
    main(words)
    assert "no weight tells, so it was taken to be as published: --output-stride 8; give it" in capsys.readouterr().out
    main([*words, "--output-stride", "8"])
    said = capsys.readouterr().out
    assert "no weight tells" not in said
    assert "normalised by mean (0.485, 0.456, 0.406)" in said
    vectors = golden("meanshifter_e2e__vit")
    save_file(vectors.tensors("state."), tmp_path / "shift.safetensors")
    words = ["convert", str(tmp_path / "shift.safetensors"), "--from", "meanshifter", "--output", str(tmp_path / "own")]
    main([*words, "--num-heads", str(vectors.config["num_heads"])])
    assert "as published: --num-layers 1; give it" in capsys.readouterr().out


def test_what_fits_nowhere_in_a_pspnet_is_an_error(tmp_path):
    theirs = smp.PSPNet("resnet18", encoder_weights=None, psp_out_channels=16)
    theirs.encoder.register_parameter("stray", nn.Parameter(torch.ones(1)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit a TimmBackbone: .*stray"):
        convert_checkpoint(tmp_path, "smp")


@pytest.mark.parametrize(("kind", "stride"), [("DeepLabV3Plus", 4), ("DeepLabV3", 32), ("PAN", 8)])
def test_an_output_stride_that_smp_has_not_is_named(kind, stride, tmp_path):
    getattr(smp, kind)("resnet18", encoder_weights=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_output_stride": stride}))
    with pytest.raises(CheckpointError, match=f"smp's {kind} with encoder_output_stride {stride} cannot be converted"):
        convert_checkpoint(tmp_path, "smp")


def test_an_option_of_smp_that_is_not_known_is_named(tmp_path):
    smp.Unet("tu-test_resnet", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 4)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_magic": 2}))
    with pytest.raises(CheckpointError, match="smp's Unet has options here that are not known: decoder_magic"):
        convert_checkpoint(tmp_path, "smp")


def test_a_dilated_head_is_refused_where_the_checkpoint_tells(golden, tmp_path):
    config = (
        "model = dict(\n    backbone=dict(dilations=(1, 1, 2, 4)),\n    decode_head=dict(type='FCNHead', dilation=6),\n"
    )
    state = {"meta": {"config": config + "    auxiliary_head=dict(dilation=6))"}}
    state["state_dict"] = golden("mmseg_fcn_resnet").tensors("state.")
    torch.save(state, tmp_path / "fcn_d6.pth")
    with pytest.raises(CheckpointError, match=r"fcn_d6.pth cannot be .*its head has dilated convolutions .dilation=6."):
        convert_checkpoint(tmp_path / "fcn_d6.pth", "mmseg")
    state["meta"]["config"] = config.replace("6", "1") + "    auxiliary_head=dict(dilation=6))"
    torch.save(state, tmp_path / "plain.pth")
    assert convert_checkpoint(tmp_path / "plain.pth", "mmseg").num_classes == 5
