"""Look at this installation: versions, devices, which way loss, label map and mean shift take, cache folders.

    segheads doctor
    segheads doctor --json > doctor.json

Trains one step of a tiny model on each device, and predicts with it. The exit status is 0 if all is well, 1 if
something is wrong, which the last lines say.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from packaging.requirements import Requirement

from segheads.build import create_model
from segheads.errors import SegheadsError
from segheads.files import cache_folder
from segheads.functional.paths import driver_version, path_of_loss
from segheads.mean_shift import MeanShift
from segheads.training.machine import installed_version
from segheads.version import VERSION

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES_OF_EXTRAS = ("recipes", "tiff", "coco", "parquet", "export", "openvino")  # those that a user may want


@dataclass(frozen=True, kw_only=True)
class Config:
    """How it is shown."""

    json: bool = False
    """Print JSON, for programs."""


def main(config: Config) -> None:
    """Run the command."""
    values = examine()
    print(json.dumps(values) if config.json else described(values))
    if values["problems"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """What there is to say of the installation, in JSON values; `problems` has what is wrong."""
    problems: list[str] = []
    versions, optional = packages(problems)
    return {
        "segheads": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "optional": optional,
        "devices": [device_values(device, problems) for device in devices()],
        "caches": caches(problems),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SEGHEADS_")},
        "problems": problems,
    }


def packages(problems: list[str]) -> tuple[dict[str, str | None], dict[str, dict[str, str | None]]]:
    """Versions of what segheads needs, and of what its extras bring, by extra; None is not installed.

    Args:
        problems: Gets a line for each that is missing, or older than it must be.
    """
    try:
        listed = [Requirement(line) for line in requires("segheads") or []]
    except PackageNotFoundError:
        problems.append("segheads is not installed: pip install -e . in its folder, or pip install segheads")
        return {"torch": torch.__version__}, {}
    versions: dict[str, str | None] = {}
    for requirement in (one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})):
        version = installed_version(requirement.name)
        versions[requirement.name] = version
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version or 'missing'}, and segheads needs {requirement.specifier}")
    optional: dict[str, dict[str, str | None]] = {}
    for extra in PACKAGES_OF_EXTRAS:
        own = (one for one in listed if one.marker is not None and one.marker.evaluate({"extra": extra}))
        found = {one.name: installed_version(one.name) for one in own if one.name != "segheads"}
        optional |= {extra: found} if found else {}
    return versions, optional


def devices() -> Iterator[torch.device]:
    """What a model can run on."""
    yield torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        yield torch.device("cuda", index)
    if torch.backends.mps.is_available():
        yield torch.device("mps")


def device_values(device: torch.device, problems: list[str]) -> dict[str, Any]:
    """Name, memory and paths of a device, on which a tiny model is tried.

    Args:
        device: The device.
        problems: Gets a line where something fails.
    """
    values: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        values |= {"name": told.name, "memory_gb": round(told.total_memory / 1e9, 1), "driver": driver_version()}
    else:
        values |= {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    values["loss and label map"] = {name: _path(device, dtype, problems) for name, dtype in PRECISIONS.items()}
    try:
        block = MeanShift(32, num_layers=1).to(device)
        values["mean shift"] = block.path(torch.zeros(1, 32, 2, 2, device=device, requires_grad=True))
        model = create_model("test_vit", "mean_shift", 3, pretrained=False).to(device)
        images, labels = (
            torch.randn(2, 3, 32, 32, device=device),
            torch.zeros(2, 32, 32, dtype=torch.long, device=device),
        )
        model(images, labels).backward()
        model.predict(images)
        values["a step and a prediction"] = "work"
    except Exception as error:  # whatever torch, Triton or a driver raises is what is looked for
        values["a step and a prediction"] = "fail"
        problems.append(f"{device}: a tiny model fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return values


def _path(device: torch.device, dtype: torch.dtype, problems: list[str]) -> str:
    try:
        return path_of_loss(device, dtype)
    except SegheadsError as error:  # what SEGHEADS_TRITON asks for cannot be had
        if (problem := f"{device}: {error}") not in problems:
            problems.append(problem)
        return "none"


def caches(problems: list[str]) -> dict[str, dict[str, Any]]:
    """Folders of what can be made or fetched again, and their sizes.

    Args:
        problems: Gets a line if segheads' own cannot be written.
    """
    own = cache_folder("")
    folders = {
        "scans of labels": own / "scans",
        "checks of kernels": own / "triton",
        "Hugging Face hub": Path(huggingface_hub.constants.HF_HUB_CACHE),
        "torch hub": Path(torch.hub.get_dir()),
    }
    nearest = next(place for place in (own, *own.parents) if place.exists())
    if not os.access(nearest, os.W_OK) or not nearest.is_dir():
        problems.append(f"{own} cannot be written; set SEGHEADS_CACHE to a folder that can")
    return {
        name: {"folder": str(folder), "bytes": size_of_folder(folder), "free_bytes": _free(folder)}
        for name, folder in folders.items()
    }


def size_of_folder(folder: Path) -> int:
    """Bytes of all files; links count nothing, and what is not there 0."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                total += os.stat(path).st_size
    return total


def described(values: Mapping[str, Any]) -> str:
    """The same in words.

    Args:
        values: What `examine` gave.
    """
    lines = [f"segheads {values['segheads']}, Python {values['python']}, {values['platform']}", "", "packages:"]
    lines += [f"  {', '.join(f'{name} {version}' for name, version in values['packages'].items())}"]
    for extra, own in values["optional"].items():
        missing = [name for name, version in own.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in own.items() if version is not None)
        hint = f'no {", ".join(missing)} (pip install "segheads[{extra}]")' if missing else ""
        lines.append(f"  {extra}: {'; '.join(filter(None, (there, hint)))}")
    lines += ["", "devices:"]
    for device in values["devices"]:
        paths = device["loss and label map"]
        ways = "; ".join(
            f"{way} in {', '.join(x for x in paths if paths[x] == way)}" for way in dict.fromkeys(paths.values())
        )
        told = {name: x for name, x in device.items() if name not in ("device", "name", "loss and label map")}
        lines.append(f"  {device['device']} ({device['name']}): {', '.join(f'{name} {x}' for name, x in told.items())}")
        lines.append(f"    loss and label map: {ways}")
    lines += [f"  {name}={value}" for name, value in values["environment"].items()]
    lines += ["", "caches:"]
    for name, cache in values["caches"].items():
        sizes = f"{cache['bytes'] / 1e6:.1f} MB, {cache['free_bytes'] / 1e9:.0f} GB free"
        lines.append(f"  {name}: {cache['folder']}, {sizes}")
    lines += ["", *(f"problem: {problem}" for problem in values["problems"])]
    return "\n".join(lines if values["problems"] else [*lines, "all is well"])


def _free(folder: Path) -> int:
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(nearest).free
