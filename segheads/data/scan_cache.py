"""What a scan has read of files, remembered by path, size and time of change."""

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from segheads.data.dataset import SegmentationDataset
from segheads.files import cache_folder, write_text
from segheads.version import VERSION

FORMAT = 3  # of what is remembered
log = logging.getLogger(__name__)


def default_cache() -> Path:
    """The folder `scans` of the environment variable SEGHEADS_CACHE, or of ~/.cache/segheads."""
    return cache_folder("scans")


class ScanCache:
    """A JSON file of records, one for each pair of files that has not changed since.

    Data sets that read the same files in another way (more classes, another ignored value) have a file of their own.

    Args:
        folder: Where the file lies; None remembers nothing.
        dataset: Whose samples they are.
    """

    def __init__(self, folder: str | Path | None, dataset: SegmentationDataset) -> None:
        mark = _fingerprint(dataset)
        self.path = None if folder is None or mark is None else Path(folder) / f"{mark}.json"
        self.entries = self._read()
        self.changed: dict[str, Any] = {}

    def get(self, pair: Sequence[str]) -> Any:
        """What is known of a pair of files as they are now, or None.

        Args:
            pair: Paths of the image and of the label.
        """
        entry = self.entries.get("\0".join(pair))
        if not isinstance(entry, dict) or entry.get("stamp") != _stamp(pair):  # anybody may have written the file
            return None
        return entry.get("record")

    def put(self, pair: Sequence[str], record: Any) -> None:
        """Remember a record of JSON values; `save` writes it.

        Args:
            pair: Paths of the image and of the label.
            record: What was read.
        """
        if self.path and (stamp := _stamp(pair)):
            self.changed["\0".join(pair)] = {"stamp": stamp, "record": record}

    def save(self) -> None:
        """Add what is new to the file; where that cannot be written, the next scan reads again."""
        if not self.path or not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                self.entries = self._read() | self.changed
                write_text(self.path, json.dumps(self.entries, separators=(",", ":")))
        except OSError as error:
            log.warning("the scan is not remembered: %s", error)
        self.changed = {}

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
        except (OSError, ValueError, RecursionError):  # not there, or damaged: it is written anew
            return {}
        return entries if isinstance(entries, dict) else {}


def _stamp(pair: Sequence[str]) -> list[int] | None:
    """Sizes and times of change; None where a file is not there."""
    try:
        found = [os.stat(path) for path in pair]
    except OSError:
        return None
    return [number for status in found for number in (status.st_size, status.st_mtime_ns)]


def _fingerprint(dataset: SegmentationDataset) -> str | None:
    """A hash of how a data set reads files, whichever they are; None if that cannot be told."""
    kind = f"{FORMAT} {VERSION} {type(dataset).__module__}.{type(dataset).__qualname__} {dataset.num_classes}"
    options = sorted((name, value) for name, value in vars(dataset).items() if name not in ("files", "classes"))
    try:
        return hashlib.sha256(kind.encode() + pickle.dumps(options)).hexdigest()[:24]
    except (pickle.PicklingError, AttributeError, TypeError):  # a local function among its attributes
        return None
