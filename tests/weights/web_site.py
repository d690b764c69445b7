"""A web server on this machine whose pages misbehave as told, and what tests of downloads ask of the result."""

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from visionssm.errors import UserError
from visionssm.weights import DownloadError, UnreachableError, fetch

_ARCHIVE = b"PK\x03\x04"
CONTENT = _ARCHIVE + bytes(range(4, 256)) + bytes(range(256)) * 4095  # 1 MiB
OTHER = _ARCHIVE + bytes(reversed(CONTENT[4:]))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER_SHA256 = hashlib.sha256(OTHER).hexdigest()


@dataclass
class Page:
    """How one address answers.

    Attributes:
        content: the file.
        headers: of every answer with content, besides Content-Length; a Content-Length here is the one stated.
        ranges: whether a request for a range is honoured, if `If-Range` names the page's strong ETag or date.
        heeds_if_range: False honours it in any case.
        piece: how many bytes at most the answer to such a request holds.
        range_headers: what differs in the headers of that answer; None leaves one out.
        status: of every other answer with content.
        cuts: after how many bytes of the body the connection breaks: at the first request, the second and so on.
        statuses: errors that the first requests get.
        length: whether the length is stated.
        redirect: where the file is instead.
        gate: wait for it before answering.
        arrived: set by the first request.
    """

    content: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"first"'})
    ranges: bool = True
    heeds_if_range: bool = True
    piece: int | None = None
    range_headers: dict[str, str | None] = field(default_factory=dict)
    status: int = 200
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    redirect: str | None = None
    length: bool = True
    gate: threading.Event | None = None
    arrived: threading.Event = field(default_factory=threading.Event)


@dataclass
class Seen:
    """A request as the server saw it."""

    path: str
    range: str | None
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        seen = Seen(self.path, self.headers["Range"])
        self.server.requests.append(seen)
        page = self.server.pages.get(self.path)
        if page is None:
            return self.send_error(404)
        page.arrived.set()
        if page.gate is not None:
            page.gate.wait(10)
        if page.statuses:
            return self.send_error(page.statuses.pop(0))
        if page.redirect is not None:
            self.send_response(302)
            self.send_header("Location", page.redirect)
            return self.end_headers()
        start = self.range_start(page, seen)
        if start >= len(page.content) > 0:
            return self.send_error(416)
        body = page.content[start:][: page.piece if start else None]
        self.send_response(206 if start else page.status)
        headers = dict(page.headers)
        if page.length:
            headers.setdefault("Content-Length", str(len(body)))
        if start:
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(page.content)}"
            headers.update(page.range_headers)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = body[: page.cuts.pop(0)] if page.cuts else body
        seen.sent = len(body)
        self.wfile.write(body)

    def range_start(self, page, seen):
        version = self.headers["If-Range"] or ""
        is_known = version in page.headers.values() and not version.startswith("W/")
        if not (page.ranges and seen.range and (is_known or not page.heeds_if_range)):
            return 0
        return int(seen.range.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, format, *args):
        pass


class Site(ThreadingHTTPServer):
    """`pages` by path; `requests` are those seen so far."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[Seen] = []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address):
        """A client that hangs up is no failure of the test."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def serve(self, page, path="/v1/model.pth"):
        """Put a page up; returns its URL."""
        self.pages[path] = page
        return self.address + path


def complaint(url, **kwargs):
    """The message of the error, which is one line, where there is a file but not the right one, or something else is wrong."""
    return _complaint(DownloadError, url, kwargs)


def unreachable(url, **kwargs):
    """The same where the file cannot be had."""
    return _complaint(UnreachableError, url, kwargs)


def _complaint(kind, url, kwargs):
    with pytest.raises(UserError) as caught:
        fetch(url, **kwargs)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def cached(suffix=""):
    """The files of the cache of that ending, besides locks."""
    files = [path for path in Path(torch.hub.get_dir()).rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(path for path in files if path.name.endswith(suffix))
