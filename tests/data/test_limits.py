"""Images are looked at before they are decoded; what is wrong with a sample reaches the user in one line."""

import pickle
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Subset

from segheads.data import DataConfig, EvaluationSamples, open_dataset, pixel_limit, read_image
from segheads.data.dataset import read_sample
from segheads.data.images import ImageForm
from segheads.data.labels import read_labels
from segheads.data.limits import opened
from segheads.data.scan import scan_sample
from segheads.errors import DataError, DataMissingError, ImageFormError, OptionError, StoppedError


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, width, height):
    """A PNG whose header promises a size, and whose data is a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def tiff(path, width, height, *, samples=1):
    """A TIFF that promises a size."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, samples), (278, height)]
    entries += [(279, 10), (284, 1)]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(200))
    return path


def npy(path, shape):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(bytes(16))
    return path


def test_a_size_beyond_the_limit_is_refused_from_the_header(tmp_path):
    for path in (png(tmp_path / "a.png", 40_000, 30_000), tiff(tmp_path / "a.tif", 40_000, 30_000)):
        for read in (read_image, read_labels):
            with pytest.raises(
                ImageFormError, match=r"40000 x 30000, 1,200,000,000 pixels, and 1,000,000,000 are"
            ) as e:
                read(path)
            assert str(path) in str(e.value)
    with pytest.raises(ImageFormError, match="1,200,000,000 pixels"):
        read_image(tiff(tmp_path / "b.tif", 40_000, 30_000, samples=5), ImageForm(5))


@pytest.mark.filterwarnings("error")
def test_the_limit_is_an_option_and_pillows_own_gives_way(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (30, 20), 3).save(path)
    with pixel_limit(600):
        assert read_labels(path).shape == (20, 30)
    with pixel_limit(599), pytest.raises(ImageFormError, match="600 pixels, and 599 are the most"):
        read_labels(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice that is refused
    assert read_labels(path).shape == (20, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ValueError, match="max_pixels must be 1 or more"), pixel_limit(0):
        pass


def test_no_pixels_are_no_image(tmp_path):
    for width, height in ((0, 5), (5, 0)):
        with pytest.raises(DataError, match=r"a\.png"):
            read_image(png(tmp_path / "a.png", width, height))


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**9, 10, 3), (2, 3, 10**15), (4, 4, 4)])
def test_an_array_whose_header_promises_other_bytes_than_the_file_has_is_refused(tmp_path, shape):
    with pytest.raises(DataError, match=r"a\.npy .* its header says"):
        read_image(npy(tmp_path / "a.npy", shape), ImageForm(3, 32))


def test_an_array_of_objects_is_never_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}]], object))
    with pytest.raises(DataError, match="Python objects"):
        read_image(tmp_path / "a.npy", ImageForm(1, 32))


def test_what_is_not_finite_is_named_with_its_place(tmp_path):
    values = np.zeros((5, 6, 2), np.float32)
    values[3, 4, 1] = np.inf
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ImageFormError, match=r"a\.npy has 1 values .* the first in row 3, column 4, channel 1"):
        read_image(tmp_path / "a.npy", ImageForm(2, 32))


@pytest.fixture
def folder(tmp_path):
    """A folder data set of three images; the second is what a test makes of it."""
    for split in ("train", "val"):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / kind / split).mkdir(parents=True)
            for index in range(3):
                Image.new(mode, (12, 10), 1).save(tmp_path / kind / split / f"{index}.png")
    return tmp_path


def config(folder, **options):
    return DataConfig(dataset="folder", data_root=folder, num_classes=3, **options)


def test_max_pixels_of_a_configuration_holds_for_samples_and_is_checked(folder):
    assert read_sample(open_dataset(config(folder, max_pixels=120), "val"), 1)[1].shape == (10, 12)
    dataset = open_dataset(config(folder, max_pixels=119, train_images=2), "train")
    with pytest.raises(ImageFormError, match="sample 0 of SubsetDataset.* 120 pixels, and 119 are the most"):
        read_sample(dataset, 0)
    with pytest.raises(OptionError, match="max_pixels must be 1 or more; got 0"):
        config(folder, max_pixels=0)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), DataError, "cannot be read as an image"),
        (lambda path: path.unlink(), DataMissingError, "there is no"),
        (lambda path: Image.new("I;16", (12, 10), 900).save(path), ImageFormError, "give bit_depth"),
    ],
)
def test_an_error_in_a_worker_is_the_error_that_was_raised(folder, change, kind, words):
    path = folder / "images" / "val" / "1.png"
    dataset = open_dataset(config(folder), "val")
    change(path)
    samples = Subset(EvaluationSamples(dataset, [0.5] * 3, [0.5] * 3), [1])
    raised = []
    for workers in (0, 1):
        with pytest.raises(kind) as error:
            list(DataLoader(samples, batch_size=None, num_workers=workers))
        raised.append(error.value)
    here, there = raised
    assert type(there) is type(here)
    assert str(there) == str(here)
    assert "\n" not in str(there)
    assert words in str(there)
    assert f"sample 1 of FolderDataset: {'' if kind is not ImageFormError else 'image '}" in str(there)
    assert str(path) in str(there)
    assert here.traceback_of_worker is None
    assert "Original Traceback" in there.traceback_of_worker


def test_what_the_system_says_of_a_file_is_an_error_of_its_sample(folder, monkeypatch):
    dataset = open_dataset(config(folder), "val")

    def refuse(index):
        raise PermissionError(13, "Permission denied", "labels/val/1.png")

    monkeypatch.setattr(dataset, "read", refuse)
    with pytest.raises(DataError, match=r"sample 1 of FolderDataset: .*Permission denied: 'labels/val/1\.png'"):
        read_sample(dataset, 1)


def test_threads_give_pillow_its_limit_back(tmp_path):
    for index in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{index}.png")
    known, seen = Image.MAX_IMAGE_PIXELS, []

    def read(index):
        with opened(tmp_path / f"{index % 4}.png", "a file") as image, image:
            seen.append(Image.MAX_IMAGE_PIXELS)
            time.sleep(0.001)
            return image.size

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(100))) == {(20, 20)}
    assert set(seen) == {None}
    assert known == Image.MAX_IMAGE_PIXELS


def test_memory_that_is_short_is_no_damage(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    def load(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_a_signal_is_no_damaged_file(folder, monkeypatch):
    def stop(*_, **__):
        raise StoppedError("stopped by SIGTERM", 15)

    monkeypatch.setattr("segheads.data.images.check_structure", stop)
    dataset = open_dataset(config(folder), "train")
    for call in (lambda: read_sample(dataset, 0), lambda: scan_sample(dataset, 0)):
        with pytest.raises(StoppedError, match="^stopped by SIGTERM$"):
            call()
    assert pickle.loads(pickle.dumps(StoppedError("stopped by SIGTERM", 15))).args == ("stopped by SIGTERM",)
