"""Downloads from a server that cuts connections, lies about lengths and serves error pages."""

import io
import socket
import ssl
import sys
import threading
from urllib.error import URLError
from urllib.request import Request

import pytest
import safetensors.torch
import torch
from web_site import CONTENT, OTHER, OTHER_SHA256, SHA256, Page, cached, complaint, unreachable

from visionssm.weights import cache, transfer
from visionssm.weights.cache import fetch

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.mark.parametrize("headers", [{"ETag": '"first"'}, {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT", "ETag": 'W/"weak"'}])
def test_cut_connection_is_resumed(site, headers):
    url = site.serve(Page(CONTENT, headers=headers, cuts=[300_000, 500_000]))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, "bytes=300000-", "bytes=800000-"]
    assert sum(seen.sent for seen in site.requests) == len(CONTENT)


def test_progress_renews_the_attempts(site):
    url = site.serve(Page(CONTENT, cuts=[100_000] * 10))
    assert fetch(url).read_bytes() == CONTENT
    assert len(site.requests) == 11


def test_next_call_resumes_what_an_earlier_one_left(site):
    page = Page(CONTENT, cuts=[600_000, 0, 0, 0, 0, 0])
    url = site.serve(page)
    message = unreachable(url)
    assert f"{url}: breaks off after 600000 of 1048576 bytes, at 4 attempts" in message
    assert cached("model.pth") == []
    page.cuts.clear()
    site.requests.clear()
    path = fetch(url)
    assert path.read_bytes() == CONTENT
    assert [(seen.range, seen.sent) for seen in site.requests] == [("bytes=600000-", 448_576)]
    assert cached() == [path, path.with_name("model.pth.sha256")]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_changed_file_is_not_mixed_with_the_old_part(site, heeds_if_range):
    url = site.serve(Page(OTHER, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    site.serve(Page(CONTENT, headers={"ETag": '"second"'}, heeds_if_range=heeds_if_range))
    assert fetch(url).read_bytes() == CONTENT


def test_file_that_shrank_starts_anew(site):
    url = site.serve(Page(OTHER, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    site.serve(Page(CONTENT[:500_000]))
    assert fetch(url).read_bytes() == CONTENT[:500_000]
    assert [seen.range for seen in site.requests[-2:]] == ["bytes=600000-", None]


def test_part_of_another_source_is_not_continued(site, monkeypatch):
    url = site.serve(Page(OTHER, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    site.serve(Page(CONTENT), "/mirror/v1/model.pth")
    monkeypatch.setenv("VISIONSSM_MIRROR", site.address + "/mirror")
    assert fetch(url).read_bytes() == CONTENT
    assert site.requests[-1].range is None


def test_short_pieces_are_asked_for_until_the_file_is_whole(site):
    url = site.serve(Page(CONTENT, cuts=[600_000], piece=200_000))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, "bytes=600000-", "bytes=800000-", "bytes=1000000-"]


def test_unstated_length_is_that_of_the_pieces(site):
    """The first answer, in chunks, breaks off without a length; the next ones state it."""
    url = site.serve(Page(b"%x\r\n" % len(CONTENT) + CONTENT, headers={"ETag": '"first"', "Transfer-Encoding": "chunked"}))
    site.pages["/v1/model.pth"].length = False
    site.pages["/v1/model.pth"].cuts = [600_000, 0, 0, 0]
    unreachable(url)
    (part,) = cached(".part")
    length = part.stat().st_size
    assert 0 < length < 600_000
    site.serve(Page(CONTENT, piece=200_000))
    assert fetch(url).read_bytes() == CONTENT
    assert site.requests[4].range == f"bytes={length}-"


@pytest.mark.parametrize(
    "range_headers",
    [
        {"ETag": None},
        {"ETag": '"second"'},
        {"ETag": 'W/"first"'},
        {"Content-Range": None},
        {"Content-Range": "bytes 600000-1048575/*"},
        {"Content-Range": "bytes 600000-1048575/1048577"},
        {"Content-Range": "bytes 600001-1048575/1048576"},
        {"Content-Range": "bytes 600000-1048576/1048576"},
        {"Content-Range": "bytes 600000-600049/1048576"},
        {"Content-Type": "multipart/byteranges; boundary=x", "Content-Range": None},
    ],
)
def test_piece_that_may_be_of_another_file_starts_anew(site, range_headers):
    url = site.serve(Page(CONTENT, cuts=[600_000], range_headers=range_headers))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, "bytes=600000-", None]


def test_piece_without_the_date_of_change_starts_anew(site):
    headers = {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT"}
    url = site.serve(Page(CONTENT, headers=headers, cuts=[600_000], range_headers={"Last-Modified": None}))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, "bytes=600000-", None]


def test_file_of_another_length_is_not_continued_under_the_same_tag(site):
    url = site.serve(Page(CONTENT, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    site.serve(Page(CONTENT + b"more"))
    assert fetch(url).read_bytes() == CONTENT + b"more"
    assert [seen.range for seen in site.requests[-2:]] == ["bytes=600000-", None]


def test_piece_longer_than_the_file_starts_anew(site):
    url = site.serve(Page(CONTENT, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    range_headers = {"Content-Range": "bytes 600000-1048575/1048576", "Content-Length": None}
    site.serve(Page(CONTENT + b"more", range_headers=range_headers))
    assert fetch(url).read_bytes() == CONTENT + b"more"
    assert [seen.range for seen in site.requests[-2:]] == ["bytes=600000-", None]


@pytest.mark.parametrize("headers", [{}, {"ETag": '"first"', "Content-Range": "bytes 0-1048575/1048576"}])
def test_piece_that_nobody_asked_for(site, headers):
    url = site.serve(Page(CONTENT, headers=headers, status=206))
    assert f"{url}: answers with a piece, asked for the whole file, at 4 attempts; " in unreachable(url)
    assert cached() == []


def test_server_without_ranges_starts_anew(site):
    url = site.serve(Page(CONTENT, ranges=False, cuts=[300_000]))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.sent for seen in site.requests] == [300_000, len(CONTENT)]


def test_server_without_versions_starts_anew(site):
    url = site.serve(Page(CONTENT, headers={}, cuts=[300_000]))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, None]


def test_body_shorter_than_stated(site):
    url = site.serve(Page(CONTENT, headers={"Content-Length": "2000000"}))
    assert "breaks off after 1048576 of 2000000 bytes, at 4 attempts" in unreachable(url)
    assert cached("model.pth") == []


def test_body_longer_than_stated(site):
    url = site.serve(Page(CONTENT, headers={"Content-Length": "1000"}))
    assert "offers 1000 bytes, expected 1048576" in complaint(url, size=len(CONTENT))
    assert len(site.requests) == 1
    assert cached() == []


def test_unstated_length(site):
    url = site.serve(Page(CONTENT, length=False))
    assert "states no length" in unreachable(url)
    assert "1048576 bytes, expected 5" in complaint(url, size=5)
    assert fetch(url, size=len(CONTENT)).read_bytes() == CONTENT
    cached("model.pth")[0].unlink()
    assert fetch(url).read_bytes() == CONTENT  # it has the recorded hash
    assert fetch(site.serve(Page(CONTENT, length=False), "/other.pth"), sha256=SHA256).read_bytes() == CONTENT


def test_chunks(site):
    frame = b"%x\r\n%s\r\n" % (len(CONTENT), CONTENT)
    url = site.serve(Page(frame, headers={"Transfer-Encoding": "chunked"}, length=False))
    assert "IncompleteRead" in unreachable(url)
    site.serve(Page(frame + b"0\r\n\r\n", headers={"Transfer-Encoding": "chunked"}, length=False))
    assert fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{"Content-Encoding": "gzip"}, {"Content-Length": "0"}])
def test_answers_that_are_no_file(site, headers):
    url = site.serve(Page(b"", headers=headers))
    assert f"{url}: " in unreachable(url)
    assert len(site.requests) == 1
    assert cached() == []


def test_wrong_hash_is_refused(site):
    url = site.serve(Page(OTHER))
    message = complaint(url, sha256=SHA256)
    assert f"{url}: sha256 {OTHER_SHA256}, expected {SHA256}" in message
    assert len(site.requests) == 1
    assert cached() == []


def test_wrong_hash_after_resuming_starts_anew(site):
    url = site.serve(Page(CONTENT, cuts=[600_000, 0, 0, 0]))
    unreachable(url)
    (part,) = cached(".part")
    part.write_bytes(OTHER[:600_000])
    assert fetch(url, sha256=SHA256).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests[-2:]] == ["bytes=600000-", None]


def test_wrong_hash_is_what_counts_however_often_the_connection_breaks(site):
    url = site.serve(Page(OTHER, cuts=[600_000, len(OTHER), 0, 0]))
    assert f"{url}: sha256 {OTHER_SHA256}, expected {SHA256}; " in complaint(url, sha256=SHA256)
    assert cached("model.pth") == []


@pytest.mark.parametrize(
    "page",
    [
        Page(b"sign in", headers={"Content-Type": "text/html; charset=utf-8"}),
        Page(b"\n<!DOCTYPE html><html>sign in</html>", headers={"Content-Type": "application/octet-stream"}),
        Page(b"<html>moved</html>"),
    ],
)
def test_html_page_is_refused(site, page):
    url = site.serve(page)
    assert f"{url}: answers with an HTML page instead of the file" in unreachable(url, size=len(CONTENT))
    assert len(site.requests) == 1
    assert cached() == []


@pytest.mark.parametrize("name", ["model.pth", "model.PTH.tar", "model.pt", "model.ckpt?download=1", "model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"error": "rate limit exceeded"}',
        b'{"err1":{"code": 429}}',
        b"Not Found",
        b"no",
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7\n",
        b"<!-- sign in --><!DOCTYPE html><html></html>",
    ],
)
def test_error_page_of_status_200_is_refused(site, name, content):
    url = site.serve(Page(content), f"/v1/{name}")
    message = unreachable(url)
    assert f"{url}: answers with something that begins with {content[:60]!r}, expected the " in message
    assert len(site.requests) == 1
    assert cached() == []


def test_a_server_that_calls_weights_text(site):
    """Some do so for every name they do not know; the content decides."""
    assert fetch(site.serve(Page(CONTENT, headers={"Content-Type": "text/plain; charset=utf-8"}))).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["config.json", "log.txt", "README.md", "weights"])
def test_files_of_other_names_may_be_text(site, name):
    content = b"<!-- a comment --> {}"
    page = Page(content, headers={"Content-Type": "text/plain"})
    assert fetch(site.serve(page, f"/v1/{name}")).read_bytes() == content


def test_safetensors(site):
    content = safetensors.torch.save({"weight": torch.zeros(3)})
    assert fetch(site.serve(Page(content), "/v1/model.safetensors")).read_bytes() == content
    message = unreachable(site.serve(Page(CONTENT), "/v1/other.safetensors"))
    assert "expected the header of a safetensors file" in message


def test_connection_that_breaks_in_the_first_bytes(site):
    url = site.serve(Page(CONTENT, cuts=[2, 5]))
    assert fetch(url).read_bytes() == CONTENT
    assert [seen.range for seen in site.requests] == [None, "bytes=2-", "bytes=7-"]


@pytest.mark.parametrize(("status", "words"), [(404, "Not Found"), (403, "Forbidden"), (401, "Unauthorized"), (410, "Gone")])
def test_statuses_that_stay(site, status, words):
    url = site.serve(Page(CONTENT, statuses=[status]))
    message = unreachable(url)
    assert f"{url}: HTTP Error {status}: {words}; " in message
    assert "VISIONSSM_MIRROR" in message
    assert len(site.requests) == 1


def test_statuses_that_pass(site):
    url = site.serve(Page(CONTENT, statuses=[500, 503, 429]))
    assert fetch(url).read_bytes() == CONTENT
    site.serve(Page(CONTENT, statuses=[502] * 9), "/down.pth")
    assert "HTTP Error 502: Bad Gateway, at 4 attempts" in unreachable(site.address + "/down.pth")


def test_waits_grow(site, monkeypatch):
    waits = []
    monkeypatch.setattr(cache, "_BACKOFF_S", 0.5)
    monkeypatch.setattr(cache.time, "sleep", waits.append)
    unreachable(site.serve(Page(CONTENT, statuses=[503] * 4)))
    assert waits == [0.5, 1.0, 2.0]


def test_silence_refusal_and_no_host(site, monkeypatch):
    monkeypatch.setattr(transfer, "_TIMEOUT_S", 0.05)
    gate = threading.Event()
    assert "no answer within 0.05 s, at 4 attempts" in unreachable(site.serve(Page(CONTENT, gate=gate)))
    gate.set()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "Connection refused" in unreachable(f"http://127.0.0.1:{unused.getsockname()[1]}/x.pth")

    def no_network(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert "no such host, or no network: Name or service not known" in unreachable("https://weights.invalid/x.pth")


def test_untrusted_certificate(monkeypatch):
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"

    class Opener:
        def open(self, *args, **kwargs):
            raise URLError(error)

    monkeypatch.setattr(transfer, "build_opener", lambda *handlers: Opener())
    assert "its certificate is not trusted: self-signed certificate; " in unreachable("https://weights.invalid/x.pth")


def test_redirects(site):
    site.serve(Page(CONTENT, cuts=[300_000]), "/storage/0123")
    url = site.serve(Page(redirect="/storage/0123"))
    path = fetch(url)
    assert (path.name, path.read_bytes()) == ("model.pth", CONTENT)
    assert [seen.range for seen in site.requests if seen.path == "/storage/0123"] == [None, "bytes=300000-"]
    assert "redirect" in unreachable(site.serve(Page(redirect="/loop.pth"), "/loop.pth"))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x.pth", "data:,x"])
def test_redirect_to_something_else(site, target):
    assert target in unreachable(site.serve(Page(redirect=target)))
    assert cached() == []


def test_redirect_to_less_security():
    redirects, body = transfer._Redirects(), io.BytesIO()
    with pytest.raises(transfer.Refused, match=r"redirects to http://b\.example/x, expected https"):
        redirects.redirect_request(Request("https://a.example/x"), body, 302, "Found", {}, "http://b.example/x")
    assert body.closed
    to_more = redirects.redirect_request(Request("http://a.example/x"), io.BytesIO(), 302, "Found", {}, "https://b.example/x")
    assert to_more.full_url == "https://b.example/x"


def test_proxy(site, monkeypatch):
    url = "http://weights.invalid/model.pth"
    site.pages[url] = Page(CONTENT)
    monkeypatch.setenv("http_proxy", site.address)
    assert fetch(url).read_bytes() == CONTENT


@pytest.mark.parametrize(("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)])
def test_progress_bar(site, monkeypatch, terminal, progress, shown):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    fetch(site.serve(Page(CONTENT)), progress=progress)
    assert ("model.pth: 100%" in stream.getvalue()) is shown
    assert shown or stream.getvalue() == ""
