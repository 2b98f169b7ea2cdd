"""Exported graphs give what the model gives, at sizes other than the one that they were made with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from segheads import Predictor, create_model
from segheads.classes import Classes
from segheads.errors import ExportError
from segheads.exporting import FORMATS, Deployed, Format, Job, OpenVino, TorchExport, TorchScript, export
from segheads.exporting.check import check, compare
from segheads.exporting.quantise import layers_with_weights, quantised
from segheads.heads import HEADS
from segheads.inference import InferenceProtocol

CLASSES = Classes(("road", "sky", "tree", "car", "sign"))
PAIRS = [("test_convnext", "mask_transformer")]  # SEGHEADS_ALL_HEADS=1 takes all heads
if os.environ.get("SEGHEADS_ALL_HEADS"):
    PAIRS = [(backbone, head) for backbone in ("test_vit", "test_convnext", "test_resnet") for head in HEADS]
SIZES = [(1, 97, 131), (3, 193, 67), (2, 64, 64)]
SMALL = {"senformer": {"learner_kwargs": {"num_layers": 1}}, "feature_fusion": {"decoder_kwargs": {"num_layers": 1}}}


def build(backbone="test_vit", head="linear", num_classes=5, **options):
    """A tiny model whose labels differ from place to place."""
    torch.manual_seed(0)
    model = create_model(backbone, head, num_classes, pretrained=False, **options)
    for parameter in model.head.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def photographs(batch, height, width, channels=3):
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)


def run(path, images, names=None):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(names, {"images": images.numpy()})


@pytest.fixture(scope="module")
def model():
    model = build(head="mean_shift")
    model.classes, model.protocol = CLASSES, InferenceProtocol(scale=(96, 64))
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """One ONNX file for many tests."""
    return export(model, tmp_path_factory.mktemp("onnx") / "model.onnx", outputs=("labels", "probability"))


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_onnxruntime_gives_the_models_labels_at_any_size(model, exported, batch, height, width):
    images = photographs(batch, height, width)
    labels, probability = run(exported.path, images)
    with torch.no_grad():
        expected = Deployed(model.eval(), ("labels", "probability"))(images)
    assert labels.dtype == np.uint8
    assert (labels == expected[0].numpy()).mean() >= 0.999
    np.testing.assert_allclose(probability, expected[1].numpy(), atol=1e-4)
    assert len(np.unique(labels)) > 1


def test_free_axes_have_names(exported):
    session = onnxruntime.InferenceSession(str(exported.path))
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", "height", "width"]


def test_the_file_says_what_it_is(model, exported):
    about = onnxruntime.InferenceSession(str(exported.path)).get_modelmeta().custom_metadata_map
    assert about == exported.metadata
    assert json.loads(about["classes"]) == list(CLASSES.names)
    assert json.loads(about["palette"]) == [list(colour) for colour in CLASSES.palette]
    assert InferenceProtocol(**json.loads(about["protocol"])) == model.protocol
    assert json.loads(about["outputs"]) == ["labels", "probability"]
    assert len(about["weights_sha256"]) == 64
    assert {"segheads", "model", "channels"} <= about.keys()
    assert (exported.size, exported.reason) == (None, None)
    assert exported.agreement.labels == 1
    assert len(exported.agreement.sizes) == 3


def test_the_program_beside_it_needs_no_segheads(model, exported, tmp_path):
    photo, result = tmp_path / "photo.png", tmp_path / "labels.png"
    Image.fromarray(photographs(1, 70, 131)[0].permute(1, 2, 0).numpy()).save(photo)
    source = exported.example.read_text()
    assert len(source.splitlines()) <= 35
    assert "segheads" not in source
    command = [sys.executable, "-I", str(exported.example), str(photo), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert any(f"{name}: " in done.stdout for name in CLASSES.names)
    picture = Image.open(result)
    expected = Predictor(model)(photo).labels.numpy()
    assert picture.getpalette()[:15] == [x for colour in CLASSES.palette for x in colour]
    assert picture.size == (131, 70)
    assert (np.array(picture) == expected).mean() > 0.9  # its labels are enlarged, and not its logits


def test_outputs_that_are_not_asked_for_are_gone(exported):
    assert [x.name for x in onnxruntime.InferenceSession(str(exported.path)).get_outputs()] == ["labels", "probability"]


@pytest.mark.parametrize(("backbone", "head"), PAIRS)
def test_heads_on_backbones(tmp_path, backbone, head):
    narrow = {"out_channels": 16} if head in ("senformer", "feature_fusion") else None
    model = build(backbone, head, head_kwargs=SMALL.get(head, {}), pyramid_kwargs=narrow)
    path = export(model, tmp_path / "model.onnx", outputs=("labels", "logits")).path
    for batch, height, width in SIZES[:2]:
        images = photographs(batch, height, width)
        labels, logits = run(path, images)
        with torch.no_grad():
            expected = Deployed(model.eval(), ("labels", "logits"))(images)
        assert (labels == expected[0].numpy()).mean() >= 0.999
        spread = float(expected[1].max() - expected[1].min())
        np.testing.assert_allclose(logits, expected[1].numpy(), atol=1e-4 * spread)


def test_int8_multiplies_layers_alone(model, exported, tmp_path):
    import onnx

    graph = onnx.load(str(exported.path))
    layers = layers_with_weights(graph.graph)
    found = quantised(graph, [photographs(1, 64, 80) for _ in range(3)], tmp_path)
    assert len(layers) >= 20
    assert sum(node.op_type == "QuantizeLinear" for node in found.graph.node) >= len(layers) // 2
    path = tmp_path / "int8.onnx"
    path.write_bytes(found.SerializeToString())
    images = photographs(1, 96, 70)
    same = (run(path, images, ["labels"])[0] == run(exported.path, images, ["labels"])[0]).mean()
    assert same > 0.8  # rounding random weights costs more labels than trained ones
    assert path.stat().st_size < 0.6 * exported.path.stat().st_size


def test_torch_export_in_16_bit(tmp_path):
    model = build()
    done = export(model, tmp_path / "model.pt2", format="torch-export", precision="fp16", outputs=("labels", "logits"))
    extra = {"classes": ""}
    graph = torch.export.load(done.path, extra_files=extra).module()
    images = photographs(2, 50, 77)
    with torch.no_grad():
        labels, logits = graph(images)
        expected = Deployed(model.eval(), ("logits",))(images)[0]
    assert logits.dtype == torch.float32
    assert 1e-6 < float((logits - expected).abs().max()) < 1e-2  # 16 bit, and close
    assert (labels == expected.argmax(1)).float().mean() > 0.99
    assert json.loads(extra["classes"])[0] == "class 0"
    assert next(model.parameters()).dtype == torch.float32


def test_torchscript_has_one_size_and_says_why(tmp_path):
    model = build()
    done = export(model, tmp_path / "model.pt", format="torchscript")
    assert done.size == tuple(model.data_config["input_size"][1:])
    assert "TorchScript" in done.reason
    images = photographs(1, *done.size)
    with torch.no_grad():
        assert torch.equal(TorchScript().load(done.path)(images)[0], Deployed(model.eval())(images)[0])


def test_openvino(tmp_path):
    openvino = pytest.importorskip("openvino", reason='openvino is not installed: pip install "segheads[openvino]"')
    model = build()
    done = export(model, tmp_path / "model.xml", format="openvino")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    read = openvino.Core().read_model(str(done.path))
    assert json.loads(read.get_rt_info(["segheads", "classes"]).astype(str))[0] == "class 0"
    assert len(read.outputs) == 1
    images = photographs(2, 55, 83)
    with torch.no_grad():
        expected = Deployed(model.eval())(images)[0]
    assert (OpenVino().load(done.path)(images)[0] == expected).float().mean() >= 0.999


class Wrong(Format):
    """Writes a file, and gives label 0 and the model's own logits."""

    suffix = ".wrong"
    share = 1.0

    def write(self, job: Job, path: Path) -> None:
        path.write_text("wrong")
        self.deployed = job.deployed

    def load(self, path: Path):
        def give(images):
            outputs = dict(zip(self.deployed.outputs, self.deployed(images), strict=True))
            return [(self.share * x).to(x.dtype) for x in outputs.values()]

        return give


@pytest.fixture
def wrong(monkeypatch):
    monkeypatch.setitem(FORMATS, "wrong", Wrong())
    return Wrong


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.0, "gives the model's label at .* and 99.9 % are wanted .*; nothing was written"), (0.9999, "logits differ")],
)
def test_a_graph_that_gives_something_else_leaves_no_file(wrong, monkeypatch, tmp_path, share, message):
    monkeypatch.setattr(wrong, "share", share)
    if share:  # labels are whole numbers, which such a factor would change, too
        monkeypatch.setattr("segheads.exporting.check.LIMITS", {"fp32": (0.0, 1e-5)})
    with pytest.raises(ExportError, match=message):
        export(build(), tmp_path / "model.wrong", format="wrong")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_after_an_error(wrong, monkeypatch, tmp_path):
    path = tmp_path / "model.wrong"
    path.write_text("before")
    monkeypatch.setattr(wrong, "write", lambda self, job, path: 1 / 0)
    with pytest.raises(ExportError, match=r"cannot be exported as asked \(ZeroDivisionError"):
        export(build(), path, format="wrong")
    assert path.read_text() == "before"
    monkeypatch.undo()
    monkeypatch.setitem(FORMATS, "wrong", Wrong())
    export(build(), path, format="wrong")
    assert path.read_text() == "wrong"


def test_a_backbone_bound_to_a_size_says_so(wrong, tmp_path):
    model = build("test_vit")
    model.backbone.fixed_size = (160, 160)
    done = export(model, tmp_path / "model.wrong", format="wrong")
    assert (done.size, done.reason) == ((160, 160), "test_vit is bound to images of 160 x 160")
    assert done.metadata["size"] == "[160, 160]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onx"}, "format must be one of onnx, .*; got 'onx'; did you mean 'onnx'"),
        ({"format": "aoti"}, "format aoti ends in .pt2; got '.*model.onnx'"),
        ({"outputs": ()}, "outputs must be one or more of labels, probability, logits, each once; got none"),
        ({"outputs": ("labels", "scores")}, "got labels, scores"),
        ({"precision": "int4"}, "precision must be one of fp32, fp16, int8; got 'int4'"),
        ({"precision": "int8"}, "int8 needs calibration"),
        ({"opset": 17}, "opset must be 18 or newer; got 17"),
        ({"min_agreement": 99}, "min_agreement must be a share of pixels, from 0 to 1; got 99"),
        ({"size": (0, 64)}, r"size must be height and width in pixels, 1 or more; got \(0, 64\)"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"precision": "int8", "calibration": [torch.zeros(64, 64)]}, r"must be \(3, H, W\) of stored values; got"),
    ],
)
def test_options_out_of_range_are_named(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_int8_is_of_onnx_alone(model, tmp_path):
    with pytest.raises(ValueError, match="format torch-export is written in fp32 or fp16; got precision int8"):
        export(model, tmp_path / "model.pt2", format="torch-export", precision="int8")


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchExport, "packages", ("nowhere",))
    with pytest.raises(ImportError, match=r'needs nowhere, which is not installed: pip install "segheads\[export\]"'):
        export(model, tmp_path / "model.pt2", format="torch-export")


@pytest.mark.parametrize("outputs", [("logits",), ("probability",)])
def test_labels_are_compared_whether_they_are_asked_for_or_not(wrong, monkeypatch, tmp_path, outputs):
    monkeypatch.setattr(wrong, "share", 0.0)
    monkeypatch.setattr("segheads.exporting.check.LIMITS", {"fp32": (0.99, None)})  # as of fp16: none on logits
    with pytest.raises(ExportError, match="gives the model's label at"):
        export(build(), tmp_path / "model.wrong", format="wrong", outputs=outputs)
    assert not list(tmp_path.iterdir())


def test_logits_of_nan_do_not_agree():
    reference = Deployed(build(), ("labels", "logits"))
    images = [photographs(1, 40, 50)]
    found = compare(lambda x: [reference(x)[0], reference(x)[1] * torch.nan], reference, images)
    for precision in ("fp32", "fp16"):
        with pytest.raises(ExportError, match="logits are NaN or infinite"):
            check(found, precision)


def test_tensors_for_calibration_are_stored_values(model, tmp_path):
    with pytest.raises(ValueError, match="must be of stored values, uint8; got torch.float32"):
        export(model, tmp_path / "model.onnx", precision="int8", calibration=[torch.rand(3, 40, 50)])
