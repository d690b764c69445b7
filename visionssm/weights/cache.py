"""Files of weights from the web, the Hugging Face hub or the disk: cached, resumed when cut off, and checked.

`fetch` is the only door. Where a file ends up:
    http, https: `torch.hub.get_dir()/checkpoints/visionssm/<start of the URL's hash>/<the URL's file name>`. TORCH_HOME and
        `torch.hub.set_dir` move it. Beside the file lie `.sha256`, the hash of its first use in the form of `sha256sum -c`;
        `.lock`, held by the process that downloads; and, of a broken download, `.part` and `.part.json`. A file saved there by
        hand counts.
    hf://owner/repository[@revision]/file: huggingface_hub's cache, under its own rules; the hash of the first use is recorded in
        the folder above.
    file:// URLs and paths: the file itself. Nothing is copied, and nothing recorded beside it.

A hash that is not known in advance is recorded on first use, and any later difference is an error. So that this holds, a file is
hashed whenever it is fetched: under a second for the largest checkpoints, less than reading them takes. A file from the web or the
hub whose name ends as one of weights must begin as one, so that no error page is ever recorded.

Environment variables:
    VISIONSSM_OFFLINE, HF_HUB_OFFLINE: 1 uses the cache alone.
    VISIONSSM_MIRROR: base URLs, separated by spaces, each of which stands for the `https://host` of http and https URLs. They are
        tried in order, and the origin last. The place in the cache is that of the origin.
    HTTP_PROXY, HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE: as for Python's urllib.
    HF_HOME, HF_ENDPOINT, HF_TOKEN and huggingface_hub's others: for hf:// URLs.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

import huggingface_hub
import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from visionssm.errors import UserError, first_line

from .transfer import Interrupted, Refused, Unexpected, discard, transfer, unlike_weights

_ATTEMPTS = 4  # in a row that bring the download no further
_BACKOFF_S = 0.5  # before the second attempt; doubled before each later one
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB_URL = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?/(?P<file>[^?#]+)")
_logger = logging.getLogger(__name__)


class DownloadError(UserError):
    """A file that cannot be had, or is not the one expected; the message is one line that names it and says what to do."""


class UnreachableError(DownloadError):
    """No source has the file, or none can be asked: there is no network, or it is not to be used. Another address may have it."""


class _Changed(Unexpected):
    """The hash differs from that of the first use."""


@dataclass(frozen=True)
class _Entry:
    """What is known of a file in advance, and its place in the cache."""

    url: str
    sha256: str | None = None
    size: int | None = None
    cache_dir: Path | None = None

    @property
    def file(self) -> Path:
        """The file of the cache; there only when it is whole."""
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", unquote(urlsplit(self.url).path).rpartition("/")[2])[-128:].lstrip(".")
        folder = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        cache = self.cache_dir or Path(torch.hub.get_dir(), "checkpoints")
        return cache / "visionssm" / folder / (name or "file")

    def beside(self, suffix: str) -> Path:
        """Another file of the same place."""
        return self.file.with_name(self.file.name + suffix)

    @property
    def part(self) -> Path:
        """What a broken download has brought."""
        return self.beside(".part")

    @property
    def record(self) -> Path:
        """The hash of the first use."""
        return self.beside(".sha256")

    @property
    def is_hashed(self) -> bool:
        """Whether there is a hash to compare with."""
        return self.sha256 is not None or self.record.is_file()


def fetch(
    url: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The local path of a file, which is downloaded unless it is there.

    Args:
        url: http://, https://, hf://owner/repository[@revision]/file, file:// or a path.
        sha256: the file's hash, 64 hexadecimal digits. None takes the hash recorded on first use, if any; for files of one's own
            disk, none.
        size: the file's length in bytes; None if unknown.
        progress: a progress bar on stderr, where that is a terminal.
        cache_dir: stands for `torch.hub.get_dir()/checkpoints`, and for huggingface_hub's cache.

    Raises:
        UnreachableError: no source has the file, or it is not in the cache while offline.
        DownloadError: a malformed argument; a file that differs from the size, the hash or the record, also where only some of the
            sources have such a one; a cache folder that is full or not writable.
    """
    url = os.fspath(url)
    if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
        raise DownloadError(f"sha256: got {sha256!r}, expected 64 hexadecimal digits")
    entry = _Entry(url, sha256, size, Path(cache_dir).expanduser() if cache_dir else None)
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() == "file":
        return _local(entry)
    if scheme.lower() == "hf":
        return _from_hub(entry, progress)
    if scheme.lower() in ("http", "https"):
        return _from_web(entry, progress)
    raise DownloadError(f"{url}: expected http://, https://, hf://, file:// or a path")


def _local(entry: _Entry) -> Path:
    path = Path(entry.url).expanduser()
    if "://" in entry.url:
        parts = urlsplit(entry.url)
        if parts.netloc not in ("", "localhost"):
            raise DownloadError(f"{entry.url}: names the host {parts.netloc}, expected file:///folder/file")
        path = Path(url2pathname(parts.path))
    try:
        if path.is_dir():
            raise DownloadError(f"{path}: a folder, expected a file")
        if not path.is_file():
            raise UnreachableError(f"{path}: no such file")
        _check(path, entry, None)
    except Unexpected as error:
        raise DownloadError(f"{path}: {error}") from error
    except OSError as error:
        raise DownloadError(f"{path}: cannot be read: {error.strerror}") from error
    return path


def _from_hub(entry: _Entry, progress: bool) -> Path:
    match = _HUB_URL.fullmatch(entry.url)
    if match is None:
        raise DownloadError(f"{entry.url}: expected hf://owner/repository@revision/file, or without @revision")
    offline = _offline()
    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        revision = unquote(match["revision"]) if match["revision"] else None
        path = huggingface_hub.hf_hub_download(
            match["repo"],
            match["file"],
            revision=revision,
            cache_dir=entry.cache_dir,
            local_files_only=bool(offline),
        )
    except Exception as error:  # its HTTP library, and with it the errors, differ between its versions
        kind = UnreachableError if _is_of_the_network(error) else DownloadError
        if offline and kind is UnreachableError:
            raise kind(f"{entry.url}: not in huggingface_hub's cache, and {offline} is set") from error
        raise kind(
            f"{entry.url}: {' '.join(str(error).split()).rstrip('.') or type(error).__name__}; "
            "if the hub cannot be reached, name a mirror in HF_ENDPOINT or download the file by hand and give its path"
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
    _check_cached(Path(path).resolve(), entry)  # the blob itself: its link would come back with the same content
    return Path(path)


def _is_of_the_network(error: Exception) -> bool:
    """Whether the hub has no such file or cannot be asked, rather than that the disk is full or the name malformed."""
    kinds = (HfHubHTTPError, EntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _from_web(entry: _Entry, progress: bool) -> Path:
    _check_url(entry.url)
    if not _is_cached(entry):
        if offline := _offline():
            raise UnreachableError(
                f"{entry.url}: not in the cache, and {offline} is set; unset it, or save the file by hand as {entry.file}"
            )
        with _locked(entry):
            if not _is_cached(entry):  # another process may have brought it
                _download(entry, progress)
                return entry.file
    _check_cached(entry.file, entry)
    return entry.file


def _is_cached(entry: _Entry) -> bool:
    with _disk(entry.file):
        return entry.file.is_file()


def _check_url(url: str, name: str = "") -> None:
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        plain = False
    if not plain or not re.fullmatch(r'[!"$-~]+', url):
        raise DownloadError(f"{name}{url}: expected https://host/folder/file without a user name, # and space written %23 and %20")


def _offline() -> str | None:
    """The environment variable that forbids the network, if one does."""
    names = ("VISIONSSM_OFFLINE", "HF_HUB_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").lower() in ("1", "on", "yes", "true")), None)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Errors of the disk, in a line."""
    try:
        yield
    except OSError as error:
        advice = "see to its permissions and the room on its disk, or name another cache folder in TORCH_HOME"
        raise DownloadError(f"{path}: {error.strerror or first_line(error)}; {advice}") from error


@contextmanager
def _locked(entry: _Entry) -> Iterator[None]:
    """Keep other processes and threads away from the download of the same file."""
    lock = FileLock(entry.beside(".lock"))
    with _disk(entry.file.parent):
        entry.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _logger.warning("%s: waiting for another process that downloads it", entry.url)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_cached(file: Path, entry: _Entry) -> None:
    try:
        with _disk(file):
            _check(file, entry, entry.record)
    except Unexpected as error:
        remedy = f"delete {file} to have it downloaded again"
        if entry.sha256 is None and entry.record.is_file():
            remedy = f"delete {file} and {entry.record} to have it downloaded and recorded anew"
        raise DownloadError(f"{file}: {error}; {remedy}") from error


def _check(file: Path, entry: _Entry, record: Path | None) -> None:
    """Raise Unexpected unless it is the file; where there is a place for it, record its hash."""
    length = file.stat().st_size
    if entry.size not in (None, length):
        raise Unexpected(f"{length} bytes, expected {entry.size}")
    if record is not None and (fault := unlike_weights(entry.file.name, _beginning(file))):
        raise Unexpected(fault)
    if entry.sha256 is None and record is None:
        return
    digest = sha256_of(file)
    if entry.sha256 not in (None, digest):
        raise Unexpected(f"sha256 {digest}, expected {entry.sha256}")
    if record is None:
        return
    recorded = record.read_text(encoding="utf-8", errors="replace").split()[:1] if record.is_file() else []
    if recorded and entry.sha256 is None and recorded != [digest]:
        raise _Changed(f"sha256 {digest}, but on first use {recorded[0]}")
    if recorded != [digest]:
        _note_hash(record, digest, entry.file.name)


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(64)


def _note_hash(record: Path, digest: str, name: str) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{digest}  {name}\n", encoding="utf-8")
    except OSError as error:  # the files of a cache that others keep, read-only, can be used
        _logger.warning("%s: the hash of the first use cannot be recorded: %s", record, error.strerror)


def sha256_of(file: Path) -> str:
    """SHA-256 of the content of a file, hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(entry: _Entry, progress: bool) -> None:
    """Bring the file from the first source that has it to its place in the cache."""
    failures: dict[str, Refused] = {}
    for source in _sources(entry.url):
        try:
            _download_from(source, entry, progress)
        except Refused as error:
            failures[source] = error
            continue
        with _disk(entry.file):
            entry.part.replace(entry.file)
            discard(entry.part)
        return
    advice = f"if that lasts, name a mirror in VISIONSSM_MIRROR or save the file by hand as {entry.file}"
    if any(isinstance(error, _Changed) for error in failures.values()):
        advice = f"if the change is meant, delete {entry.record}"
    kind = DownloadError if any(isinstance(error, Unexpected) for error in failures.values()) else UnreachableError
    raise kind(f"{'; '.join(f'{source}: {error}' for source, error in failures.items())}; {advice}")


def _sources(url: str) -> list[str]:
    """The same file on each mirror, and at its origin."""
    mirrors = os.environ.get("VISIONSSM_MIRROR", "").split()
    for mirror in mirrors:
        _check_url(mirror, "VISIONSSM_MIRROR: ")
    parts = urlsplit(url)
    rest = urlunsplit(("", "", parts.path.lstrip("/"), parts.query, ""))
    return [*(f"{mirror.rstrip('/')}/{rest}" for mirror in mirrors), url]


def _download_from(source: str, entry: _Entry, progress: bool) -> None:
    """Ask until the part is the whole file, and check it."""
    failures = longest = 0
    mismatch = None
    while True:
        try:
            with _disk(entry.part):
                resumed = transfer(source, entry.part, size=entry.size, hashed=entry.is_hashed, progress=progress)
                try:
                    _check(entry.part, entry, entry.record)
                except Unexpected as error:
                    discard(entry.part)
                    if not resumed:
                        raise
                    mismatch = error
                    raise Interrupted(str(error)) from error  # the earlier part may be to blame
            return
        except Interrupted as error:
            length = entry.part.stat().st_size if entry.part.is_file() else 0
            failures = 1 if length > longest else failures + 1
            longest = max(longest, length)
            if failures == _ATTEMPTS:
                raise mismatch or Refused(f"{error}, at {_ATTEMPTS} attempts") from error
            _logger.info("%s: %s; asking again", source, error)
            time.sleep(_BACKOFF_S * 2 ** (failures - 1))
