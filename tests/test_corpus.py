"""Hundreds of bad inputs, made by code: each is refused in words that name it, or read as what it is."""

import copy
import json
import os
import resource
import shutil
import signal
import struct
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from corpus.images import COLOURS, VALUES, K, files, sources
from PIL import Image
from safetensors.torch import load, save

from segheads import Predictor, SegmentationModel, create_model
from segheads.cli import main
from segheads.cli.run import USAGE
from segheads.convert import convert_checkpoint, from_reference
from segheads.data import FolderDataset, LabelMap, class_weights
from segheads.data.coco_json import COCOContent
from segheads.data.dataset import read_sample
from segheads.data.download import _unpack
from segheads.data.scan import SplitScan, scan_sample
from segheads.data.tables import table_pairs
from segheads.errors import SegheadsError

SECONDS = 4  # for one input
MEMORY = 1 << 30  # that all inputs together may add
SMALL = {"img_size": 32, "model_kwargs": {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}}

counts: dict[str, int] = {}


class StuckError(BaseException):
    """No Exception: a reader would take it for what a decoder raised."""


@contextmanager
def limited():
    """Stop what does not end."""

    def stop(*_):
        raise StuckError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(call, *culprits, right=None, kinds=(SegheadsError,)):
    """What is wrong with how an input is taken; None if it is refused by name, or is what it should be."""
    try:
        with limited():
            result = call()
    except kinds as error:
        words = str(error)
        if "\n" in words or len(words) > 1500:
            return f"not one line: {words[:200]!r}"
        return None if any(str(culprit) in words for culprit in culprits) else f"names nothing: {words[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if right is not None and right(result) else "silent"


def report(name, faults, count):
    """Fail with all that went wrong."""
    counts[name] = count
    shown = "\n".join(f"{case}: {words}" for case, words in faults.items())
    assert not faults, f"{len(faults)} of {count} {name} were not taken as they should be:\n{shown}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small saved model."""
    folder = tmp_path_factory.mktemp("model")
    create_model("test_vit", "linear", K, pretrained=False, backbone_kwargs=SMALL).save_pretrained(folder)
    return folder


def is_same(pair):
    image, labels = pair
    return np.array_equal(np.asarray(image), COLOURS) and np.array_equal(labels.numpy(), VALUES)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about metadata
def test_images_and_labels(tmp_path, model):
    predictor = Predictor.from_pretrained(model)
    all_files, faults = files(), {}
    for number, bad in enumerate(all_files):
        folder = tmp_path / str(number)
        folder.mkdir()
        place = {"image": folder / "good.png", "label": folder / "good_label.png"}
        Image.fromarray(COLOURS).save(place["image"])
        Image.fromarray(VALUES).save(place["label"])
        path = place[bad.what] = folder / bad.name
        bad.write(path)

        def fits(pair, bad=bad):
            values = set(pair[1].unique().tolist())
            return is_same(pair) or (bad.may_differ and values <= {*range(K), 255})

        dataset = FolderDataset([place["image"]], [place["label"]], K)
        found = fault(lambda d=dataset: read_sample(d, 0), path, right=fits)
        scanned = None
        if found is None:
            scanned = fault(lambda d=dataset: scan_sample(d, 0), right=lambda scan, p=path: _told(scan, p))
        predicted = None
        if found is None and bad.what == "image":
            predicted = fault(lambda p=path: predictor(p), path, right=lambda _: True)
        for how, words in (("read", found), ("scan", scanned), ("predict", predicted)):
            if words:
                faults[f"{bad.kind}, {how}"] = words
        shutil.rmtree(folder)
    report("images and labels", faults, len(all_files))


def _told(scan, path):
    return not scan.problem or str(path) in scan.message


def test_the_sources_are_sound(tmp_path):
    for name, (what, content) in sources().items():
        path, good = tmp_path / name, tmp_path / f"good_{name}.png"
        path.write_bytes(content)
        Image.fromarray(VALUES if what == "image" else COLOURS).save(good)
        image, label = (path, good) if what == "image" else (good, path)
        pair = read_sample(FolderDataset([image], [label], K), 0)
        assert is_same(pair) or name.endswith(".jpg")


WRONG = [None, "x", "", -1, 10**9, 1.5, True, [], {}, ["x"], {"x": 1}, [[[[[[[[1]]]]]]]], "../../x", 10**30]


def entries(values, path=()):
    """The way to every entry of nested dictionaries."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from entries(value, (*path, key))


def test_configs_with_every_entry_wrong_in_turn(tmp_path, model):
    sound = json.loads((model / "config.json").read_text(encoding="utf-8"))
    weights = load((model / "model.safetensors").read_bytes())
    images, faults, count = torch.randn(1, 3, 32, 32), {}, 0
    folder = tmp_path / "changed"
    folder.mkdir()
    os.link(model / "model.safetensors", folder / "model.safetensors")
    for path in entries(sound):
        for value in WRONG:
            config = copy.deepcopy(sound)
            place = config
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

            def right(loaded):
                return (
                    all(torch.equal(loaded.state_dict()[key], x) for key, x in weights.items()) and loaded(images).ndim
                )

            count += 1
            if words := fault(lambda: SegmentationModel.from_pretrained(folder), folder, right=right):
                faults[f"{'.'.join(path)} = {value!r}"] = words
    report("configs", faults, count)


def test_weights(tmp_path, model):
    content = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def with_header(**changes):
        text = json.dumps({**header, **changes}).encode()
        return struct.pack("<Q", len(text)) + text + body

    first, second = names[0], names[1]
    bad = {f"cut at {n}": content[:n] for n in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, len(content) - 1)}
    bad |= {f"length {n}": struct.pack("<Q", n) + content[8:] for n in (0, 1, 2**32, 2**63, 2**64 - 1, length - 1)}
    bad |= {f"flipped at {n}": content[:n] + bytes([content[n] ^ 255]) + content[n + 1 :] for n in range(0, 64, 4)}
    for dtype in ("I64", "I32", "U8", "BOOL", "F8_E4M3", "F99", "", 7):
        bad[f"type {dtype}"] = with_header(**{first: {**header[first], "dtype": dtype}})
    for shape in ([], [0], [-1], [10**9, 10**9], [1], "x", [2**64]):
        bad[f"shape {shape}"] = with_header(**{first: {**header[first], "shape": shape}})
    for offsets in ([0, 0], [5, 2], [0, 2**62], [-1, 4], [0], "x", header[second]["data_offsets"]):
        bad[f"offsets {offsets}"] = with_header(**{first: {**header[first], "data_offsets": offsets}})
    bad["another entry"] = with_header(**{first: 7})
    state = load(content)
    for name in names:
        bad[f"without {name}"] = save({key: x for key, x in state.items() if key != name})
        bad[f"{name} in another shape"] = save({**state, name: torch.zeros(*state[name].shape, 2)})
    for name in names[::4]:
        bad[f"{name} called x"] = save({("x" if key == name else key): x for key, x in state.items()})
        for value in (torch.nan, torch.inf):
            bad[f"{name} of {value}"] = save({**state, name: torch.full_like(state[name], value)})
        bad[f"{name} of integers"] = save({**state, name: state[name].int()})
    faults = {}
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    for kind, data in bad.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)
        if words := fault(lambda: SegmentationModel.from_pretrained(tmp_path), path, right=lambda _: False):
            faults[kind] = words
    report("weights", faults, len(bad))


TEXTS = {
    "empty": "",
    "cut off": '{"a": [1, ',
    "null": "null",
    "a number": "7",
    "a word": '"x"',
    "an empty list": "[]",
    "an empty dictionary": "{}",
    "nested": "[" * 100_000,
    "nested dictionaries": '{"a":' * 100_000,
    "twice": '{"0": 0, "0": 1}',
    "NaN": '{"0": NaN}',
    "a long number": '{"0": ' + "9" * 10_000 + "}",
    "a list of lists": "[[[0]]]",
    "a list of words": '["a", "b", "c"]',
    "negative": '{"-1": -5}',
    "fractions": '{"0.5": 0.5}',
    "true": '{"0": true}',
    "too many classes": '{"0": 99999999999}',
    "no UTF-8": b'{"\xff\xfe": 0}',
    "zeros": bytes(50),
    "COCO without images": '{"images": [], "annotations": [], "categories": []}',
    "COCO of words": '{"images": ["a"], "annotations": ["b"], "categories": ["c"]}',
    "COCO of null": '{"images": [null], "annotations": [null], "categories": [null]}',
    "COCO of odd ids": '{"images": [{"id": {}, "file_name": 7, "height": "x", "width": -1}], '
    '"annotations": [{"image_id": 1, "category_id": []}], "categories": [{"id": [], "name": 7}]}',
    "COCO of huge sizes": '{"images": [{"id": 1, "file_name": "a.png", "height": 1e300, "width": 1e300}], '
    '"annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 1e308, 0, 1e308, 1e308]]}], '
    '"categories": [{"id": 1, "name": "a"}]}',
}


SOUND = {("label map", "too many classes")}  # the number of classes is looked at later


@pytest.mark.parametrize("kind", ["label map", "colours", "class weights", "COCO", "table"])
def test_texts(tmp_path, kind):
    faults, scan = {}, SplitScan(class_names=("a", "b", "c"))
    calls = {
        "label map": lambda path: LabelMap.read(path, ("a", "b", "c")),
        "colours": lambda path: LabelMap.read(path, ("a", "b", "c"), colours=True),
        "class weights": lambda path: class_weights(str(path), scan),
        "COCO": COCOContent,
        "table": lambda path: table_pairs(path, "train"),
    }
    made = {"a folder": lambda p: p.mkdir(), "a pipe": os.mkfifo, "a loop": lambda p: p.symlink_to(p.name)}
    made["nothing"] = lambda p: None
    made |= {
        title: lambda p, text=text: p.write_bytes(text if isinstance(text, bytes) else text.encode())
        for title, text in TEXTS.items()
    }
    for number, (title, write) in enumerate(made.items()):
        path = tmp_path / f"{number}.csv" if kind == "table" else tmp_path / f"{number}.json"
        write(path)
        if words := fault(lambda p=path: calls[kind](p), path, right=lambda _, t=title: (kind, t) in SOUND):
            faults[title] = words
    report(kind, faults, len(made))


def test_states_to_convert():
    state = {"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8), "patch_embed.proj.bias": torch.zeros(16)}
    head = {"q.weight": torch.eye(8), "q.bias": torch.zeros(8), "conv_seg.weight": torch.randn(3, 8, 1, 1)}
    head["conv_seg.bias"] = torch.zeros(3)
    sources = ("segmenter", "mmseg_segmenter", "meanshifter", "senformer")
    bad = [
        {},
        {"x": torch.zeros(1)},
        state,
        {"learners.0.class_embeddings": torch.zeros(1)},
        {"neck.x": torch.zeros(2)},
    ]
    bad += [{key: x for key, x in head.items() if key != name} for name in head]
    bad += [{**head, name: torch.zeros(2, 2, 2)} for name in head]
    bad += [{"backbone.cls_token": torch.zeros(1)}, {"decode_head.x": torch.zeros(1), "neck.y": torch.zeros(1)}]
    bad += [{"state_dict": {}}, {"model": {"model": {}}}]
    faults, count = {}, 0
    for source in sources:
        for number, each in enumerate(bad):
            count += 1
            call = lambda e=each, s=source: from_reference(e, source=s, num_layers=1)  # noqa: E731
            if words := fault(call, source, "state", "got", kinds=(ValueError,)):
                faults[f"{source} {number}"] = words
    report("states", faults, count)


CONVERTED = {
    "_model_class": (None, "x", 7, [], "DeepLabV3Plus"),
    "encoder_name": (None, "x", 10**9, ["x"], "hf-hub:owner/name", "local-dir:../../x", "tu-hf-hub:owner/name"),
    "encoder_depth": (None, -1, 10**30, "x", {}),
    "decoder_channels": (None, -1, [10**7] * 5, "x", {"x": 1}, [[1]], [1.5] * 5),
    "decoder_interpolation": (None, "x", -1, []),
    "in_channels": (None, -1, 0, 10**9, 1e300, "x"),
    "classes": (None, -1, 0, 10**9, 10**30, "x", []),
}


def test_folders_to_convert(tmp_path):
    decoder = {"decoder_channels": (16, 8, 8, 8, 4), "classes": K}
    smp.Unet("tu-test_resnet", encoder_weights=None, **decoder).save_pretrained(tmp_path)
    sound = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert convert_checkpoint(tmp_path, "smp").num_classes == K
    cases = [(key, value) for key, values in CONVERTED.items() for value in values]
    faults = {}
    for key, value in cases:
        (tmp_path / "config.json").write_text(json.dumps({**sound, key: value}), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on the way to a refusal
            if words := fault(lambda: convert_checkpoint(tmp_path, "smp"), tmp_path):
                faults[f"{key} = {value!r}"] = words
    report("folders to convert", faults, len(cases))


def test_exports_of_damaged_models(tmp_path, model, capsys):
    """The command: two lines at most, and no file."""
    content, config = ((model / name).read_bytes() for name in ("model.safetensors", "config.json"))
    bad = [(content[:-1], config), (b"", config), (content, config[:-9]), (content, b"[]"), (content, b"\xff")]
    faults = {}
    for number, (weights, settings) in enumerate(bad):
        (tmp_path / "model.safetensors").write_bytes(weights)
        (tmp_path / "config.json").write_bytes(settings)
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tmp_path), "--output", str(tmp_path / "model.onnx")])
        said = capsys.readouterr().err
        if ended.value.code != USAGE or said.count("\n") > 2 or str(tmp_path) not in said:
            faults[str(number)] = said
        assert not (tmp_path / "model.onnx").exists()
    report("exports", faults, len(bad))


def test_archives(tmp_path):
    name, faults = "ADEChallengeData2016", {}
    members = [
        "../x",
        "/x",
        f"{name}/../../x",
        "..\\x",
        f"{name}/..\\..\\x",
        "C:\\x",
        f"{name}/\0x",
        "other/x",
        "//h/x",
    ]
    for number, member in enumerate(members):
        archive = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"{name}/a", "a")
            file.writestr(member, "b")
        outcome = fault(lambda a=archive, n=number: _unpack(a, tmp_path / f"out{n}"), archive, right=lambda _: True)
        escaped = [p for p in (tmp_path.parent / "x", tmp_path / "x", Path("/x")) if p.exists()]
        if outcome or escaped:
            faults[member] = outcome or f"wrote {escaped}"
    report("archives", faults, len(members))


def test_the_corpus_is_large_and_took_no_memory():
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\n{sum(counts.values())} inputs: {counts}; {used / 1e9:.2f} GB at most; {time.process_time():.0f} s of CPU")
    if len(counts) >= 10:  # all of this file ran
        assert sum(counts.values()) >= 600
    assert used < 2 * MEMORY + (1 << 30)  # torch and timm alone take half a gigabyte
