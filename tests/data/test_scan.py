"""What a scan counts, remembers and survives."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import SIZE, camvid, coco_stuff, converted_coco_stuff, draw_labels, own_folder
from PIL import Image
from torch import Tensor

from segheads.data import CamVid, COCOStuff10K, FolderDataset, LabelMap, Scenes, SegmentationDataset, SubsetDataset
from segheads.data import scan as scan_module
from segheads.data.findings import find_problems
from segheads.data.images import ImageForm
from segheads.data.scan import has_files, scan, scan_sample, scan_splits, summed_up
from segheads.data.scan_cache import ScanCache, default_cache
from segheads.errors import DataError, PackageMissingError, RunError

PIXELS = SIZE[0] * SIZE[1]


@pytest.fixture
def folder(tmp_path):
    return own_folder(tmp_path / "own")


def opened(root, split="train", num_classes=2, **options):
    return FolderDataset(root / "images" / split, root / "labels" / split, num_classes, **options)


@pytest.fixture
def reads(monkeypatch):
    """The samples that are read, of any folder."""
    seen, read = [], FolderDataset.read
    monkeypatch.setattr(
        FolderDataset, "read", lambda self, index: (seen.append(self.name(index)), read(self, index))[1]
    )
    return seen


def test_counts_are_those_of_a_slow_reference(folder):
    dataset = opened(folder)
    labels = torch.cat([dataset.read(index)[1].flatten() for index in range(2)])
    found = scan(dataset)
    assert found.pixels == tuple(int((labels == k).sum()) for k in range(2))
    assert found.ignored == int((labels == 255).sum())
    assert found.ignored_share == pytest.approx(1 / 3)
    assert found.values == {0: 2 * PIXELS // 3, 1: 2 * PIXELS // 3, 255: 2 * PIXELS // 3}
    assert found.classes == {0: 0, 1: 1, 255: -1}
    assert (found.images, found.samples, found.absent) == ((2, 2), 2, [])
    assert found.image_sizes == {"48x40": 2}
    assert found.image_kinds == {"JPEG, 3 channels (RGB), 8 bit": 2}
    assert found.label_kinds == {"PNG, 1 channel (L), 8 bit": 2}
    assert not found.problems
    assert not found.unlabelled
    assert set(found.as_json()) >= {"pixels", "ignored_share"}
    json.dumps(found.as_json())


def test_values_are_those_of_the_files_and_classes_what_they_are_read_as(tmp_path):
    found = scan(COCOStuff10K(converted_coco_stuff(tmp_path)))
    assert found.classes == {0: -1, 1: 0, 171: 170}
    assert found.absent == [*range(1, 170)]


def test_labels_that_are_no_images(tmp_path):
    io = pytest.importorskip("scipy.io", reason="the .mat files of COCO-Stuff need SciPy")
    found = scan(COCOStuff10K(coco_stuff(tmp_path, io.savemat)))
    assert (found.values, found.classes, found.label_kinds) == ({}, {}, {})
    assert (found.pixels[0], found.pixels[170], found.ignored) == (2 * PIXELS // 3,) * 3


def sixteen_colours():
    image = Image.new("P", SIZE)
    image.putpalette(range(48))
    return image


@pytest.mark.parametrize(
    ("draw", "kind"),
    [
        (lambda path: Image.new("1", SIZE).save(path), "PNG, 1 channel (1), 1 bit"),
        (lambda path: sixteen_colours().save(path), "PNG, 1 channel (P), 4 bit"),
        (lambda path: draw_labels(path, [0, 1], dtype=np.uint16), "PNG, 1 channel (I;16), 16 bit"),
        (lambda path: draw_labels(path.with_suffix(".tif"), [0, 1], dtype=np.uint16), "TIFF, 1 channel (I;16), 16 bit"),
    ],
)
def test_bit_depths(folder, draw, kind):
    path = folder / "labels" / "train" / "a_000000_000019.png"
    path.unlink()
    draw(path)
    assert kind in scan(opened(folder)).label_kinds


def test_wide_values(folder):
    draw_labels(folder / "labels" / "train" / "a_000000_000019.png", [0, 1, 1000], dtype=np.uint16)
    found = scan(opened(folder, ignore_index=1000, num_classes=256 - 1))
    assert found.classes[1000] == -1
    assert found.values[1000] == PIXELS // 3


class Fine(SegmentationDataset):
    """More classes than 8 bit hold: labels of 16 bit, and -1 for no class."""

    ignore_index = -1

    def __init__(self, path):
        super().__init__(("a",), ((0, 0, 0),))
        self.files = [(path, path)]

    def __len__(self):
        return 1

    def name(self, index):
        return "fine"

    def read(self, index):
        values = np.array(Image.open(self.files[0][1])).astype(np.int16)
        return Image.new("RGB", SIZE), torch.from_numpy(np.where(values == 255, -1, values))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_of_16_bit(tmp_path, dtype):
    draw_labels(tmp_path / "a.png", [0, 254, 255], dtype=dtype)
    found = scan(Fine(tmp_path / "a.png"))
    assert found.classes == {0: 0, 254: 254, 255: -1}
    assert found.ignored == found.values[254] == PIXELS // 3


def damage(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_bad_files_are_named_and_the_scan_goes_on(folder):
    images, labels = (sorted((folder / kind / "train").iterdir()) for kind in ("images", "labels"))
    damage(images[0])
    draw_labels(labels[1], [0, 1, 7, 9])
    found = scan(opened(folder))
    assert found.samples == 2
    assert sum(found.pixels) == found.ignored == 0
    assert list(found.problems) == ["unreadable", "values"]
    assert "cannot be read as an image" in found.problems["unreadable"][str(images[0])]
    assert "holds the value 7" in found.problems["values"][str(labels[1])]
    assert found.refused == {7: [str(labels[1])], 9: [str(labels[1])]}
    assert set(found.values) == {0, 1, 7, 9, 255}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_refused_values_of_any_type(folder, dtype):
    path = folder / "labels" / "val" / "c_000000_000001.png"
    path.unlink()
    values = {np.uint8: [0, 38], np.uint16: [0, 3800], np.int32: [0, -1]}[dtype]
    draw_labels(path.with_suffix(".tif"), values, dtype=dtype)
    assert list(scan(opened(folder, "val")).refused) == [values[1]]


def test_a_label_all_of_whose_values_are_refused(folder):
    draw_labels(folder / "labels" / "val" / "c_000000_000001.png", [38])
    assert list(scan(opened(folder, "val")).refused) == [38]


def test_sizes_that_differ(folder):
    path = folder / "labels" / "val" / "c_000000_000001.png"
    draw_labels(path, [0, 38], size=SIZE[::-1])
    found = scan(opened(folder, "val"))
    assert "40x48" in found.problems["size"][str(path)]
    assert not found.refused


class Odd(SegmentationDataset):
    """Without files, and with an error that no reader should raise."""

    def __init__(self, error=None):
        super().__init__(("a", "b"), ((0, 0, 0), (1, 1, 1)))
        self.error = error

    def __len__(self):
        return 1

    def name(self, index):
        return "odd"

    def read(self, index):
        if self.error:
            raise self.error
        return Image.new("RGB", (2, 1)), torch.tensor([[1, 255]], dtype=torch.uint8)


def test_a_data_set_without_files():
    assert not has_files(Odd())
    found = scan(Odd())
    assert (found.pixels, found.ignored, found.values) == ((0, 1), 1, {})


def test_any_error_of_a_reader_is_named_but_a_missing_package_stops():
    assert scan(Odd(KeyError("x"))).problems == {"unreadable": {"odd": "KeyError: 'x'"}}
    assert scan(Odd(DataError("two\nlines"))).problems == {"unreadable": {"odd": "two lines"}}
    with pytest.raises(PackageMissingError, match="pip"):
        scan(Odd(PackageMissingError("pip install it")))


def test_an_image_without_a_labelled_pixel(folder):
    path = folder / "labels" / "train" / "a_000000_000019.png"
    draw_labels(path, [255])
    assert scan(opened(folder)).unlabelled == [str(path)]


def test_duplicates_are_found_by_content_whatever_the_file(folder):
    scene, _ = Scenes("val", size=(40, 48), length=1).read(0)
    scene.save(folder / "images" / "train" / "a_000000_000019.jpg", format="PNG")
    scene.save(folder / "images" / "val" / "c_000000_000001.jpg", format="BMP")
    for split in ("train", "val"):  # the miniatures are all the same
        other = {"train": "b_000001_000019", "val": "d_000000_000001"}[split]
        Scenes(split, size=(40, 48), length=2).read(1)[0].save(folder / "images" / split / f"{other}.jpg")
    found = scan_splits({split: opened(folder, split) for split in ("train", "val")})
    assert [tuple(Path(path).name for path in pair) for pair in found.duplicates] == [
        ("a_000000_000019.jpg", "c_000000_000001.jpg")
    ]
    json.dumps(found.as_json())


def test_a_subset_is_scanned_as_a_part(folder, reads, tmp_path):
    whole = opened(folder)
    assert has_files(SubsetDataset(whole, 1))
    assert scan(SubsetDataset(whole, 1), cache=tmp_path / "cache").samples == 1
    assert scan(whole, cache=tmp_path / "cache").samples == 2
    assert len(reads) == 2  # of the whole, only the other one


def test_files_that_did_not_change_are_read_once(folder, reads, tmp_path):
    first = scan(opened(folder), cache=tmp_path / "cache")
    assert len(reads) == 2
    assert scan(opened(folder), cache=tmp_path / "cache") == first
    assert len(reads) == 2
    (file,) = (tmp_path / "cache").glob("*.json")
    file.write_text("{damaged")
    assert scan(opened(folder), cache=tmp_path / "cache") == first
    assert len(reads) == 4
    assert scan(opened(folder)) == first  # remembers nothing
    assert len(reads) == 6


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_file_that_changed_is_read_again(folder, reads, tmp_path, kind):
    scan(opened(folder), cache=tmp_path / "cache")
    path = next(path for path in (folder / kind / "train").iterdir() if path.name.startswith("a"))
    os.utime(path, ns=(1, 1))
    scan(opened(folder), cache=tmp_path / "cache")
    assert reads[2:] == ["a_000000_000019"]
    if kind == "labels":
        draw_labels(path, [0])
        assert scan(opened(folder), cache=tmp_path / "cache").images == (2, 1)


def test_what_is_read_in_another_way_is_another_scan(folder, reads, tmp_path):
    counts = [
        scan(opened(folder, **options), cache=tmp_path / "cache").ignored
        for options in ({}, {"num_classes": 3}, {"reduce_zero_label": True}, {"class_names": ("x", "y")})
    ]
    assert counts[2] == 2 * counts[0]
    assert len(reads) == 6  # names change nothing


def test_errors_are_not_remembered(folder, reads, tmp_path):
    damage(folder / "images" / "train" / "a_000000_000019.jpg")
    for _ in range(2):
        scan(opened(folder), cache=tmp_path / "cache")
    assert sorted(reads) == ["a_000000_000019"] * 2 + ["b_000001_000019"]


def test_a_cache_that_cannot_be_written_is_said(folder, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert scan(opened(folder), cache=tmp_path / "file").samples == 2
    assert "the scan is not remembered" in caplog.text


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGHEADS_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "scans"
    monkeypatch.delenv("SEGHEADS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "segheads" / "scans"


def test_a_data_set_that_cannot_be_told_apart_has_no_cache(tmp_path):
    dataset = Odd()
    dataset.convert = lambda x: x
    assert ScanCache(tmp_path, dataset).path is None


def test_processes_count_what_one_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "WORTH_A_PROCESS", 1)
    dataset = CamVid(camvid(tmp_path), "train")
    state = torch.random.get_rng_state()
    assert scan(dataset, workers=2) == scan(dataset, workers=0)
    assert torch.equal(state, torch.random.get_rng_state())


class Deadly(Odd):
    """A reader that takes its process down, as a decoder in C may."""

    def __len__(self):
        return 20

    def name(self, index):
        return f"sample {index}"

    def read(self, index) -> tuple[Image.Image, Tensor]:
        if index == 11 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_dies_is_said(monkeypatch):
    monkeypatch.setattr(scan_module, "WORTH_A_PROCESS", 1)
    with pytest.raises(RunError, match=r"died after \d+ of 20 files, at sample \d+ or soon after it: .*workers=0"):
        scan(Deadly(), workers=1)
    assert scan(Deadly(), workers=0).samples == 20


def test_the_sum_of_no_samples():
    assert summed_up([], ("a",)).ignored_share == 0


def test_a_sample_by_itself(folder):
    sample = scan_sample(opened(folder), 0)
    assert (sample.problem, tuple(sample.size)) == ("", SIZE)


def test_an_orientation_that_is_not_decided_is_found_before_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for kind, options in (("images", {"exif": exif}), ("labels", {})):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / kind / "a.png", **options)
    dataset = FolderDataset(tmp_path / "images", tmp_path / "labels", 2)
    (finding,) = (x for x in find_problems(scan_splits({"train": dataset}, workers=0)) if x.severity == "error")
    assert finding.code == "exif"
    assert finding.files == (str(tmp_path / "images/a.png"),)
    assert "EXIF orientation 3" in finding.message


def test_images_of_other_channels_are_named_with_all_counts(tmp_path):
    for index, bands in enumerate((3, 3, 4)):
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir(exist_ok=True)
        np.save(tmp_path / f"images/{index}.npy", np.zeros((6, 8, bands), np.uint8))
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / f"labels/{index}.png")
    found = scan_splits({"train": FolderDataset(tmp_path / "images", tmp_path / "labels", 2)}, workers=0)
    assert found.splits["train"].image_kinds == {"NPY, 3 channels, 8 bit": 2, "NPY, 4 channels, 8 bit": 1}
    (finding,) = (x for x in find_problems(found) if x.severity == "error")
    assert finding.code == "channels"
    assert "2.npy has 4 channels, and in_chans is 3" in finding.message
    assert finding.message.endswith("channels in all: 3 in 2 images, 4 in 1 image")


def test_statistics_of_channels_are_those_of_a_slow_reference(tmp_path):
    values = np.random.default_rng(0).integers(0, 1000, (2, 6, 8, 2)).astype(np.uint16)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for index, image in enumerate(values):
        np.save(tmp_path / f"images/{index}.npy", image)
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / f"labels/{index}.png")
    form = ImageForm(2, 10)
    found = scan(FolderDataset(tmp_path / "images", tmp_path / "labels", 2, image_form=form), workers=0)
    assert (found.largest, found.bits, found.channels) == (values.max(), 16, {2: 2})
    np.testing.assert_allclose(found.band_mean, values.mean((0, 1, 2)))
    np.testing.assert_allclose(found.band_std, values.std((0, 1, 2)))


def test_unknown_colours_are_values_and_no_damage(tmp_path):
    own_folder(tmp_path, values=(0, 1))
    colours = LabelMap({(0, 0, 0): 0})
    dataset = FolderDataset(tmp_path / "images/train", tmp_path / "labels/train", 2, label_map=colours)
    problems = scan(dataset).problems
    assert list(problems) == ["values"]
    assert all("holds #010101" in message for message in problems["values"].values())
