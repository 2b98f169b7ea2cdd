"""The folder of a model: config.json and model.safetensors, each whole or not there."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from segheads.classes import Classes, num_labels
from segheads.data.label_map import LabelMap
from segheads.errors import SavedModelError, SavedModelMissingError
from segheads.files import read_json, write_json
from segheads.heads import Head
from segheads.hub import download
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.mean_shift import MeanShift
from segheads.merges import LEARNED_OF_0_1_0
from segheads.plan import ModelPlan
from segheads.pretrained import why_hub_is_out_of_reach
from segheads.schema import check_fields, check_value, short, short_name
from segheads.untrusted import check_input, check_model, check_plan
from segheads.version import VERSION
from segheads.weights_file import WRITTEN, write_weights

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
INPUT = ("bit_depth", "band_mean", "band_std")
FORMAT = 2  # a config.json without a number is of 0.1.0
ENTRIES = ("format", "segheads", "model", "settings", "input", "classes", "label_map", "protocol", "ignore_index")

Settings = Mapping[str, Mapping[str, Any]]  # by the name of a part, what may have been changed on it


class SavedModel(NamedTuple):
    """What a folder holds."""

    plan: ModelPlan
    settings: Settings
    weights: Path
    config: Path
    classes: Classes | None
    protocol: InferenceProtocol
    label_map: LabelMap | None
    input: Mapping[str, Any]  # arguments of set_input
    revision: str | None = None  # the commit on the hub


def write_folder(
    folder: Path,
    model: nn.Module,
    plan: ModelPlan,
    data_config: Mapping[str, Any],
    classes: Classes | None,
    protocol: InferenceProtocol,
    label_map: LabelMap | None = None,
) -> None:
    """Write config.json and model.safetensors.

    Args:
        folder: Where to; made if need be.
        model: The model; its settings are kept, too.
        plan: What it was built from.
        data_config: Mean, std and input size, and what `set_input` was told.
        classes: Names and colours, if they are known.
        protocol: How images are shown to the model.
        label_map: What the label files meant, if that was not their values.

    Raises:
        ValueError: If the plan holds what is no JSON value, or what reading refuses.
        SavedModelError: If a weight is NaN or infinite.
    """
    values = {
        "format": FORMAT,
        "segheads": VERSION,
        "model": dataclasses.asdict(plan),
        "settings": settings_of(model),
        "input": {
            **{key: list(data_config[key]) for key in ("mean", "std", "input_size")},
            "in_chans": data_config["input_size"][0],
            **{key: data_config.get(key) for key in INPUT},  # None: 8 bit, and the backbone's mean and std
        },
        **meaning_as_json(classes, protocol, label_map),
        "ignore_index": plan.ignore_index,
    }
    check_savable(plan, protocol, values["input"])
    meaning_from_json(json.loads(json.dumps(values)), num_labels(plan.num_classes))
    write_weights(folder / WEIGHTS_FILE, model)
    write_json(folder / CONFIG_FILE, values)


def check_savable(plan: ModelPlan, protocol: InferenceProtocol, data_config: Mapping[str, Any]) -> None:
    """Refuse what cannot be written, or what reading would refuse.

    Args:
        plan: What a model was built from.
        protocol: How images are shown to it.
        data_config: Mean, std and input size, and what `set_input` was told.

    Raises:
        ValueError: Says what of it.
    """
    values = dataclasses.asdict(plan)
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"the arguments of create_model must be JSON values to be saved: {error}") from error
    check_model(values)
    check_plan(plan)
    check_fields(json.loads(json.dumps(protocol.as_json())), InferenceProtocol, "protocol")
    given = {key: data_config[key] for key in ("mean", "std", *INPUT) if data_config.get(key) is not None}
    check_input(json.loads(json.dumps(given)))


def meaning_as_json(classes: Classes | None, protocol: InferenceProtocol, label_map: LabelMap | None) -> dict[str, Any]:
    """What labels and images are to a model, for `meaning_from_json`.

    Args:
        classes: Names and colours, if they are known.
        protocol: How images are shown to the model.
        label_map: What the label files meant, if that was not their values.
    """
    return {
        "classes": None if classes is None else _classes_as_json(classes),
        "label_map": None if label_map is None else label_map.as_json(),
        "protocol": protocol.as_json(),
    }


def meaning_from_json(
    config: Mapping[str, Any], labels: int
) -> tuple[Classes | None, InferenceProtocol, LabelMap | None]:
    """Classes, protocol and label map of a config.json; of one that lacks them None, whole images and None.

    Args:
        config: What it holds.
        labels: How many labels the model tells apart.

    Raises:
        ValueError: If they are damaged; the message begins with the entry.
    """
    named, mapped, shown = config.get("classes"), config.get("label_map"), config.get("protocol", WHOLE.as_json())
    classes = label_map = None
    if named is not None:
        check_fields(named, Classes, "classes")
        classes = _classes_from_json(named)
        if len(classes) != labels:
            raise ValueError(f"classes.names must be {labels}, as many as the model has labels; got {len(classes)}")
    if mapped is not None:
        check_value(mapped, dict[str, Any], "label_map")
        label_map = LabelMap.from_json(mapped)
        label_map.check(labels)
    check_fields(shown, InferenceProtocol, "protocol")
    return classes, InferenceProtocol(**shown), label_map


def _classes_as_json(classes: Classes) -> dict[str, Any]:
    pairs = {"flip_pairs": classes.flip_pairs} if classes.flip_pairs else {}
    background = {"has_background": True} if classes.has_background else {}
    return {"names": classes.names, "palette": classes.palette, **pairs, **background}


def _classes_from_json(named: Mapping[str, Any]) -> Classes:
    return Classes(
        tuple(named["names"]),
        tuple(map(tuple, named["palette"])),
        tuple(map(tuple, named.get("flip_pairs", ()))),
        bool(named.get("has_background", False)),
    )


def find_folder(where: str, **hub_options: Any) -> SavedModel:
    """Read config.json of a local folder or of a model on the hub, and say clearly where there is none.

    Args:
        where: A folder, or a name on the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        **hub_options: See `SegmentationModel.from_pretrained`.

    Raises:
        SavedModelMissingError: If there is no such model.
        SavedModelError: If config.json is damaged or describes no model.
    """
    name, mark, revision = where.rpartition("@")
    is_folder = Path(where).is_dir() or Path(name).is_dir()  # a folder has no revisions, and its name may be mistyped
    if mark and not is_folder and hub_options.get("revision") is None:
        where, hub_options = name, {**hub_options, "revision": revision}
    cause = check_place(where, hub_options)
    try:
        return read_folder(where, **hub_options)
    except SavedModelError:
        raise
    except OSError as error:
        raise SavedModelMissingError(
            f"{where!r} is no local folder, and could not be had from the Hugging Face hub: {cause or error}"
        ) from error


def read_folder(name: str, **hub_options: Any) -> SavedModel:
    """Read config.json of a local folder or of a model on the hub, and find its weights.

    Nothing is built, and nothing that config.json names is opened.

    Args:
        name: A folder, or a name on the hub.
        **hub_options: See `SegmentationModel.from_pretrained`.

    Raises:
        SavedModelError: If config.json is damaged or describes no model; the message names the entry.
    """
    revision = None
    if Path(name).is_dir():
        config_file, weights = (inside(name, file) for file in (CONFIG_FILE, WEIGHTS_FILE))
    else:
        config_file = download(name, CONFIG_FILE, **hub_options)
        revision = config_file.parent.name  # in huggingface_hub's cache: snapshots/COMMIT/config.json
        weights = download(name, WEIGHTS_FILE, **{**hub_options, "revision": revision})
    with describing(config_file):
        config = read_config(config_file)
        version = config.get("format", 1)
        plan, settings = read_model(config["model"], version=version), config["settings"]
        meaning = meaning_from_json(config, num_labels(plan.num_classes))
        check_input(config.get("input", {}))
    given = {key.removeprefix("band_"): config["input"].get(key) for key in INPUT} if "input" in config else {}
    if not all(isinstance(values, dict) for values in settings.values()):
        settings = {"head": settings}  # as they were saved before heads nested
    if version == 1:
        settings = {part: _with_its_merge(values) for part, values in settings.items()}
    return SavedModel(plan, settings, weights, config_file, *meaning, given, revision)


def inside(folder: str | Path, name: str) -> Path:
    """A file of a folder, which no link may lead out of; huggingface_hub's cache links to the blobs beside it.

    Args:
        folder: The folder.
        name: Of the file.

    Raises:
        SavedModelError: If it is a link to what lies elsewhere.
    """
    path, real = Path(folder) / name, (Path(folder) / name).resolve()
    home = Path(folder).resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise SavedModelError(f"{path} is a link to {real}, outside its folder; copy the file, or give that folder")
    return path


def read_config(path: Path, others: Collection[str] = ()) -> dict[str, Any]:
    """Read a config.json whose entries are known, and in kind and size what they should be.

    Args:
        path: The file.
        others: Names that it may have besides those of a model.

    Raises:
        SavedModelError: If it is damaged.
        ValueError: If an entry is unknown, missing or of another kind; the message begins with it.
    """
    config: dict[str, Any] = read_json(path, WRITTEN, SavedModelError, finite=True)
    known = (*ENTRIES, *others)
    for key in config:
        if key not in known:
            raise ValueError(f"{short_name(key)} is not known here; there are {', '.join(known)}")
    version = config.get("format", 1)
    if isinstance(version, bool) or version not in range(1, FORMAT + 1):
        raise ValueError(f"format must be 1 to {FORMAT}; got {short(version)}: a newer segheads may read it")
    if "model" not in config:
        raise ValueError("model is missing")
    config.setdefault("settings", {})
    check_model(config["model"])
    check_value(config["settings"], dict[str, Any], "settings")
    check_value(config.get("segheads"), str | None, "segheads")
    check_value(config.get("ignore_index"), int | None, "ignore_index")
    return config


@contextmanager
def describing(path: Path) -> Iterator[None]:
    """Name the file whose entries describe no model.

    Args:
        path: A config.json.

    Raises:
        SavedModelError: Instead of whatever building from it raises.
    """
    try:
        yield
    except SavedModelError:
        raise
    except Exception as error:  # of segheads, timm, smp or PyTorch: it is the file's fault
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise SavedModelError(
            f"{path} does not describe a model: {' '.join(reason.split())[:600]}; expected {WRITTEN}"
        ) from error


def read_model(values: Mapping[str, Any], *, version: int = FORMAT) -> ModelPlan:
    """The plan that config.json holds, of this version or of 0.1.0.

    Args:
        values: The entry `model`.
        version: The number `format` of config.json; 1 where 0.1.0 wrote none.

    Raises:
        ValueError: If an entry names what no registry has, or is out of range.
    """
    values = {"pyramid": None, **values}
    if 0 <= values.get("ignore_index", 255) < values.get("num_classes", 0):
        values["ignore_index"] = -1  # 0.1.0 could ignore a class, which matters to training alone
    kwargs = dict(values.get("head_kwargs") or {})
    if values.get("head") == "senformer":  # 0.1.0 had three arguments for what is `shift` now
        layers = kwargs.pop("mean_shift_layers", 0)
        channels, others = kwargs.pop("shift_channels", None), kwargs.pop("mean_shift_kwargs", None) or {}
        if layers:
            kwargs["shift"] = {"num_layers": layers, "shift_channels": channels, **others}
    if version == 1:
        kwargs = _with_its_merge(kwargs)
    if version == 1 and values.get("head") == "feature_fusion":
        kwargs = {"norm": False, **kwargs}
    plan = ModelPlan(**{**values, "head_kwargs": kwargs})
    check_plan(plan)
    return plan


def _with_its_merge(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options or settings of 0.1.0 in today's words: its learned merges have another name now."""
    merge = values.get("merge")
    return {**values, "merge": LEARNED_OF_0_1_0[merge]} if merge in LEARNED_OF_0_1_0 else dict(values)


def settings_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What may have been changed since the model was built, by the name of the part that it belongs to.

    Args:
        model: Any module.
    """
    parts = {name: part for name, part in model.named_modules() if isinstance(part, (Head, MeanShift))}
    return {name: part.settings() for name, part in parts.items() if part.settings()}


def restore_settings(model: nn.Module, settings: Settings, source: Path) -> None:
    """Set what `settings_of` gave, and nothing else.

    Args:
        model: A model of the same plan.
        settings: From config.json.
        source: The file, for messages.

    Raises:
        SavedModelError: If a part is not there, has no such setting, or refuses the value.
    """
    for name, values in settings.items():
        for key, value in values.items():
            try:
                check_value(value, Any, f"settings.{name}.{key}")
                setattr(_owner(model.get_submodule(name), key), key, value)
            except (AttributeError, TypeError, ValueError) as error:  # noqa: PERF203 (a handful of turns)
                raise SavedModelError(f"{source}: {name}.{key} cannot be set to {value!r}: {error}") from error


def _owner(part: nn.Module, key: str) -> nn.Module:
    """The part that has a setting: the one that is named or, in a file of 0.1.0, its mean shift."""
    if isinstance(part, (Head, MeanShift)) and key in part.settings():
        return part
    if isinstance(part, Head):
        shift = getattr(part, "shift", None)
        if isinstance(shift, MeanShift) and key in shift.settings():
            return shift
        if key == "mean_shift_layers" and hasattr(type(part), key):
            return part
    known = part.settings() if isinstance(part, (Head, MeanShift)) else {}
    raise AttributeError(f"{type(part).__name__} has the settings {', '.join(known) or 'none'}")


def check_place(name: str, hub_options: dict[str, Any]) -> str | None:
    """Refuse a folder that is not whole; where the hub does not answer, look in its cache alone and say why."""
    if Path(name).is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (Path(name) / file).is_file():
                raise SavedModelMissingError(f"{name} holds no {file}; expected a folder that save_pretrained wrote")
    elif not hub_options.get("local_files_only"):
        cause = why_hub_is_out_of_reach()
        hub_options["local_files_only"] = cause is not None  # the cache may have it
        return cause
    return None
