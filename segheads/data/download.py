"""Fetch the ADE20K archive: resumable, verified, unpacked in one piece."""

import hashlib
import os
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from segheads.errors import DownloadError

FOLDER = "ADEChallengeData2016"
URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
# As gluon-cv and Segmenter list it for this file; the publisher gives none.
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
MOST_FILES, MOST_BYTES = 200_000, 20 * 10**9
ENCRYPTED = 1  # a flag of a member
_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def download_ade20k(root: str | os.PathLike[str], *, url: str = URL, sha1: str | None = SHA1) -> Path:
    """Download and unpack ADEChallengeData2016 (0.9 GB) below a folder, unless it is there.

    An interrupted download goes on where it stopped when called again. The archive is unpacked beside its destination
    and moved there when complete, so the data set is either whole or absent.

    Args:
        root: The folder that will hold `ADEChallengeData2016`.
        url: Where the archive is.
        sha1: Its checksum in hexadecimal; None accepts any archive.

    Returns:
        The folder `root/ADEChallengeData2016`.

    Raises:
        DownloadError: The server cannot be reached or breaks off, or the archive is not the expected or not a safe one.
    """
    root = Path(root)
    folder, archive = root / FOLDER, root / f"{FOLDER}.zip"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        part = archive.with_suffix(".zip.part")
        try:
            _fetch(url, part)
        except (OSError, HTTPException) as error:
            raise DownloadError(
                f"cannot download {url} to {root}: {error}; call again to go on where it stopped, or fetch the file by "
                f"other means and save it as {archive}"
            ) from error
        os.replace(part, archive)
    _verify(archive, sha1)
    _unpack(archive, folder)
    archive.unlink()
    return folder


def _fetch(url: str, part: Path) -> None:
    """Append what is missing to `part`; its ETag, kept beside it, tells a file that changed on the server."""
    tag_file = part.with_suffix(".tag")
    tag = tag_file.read_text(encoding="utf-8") if part.is_file() and tag_file.is_file() else ""
    have = part.stat().st_size if tag else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "If-Range": tag} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if not have or error.code != 416:  # 416: the part is as long as the file or longer
            raise
        return _restart(url, part)
    with response:
        if response.status == 206 and not _continues(response, have, tag):
            return _restart(url, part)
        _save(response, part, tag_file, have if response.status == 206 else 0)
    return None


def _restart(url: str, part: Path) -> None:
    part.unlink()
    _fetch(url, part)


def _identity(response: HTTPResponse, size: int) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or f'"size-{size}"'


def _continues(response: HTTPResponse, have: int, tag: str) -> bool:
    span, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    return span.startswith(f"{have}-") and size.isdigit() and _identity(response, int(size)) == tag


def _save(response: HTTPResponse, part: Path, tag_file: Path, have: int) -> None:
    from tqdm import tqdm  # for those who download alone

    length = response.headers.get("Content-Length")
    size = have + int(length) if length else None
    if not have:
        part.unlink(missing_ok=True)
        tag_file.write_text(_identity(response, size or 0), encoding="utf-8")
    with (
        open(part, "ab") as file,
        tqdm(total=size, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem) as progress,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            progress.update(len(chunk))
    if size is not None and part.stat().st_size != size:
        raise DownloadError(f"the connection broke off after {part.stat().st_size} of {size} bytes")
    tag_file.unlink()


def _verify(archive: Path, sha1: str | None) -> None:
    if sha1 is None:
        return
    digest = hashlib.sha1(usedforsecurity=False)
    with open(archive, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if (found := digest.hexdigest()) != sha1:
        archive.unlink()
        raise DownloadError(
            f"{archive} has the SHA-1 checksum {found}, not {sha1}, and was deleted; call again to download it anew"
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack beside `folder`, then rename, so that a kill leaves nothing that looks complete."""
    from tqdm import tqdm

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as contents:
            members = contents.infolist()
            size = sum(member.file_size for member in members)
            if len(members) > MOST_FILES or size > MOST_BYTES:
                raise DownloadError(
                    f"{archive} holds {len(members)} files of {size} bytes in all, and {MOST_FILES} files of "
                    f"{MOST_BYTES} bytes are the most; delete it and give the url of the right archive"
                )
            for member in members:
                _check_member(member, archive)
            for member in tqdm(members, desc=f"unpack {archive.name}", unit="file"):
                contents.extract(member, unfinished)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(f"{archive} is not a whole zip archive: {error}; delete it and call again") from error
    if not (unfinished / folder.name).is_dir():
        raise DownloadError(f"{archive} holds no folder {folder.name}; delete it and give the url of the right archive")
    os.replace(unfinished / folder.name, folder)
    shutil.rmtree(unfinished)


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    if member.flag_bits & ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DownloadError(
            f"{archive}: {member.filename!r} is encrypted, or compressed in another way than by deflate; nothing was "
            "unpacked. Delete it and give the url of the right archive"
        )
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1]) or is_link:
        raise DownloadError(
            f"{archive} holds {member.filename!r}, which leads out of the folder; nothing was unpacked, "
            "so delete the archive"
        )
