"""What a scan gives cause to doubt: nothing in sound data, and every spoiling of it by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segheads.data import ADE20K, CamVid, FolderDataset, Scenes
from segheads.data.findings import CHECKS, find_problems
from segheads.data.scan import DataScan, SplitScan, scan_splits

NAMES = ("ground", "thing", "sky")


def split(pixels=(5, 3, 2), ignored=0, samples=9, **values):
    """A split by the pixels of each class; in the files the classes are themselves, and 255 is ignored."""
    counted = {index: count for index, count in enumerate(pixels) if count} | ({255: ignored} if ignored else {})
    known = {
        "class_names": NAMES[: len(pixels)],
        "samples": samples,
        "pixels": tuple(pixels),
        "images": tuple(min(count, samples) for count in pixels),
        "ignored": ignored,
        "values": counted,
        "classes": {value: -1 if value == 255 else value for value in counted},
    }
    return SplitScan(**known | values)


def codes(train=None, val=None, **values):
    found = find_problems(DataScan(splits={"train": train or split(), "val": val or split()}, **values))
    return [(finding.severity, finding.code) for finding in found]


def message(train, val=None):
    (finding,) = find_problems(DataScan(splits={"train": train, "val": val or split()}))
    return finding.message


def test_sound_data_gives_nothing():
    assert codes() == []
    assert codes(split(ignored=9)) == []
    assert find_problems(DataScan(splits={"train": split()})) == []


def test_bad_files_are_named():
    bad = {f"{name}.png": f"{name}.png is bad" for name in "abcde"}
    train = split(problems={"unreadable": bad, "size": {"f.png": "f.png is 3x4"}})
    found = find_problems(DataScan(splits={"train": train, "val": split()}))
    assert [(finding.code, finding.message) for finding in found] == [
        ("unreadable", "train: a.png is bad; the same is so of b.png, c.png, d.png and 1 more file"),
        ("size", "train: f.png is 3x4"),
    ]
    assert found[0].files == tuple(bad)


def test_values_out_of_range_are_all_told():
    train = split(problems={"values": {"a.png": "a.png holds 7"}}, refused={7: ["a.png"], 9: ["a.png"]})
    assert message(train) == "train: a.png holds 7; values out of range in all: 7, 9"


def test_masks_of_0_and_255():
    mask = split((5, 0), ignored=4)
    found = find_problems(DataScan(splits={"train": mask, "val": mask}))
    assert (found[0].severity, found[0].code) == ("error", "binary_mask")
    assert "0 and 255" in found[0].message
    assert "255 is ignored" in found[0].message
    assert "--label-values 0 255 reads it as 'thing'" in found[0].message
    # read as a class, and ignored beside two classes
    read = split((5, 4), values={0: 5, 255: 4}, classes={0: 0, 255: 1})
    assert codes(read, read) == []
    assert codes(split((5, 4), ignored=4), split((5, 4), ignored=4)) == []
    assert codes(split((5,), ignored=4), split((5,), ignored=4)) == []  # one class


def test_labels_that_count_from_1():
    shifted = {"values": {1: 5, 2: 3, 3: 2}, "classes": {1: 1, 2: 2}}
    one = split((0, 5, 3), samples=2, refused={3: ["a.png"]}, problems={"values": {"a.png": "bad"}}, **shifted)
    found = find_problems(DataScan(splits={"train": one, "val": one}))
    assert [f.code for f in found] == ["values", "values", "shifted"]
    assert "labels hold 1 to 3 and never 0, and 3 classes are 0 to 2" in found[2].message
    assert "--reduce-zero-label" in found[2].message
    ignored = split((0, 5, 3), ignored=2, values={1: 5, 2: 3, 3: 2}, classes={1: 1, 2: 2, 3: -1})
    assert ("warning", "shifted") in codes(ignored, ignored)
    few = split((0, 5, 3), ignored=2, samples=2, values={1: 5, 2: 3, 3: 2}, classes={1: 1, 2: 2, 3: -1})
    assert codes(few, few) == []  # the first class need not occur in two images
    whole = split(values={1: 5, 2: 3, 3: 2}, classes={1: 0, 2: 1, 3: 2})
    assert codes(whole, whole) == []  # read as they are


def test_the_ignored_one_among_the_names():
    kept = split((0, 5, 3), ignored=2, values={0: 2, 1: 5, 2: 3}, classes={0: -1, 1: 1, 2: 2})
    assert ("error", "named_ignored") in codes(kept, kept)
    values = {"values": {0: 2, 1: 5, 2: 3}, "classes": {0: -1, 1: 0, 2: 1}}
    shifted = split((5, 3, 0), ignored=2, **values)
    assert ("warning", "named_ignored") in codes(shifted, shifted)
    telling = split((5, 3, 0), ignored=2, class_names=("Background", "a", "b"), **values)
    assert ("error", "named_ignored") in codes(telling, telling)
    last = split((5, 3, 2), ignored=2, values={0: 2, 1: 5, 2: 3, 3: 2}, classes={0: -1, 1: 0, 2: 1, 3: 2})
    assert codes(last, last) == []
    assert codes(telling, last) == [("warning", "absent")]  # it occurs in val
    below = split(ignored=2, values={-1: 2, 0: 5, 1: 3, 2: 2}, classes={-1: -1, 0: 0, 1: 1, 2: 2})
    assert codes(below, below) == []


@pytest.mark.parametrize("name", ["train", "val"])
def test_classes_that_never_occur(name):
    assert codes(**{name: split((5, 0, 2))}) == [("warning", "absent")]
    assert codes(**{name: split((5, 0, 2), samples=2)}) == []  # fewer images than classes
    assert codes(**{name: split((5, 3, 0, 2), samples=2, class_names=tuple("abcd"))}) == [
        ("warning", "absent")
    ]  # but most classes occur
    bad = split((5, 0, 2), problems={"unreadable": {"a.png": "bad"}})  # it may be in this one
    assert codes(**{name: bad}) == [("error", "unreadable")]
    found = find_problems(DataScan(splits={name: split((5, 0, 0))}))
    assert found[0].message.startswith(f"{name}: 'thing', 'sky' never occur in 9 images; ")


def test_much_ignored():
    assert codes(split(ignored=10)) == []
    assert codes(split(ignored=11)) == [("warning", "ignored")]
    assert message(split(ignored=30)) == "train: 75.0 % of all pixels are ignored (in the files: 255)"


def test_images_without_labels_and_in_two_splits():
    assert codes(split(unlabelled=["a.png"])) == [("warning", "unlabelled")]
    assert message(split(unlabelled=["a.png"])) == "train: a.png has no pixel of any class"
    assert codes(duplicates=[("a.png", "b.png")]) == [("warning", "duplicates")]
    assert codes(split(lossy=["a.jpg"])) == [("error", "lossy")]


def test_errors_come_first():
    assert codes(split(unlabelled=["a"]), split(lossy=["b"])) == [("error", "lossy"), ("warning", "unlabelled")]


def test_checks_may_be_added():
    assert all(check.__doc__ for check in CHECKS)


# Spoilings of data that is sound. Each is given the files of a split by kind and split, and changes some.


def labels(path):
    return np.array(Image.open(path))


def rewrite(path, values, **options):
    Image.fromarray(values).save(path, **options)


def every_label(files, change):
    for split_name in ("train", "val"):
        for path in files("labels", split_name):
            rewrite(path, change(labels(path)))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_jpeg(path):
    Image.open(path).save(path, format="JPEG", quality=90)


def one_pixel(path, value, dtype=np.uint8):
    values = labels(path).astype(dtype)
    values[0, 0] = value
    rewrite(path, values)


def without(value, by):
    return lambda values: np.where(values == value, by, values).astype(np.uint8)


def gone(files, name):
    for path in files("labels", name):
        rewrite(path, without(1, 0)(labels(path)))


def mostly_ignored(files, void):
    for path in files("labels", "train"):
        values = labels(path)
        values[: int(0.8 * len(values))] = void
        rewrite(path, values)


def twin(files):
    """The same pixels in another format."""
    Image.open(files("images", "train")[1]).save(files("images", "val")[2], format="PNG")


SPOILINGS = {
    # name: what is done, what is said, the file that is named
    "image cut off": (lambda files, void: cut(files("images", "val")[1]), "unreadable", ("images", "val", 1)),
    "image of no bytes": (
        lambda files, void: files("images", "train")[0].write_bytes(b""),
        "unreadable",
        ("images", "train", 0),
    ),
    "label cut off": (lambda files, void: cut(files("labels", "train")[2]), "unreadable", ("labels", "train", 2)),
    "label of text": (
        lambda files, void: files("labels", "val")[0].write_text("see Anna's disk"),
        "unreadable",
        ("labels", "val", 0),
    ),
    "label in colours": (
        lambda files, void: Image.open(files("labels", "val")[2]).convert("RGB").save(files("labels", "val")[2]),
        "unreadable",
        ("labels", "val", 2),
    ),
    "label with alpha": (
        lambda files, void: Image.open(files("labels", "train")[3]).convert("LA").save(files("labels", "train")[3]),
        "unreadable",
        ("labels", "train", 3),
    ),
    "label turned": (
        lambda files, void: rewrite(files("labels", "val")[3], np.rot90(labels(files("labels", "val")[3])).copy()),
        "size",
        ("labels", "val", 3),
    ),
    "one value too high": (
        lambda files, void: one_pixel(files("labels", "val")[-1], 77),
        "values",
        ("labels", "val", -1),
    ),
    "a value beyond 8 bit": (
        lambda files, void: one_pixel(files("labels", "train")[1], 300, np.uint16),
        "values",
        ("labels", "train", 1),
    ),
    "label as JPEG": (lambda files, void: to_jpeg(files("labels", "train")[0]), "lossy", ("labels", "train", 0)),
    "no class in one image": (
        lambda files, void: rewrite(files("labels", "val")[0], np.full_like(labels(files("labels", "val")[0]), void)),
        "unlabelled",
        ("labels", "val", 0),
    ),
    "most of it ignored": (mostly_ignored, "ignored", None),
    "class gone from train": (lambda files, void: gone(files, "train"), "absent", None),
    "class gone from val": (lambda files, void: gone(files, "val"), "absent", None),
    "image in both splits": (lambda files, void: twin(files), "duplicates", ("images", "val", 2)),
    "shifted by one": (
        lambda files, void: every_label(files, lambda x: np.where(x == void, void, x + 1).astype(np.uint8)),
        "shifted",
        None,
    ),
}


ALSO = {  # what else follows from a spoiling
    "label as JPEG": ["values", "unreadable"],
    "shifted by one": ["values", "absent"],
    "most of it ignored": ["absent"],
}


class Copy:
    """Files of a data set that may be spoiled."""

    def __init__(self, root, folders, opened, void):
        self.root, self.folders, self.opened, self.void = root, folders, opened, void

    def files(self, kind, name):
        return sorted((self.root / self.folders[kind].format(name)).iterdir())

    def problems(self):
        return find_problems(scan_splits({name: self.opened(self.root, name) for name in ("train", "val")}))


def check(copy, name):
    spoil, code, place = SPOILINGS[name]
    file = str(copy.files(*place[:2])[place[2]]) if place else ""
    spoil(copy.files, copy.void)
    problems = copy.problems()
    (found, *_) = [finding for finding in problems if finding.code == code]
    assert {finding.code for finding in problems} <= {code, *ALSO.get(name, ())}
    assert not file or file in found.files
    assert not file or Path(file).name in found.message


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Twelve sound scenes of two splits, their twelve classes made three."""
    root = tmp_path_factory.mktemp("drawn")
    for name, length in (("train", 7), ("val", 5)):
        scenes = Scenes(name, size=(48, 40), length=length)
        for index in range(length):
            image, values = scenes.read(index)
            values = (values.numpy() // 4).astype(np.uint8)
            values[-2:, :3] = 255
            for kind, picture in (("images", image), ("labels", Image.fromarray(values))):
                path = root / kind / name / f"{name}_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
    return root


def open_folder(root, name):
    return FolderDataset(root / "images" / name, root / "labels" / name, 3, class_names=NAMES)


@pytest.fixture
def drawn_copy(drawn, tmp_path):
    root = shutil.copytree(drawn, tmp_path / "own")
    return Copy(root, {"images": "images/{}", "labels": "labels/{}"}, open_folder, 255)


def test_a_sound_folder(drawn_copy):
    assert drawn_copy.problems() == []


@pytest.mark.parametrize("name", SPOILINGS)
def test_spoiled_folder(drawn_copy, name):
    check(drawn_copy, name)


def test_folder_of_binary_masks(drawn_copy):
    every_label(drawn_copy.files, lambda values: np.where(values == 1, 255, 0).astype(np.uint8))
    assert "binary_mask" in [finding.code for finding in drawn_copy.problems()]


def test_folder_with_the_ignored_one_among_its_names(drawn_copy):
    every_label(drawn_copy.files, lambda values: np.where(values == 255, 0, values).astype(np.uint8))

    def with_names(root, name):
        folders = [root / kind / name for kind in ("images", "labels")]
        return FolderDataset(*folders, 3, class_names=("background", "thing", "sky"), reduce_zero_label=True)

    drawn_copy.opened = with_names
    assert [finding.code for finding in drawn_copy.problems()] == ["named_ignored", "absent", "absent"]


@pytest.fixture
def camvid_copy(shared_data, tmp_path):
    """31 training and 17 validation images of CamVid."""
    source = shared_data("camvid")
    for folder in ("train", "trainannot", "val", "valannot"):
        (tmp_path / folder).mkdir()
        for path in sorted((source / folder).iterdir())[:: 12 if folder.startswith("train") else 6]:
            shutil.copyfile(path, tmp_path / folder / path.name)  # without the mode: the source may be read-only
    return Copy(tmp_path, {"images": "{}", "labels": "{}annot"}, CamVid, 11)


@pytest.mark.parametrize("name", SPOILINGS)
def test_spoiled_camvid(camvid_copy, name):
    check(camvid_copy, name)


def test_a_part_of_camvid_is_sound(camvid_copy):
    assert camvid_copy.problems() == []


@pytest.mark.parametrize(("name", "kind", "images"), [("camvid", CamVid, 468), ("ade20k_sample", ADE20K, 3)])
def test_sound_published_data(shared_data, name, kind, images):
    scan = scan_splits({part: kind(shared_data(name), part) for part in ("train", "val")})
    assert sum(part.samples for part in scan.splits.values()) == images
    assert find_problems(scan) == []
