"""What makes a checkpoint whole: every file that its manifest names, with the content that it had when written."""

import json
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils.other import load
from safetensors import SafetensorError, safe_open

from segheads.files import sha256, write_json

MANIFEST = "manifest.json"
PROCESSES, FILES = "processes", "files"  # in the manifest


def write_manifest(folder: Path, processes: int) -> None:
    """Note the size and the SHA-256 of every file of a checkpoint.

    Args:
        folder: The checkpoint, before it is renamed.
        processes: Number of processes of the run, each of which has a random state.

    Raises:
        FileNotFoundError: If a process has none.
    """
    for number in range(processes):
        if not random_state(folder, number).is_file():
            raise FileNotFoundError(f"process {number} of {processes} wrote no {random_state(folder, number).name}")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {PROCESSES: processes, FILES: files})


def random_state(folder: Path, process: int) -> Path:
    """The file in which Accelerate keeps the random state of a process.

    Args:
        folder: The checkpoint.
        process: Its number.
    """
    return folder / f"random_states_{process}.pkl"


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole.

    Checkpoints of 0.1.0 have no manifest. Of them each file is opened: safetensors know their own length, and files of
    `torch.save` are ZIP archives with checksums.

    Args:
        folder: The checkpoint.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return _damage_without_manifest(folder)
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[FILES]
        for name, known in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size} bytes instead of {known['bytes']}"
            if sha256(folder / name) != known["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it names cannot be read ({error!r})"
    return None


def processes_of(folder: Path) -> int | None:
    """How many processes wrote a checkpoint; None where it does not say.

    Args:
        folder: A whole checkpoint.
    """
    path = folder / MANIFEST
    return int(json.loads(path.read_text(encoding="utf-8"))[PROCESSES]) if path.is_file() else None


def _damage_without_manifest(folder: Path) -> str | None:
    for name in ("model.safetensors", "optimizer.bin", random_state(folder, 0).name):
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path in sorted(folder.iterdir()):
        if (wrong := _damage_of_file(path)) is not None:
            return f"{path.name} is damaged ({wrong})"
    try:
        load(random_state(folder, 0))["torch_manual_seed"]
    except Exception as error:  # whatever is wrong with it, Accelerate would go on without a word
        return f"{random_state(folder, 0).name} holds no random state ({error!r})"
    return None


def _damage_of_file(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
            return None
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    return wrong and f"checksum of {wrong}"
