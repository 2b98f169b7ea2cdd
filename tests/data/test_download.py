import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

from segheads.data import download, download_ade20k
from segheads.data.download import FOLDER
from segheads.errors import DownloadError


def make_zip(members=None, link=False, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in members or [f"{FOLDER}/images/training/a.jpg", f"{FOLDER}/annotations/training/a.png"]:
            archive.writestr(name, bytes(range(256)) * 20)
        if link:
            info = zipfile.ZipInfo(f"{FOLDER}/link")
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc")
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server.site
        site.requests.append(self.headers.get("Range"))
        data, start = site.data, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        matches = site.ignore_if_range or self.headers.get("If-Range") == site.etag
        if wanted and site.ranges and matches:
            start = int(wanted[1])
            if start >= len(data):
                self.send_error(416)
                return
        site.starts.append(start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", site.etag)
        self.end_headers()
        self.wfile.write(data[start : site.break_at] if site.break_at else data[start:])

    def log_message(self, *_):
        pass


class Site:
    """One file on a local server that can break off, ignore ranges, or change."""

    def __init__(self):
        self.data, self.etag, self.ranges, self.break_at, self.requests = make_zip(), '"one"', True, None, []
        self.ignore_if_range, self.starts = False, []  # starts: the first byte of each answer
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.site = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/ADEChallengeData2016.zip"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def sha1(self):
        return hashlib.sha1(self.data).hexdigest()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def assert_whole(root):
    assert (root / FOLDER / "images/training/a.jpg").read_bytes() == bytes(range(256)) * 20
    assert [path.name for path in root.iterdir()] == [FOLDER]


def test_fresh_then_already_there(site, tmp_path):
    assert download_ade20k(tmp_path / "new", url=site.url, sha1=site.sha1) == tmp_path / "new" / FOLDER
    assert_whole(tmp_path / "new")
    download_ade20k(tmp_path / "new", url=site.url, sha1=site.sha1)
    assert site.requests == [None]


def interrupt(site, root):
    site.break_at = 3000
    with pytest.raises(
        DownloadError, match=rf"cannot download {site.url} to .*3000 of {len(site.data)} bytes.*call again"
    ):
        download_ade20k(root, url=site.url, sha1=site.sha1)
    site.break_at = None


def test_interrupted_goes_on_where_it_stopped(site, tmp_path):
    interrupt(site, tmp_path)
    download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert_whole(tmp_path)
    assert site.starts == [0, 3000]  # only the rest came over the line


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_file_that_changed_is_fetched_anew(site, tmp_path, ignore_if_range):
    interrupt(site, tmp_path)
    site.data, site.etag, site.ignore_if_range = (
        make_zip([f"{FOLDER}/b", f"{FOLDER}/images/training/a.jpg"]),
        '"two"',
        ignore_if_range,
    )
    download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert_whole(tmp_path)


def test_file_that_became_shorter_is_fetched_anew(site, tmp_path):
    interrupt(site, tmp_path)
    (tmp_path / f"{FOLDER}.zip.part").write_bytes(bytes(len(site.data) + 5))
    download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert_whole(tmp_path)


def test_server_without_ranges_starts_again(site, tmp_path):
    interrupt(site, tmp_path)
    site.ranges = False
    download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert_whole(tmp_path)
    assert site.starts == [0, 0]


def test_wrong_checksum(site, tmp_path):
    with pytest.raises(DownloadError, match=rf"has the SHA-1 checksum {site.sha1}, not {'0' * 40}, and was deleted"):
        download_ade20k(tmp_path, url=site.url, sha1="0" * 40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("member", ["../x", "/x", f"{FOLDER}/../../x", "..\\x", "link"])
def test_unsafe_archive(site, tmp_path, member):
    site.data = make_zip(link=True) if member == "link" else make_zip([f"{FOLDER}/a", member])
    with pytest.raises(DownloadError, match="leads out of the folder; nothing was unpacked"):
        download_ade20k(tmp_path / "root", url=site.url, sha1=None)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == [f"{FOLDER}.zip"]


@pytest.mark.parametrize(("most", "value"), [("MOST_FILES", 1), ("MOST_BYTES", 10_000)])
def test_an_archive_of_too_much_is_not_unpacked(site, tmp_path, monkeypatch, most, value):
    monkeypatch.setattr(download, most, value)
    with pytest.raises(DownloadError, match="holds 2 files of 10240 bytes in all, and .* are the most"):
        download_ade20k(tmp_path, url=site.url, sha1=None)
    assert [path.name for path in tmp_path.iterdir()] == [f"{FOLDER}.zip"]


def test_a_file_is_no_larger_than_its_archive_says(site, tmp_path):
    data = bytearray(make_zip(compression=zipfile.ZIP_DEFLATED))
    size = data.find(b"PK\1\2") + 24
    data[size : size + 4] = (10).to_bytes(4, "little")
    site.data = bytes(data)
    with pytest.raises(DownloadError, match="is not a whole zip archive"):
        download_ade20k(tmp_path, url=site.url, sha1=None)
    assert sum(path.stat().st_size for path in (tmp_path / f"{FOLDER}.unfinished").rglob("*.jpg")) <= 10


@pytest.mark.parametrize(
    ("central", "local", "value", "message"),
    [
        (8, 6, 1, "is encrypted"),  # the place of the flag in the two headers
        (10, 8, 99, "compressed in another way"),
        (None, 30 + len(f"{FOLDER}/images/training/a.jpg"), 255, "is not a whole zip archive"),  # of the stream
    ],
)
def test_a_member_that_cannot_be_read_is_told(site, tmp_path, central, local, value, message):
    data = bytearray(make_zip(compression=zipfile.ZIP_DEFLATED))
    data[data.find(b"PK\3\4") + local] = value
    if central is not None:
        data[data.find(b"PK\1\2") + central] = value
    site.data = bytes(data)
    with pytest.raises(DownloadError, match=message):
        download_ade20k(tmp_path, url=site.url, sha1=None)
    assert not (tmp_path / FOLDER).exists()


def test_not_a_zip_and_another_archive(site, tmp_path):
    site.data = b"no zip at all"
    with pytest.raises(DownloadError, match="is not a whole zip archive"):
        download_ade20k(tmp_path / "a", url=site.url, sha1=None)
    site.data = make_zip(["other/file"])
    with pytest.raises(DownloadError, match=f"holds no folder {FOLDER}"):
        download_ade20k(tmp_path / "b", url=site.url, sha1=None)


def test_kill_while_unpacking_leaves_nothing_that_looks_complete(site, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", killed)
        with pytest.raises(KeyboardInterrupt):
            download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert not (tmp_path / FOLDER).exists()
    download_ade20k(tmp_path, url=site.url, sha1=site.sha1)
    assert_whole(tmp_path)
    assert site.requests == [None]


def test_unreachable_names_url_folder_and_the_manual_way(tmp_path):
    with pytest.raises(
        DownloadError, match=rf"cannot download http://127\.0\.0\.1:9/x\.zip to {tmp_path}: .*save it as .*\.zip"
    ):
        download_ade20k(tmp_path, url="http://127.0.0.1:9/x.zip")
