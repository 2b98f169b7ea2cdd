"""What a scan of labels gives cause to doubt: errors that no training should begin with, and warnings."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from segheads.data.images import FLOATS, used_bits
from segheads.data.scan import IGNORED, DataScan, SplitScan

NAMED = 3  # files or classes in a message
VOID = 255  # the value that label files have for "no class", as a rule
MUCH = 0.5  # share of pixels
# Names that people give to what is no class
NO_CLASS = {"background", "ignore", "ignored", "none", "other", "unknown", "unlabeled", "unlabelled", "void"}

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        severity: `"error"` where training would fail or learn the wrong thing, `"warning"` where it may be meant.
        code: A word for it, always the same.
        message: One line that says what was found and what helps.
        files: All files that it is about.
    """

    severity: Severity
    code: str
    message: str
    files: tuple[str, ...] = ()


def find_problems(scan: DataScan) -> list[Finding]:
    """What is wrong or suspicious in a data set, errors first; nothing for a sound one.

    A class that never occurs is named where there are as many images as classes, or three quarters of them occur; in a
    few images of many classes most need not occur.

    Args:
        scan: What `scan_splits` gave.

    Examples:
        >>> from segheads.data import Scenes
        >>> from segheads.data.scan import scan_splits
        >>> find_problems(scan_splits({"train": Scenes("train", size=(64, 64), length=12)}))
        []
    """
    found = [finding for check in CHECKS for finding in check(scan)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def unusable_files(scan: DataScan) -> Iterator[Finding]:
    """Files that are damaged, labels of another size than their image, values that are no class.

    Args:
        scan: The scan.
    """
    for name, split in scan.splits.items():
        for code in ("unreadable", "size", "values", "channels", "bit_depth", "exif"):
            problems = split.problems.get(code, {})
            if problems:
                first, *others = problems.items()
                more = f"; the same is so of {_several([path for path, _ in others], 'file')}" if others else ""
                values = [value for value, files in split.refused.items() if set(files) & set(problems)]
                more += f"; values out of range in all: {_several(values, 'value', 8)}" if len(values) > 1 else ""
                more += _measured(scan, code)
                yield Finding("error", code, f"{name}: {first[1]}{more}", tuple(problems))


def jpeg_labels(scan: DataScan) -> Iterator[Finding]:
    """Labels that were compressed with loss.

    Args:
        scan: The scan.
    """
    for name, split in scan.splits.items():
        if split.lossy:
            yield Finding(
                "error",
                "lossy",
                f"{name}: {_several(split.lossy, 'label')} {_is(split.lossy)} JPEG, which changes values at every "
                "border; export the labels again, as PNG",
                tuple(split.lossy),
            )


def binary_masks(scan: DataScan) -> Iterator[Finding]:
    """Masks of 0 and 255, where 255 was meant to be a class.

    Args:
        scan: The scan.
    """
    values, classes = _values(scan)
    if values == {0, VOID} and classes.get(VOID) == IGNORED and len(scan.class_names) > 1:
        yield Finding(
            "error",
            "binary_mask",
            f"all labels hold 0 and 255 alone, and 255 is ignored, so that of {len(scan.class_names)} classes only "
            f"{scan.class_names[0]!r} would be learned; if 255 is a class, --label-values 0 255 reads it as "
            f"{scan.class_names[1]!r}",
        )


def shifted_labels(scan: DataScan) -> Iterator[Finding]:
    """Labels that count from 1, read as if they counted from 0.

    Args:
        scan: The scan.
    """
    values, classes = _values(scan)
    count = len(scan.class_names)
    inside = values - {VOID}
    is_plain = all(value == label for value, label in classes.items() if label != IGNORED)
    if not is_plain or 0 in values or not inside or max(inside) != count or min(inside) < 1:
        return
    is_refused = any(count in split.refused for split in scan.splits.values())
    if is_refused or (classes.get(count) == IGNORED and _has_enough(scan)):
        yield Finding(
            "error" if is_refused else "warning",
            "shifted",
            f"labels hold {min(inside)} to {count} and never 0, and {count} classes are 0 to {count - 1}: they seem to "
            "count from 1; --reduce-zero-label reads 1 as the first class",
        )


def named_ignored(scan: DataScan) -> Iterator[Finding]:
    """Names of the classes with the ignored one among them.

    Args:
        scan: The scan.
    """
    values, classes = _values(scan)
    names = scan.class_names
    taken = {value: label for value, label in classes.items() if label != IGNORED}
    left_out = [value for value, label in classes.items() if label == IGNORED and 0 <= value < len(names)]
    if not left_out or not taken:
        return
    value = left_out[0]
    if all(value == label for value, label in taken.items()):  # its class can never occur
        yield Finding(
            "error",
            "named_ignored",
            f"the value {value} is ignored, but is class {names[value]!r} of the {len(names)} that are named; choose "
            "another ignored value, or leave its name out and give the labels of the others without a gap",
        )
    absent = _absent(scan)
    is_shifted = all(value == label + 1 for value, label in taken.items())
    if left_out == [0] and is_shifted and absent == [len(names) - 1] and max(values - {VOID}) == absent[0]:
        yield Finding(
            "error" if names[0].lower() in NO_CLASS else "warning",
            "named_ignored",
            f"the value 0 is ignored and the labels hold 1 to {absent[0]}, which are {absent[0]} classes, but "
            f"{len(names)} are named: 1 is read as {names[0]!r}, and {names[-1]!r} never occurs; leave out the name of "
            "the ignored one",
        )


def absent_classes(scan: DataScan) -> Iterator[Finding]:
    """Classes that no image of a split shows; where files cannot be read, they may be in these.

    Args:
        scan: The scan.
    """
    for name, split in scan.splits.items():
        most_occur = 4 * len(split.absent) <= len(split.class_names)
        if split.absent and (_is_enough(split) or most_occur) and not split.problems:
            some = [repr(scan.class_names[index]) for index in split.absent]
            yield Finding(
                "warning",
                "absent",
                f"{name}: {_several(some, 'class', 8)} never {'occurs' if len(some) == 1 else 'occur'} in "
                f"{split.samples} images; "
                + ("it cannot be learned" if name == "train" else "nothing is measured of it"),
            )


def much_ignored(scan: DataScan) -> Iterator[Finding]:
    """Splits most of whose pixels are of no class.

    Args:
        scan: The scan.
    """
    for name, split in scan.splits.items():
        if split.ignored_share > MUCH:
            values = [value for value, label in split.classes.items() if label == IGNORED]
            held = f" (in the files: {_several(values, 'value', 8)})" if values else ""
            yield Finding(
                "warning", "ignored", f"{name}: {100 * split.ignored_share:.1f} % of all pixels are ignored{held}"
            )


def unlabelled_images(scan: DataScan) -> Iterator[Finding]:
    """Images all of whose pixels are ignored.

    Args:
        scan: The scan.
    """
    for name, split in scan.splits.items():
        if split.unlabelled:
            yield Finding(
                "warning",
                "unlabelled",
                f"{name}: {_several(split.unlabelled, 'label')} {_has(split.unlabelled)} no pixel of any class",
                tuple(split.unlabelled),
            )


def images_in_two_splits(scan: DataScan) -> Iterator[Finding]:
    """Images that are trained on and measured with.

    Args:
        scan: The scan.
    """
    if scan.duplicates:
        pairs = [f"{one} and {other}" for one, other in scan.duplicates]
        yield Finding(
            "warning",
            "duplicates",
            f"{len(pairs)} image{'s' if len(pairs) > 1 else ''} in two splits, pixel by pixel: "
            f"{_several(pairs, 'pair', 1)}; scores on images that were trained on say little",
            tuple(path for pair in scan.duplicates for path in pair),
        )


def unused_bits(scan: DataScan) -> Iterator[Finding]:
    """Images of fewer bits than was told, which a model would see almost black.

    Args:
        scan: The scan.
    """
    forms = {split.image_form for split in scan.splits.values()}
    form, highest = forms.pop(), _largest(scan)
    if forms or form.bit_depth in (None, 8, FLOATS) or highest is None or not 0 <= highest < form.full_scale / 4:
        return
    yield Finding(
        "warning",
        "unused_bits",
        f"the largest value in all images is {highest:g}, of {form.full_scale:g} that bit_depth {form.bit_depth} has: "
        f"they are dark; --bit-depth {used_bits(int(highest))} has no more than they use",
    )


CHECKS: tuple[Callable[[DataScan], Iterator[Finding]], ...] = (
    unusable_files,
    jpeg_labels,
    binary_masks,
    shifted_labels,
    named_ignored,
    absent_classes,
    much_ignored,
    unlabelled_images,
    images_in_two_splits,
    unused_bits,
)
"""What `find_problems` asks of a scan; a check of your own may be added."""


def _largest(scan: DataScan) -> float | None:
    """The largest value in the images of all splits."""
    return max((split.largest for split in scan.splits.values() if split.largest is not None), default=None)


def _measured(scan: DataScan, code: str) -> str:
    """What all images say of a channel count or a bit depth that does not fit."""
    if code == "channels":
        counts: Counter[int] = Counter()
        for split in scan.splits.values():
            counts.update(split.channels)
        told = [f"{count} in {images} image{'s' if images > 1 else ''}" for count, images in counts.most_common()]
        advice = f"; --in-chans {next(iter(counts))} reads them" if len(counts) == 1 else ""
        return f"; channels in all: {', '.join(told)}{advice}"
    highest = _largest(scan)
    if code == "bit_depth" and highest is not None and 0 <= highest < 65536:
        bits = {split.bits for split in scan.splits.values()}
        if max(bits) == 16:
            return f"; the largest value in all images is {highest:g}: --bit-depth {used_bits(int(highest))}"
    return ""


def _values(scan: DataScan) -> tuple[set[int], dict[int, int]]:
    """The values in all label files, and the class that each is read as."""
    values = {value for split in scan.splits.values() for value in split.values}
    return values, {value: label for split in scan.splits.values() for value, label in split.classes.items()}


def _absent(scan: DataScan) -> list[int]:
    """The classes that no split shows."""
    per_split = [set(split.absent) for split in scan.splits.values()]
    return sorted(set.intersection(*per_split)) if per_split else []


def _is_enough(split: SplitScan) -> bool:
    return split.samples >= len(split.class_names)


def _has_enough(scan: DataScan) -> bool:
    return any(_is_enough(split) for split in scan.splits.values())


def _several(items: Sequence[object], word: str, most: int = NAMED) -> str:
    """Some of the items, and how many more there are."""
    shown = ", ".join(map(str, items[:most]))
    others = len(items) - most
    plural = {"class": "classes"}.get(word, f"{word}s")
    return shown + (f" and {others} more {word if others == 1 else plural}" if others > 0 else "")


def _is(items: Sequence[object]) -> str:
    return "is" if len(items) == 1 else "are"


def _has(items: Sequence[object]) -> str:
    return "has" if len(items) == 1 else "have"
