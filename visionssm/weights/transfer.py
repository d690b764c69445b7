"""One HTTP request for a file, or for what an earlier one left out of it.

The file grows in a part, beside which `.json` names its source and version. Whatever goes wrong on the network is `Refused` or
`Interrupted`; an OSError is one of the disk.
"""

import json
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from visionssm._version import __version__
from visionssm.errors import first_line

_TIMEOUT_S = 15.0  # of silence
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt
_HTML = (b"<!doctype", b"<html")


class Refused(Exception):
    """The source does not have the file; asking it again is of no use."""


class Interrupted(Exception):
    """The request came to nothing, or not to its end; another one goes on from there."""


def transfer(source: str, part: Path, *, size: int | None, hashed: bool, progress: bool) -> bool:
    """Append to the part what it lacks of the file, which is whole on return.

    A part is continued only if the server confirms, by strong ETag or date of change, that it still has the version that the part
    began with; otherwise the file is brought anew.

    Args:
        source: an http or https URL.
        part: where the file grows; what an interrupted call left there is continued.
        size: the file's length, if known.
        hashed: the caller checks a hash, so that a length which nobody states is no harm.
        progress: a progress bar on stderr, where that is a terminal.

    Returns:
        Whether an earlier part was continued.

    Raises:
        Refused: the source does not have the file: a status such as 404, an HTML page, another length, a redirect to http.
        Interrupted: no connection, a status such as 503, a body that breaks off; the part holds what came.
        OSError: the part cannot be written.
    """
    version = _version_of(part, source)
    offset = part.stat().st_size if version else 0
    request = Request(source, headers={"User-Agent": f"visionssm/{__version__}"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", version)
    with _open(request, part) as response:
        if response.status != 206:
            offset = 0
        elif not _continues(response, offset, version):
            part.unlink()
            raise Interrupted("answers with a piece of another file")
        whole = None if response.length is None else offset + response.length
        head = _read(response.read, 512)
        if not offset:
            _check_content(response, head, whole, size, hashed)
            _note_version(part, source, response)
        bar = tqdm(
            desc=part.stem,
            total=whole,
            initial=offset,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None if progress else True,  # None: on terminals only
        )
        with bar, part.open("ab" if offset else "wb") as file:
            chunk = head
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = _read(response.read1, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
    length = part.stat().st_size
    if whole not in (None, length):
        raise Interrupted(f"breaks off after {length} of {whole} bytes")
    return offset > 0


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but not from https to less."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("https", req.type) or scheme not in ("https", "http"):
            fp.close()
            raise Refused(f"redirects to {newurl}, expected https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: Request, part: Path) -> HTTPResponse:
    with _network_errors():
        try:
            return build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
        except HTTPError as error:
            error.close()
            if error.code == 416 and part.exists():  # the part is not the beginning of the file
                part.unlink()
                raise Interrupted(first_line(error)) from error
            raise (Interrupted if error.code in _PASSING else Refused)(first_line(error)) from error


def _read(read: Callable[[int], bytes], length: int) -> bytes:
    with _network_errors():
        return read(length)


@contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Refused(f"its certificate is not trusted: {reason.verify_message}") from error
        if isinstance(reason, socket.gaierror):
            raise Interrupted(f"no such host, or no network: {reason.strerror}") from error
        if isinstance(reason, TimeoutError):
            raise Interrupted(f"no answer within {_TIMEOUT_S:g} s") from error
        raise Interrupted(getattr(reason, "strerror", None) or first_line(reason)) from error
    except ValueError as error:  # a proxy or a redirect that is no URL
        raise Refused(first_line(error)) from error


def _continues(response: HTTPResponse, offset: int, version: str | None) -> bool:
    """Whether a partial answer begins where the part ends, and is of the same version."""
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return offset > 0 and start is not None and int(start[1]) == offset and _version(response) in (None, version)


def _check_content(response: HTTPResponse, head: bytes, whole: int | None, size: int | None, hashed: bool) -> None:
    """Refuse what cannot be the file, before anything is written."""
    if response.headers.get_content_type() == "text/html" or head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        raise Refused("answers with an HTML page instead of the file; open it in a browser to see why")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(f"answers in the encoding {encoding}, expected the plain file")
    if whole is not None and whole != (size or whole):
        raise Refused(f"offers {whole} bytes, expected {size}")
    if not head and whole == 0:
        raise Refused("offers an empty file")
    if whole is None and not response.chunked and size is None and not hashed:
        raise Refused("states no length, so that a whole file looks like a broken one; give its size or sha256")


def _version(response: HTTPResponse) -> str | None:
    """How the server tells versions of a file apart: the strong ETag, or else the date of change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note_version(part: Path, source: str, response: HTTPResponse) -> None:
    part.unlink(missing_ok=True)  # no part is ever beside the version of another
    _state(part).write_text(json.dumps({"source": source, "version": _version(response)}), encoding="utf-8")


def _version_of(part: Path, source: str) -> str | None:
    """The version of the file that the part is of; None if there is nothing to continue from this source."""
    try:
        state = json.loads(_state(part).read_text(encoding="utf-8"))
        return state["version"] if state["source"] == source and part.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def discard(part: Path) -> None:
    """Remove a part and what is noted of it."""
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)
