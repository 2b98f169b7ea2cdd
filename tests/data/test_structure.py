"""What decoders pass over in damaged files is found."""

import struct

import numpy as np
import pytest
from PIL import Image

from segheads.data.folder import FolderDataset
from segheads.data.images import read_image
from segheads.data.labels import read_labels
from segheads.data.scan import scan_sample
from segheads.errors import DataError


def test_a_changed_label_of_a_png_is_refused_though_it_decodes(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 15] = 1  # a stored pixel
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png .* the checksum of its chunk IDAT is wrong"):
        read_labels(path)


def test_pages_in_a_loop_and_tags_beyond_the_end_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 8) + bytes(30))
    with pytest.raises(DataError, match=r"a\.tif .* its pages lead round in a loop"):
        read_image(path)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path, compression="tiff_deflate")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.tif .* its tag 258 lies beyond its end"):
        read_image(path)


def test_a_scan_waits_for_no_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.png")
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    found = scan_sample(FolderDataset([tmp_path / "a.png"], [tmp_path / "b.png"], 2), 0)
    assert found.problem == "unreadable"
    assert "is a named pipe" in found.message
