"""One HTTP request for a file, or for what an earlier one left out of it.

The file grows in a part, beside which `.json` names its source, version and length. Whatever goes wrong on the network is `Refused`
or `Interrupted`; an OSError is one of the disk.
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
from typing import IO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from visionssm._version import __version__
from visionssm.errors import first_line

_TIMEOUT_S = 15.0  # of silence
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt
_HEAD = 512  # bytes that are looked at before anything is written
_HTML = (b"<!doctype", b"<html")
_WEIGHTS = (".pth", ".pth.tar", ".pt", ".ckpt", ".safetensors")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit


class Refused(Exception):
    """The source does not have the file; asking it again is of no use."""


class Unexpected(Refused):
    """It has a file of that name that is not the one expected."""


class Interrupted(Exception):
    """The request came to nothing, or not to its end; another one goes on from there."""


class _Noted(NamedTuple):
    """What the first answer said of the file that a part is the beginning of; its length is None if unstated."""

    version: str
    length: int | None


def transfer(source: str, part: Path, *, size: int | None, hashed: bool, progress: bool) -> bool:
    """Append to the part what it lacks of the file, which is whole on return.

    A part is continued only if the answer names the version, by strong ETag or date of change, and the length that the part began
    with; otherwise the file is brought anew. An answer that names neither proves nothing: RFC 9110, section 15.3.7, demands the
    ETag of it, and to bring the file anew from the few servers that then omit the date is the lesser harm.

    Args:
        source: an http or https URL.
        part: where the file grows; what an interrupted call left there is continued.
        size: the file's length, if known.
        hashed: the caller checks a hash, so that a length which nobody states is no harm.
        progress: a progress bar on stderr, where that is a terminal.

    Returns:
        Whether an earlier part was continued.

    Raises:
        Refused: the source does not have the file: a status such as 404, an error page, a redirect to http.
        Unexpected: it has one of another length.
        Interrupted: no connection, a status such as 503, a body that breaks off; the part holds what came.
        OSError: the part cannot be written.
    """
    noted = _noted(part, source)
    offset = part.stat().st_size if noted else 0
    request = Request(source, headers={"User-Agent": f"visionssm/{__version__}"})
    if noted:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", noted.version)
    with _open(request, part) as response:
        if response.status == 206:
            whole = _whole(response, offset, noted, size)
            if whole is None:
                discard(part)
                raise Interrupted(
                    "answers with a piece of another file" if noted else "answers with a piece, asked for the whole file"
                )
        else:
            offset = 0
            whole = response.length
        head = _read(response.read, _HEAD)
        if not offset:
            _check_content(response, head, part.stem, whole, size, hashed)
            _note(part, source, response, whole)
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
        if length > whole:
            discard(part)
        raise Interrupted(f"{'goes on' if length > whole else 'breaks off'} after {min(length, whole)} of {whole} bytes")
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
                discard(part)
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


def _whole(response: HTTPResponse, offset: int, noted: _Noted | None, size: int | None) -> int | None:
    """The length of the whole file of which a partial answer continues the part; None if it does not, for all that it says."""
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
    if noted is None or stated is None or _version(response) != noted.version:
        return None
    start, last, whole = map(int, stated.groups())
    is_next = start == offset <= last < whole and response.length in (None, last + 1 - start)
    return whole if is_next and whole == (noted.length or size or whole) else None


def _check_content(response: HTTPResponse, head: bytes, name: str, whole: int | None, size: int | None, hashed: bool) -> None:
    """Refuse what cannot be the file, before anything is written."""
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "text/html" or head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        raise Refused("answers with an HTML page instead of the file; open it in a browser to see why")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(f"answers in the encoding {encoding}, expected the plain file")
    if not head and whole == 0:
        raise Refused("offers an empty file")
    if len(head) >= min(_HEAD, whole or 0) and (fault := unlike_weights(name, head)):  # not for a head that is cut off
        raise Refused(f"answers with {kind or 'something'} that {fault}")
    if whole is not None and whole != (size or whole):
        raise Unexpected(f"offers {whole} bytes, expected {size}")
    if whole is None and not response.chunked and size is None and not hashed:
        raise Refused("states no length, so that a whole file looks like a broken one; give its size or sha256")


def _is_weights(name: str) -> bool:
    """Whether a file's name promises weights."""
    return name.lower().endswith(_WEIGHTS)


def unlike_weights(name: str, head: bytes) -> str | None:
    """What shows that a file is none of weights, such as the error pages that servers give the status 200.

    Args:
        name: the file's name; one without an ending of weights promises nothing.
        head: its first 9 bytes or more, or all of it.

    Returns:
        The end of a sentence; None if the file can be what its name says.
    """
    if not _is_weights(name):
        return None
    if name.lower().endswith(".safetensors"):
        is_like = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER
        expected = "the header of a safetensors file"
    else:
        is_like = head.startswith(b"PK\x03\x04")
        expected = "the zip archive that torch.save writes since PyTorch 1.6"
    return None if is_like else f"begins with {head[:60]!r}, expected {expected}"


def _version(response: HTTPResponse) -> str | None:
    """How the server tells versions of a file apart: the strong ETag, or else the date of change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note(part: Path, source: str, response: HTTPResponse, whole: int | None) -> None:
    part.unlink(missing_ok=True)  # no part is ever beside the version of another
    noted = {"source": source, "version": _version(response), "length": whole}
    _state(part).write_text(json.dumps(noted), encoding="utf-8")


def _noted(part: Path, source: str) -> _Noted | None:
    """What is noted of the file that the part is of; None if there is nothing to continue from this source."""
    try:
        state = json.loads(_state(part).read_text(encoding="utf-8"))
        is_continued = state["source"] == source and state["version"] and part.stat().st_size
        return _Noted(state["version"], state["length"]) if is_continued else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def discard(part: Path) -> None:
    """Remove a part and what is noted of it."""
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)
