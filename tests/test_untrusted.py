"""A model's folder is untrusted input: what it says is checked entry by entry, nothing else is opened or asked."""

import copy
import io
import json
import os
import pickle
import site
import socket
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from segheads import SegmentationModel, create_model
from segheads.errors import RunError, SavedModelError, SavedModelMissingError
from segheads.files import read_lines
from segheads.inference import InferenceProtocol
from segheads.pretrained import find_weights
from segheads.run_config import read_run_config
from segheads.untrusted import TIMM_ARGUMENTS, no_more_than

SMALL = {"img_size": 32, "model_kwargs": {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}}
MODEL_KWARGS = ("model", "backbone_kwargs", "model_kwargs")
HUGE = 10**9

# The way to an entry of config.json, what stands there, and what the error names.
HOSTILE = [
    # other places
    *(
        (("model", "backbone"), name, "model.backbone")
        for name in (
            "hf-hub:evil/model",
            "hf_hub:evil/model",
            "local-dir:/etc",
            "timm/resnet18.a1_in1k",
            "http://127.0.0.1:9/x",
            "file:///etc/passwd",
            "../../etc/passwd",
            "no_such_architecture",
            "",
            7,
            None,
        )
    ),
    *(
        ((*MODEL_KWARGS, name), value, f"model_kwargs.{name}")
        for name, value in {
            "pretrained_cfg_overlay": {"file": "/etc/passwd"},
            "pretrained_cfg": {"url": "http://127.0.0.1:9/x"},
            "checkpoint_path": "/etc/passwd",
            "cache_dir": "/var/poisoned",
            "pretrained": True,
            "pretrained_strict": False,
            "features_only": True,
            "scriptable": True,
            "num_classes": 7,
            "in_chans": 3,
            "embed_layer": "os.system",
        }.items()
    ),
    (("model", "backbone_kwargs", "pretrained"), True, "backbone_kwargs.pretrained"),
    (("model", "backbone_kwargs", "name"), "resnet18", "backbone_kwargs.name"),
    ((*MODEL_KWARGS, "act_layer"), "http://127.0.0.1:9/x", "model_kwargs.act_layer"),
    ((*MODEL_KWARGS, "norm_layer"), {"a": 1}, "model_kwargs.norm_layer"),
    # sizes
    ((*MODEL_KWARGS, "depth"), 100_000, "model_kwargs.depth"),
    ((*MODEL_KWARGS, "depth"), -1, "model_kwargs.depth"),
    ((*MODEL_KWARGS, "depth"), 500, "far larger than its weights"),
    ((*MODEL_KWARGS, "embed_dim"), HUGE, "model_kwargs.embed_dim"),
    ((*MODEL_KWARGS, "embed_dim"), 60_000, "far larger than its weights"),
    ((*MODEL_KWARGS, "num_heads"), 0, "model_kwargs.num_heads"),
    ((*MODEL_KWARGS, "patch_size"), 0, "model_kwargs.patch_size"),
    ((*MODEL_KWARGS, "mlp_ratio"), HUGE, "model_kwargs.mlp_ratio"),
    (("model", "backbone_kwargs", "img_size"), HUGE, "backbone_kwargs.img_size"),
    (("model", "backbone_kwargs", "img_size"), [32, "32"], "backbone_kwargs.img_size"),
    (("model", "backbone_kwargs", "in_chans"), HUGE, "backbone_kwargs.in_chans"),
    (("model", "backbone_kwargs", "levels"), HUGE, "backbone_kwargs.levels"),
    (("model", "backbone_kwargs", "no_such"), 1, "backbone_kwargs.no_such"),
    (("model", "backbone_kwargs", "drop_path_rate"), 7, "backbone_kwargs.drop_path_rate"),
    (("model", "num_classes"), HUGE, "model.num_classes"),
    (("model", "num_classes"), 30_000, "far larger than its weights|does not fit"),
    (("model", "num_classes"), True, "model.num_classes"),
    (("model", "num_classes"), 3.0, "model.num_classes"),
    (("model", "num_classes"), "3", "model.num_classes"),
    (("model", "num_classes"), 0, "model.num_classes"),
    # names and kinds
    (("model", "head"), "no_such", "no_such"),
    (("model", "head"), ["linear"], "model.head"),
    (("model", "pyramid"), "os.system", "os.system"),
    (("model", "pyramid_kwargs"), {"out_channels": 8}, "pyramid_kwargs"),
    (("model", "head_kwargs"), [], "model.head_kwargs"),
    (("model", "head_kwargs", "no_such"), 1, "head_kwargs.no_such"),
    (("model", "head_kwargs", "num_classes"), 1, "head_kwargs.num_classes"),
    (("model", "auxiliary_weight"), -1, "model.auxiliary_weight"),
    (("model", "auxiliary_weight"), float("nan"), "NaN"),
    (("model", "auxiliary_kwargs", "channels"), "8", "auxiliary_kwargs.channels"),
    (("model", "ignore_index"), 0.5, "model.ignore_index"),
    (("model", "loss"), "no_such", "no_such"),
    (("model", "loss"), "(" * 900, "loss"),
    (("model", "loss_kwargs", "label_smoothing"), "a", "loss_kwargs.label_smoothing"),
    (("model", "loss_reduction"), "sum", "model.loss_reduction"),
    (("model", "stretch_logits"), 1, "model.stretch_logits"),
    (("model", "freeze_stages"), HUGE, "model.freeze_stages"),
    (("model", "forward"), 1, "model.forward"),
    (("model",), [], "model"),
    # settings
    (("settings", "head", "forward"), 1, "head.forward"),
    (("settings", "head", "__class__"), "x", "head.__class__"),
    (("settings", "backbone.model", "forward"), 1, "forward"),
    (("settings", "no.such.part", "x"), 1, "no.such.part"),
    (("settings",), 7, "settings"),
    # the rest
    (("format",), 3, "format"),
    (("format",), "2", "format"),
    (("format",), True, "format"),
    (("no_such",), 1, "no_such"),
    (("auto_map",), {"AutoModel": "evil.Model"}, "auto_map"),
    (("classes",), {"names": ["a"], "palette": [[0, 0, 0]]}, "classes.names"),
    (("classes",), {"names": ["a", "b", "c"], "palette": [[0, 0, 300]] * 3}, "classes.palette"),
    (("classes",), {"names": "abc", "palette": []}, "classes.names"),
    (("classes",), {"names": ["a", "b", "c"], "run": "x"}, "classes.run"),
    (("protocol", "window"), HUGE, "protocol.window"),
    (("protocol", "scales"), [HUGE], "protocol.scales"),
    (("protocol", "scale"), [512], "protocol.scale"),
    (("protocol", "flip"), "yes", "protocol.flip"),
    (("protocol", "url"), "http://127.0.0.1:9/x", "protocol.url"),
    (("label_map",), {"0": 7}, "label map"),
    (("label_map",), {"os.system": 0}, "os.system"),
    (("input", "bit_depth"), 99, "bit_depth"),
    (("input", "band_std"), [0, 0, 0], "std"),
    (("input", "band_mean"), ["a"], "input.band_mean"),
    (("input", "path"), "/etc/passwd", "input.path"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a small model, and its config.json."""
    folder = tmp_path_factory.mktemp("models") / "small"
    create_model("test_vit", "linear", 3, pretrained=False, backbone_kwargs=SMALL).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def sealed(monkeypatch):
    """No connection, and a list of what was opened that is neither installed nor in the folder that is returned."""
    opened, home = [], []
    allowed = [sys.prefix, sys.base_prefix, *site.getsitepackages(), str(Path(__file__).parents[1]), *sys.path]

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection to {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)

    def spied(real):
        def spy(path, *args, **kwargs):
            if not isinstance(path, int):
                where = os.path.abspath(os.fsdecode(path))
                if not where.startswith(tuple(x for x in (*allowed, *home) if x)):
                    opened.append(where)
            return real(path, *args, **kwargs)

        return spy

    monkeypatch.setattr("builtins.open", spied(open))
    monkeypatch.setattr(io, "open", spied(io.open))
    monkeypatch.setattr(os, "open", spied(os.open))

    def start(folder):
        home.append(str(folder))
        opened.clear()
        return opened

    return start


def changed(folder, config, path, value):
    """Write config.json with one entry changed beside the weights."""
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "value", "named"), HOSTILE, ids=[f"{'.'.join(path)}={str(value)[:30]}" for path, value, _ in HOSTILE]
)
def test_a_hostile_entry_is_refused_by_name_without_a_connection_or_a_read(saved, sealed, tmp_path, path, value, named):
    folder = tmp_path / "model"
    changed(folder, saved[1], path, value)
    os.link(saved[0] / "model.safetensors", folder / "model.safetensors")
    opened = sealed(folder)
    with pytest.raises(SavedModelError, match=named) as error:
        SegmentationModel.from_pretrained(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200
    assert opened == []


def test_the_model_that_is_not_changed_loads_sealed(saved, sealed):
    opened = sealed(saved[0])
    assert SegmentationModel.from_pretrained(saved[0]).num_classes == 3
    assert opened == []


TEXTS = {
    "empty": (b"", "cannot be read"),
    "cut off": (b'{"format": 2, "model": {', "cannot be read"),
    "no JSON": (b"\x80\x04\x95pickle", "cannot be read"),
    "a list": (b"[]", "a dictionary"),
    "nested": (b"[" * 200_000, "nested too deep|cannot be read"),
    "of NaN": (b'{"model": {"auxiliary_weight": NaN}}', "NaN"),
    "twice": (b'{"model": {}, "model": {}}', "model' twice"),
    "a long number": (b'{"format": ' + b"9" * 5000 + b"}", "digits"),
    "without a model": (b'{"format": 2}', "model is missing"),
    "null": (b"null", "a dictionary"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_config_that_is_no_such_json_is_named_with_what_was_expected(saved, tmp_path, kind):
    text, words = TEXTS[kind]
    (tmp_path / "config.json").write_bytes(text)
    os.link(saved[0] / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(SavedModelError, match=words) as error:
        SegmentationModel.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "what save_pretrained wrote" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused_but_not_to_the_blobs_of_the_hubs_cache(saved, tmp_path, name):
    files = {file: saved[0] / file for file in ("config.json", "model.safetensors")}
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file, source in files.items():
        os.link(source, blobs / file)
        (snapshot / file).symlink_to(blobs / file)
    assert SegmentationModel.from_pretrained(snapshot).num_classes == 3
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(files[name])
    with pytest.raises(SavedModelError, match=f"{name} is a link to .* outside its folder"):
        SegmentationModel.from_pretrained(snapshot)


def test_a_pipe_or_a_device_is_no_file(saved, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    os.link(saved[0] / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(SavedModelError, match="holds no config.json"):
        SegmentationModel.from_pretrained(tmp_path)


WEIGHTS = {
    "a hole": (lambda state: state.popitem(), "is missing"),
    "more": (lambda state: state.update(extra=torch.zeros(1)), "extra is not expected"),
    "a shape": (lambda state: state.update({"head.classifier.bias": torch.zeros(4)}), r"\(4,\) instead of \(3,\)"),
    "a type": (
        lambda state: state.update({"head.classifier.bias": torch.zeros(3, dtype=torch.int64)}),
        "of int64 instead",
    ),
    "NaN": (
        lambda state: state["head.classifier.weight"].fill_(torch.nan),
        "48 of 48 values of head.classifier.weight",
    ),
    "infinite": (lambda state: state["head.classifier.bias"][1:2].fill_(torch.inf), "1 of 3 values"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_do_not_fit_or_are_not_finite_are_named(saved, tmp_path, kind):
    change, words = WEIGHTS[kind]
    state = load_file(saved[0] / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    os.link(saved[0] / "config.json", tmp_path / "config.json")
    with pytest.raises(SavedModelError, match=words) as error:
        SegmentationModel.from_pretrained(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_weights_of_another_float_type_load(saved, tmp_path):
    state = {key: value.bfloat16() for key, value in load_file(saved[0] / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    os.link(saved[0] / "config.json", tmp_path / "config.json")
    assert SegmentationModel.from_pretrained(tmp_path).head.classifier.weight.dtype == torch.float32


def test_a_model_whose_weights_are_not_finite_is_not_saved_and_what_was_there_stays(saved, tmp_path):
    model = SegmentationModel.from_pretrained(saved[0])
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.head.classifier.bias[0] = torch.nan
    with pytest.raises(SavedModelError, match="1 of 3 values of head.classifier.bias are NaN or infinite"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    options = {"backbone_kwargs": {"model_kwargs": {"depth": 1, "ffn_layer": "mlp"}}}
    plan = create_model("test_vit", "linear", 3, pretrained=False, backbone_kwargs=SMALL)
    plan.plan.backbone_kwargs["model_kwargs"] = options["backbone_kwargs"]["model_kwargs"]
    with pytest.raises(ValueError, match="ffn_layer is none of the arguments of timm that a file may set"):
        plan.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_backbone_from_a_place_is_saved_by_its_architecture(tmp_path, sealed):
    place = tmp_path / "hub"
    place.mkdir()
    about = {
        "architecture": "test_vit",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        "model_args": {"depth": 2, "patch_size": 8},
    }
    (place / "config.json").write_text(json.dumps(about), encoding="utf-8")
    model = create_model(f"local-dir:{place}", "linear", 3, pretrained=False, backbone_kwargs={"img_size": 32})
    model.save_pretrained(tmp_path / "saved")
    opened = sealed(tmp_path / "saved")
    again = SegmentationModel.from_pretrained(tmp_path / "saved")
    assert opened == []
    assert again.plan.backbone == "test_vit"
    assert again.data_config["mean"] == [0.1, 0.2, 0.3]
    x = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(again(x), model.eval()(x))


class Evil:
    """Makes a folder where a pickle of it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("was-here",)


def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": Evil()}, path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for file in (path, tmp_path / "plain.pth"):
        with pytest.raises(RuntimeError, match=file.name) as error:
            find_weights("test_vit", file)
        assert "Weights only load failed" in str(error.value) or "weights_only" in str(error.value).lower()
    assert not (tmp_path / "was-here").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert (tmp_path / "was-here").exists()  # so it would have run


def test_the_whitelist_names_neither_places_nor_what_timm_itself_takes():
    banned = (
        "pretrained",
        "cfg",
        "checkpoint",
        "path",
        "url",
        "file",
        "cache",
        "script",
        "export",
        "filter",
        "out_ind",
    )
    assert not [name for name in TIMM_ARGUMENTS if any(word in name.replace("drop_path", "") for word in banned)]
    assert {"depth", "embed_dim", "patch_size", "num_heads", "drop_rate", "img_size"} <= TIMM_ARGUMENTS


def test_a_model_is_not_built_beyond_its_weights_and_the_hooks_are_gone(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="1 tensors of 3 numbers"), no_more_than(tmp_path / "few.safetensors"):
        torch.nn.Linear(20_000, 20_000)
    assert torch.nn.Linear(2, 2).weight.shape == (2, 2)
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_every_backbone_that_saves_holds_finite_buffers():
    for name in ("test_vit", "test_convnext", "test_resnet"):
        model = timm.create_model(name)
        assert all(x.isfinite().all() for x in model.state_dict().values() if x.is_floating_point())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"dataset": 7}', "dataset must be a word or null; got 7"),
        ('{"scenes_size": -5000}', "scenes_size must be from"),
        ('{"data_root": ["/etc"]}', "data_root must be a word or null"),
        ('{"window": 1000000000}', "window must be from 1 to 65536"),
        ('{"exif": "upside"}', "exif must be one of 'apply', 'ignore'"),
        ("[" * 100_000, "nested too deep|cannot be read"),
        ("[]", "a dictionary"),
    ],
)
def test_the_configuration_of_a_run_is_checked_too(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=words) as error:
        read_run_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_records_of_a_run_are_named_by_their_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n7\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2, cannot be read \(it is a int\); expected records"):
        read_lines(path, "records", RunError)
    path.write_text('{"iteration": 1}\n{"iter', encoding="utf-8")
    assert read_lines(path, "records", RunError) == [{"iteration": 1}]


@pytest.mark.parametrize("options", [{"scales": (20.0,)}, {"scale": (70000, 512)}])
def test_what_would_not_be_read_is_not_written(tmp_path, options):
    model = create_model("test_vit", "linear", 3, pretrained=False, backbone_kwargs=SMALL)
    model.protocol = InferenceProtocol(**options)
    with pytest.raises(ValueError, match=r"^protocol\."):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_folder_has_no_revisions(tmp_path):
    create_model("test_vit", "linear", 3, pretrained=False, backbone_kwargs=SMALL).save_pretrained(tmp_path / "model")
    with pytest.raises(SavedModelMissingError, match="model@typo"):
        SegmentationModel.from_pretrained(tmp_path / "model@typo")
