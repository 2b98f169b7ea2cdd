"""What the files of a data set really hold: every image and every label read once, in parallel, and remembered."""

import copy
import dataclasses
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from segheads.data.band_counts import BandCounts, band_statistics, count_bands
from segheads.data.bands import read_by_pillow
from segheads.data.dataset import SegmentationDataset
from segheads.data.folders import check_file
from segheads.data.images import RGB, ImageForm, read_bands
from segheads.data.labels import read_labels
from segheads.data.limits import opened, pixel_limit
from segheads.data.scan_cache import ScanCache
from segheads.data.subset import SubsetDataset
from segheads.errors import DataError, ImageFormError, PackageMissingError, RunError, UnknownLabelError

IGNORED = -1  # in a scan, whatever label the data set has for "no class"
MOST_VALUES = 300  # of one label file that are asked for one by one
WORTH_A_PROCESS = 32  # samples


@dataclass(frozen=True, kw_only=True)
class SampleScan:
    """What one sample holds, in JSON values.

    Attributes:
        image: Path of the image, or the sample's name where there is no file.
        label: Path of the label; that of the image where labels share a file; or the sample's name.
        problem: `"unreadable"`, `"size"`, `"values"`, or what an `ImageFormError` is about; empty where the sample can
            be read.
        message: What the data set says of the problem.
        file: The file that has it.
        values: Triples of a value in the label file, the class that it is read as (-1: ignored), and its pixels. The
            value is None where the file is no grey or palette image; the class is None where there is a problem.
        refused: Pairs of a value that is no class, and its pixels.
        size: Width and height of the image, pixels.
        image_kind: Format, channels and bit depth.
        label_kind: The same of the label.
        digest: A hash of the image's pixels.
        bands: The image's `BandCounts` as a dict; empty where it cannot be read at all.
    """

    image: str
    label: str
    problem: str = ""
    message: str = ""
    file: str = ""
    values: Sequence[Sequence[Any]] = ()
    refused: Sequence[Sequence[int]] = ()
    size: Sequence[int] = ()
    image_kind: str = ""
    label_kind: str = ""
    digest: str = ""
    bands: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SplitScan:
    """What the samples of one split hold.

    Attributes:
        class_names: One name per class.
        samples: How many there are.
        pixels: Pixels of each class.
        images: Images that show each class.
        ignored: Pixels that are of no class.
        values: Pixels of each value in the label files, those with problems among them.
        classes: The class that each value is read as; -1 where it is ignored.
        refused: The label files that hold a value that is no class, by value.
        problems: What data sets say of files, by kind (`"unreadable"`, `"size"`, `"values"`, `"channels"`,
            `"bit_depth"`, `"exif"`) and file.
        unlabelled: Label files without a pixel of any class.
        lossy: Label files that are JPEG.
        image_sizes: How many images there are of each size, `"WIDTHxHEIGHT"`.
        image_kinds: How many images there are of each format, number of channels and bit depth.
        label_kinds: The same of labels.
        digests: An image file for each hash of an image's pixels.
        class_pixels: Pixels of each class in each sample, of those that it shows.
        image_form: What the data set says that images hold.
        channels: How many images there are of each number of channels.
        largest: The largest value in images; None where it is not known.
        bits: Bits of a value as they are stored, the most of all images.
        band_mean: Mean of each channel, of the stored values; empty where numbers of channels differ.
        band_std: Standard deviation of each channel, of the stored values.
    """

    class_names: tuple[str, ...]
    samples: int = 0
    pixels: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    ignored: int = 0
    values: Mapping[int, int] = field(default_factory=dict)
    classes: Mapping[int, int] = field(default_factory=dict)
    refused: Mapping[int, Sequence[str]] = field(default_factory=dict)
    problems: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unlabelled: Sequence[str] = ()
    lossy: Sequence[str] = ()
    image_sizes: Mapping[str, int] = field(default_factory=dict)
    image_kinds: Mapping[str, int] = field(default_factory=dict)
    label_kinds: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    class_pixels: Sequence[Mapping[int, int]] = ()
    image_form: ImageForm = RGB
    channels: Mapping[int, int] = field(default_factory=dict)
    largest: float | None = None
    bits: int = 8
    band_mean: tuple[float, ...] = ()
    band_std: tuple[float, ...] = ()

    @property
    def ignored_share(self) -> float:
        """Share of all readable pixels that are of no class."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))

    @property
    def absent(self) -> list[int]:
        """The classes that no image shows."""
        return [index for index, count in enumerate(self.images) if not count]

    def as_json(self) -> dict[str, Any]:
        """All of it but what is of each sample, in JSON values, with the share ignored."""
        values = dataclasses.asdict(dataclasses.replace(self, digests={}, class_pixels=()))
        del values["digests"], values["class_pixels"]
        return {**values, "ignored_share": self.ignored_share}


@dataclass(frozen=True, kw_only=True)
class DataScan:
    """What the splits of a data set hold.

    Attributes:
        splits: The scan of each, by name.
        duplicates: Image files of the same pixels in two splits.
    """

    splits: Mapping[str, SplitScan]
    duplicates: Sequence[tuple[str, str]] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return next(iter(self.splits.values())).class_names

    def as_json(self) -> dict[str, Any]:
        """The same in JSON values."""
        splits = {name: split.as_json() for name, split in self.splits.items()}
        return {"splits": splits, "duplicates": [list(pair) for pair in self.duplicates]}


def has_files(dataset: SegmentationDataset) -> bool:
    """Whether the samples of a data set, or of the one that it is a part of, are pairs of files.

    Args:
        dataset: Any data set.
    """
    return bool(getattr(_whole(dataset)[0], "files", ()))


def scan(
    dataset: SegmentationDataset,
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    title: str = "looking at labels",
) -> SplitScan:
    """Read all samples of a data set and sum up what they hold; files that cannot be read are named.

    Args:
        dataset: Any data set; of one whose `files` are pairs of paths, the values in the label files are told, too.
        workers: Processes that read; 0 reads in this one, None takes all cores for many files.
        cache: Folder in which what was read is remembered by path, size and time of change, such as
            `default_cache()`; None remembers nothing.
        title: Stands beside the progress bar.

    Raises:
        RunError: A process that reads died.
        PackageMissingError: The files need a package that is not installed.

    Examples:
        >>> from segheads.data import Scenes
        >>> found = scan(Scenes("val", size=(48, 48), length=2))
        >>> found.samples, sum(found.pixels), found.ignored_share
        (2, 4608, 0.0)
    """
    from tqdm import tqdm  # for those who scan alone

    whole, indices = _whole(dataset)
    memory = ScanCache(cache, whole)
    known = {index: memory.get(pair) for index in indices if (pair := _pair(whole, index))}
    samples = {index: SampleScan(**record) for index, record in known.items() if record}
    todo = [index for index in indices if index not in samples]
    try:
        for index, sample in tqdm(
            zip(todo, _read_all(whole, todo, workers), strict=True),
            total=len(todo),
            desc=title,
            unit="file",
            leave=False,
            disable=None if len(todo) >= WORTH_A_PROCESS else True,
        ):
            samples[index] = sample
            if not sample.problem and (pair := _pair(whole, index)):
                memory.put(pair, dataclasses.asdict(sample))
    finally:  # what was read before an interrupt need not be read again
        memory.save()
    return summed_up([samples[index] for index in indices], dataset.class_names, dataset.image_form)


def scan_splits(
    splits: Mapping[str, SegmentationDataset], *, workers: int | None = None, cache: str | Path | None = None
) -> DataScan:
    """Scan several splits and look for images that are in two of them.

    Args:
        splits: Data sets by the names of the splits, as a rule `"train"` and `"val"`.
        workers: As in `scan`.
        cache: As in `scan`.

    Raises:
        RunError: A process that reads died.
        PackageMissingError: The files need a package that is not installed.
    """
    found = {
        name: scan(dataset, workers=workers, cache=cache, title=f"looking at {name}")
        for name, dataset in splits.items()
    }
    names = list(found)
    duplicates = [
        (path, found[other].digests[digest])
        for place, name in enumerate(names)
        for other in names[place + 1 :]
        for digest, path in found[name].digests.items()
        if digest in found[other].digests
    ]
    return DataScan(splits=found, duplicates=duplicates)


def summed_up(samples: Sequence[SampleScan], class_names: tuple[str, ...], form: ImageForm = RGB) -> SplitScan:
    """The scan of a split from those of its samples.

    Args:
        samples: One for each sample.
        class_names: One name per class.
        form: What images are said to hold.
    """
    pixels: Counter[int] = Counter()
    images: Counter[int] = Counter()
    values: Counter[int] = Counter()
    classes: dict[int, int] = {}
    refused: dict[int, list[str]] = {}
    problems: dict[str, dict[str, str]] = {}
    class_pixels: list[dict[int, int]] = []
    for sample in samples:
        shown = Counter[int]()
        for value, label, count in sample.values:
            if value is not None:
                values[value] += count
            if label is not None:
                shown[label] += count
            if value is not None and label is not None:
                classes.setdefault(value, label)
        pixels.update(shown)
        images.update(shown.keys())
        class_pixels.append({label: count for label, count in shown.items() if label != IGNORED})
        for value, _ in sample.refused:
            refused.setdefault(value, []).append(sample.label)
        if sample.problem:
            problems.setdefault(sample.problem, {})[sample.file] = sample.message
    readable = [sample for sample in samples if not sample.problem]
    return SplitScan(
        class_names=class_names,
        samples=len(samples),
        pixels=tuple(pixels[index] for index in range(len(class_names))),
        images=tuple(images[index] for index in range(len(class_names))),
        ignored=pixels[IGNORED],
        values=dict(sorted(values.items())),
        classes=dict(sorted(classes.items())),
        refused=dict(sorted(refused.items())),
        problems=problems,
        unlabelled=[s.label for s in readable if {label for _, label, _ in s.values} <= {IGNORED}],
        lossy=[s.label for s in samples if s.label_kind.startswith("JPEG")],
        image_sizes=dict(Counter(f"{s.size[0]}x{s.size[1]}" for s in samples if s.size).most_common()),
        image_kinds=dict(Counter(s.image_kind for s in samples if s.image_kind).most_common()),
        label_kinds=dict(Counter(s.label_kind for s in samples if s.label_kind).most_common()),
        digests={s.digest: s.image for s in reversed(samples) if s.digest},
        class_pixels=class_pixels,
        image_form=form,
        **band_statistics([BandCounts(**s.bands) for s in samples if s.bands]),
    )


def scan_sample(dataset: SegmentationDataset, index: int) -> SampleScan:
    """Read one sample.

    Args:
        dataset: Any data set.
        index: The sample's.

    Raises:
        PackageMissingError: The files need a package that is not installed.
    """
    pair = _pair(dataset, index)
    image_path, label_path = pair or (dataset.name(index),) * 2
    has_own_label = pair is not None and not dataset.labels_share_a_file
    if not has_own_label:
        label_path = image_path
    with pixel_limit(dataset.max_pixels):
        size, image_kind = _looked_at(image_path if pair else "")
        label_size, label_kind = _looked_at(label_path if has_own_label else "")
        raw = _raw_values(label_path) if has_own_label else None
    about: dict[str, Any] = {
        "image": image_path,
        "label": label_path,
        "image_kind": image_kind,
        "label_kind": label_kind,
    }
    try:
        with pixel_limit(dataset.max_pixels):
            image, labels = dataset.read(index)
        picture, classes = np.ascontiguousarray(image), labels.numpy()
    except PackageMissingError:
        raise
    except ImageFormError as error:
        return SampleScan(
            file=image_path,
            problem=error.kind,
            message=" ".join(str(error).split()),
            size=size,
            bands=_bands(image_path) if pair else {},
            **about,
        )
    except Exception as error:  # whatever a damaged file makes a reader raise: it is named, and the scan goes on
        words = str(error) if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {error}"
        named = [str(path) in words for path in cast(Any, dataset).files[index][:2]] if pair else []
        is_of_image = named == [True, False]
        is_unknown = isinstance(error, UnknownLabelError)
        is_other_size = bool(size and label_size) and size != label_size
        counted = [] if raw is None else _counted(raw)
        refused = [] if not counted or is_other_size or is_of_image else _refused(dataset, index, counted)
        return SampleScan(
            file=image_path if is_of_image else label_path,
            problem="size" if is_other_size else "values" if refused or is_unknown else "unreadable",
            message=" ".join(words.split()),
            values=[(value, None, count) for value, count in counted],
            refused=refused,
            size=size,
            **about,
        )
    digest = hashlib.blake2b(repr(picture.shape).encode() + picture.tobytes(), digest_size=16).hexdigest()
    return SampleScan(
        values=_joined(raw, classes, dataset.ignore_index),
        size=picture.shape[1::-1],
        digest=digest,
        bands=dataclasses.asdict(count_bands(image)),
        **about,
    )


class _Samples(Dataset[SampleScan]):
    """Scans of samples, for a loader."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> SampleScan:
        return scan_sample(self.dataset, self.indices[place])


def _read_all(dataset: SegmentationDataset, indices: Sequence[int], workers: int | None) -> Iterator[SampleScan]:
    """The scans of samples in their order, read by as many processes as are worth it."""
    wanted = _cores() if workers is None else workers
    loader = DataLoader(
        _Samples(dataset, indices),
        batch_size=8,
        num_workers=min(wanted, len(indices) // WORTH_A_PROCESS),
        collate_fn=list,
        generator=torch.Generator(),  # which leaves the global one alone
    )
    done = 0
    batches = iter(loader)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise RunError(
                f"a process that looks at labels died after {done} of {len(indices)} files, at "
                f"{dataset.name(indices[done])} or soon after it: {str(error).splitlines()[0]}; "
                "workers=0 reads in this process"
            ) from error
        if batch is None:
            return
        done += len(batch)
        yield from batch


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole(dataset: SegmentationDataset) -> tuple[SegmentationDataset, list[int]]:
    """The data set that a subset is of, and the subset's samples in it."""
    indices = list(range(len(dataset)))
    while isinstance(dataset, SubsetDataset):
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def _pair(dataset: SegmentationDataset, index: int) -> tuple[str, str] | None:
    """Paths of image and label, where the data set has such."""
    files: Sequence[Any] = getattr(dataset, "files", ())
    if len(files) != len(dataset) or not isinstance(files[index], Sequence) or len(files[index]) < 2:
        return None
    image, label = (os.path.abspath(path) for path in files[index][:2])
    return image, label


def _bands(path: str) -> dict[str, Any]:
    """What is counted of an image whose form is not the one that was told; nothing if it is too large to decode."""
    try:
        return dataclasses.asdict(count_bands(read_bands(path)))
    except DataError:
        return {}


def _looked_at(path: str) -> tuple[tuple[int, int] | tuple[()], str]:
    """Size in pixels, and format with channels and bit depth; nothing for what is no image."""
    try:
        if path:
            check_file(path, "an image")  # a named pipe would be waited for
        if path and not read_by_pillow(path):
            values = read_bands(path)
            height, width, count = values.shape
            what = "floats" if values.dtype.kind == "f" else f"{8 * values.dtype.itemsize} bit"
            ending = "TIFF" if Path(path).suffix.lower() != ".npy" else "NPY"
            return (width, height), f"{ending}, {count} channel{'s' if count > 1 else ''}, {what}"
        with opened(path, path) as image, image:
            bands = image.getbands()
            channels = f"{len(bands)} channel{'s' if len(bands) > 1 else ''}"
            return image.size, f"{image.format}, {channels} ({image.mode}), {_bits(image, path)} bit"
    except Exception:  # the data set says what is wrong with it
        return (), ""


def _bits(image: Image.Image, path: str) -> int:
    """Bits of a channel, as the file has them."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24]  # of the header, IHDR
    tags = getattr(image, "tag_v2", None)
    if tags and 258 in tags:  # BitsPerSample
        return int(np.max(tags[258]))
    depths = {"1": 1, "F": 32, "I": 32}
    return 16 if image.mode.startswith("I;16") else depths.get(image.mode, 8)


def _raw_values(path: str) -> NDArray[np.integer] | None:
    """The values in a label file; None if it holds none of one channel."""
    try:
        return read_labels(path)
    except (DataError, OSError):
        return None


def _counted(raw: NDArray[np.integer]) -> list[tuple[int, int]]:
    values, counts = np.unique(raw, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def _joined(
    raw: NDArray[np.integer] | None, classes: NDArray[np.integer], ignore_index: int
) -> list[tuple[int | None, int, int]]:
    """Each value of the file with the class that it is read as, and how many pixels."""
    found: list[tuple[int | None, int, int]]
    if raw is None or raw.shape != classes.shape:
        found = [(None, *pair) for pair in _counted(classes)]
    elif raw.dtype == classes.dtype == np.uint8:
        counts = np.bincount((raw.astype(np.uint16) << 8 | classes).ravel(), minlength=1 << 16)
        found = [(int(both >> 8), int(both & 255), int(counts[both])) for both in np.flatnonzero(counts)]
    else:
        joined = raw.astype(np.int64) * (1 << 16) + (classes.astype(np.int64) + (1 << 15))  # classes have 16 bit
        found = [(both >> 16, (both & 0xFFFF) - (1 << 15), count) for both, count in _counted(joined)]
    return [(value, IGNORED if label == ignore_index else label, count) for value, label, count in found]


def _refused(dataset: SegmentationDataset, index: int, counted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The values that a data set refuses: it is asked for each alone, in files of one pixel and of the same names."""
    pair, probe = _pair(dataset, index) or ("", ""), cast(Any, copy.copy(dataset))
    with tempfile.TemporaryDirectory() as folder:
        image, label = (Path(folder, place, Path(path).name) for place, path in zip("il", pair, strict=True))
        image = image.with_suffix(".png")
        try:
            probe.files, probe.image_form = [(image, label)], RGB
        except AttributeError:  # a property
            return []
        for path in (image, label):
            path.parent.mkdir()
        Image.new("RGB", (1, 1)).save(image, format="PNG")
        wrong = [(value, count) for value, count in counted[:MOST_VALUES] if not _takes(probe, label, value)]
        sound = len(wrong) < len(counted) or any(_takes(probe, label, value) for value in (0, 1, 255))
    return wrong if sound else []  # where it takes nothing, it is not the values


def _takes(probe: SegmentationDataset, label: Path, value: int) -> bool:
    """Whether a data set of one sample reads a label file of one value."""
    kind = next((kind for kind in (np.uint8, np.uint16) if 0 <= value <= np.iinfo(kind).max), np.int32)
    Image.fromarray(np.full((1, 1), value, kind)).save(label, format="TIFF" if kind is np.int32 else "PNG")
    try:
        probe.read(0)
    except Exception:  # as in `scan_sample`
        return False
    return True
