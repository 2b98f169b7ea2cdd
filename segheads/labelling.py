"""Label image files into a folder, each once: what is done is remembered, and what fails stops no other."""

import csv
import glob
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segheads.data.folders import IMAGE_SUFFIXES, walk_images
from segheads.errors import DataMissingError, OptionError
from segheads.files import readable, whole_file, write_text
from segheads.modules import weights_hash
from segheads.prediction import Prediction
from segheads.predictor import Predictor
from segheads.saving import settings_of

RECORD, SHARES = "record.jsonl", "shares.csv"
LABELS, OVERLAY, PROBABILITY, UNCERTAINTY = "labels", "overlay", "probability", "uncertainty"
NOTED = {"input", "name", "bytes", "mtime_ns", "key", "made", "size", "pixels"}
ENDINGS = {LABELS: ".png", OVERLAY: ".jpg", PROBABILITY: ".npy", UNCERTAINTY: ".png"}


@dataclass(frozen=True)
class Kinds:
    """What is written of each image beside its labels, each in a sub-folder of its own.

    Attributes:
        overlay: The image under the colours of its classes, `overlay/NAME.jpg`.
        opacity: Of the colours, 0 to 1.
        probability: Of every class, `probability/NAME.npy`: float16, `(K, H, W)`.
        uncertainty: Entropy of each pixel, `uncertainty/NAME.png`: grey, from 0 to the highest that there can be.
    """

    overlay: bool = False
    opacity: float = 0.5
    probability: bool = False
    uncertainty: bool = False

    def wanted(self) -> dict[str, str]:
        """The kinds, and what files of each depend on."""
        given = {PROBABILITY: self.probability, UNCERTAINTY: self.uncertainty}
        shown = {OVERLAY: f"{self.opacity:g}"} if self.overlay else {}
        return {LABELS: "", **shown, **{kind: "" for kind, is_wanted in given.items() if is_wanted}}


class Source(NamedTuple):
    """An image file, and the name of what is made of it."""

    path: Path
    name: str  # below the folder of each kind, with slashes, without ending


@dataclass
class Record:
    """What lies in the folder of results, image by image, as record.jsonl keeps it: one JSON object a line.

    Attributes:
        folder: Of the results.
        key: Of the model, its protocol and its precision; what another key made is done again.
        entries: By the absolute path of the image; the last line of each counts.
    """

    folder: Path
    key: str
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, key: str) -> "Record":
        """What a folder holds; nothing where there is none yet. A line that was cut off, or is none, is passed over."""
        record, path = cls(folder, key), folder / RECORD
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.keys() >= NOTED:
                record.entries[entry["input"]] = entry
        return record

    def is_done(self, source: Source, wanted: Mapping[str, str]) -> bool:
        """Whether all that is wanted is there, made of this file by this model."""
        entry = self.entries.get(str(source.path), {})
        made = entry.get("made", {})
        return (
            self._holds_for(entry, source)
            and all(made.get(kind) == about for kind, about in wanted.items())
            and all(place(self.folder, kind, source.name).is_file() for kind in wanted)
        )

    def begin(self, source: Source) -> None:
        """Forget what was made of an image before, as its results are about to change."""
        if (before := self.entries.get(str(source.path))) and not self._holds_for(before, source):
            self._append({**before, "key": ""})

    def add(self, source: Source, wanted: Mapping[str, str], state: tuple[int, int], found: Prediction) -> None:
        """Note what was written of an image, and remove what another model, or another image, left in its name."""
        before = self.entries.get(str(source.path), {})
        kept = before.get("made", {}) if self._holds_for(before, source) else {}
        for kind in ENDINGS.keys() - kept.keys() - wanted.keys():
            place(self.folder, kind, source.name).unlink(missing_ok=True)
        entry = {
            **{"input": str(source.path), "name": source.name, "bytes": state[0], "mtime_ns": state[1]},
            **{"key": self.key, "made": {**kept, **wanted}, "size": [*found.labels.shape]},
            "pixels": {str(area.label): area.pixels for area in found.areas},
        }
        self.entries[str(source.path)] = entry
        self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        path = self.folder / RECORD
        with open(path, "ab") as file:  # one call, so that lines of several processes stay whole
            file.write(_after_a_cut(path) + json.dumps(entry).encode("ascii") + b"\n")

    def write_shares(self, names: Sequence[str]) -> None:
        """Write shares.csv: the size of each image that this model labelled, and the share of each class.

        Args:
            names: Of the classes.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["name", "image", "width", "height", *names])
        entries = (entry for entry in self.entries.values() if entry["key"] == self.key)
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if place(self.folder, LABELS, entry["name"]).is_file():
                height, width = entry["size"]
                shares = (entry["pixels"].get(str(k), 0) / (height * width) for k in range(len(names)))
                row = [entry["name"], entry["input"], width, height, *(f"{share:.6f}" for share in shares)]
                table.writerow([readable(x) if isinstance(x, str) else x for x in row])
        write_text(self.folder / SHARES, text.getvalue())

    def _holds_for(self, entry: Mapping[str, Any], source: Source) -> bool:
        """Whether an entry is of this model and of the file as it is."""
        return (
            entry.get("key") == self.key
            and entry.get("name") == source.name
            and (entry.get("bytes"), entry.get("mtime_ns")) == state_of(source.path)
        )


def find_images(words: Iterable[str], leave_out: Path) -> list[Path]:
    """The image files that words of a command line name, each once, as absolute paths.

    Args:
        words: Files, which are taken whatever their ending; folders, in which image files are looked for at any depth;
            and patterns such as `photos/**/*.jpg`, of which image files and folders are taken.
        leave_out: A folder in which nothing is looked for: that of the results.

    Raises:
        DataMissingError: A file or a folder is not there, or nothing fits a pattern.
        OptionError: There are no images at all.
    """
    found: dict[Path, None] = {}
    results = Path(os.path.realpath(leave_out))

    def is_result(path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(results)  # by whatever links it was found

    for word in words:
        path = Path(os.path.abspath(word))
        if path.is_dir():
            found |= dict.fromkeys(x for x in walk_images(path) if not is_result(x))
        elif os.path.lexists(path):
            found[path] = None
        elif fitting := sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else []:
            for place_of in (Path(os.path.abspath(name)) for name in fitting):
                inside = walk_images(place_of) if place_of.is_dir() else [place_of]
                images = (x for x in inside if x.suffix.lower() in IMAGE_SUFFIXES and not is_result(x))
                found |= dict.fromkeys(images)
        else:
            what = "nothing fits the pattern" if glob.has_magic(word) else "there is no"
            raise DataMissingError(f"{what} {word}; give image files, folders or patterns")
    if not found:
        raise OptionError(f"no image files in {', '.join(words)}; give files, folders or patterns that have some")
    return list(found)


def name_results(paths: Sequence[Path], known: Mapping[str, Any]) -> list[Source]:
    """Names of the results: the paths below the folder that holds all, without endings, and no two alike.

    Where two images differ in their endings alone, both keep them; what the record has keeps the name it has there.

    Args:
        paths: Absolute paths of the images.
        known: Entries of a record by path.
    """
    base = os.path.commonpath([path.parent for path in paths])
    bare = {path: path.relative_to(base).with_suffix("").as_posix() for path in paths}
    times = Counter(name.casefold() for name in bare.values())
    taken = {str(entry.get("name")).casefold() for entry in known.values()}
    sources = []
    for path in paths:
        name = known.get(str(path), {}).get("name")
        if name is None:
            name = bare[path]
            if times[name.casefold()] > 1 or name.casefold() in taken:
                name = path.relative_to(base).as_posix()
            while name.casefold() in taken:
                name += "_"
            taken.add(name.casefold())
        sources.append(Source(path, name))
    return sources


def label_files(
    predictor: Predictor, sources: Sequence[Source], record: Record, kinds: Kinds, *, workers: int = 2
) -> Iterator[tuple[Source, Exception | None]]:
    """Label image files one after the other, and write what is wanted of each: whole, or not there.

    Args:
        predictor: Labels them.
        sources: The files.
        record: Notes what is done.
        kinds: What is wanted.
        workers: Threads that read files ahead.

    Yields:
        Each file as it is done, and None, or why there is no result.
    """
    wanted = kinds.wanted()
    states = {}

    def paths() -> Iterator[Path]:
        for source in sources:
            states[source] = state_of(source.path)  # before it is read: what changes later is read again
            yield source.path

    found_of_all = predictor.stream(
        paths(), probability=kinds.probability, uncertainty=kinds.uncertainty, workers=workers
    )
    for source, found in zip(sources, found_of_all, strict=True):
        state = states.pop(source)
        if isinstance(found, Exception):
            yield source, found
            continue
        try:
            record.begin(source)
            write_results(record.folder, source.name, found, kinds)
            record.add(source, wanted, state, found)
        except OSError as error:  # a full disk, a folder that cannot be written
            yield source, error
        else:
            yield source, None


def write_results(folder: Path, name: str, found: Prediction, kinds: Kinds) -> None:
    """Write what is wanted of one image.

    Args:
        folder: Of the results.
        name: Of the image.
        found: What the model sees.
        kinds: What is wanted.
    """
    if kinds.overlay:
        with whole_file(place(folder, OVERLAY, name)) as temporary:
            found.overlay(kinds.opacity).save(temporary, quality=90)
    if kinds.probability and found.probability is not None:
        with whole_file(place(folder, PROBABILITY, name)) as temporary:
            np.save(temporary, found.probability.numpy().astype(np.float16))
    if kinds.uncertainty and found.uncertainty is not None:
        highest = np.log(len(found.classes))
        grey = np.rint(found.uncertainty.entropy.numpy() * (255 / highest)).clip(0, 255).astype(np.uint8)
        with whole_file(place(folder, UNCERTAINTY, name)) as temporary:
            Image.fromarray(grey).save(temporary)
    found.save(place(folder, LABELS, name))


def place(folder: Path, kind: str, name: str) -> Path:
    """The file of one kind of an image's results.

    Args:
        folder: Of the results.
        kind: A key of `ENDINGS`.
        name: Of the image.
    """
    return folder / kind / f"{name}{ENDINGS[kind]}"


def key_of(predictor: Predictor) -> str:
    """What results depend on beside the image: weights, what else the model is, classes, protocol and precision.

    Args:
        predictor: What labels.
    """
    model = predictor.model
    about = {
        "weights": weights_hash(model),
        "model": repr(model.plan),
        "settings": settings_of(model),
        "input": {name: model.data_config.get(name) for name in ("mean", "std", "bit_depth")},
        "classes": [predictor.classes.names, predictor.classes.palette, predictor.classes.has_background],
        "protocol": predictor.protocol.as_json(),
        "precision": predictor.mixed_precision,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()[:32]


def state_of(path: Path) -> tuple[int, int]:
    """Size and time of change of a file; zeros where it cannot be looked at.

    Args:
        path: The file.
    """
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _after_a_cut(path: Path) -> bytes:
    """The end of a line that a kill has left open."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"
