"""Where files come from and end up: the cache and its records, offline mode, mirrors, the hub, the disk; several at once."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from web_site import CONTENT, OTHER, OTHER_SHA256, SHA256, Page, cached, complaint, unreachable

from visionssm.weights import transfer
from visionssm.weights.cache import fetch

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_download_is_cached_and_recorded(site, tmp_path):
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    assert path.read_bytes() == CONTENT
    assert path.name == "model.pth"
    assert tmp_path / "torch" / "hub" / "checkpoints" / "visionssm" in path.parents
    assert cached() == [path, path.with_name("model.pth.sha256")]
    assert path.with_name("model.pth.sha256").read_text() == f"{SHA256}  model.pth\n"
    assert fetch(url, sha256=SHA256.upper(), size=len(CONTENT)) == path
    assert len(site.requests) == 1


def test_equal_file_names_are_kept_apart(site):
    first = fetch(site.serve(Page(CONTENT), "/tiny/best.pth"))
    second = fetch(site.serve(Page(OTHER), "/small/best.pth?download=true"))
    assert (first.name, second.name) == ("best.pth", "best.pth")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, OTHER)


def test_another_cache(site, hub, tmp_path):
    path = fetch(site.serve(Page(CONTENT)), cache_dir=tmp_path / "mine")
    assert path.parents[2] == tmp_path / "mine"
    fetch("hf://owner/repository/model.pth", cache_dir=str(tmp_path / "mine"))
    assert hub.calls[-1][1]["cache_dir"] == tmp_path / "mine"
    assert len(list(tmp_path.glob("mine/visionssm/*/model.pth.sha256"))) == 2
    assert cached() == []


@pytest.mark.parametrize("name", ["..%2F..%2Fevil.pth", "%2e%2e", ".hidden", "a%00b.pth", "x" * 300 + ".pth", "%E5%9B%BE" * 99, ""])
def test_file_names_stay_in_the_cache(site, name):
    path = fetch(site.serve(Page(CONTENT), f"/v1/{name}"))
    assert path.parents[3] == Path(torch.hub.get_dir()).resolve().parent / "hub"
    assert path.resolve() == path


def test_advice_can_be_followed(site):
    """A file saved by hand where the message says is taken, and recorded."""
    url = site.address + "/missing.pth"
    place = Path(unreachable(url).rpartition("save the file by hand as ")[2])
    place.write_bytes(CONTENT)
    assert fetch(url) == place
    assert cached(".sha256")[0].read_text() == f"{SHA256}  missing.pth\n"


def test_change_of_the_cached_file_is_an_error(site):
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    times = path.stat()
    path.write_bytes(OTHER)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    message = complaint(url)
    assert message == (
        f"{path}: sha256 {OTHER_SHA256}, but on first use {SHA256}; "
        f"delete {path} and {path}.sha256 to have it downloaded and recorded anew"
    )
    assert complaint(url, sha256=SHA256) == (
        f"{path}: sha256 {OTHER_SHA256}, expected {SHA256}; delete {path} to have it downloaded again"
    )
    path.unlink()
    assert fetch(url).read_bytes() == CONTENT
    assert f"{path}: 1048576 bytes, expected 7" in complaint(url, size=7)


PAGE = b'{"error": "rate limit exceeded"}'


def test_error_page_saved_by_hand_is_not_recorded(site):
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    path.with_name("model.pth.sha256").unlink()
    path.write_bytes(PAGE)
    message = complaint(url)
    assert message.startswith(f"{path}: begins with {PAGE!r}, expected the zip archive")
    assert message.endswith(f"; delete {path} to have it downloaded again")
    assert cached() == [path]
    path.unlink()
    assert fetch(url).read_bytes() == CONTENT


def test_error_page_that_is_recorded(site):
    """As the cache of an earlier version may hold one: both files have to go."""
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    record = path.with_name("model.pth.sha256")
    path.write_bytes(PAGE)
    record.write_text(f"{hashlib.sha256(PAGE).hexdigest()}  model.pth\n")
    assert complaint(url).endswith(f"; delete {path} and {record} to have it downloaded and recorded anew")
    path.unlink()
    record.unlink()
    assert fetch(url).read_bytes() == CONTENT


def test_change_at_the_source_is_an_error(site):
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    path.unlink()
    site.serve(Page(OTHER, headers={"ETag": '"second"'}))
    message = complaint(url)
    assert message == f"{url}: sha256 {OTHER_SHA256}, but on first use {SHA256}; if the change is meant, delete {path}.sha256"
    assert not path.exists()
    path.with_name("model.pth.sha256").unlink()
    assert fetch(url).read_bytes() == OTHER


def test_known_hash_beats_the_record(site):
    url = site.serve(Page(CONTENT))
    record = fetch(url).with_name("model.pth.sha256")
    record.write_text(f"{OTHER_SHA256}  model.pth\n")
    complaint(url)
    fetch(url, sha256=SHA256)
    assert record.read_text() == f"{SHA256}  model.pth\n"
    fetch(url)


@pytest.mark.parametrize("variable", ["VISIONSSM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(site, monkeypatch, variable):
    url = site.serve(Page(CONTENT))
    monkeypatch.setenv(variable, "1")
    message = unreachable(url)
    assert message.startswith(f"{url}: not in the cache, and {variable} is set; ")
    assert site.requests == []
    monkeypatch.setenv(variable, "0")
    path = fetch(url)
    monkeypatch.setenv(variable, "1")
    assert fetch(url) == path


def test_mirror(site, monkeypatch):
    url = "https://weights.invalid/releases/%23v0/tiny.pth?raw=1"
    site.serve(Page(CONTENT), "/copy/releases/%23v0/tiny.pth?raw=1")
    monkeypatch.setenv("VISIONSSM_MIRROR", f"{site.address}/empty {site.address}/copy/")
    path = fetch(url)
    assert path.read_bytes() == CONTENT
    assert [seen.path for seen in site.requests] == [
        "/empty/releases/%23v0/tiny.pth?raw=1",
        "/copy/releases/%23v0/tiny.pth?raw=1",
    ]
    monkeypatch.delenv("VISIONSSM_MIRROR")
    assert fetch(url) == path


def test_origin_is_tried_after_the_mirrors(site, monkeypatch):
    url = site.serve(Page(CONTENT))
    monkeypatch.setenv("VISIONSSM_MIRROR", site.address + "/empty")
    assert fetch(url).read_bytes() == CONTENT
    missing = site.address + "/missing.pth"
    message = unreachable(missing)
    assert f"{site.address}/empty/missing.pth: HTTP Error 404: Not Found; {missing}: HTTP Error 404" in message
    monkeypatch.setenv("VISIONSSM_MIRROR", "/srv/mirror")
    assert complaint(missing).startswith("VISIONSSM_MIRROR: /srv/mirror: expected https://")


@pytest.mark.parametrize("place", ["/model.pth", "/mirror/model.pth"])
def test_wrong_file_at_any_source_is_no_mere_absence(site, monkeypatch, place):
    site.serve(Page(OTHER), place)
    monkeypatch.setenv("VISIONSSM_MIRROR", site.address + "/mirror")
    message = complaint(site.address + "/model.pth", sha256=SHA256)
    assert "HTTP Error 404" in message
    assert f"sha256 {OTHER_SHA256}, expected {SHA256}" in message


def test_local_files_stay_where_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "my weights"
    folder.mkdir()
    path = folder / "best.pth"
    path.write_bytes(CONTENT)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("VISIONSSM_OFFLINE", "1")
    for url in (path.as_uri(), path.as_uri().replace("file://", "file://localhost"), str(path), path):
        assert fetch(url, sha256=SHA256, size=len(CONTENT)) == path
    assert fetch("best.pth") == Path("best.pth")
    assert fetch("~/best.pth") == path
    assert complaint(path.as_uri(), sha256=OTHER_SHA256) == f"{path}: sha256 {SHA256}, expected {OTHER_SHA256}"
    assert complaint(str(path), size=1) == f"{path}: 1048576 bytes, expected 1"
    assert unreachable("worst.pth") == "worst.pth: no such file"
    assert complaint(str(folder)) == f"{folder}: a folder, expected a file"
    assert "names the host server" in complaint("file://server/share/best.pth")
    assert list(folder.iterdir()) == [path]
    assert cached() == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host.example/x.pth",
        "s3://bucket/x.pth",
        "https:///x.pth",
        "https://host.example:port/x.pth",
        "https://name:word@host.example/x.pth",
        "https://host.example/#v0/x.pth",
        "https://host.example/a b.pth",
        "https://host.example/ü.pth",
        "https://[::1/x.pth",
        "hf://owner/x.pth",
        "hf://owner/repository@/x.pth",
    ],
)
def test_malformed_urls(url):
    message = complaint(url)
    assert message.startswith(f"{url}: expected ")
    assert cached() == []


@pytest.mark.parametrize("sha256", ["", "abc", SHA256[:-1] + "g", SHA256 + "\n"])
def test_malformed_hash(sha256):
    assert "expected 64 hexadecimal digits" in complaint("https://host.example/x.pth", sha256=sha256)


def test_hub(hub):
    url = "hf://owner/repository@07c00e0/folder/model.pth"
    quiet = are_progress_bars_disabled()
    assert fetch(url, sha256=SHA256, size=len(CONTENT), progress=False) == hub.file
    assert are_progress_bars_disabled() is quiet
    fetch("hf://owner/repository@refs%2Fpr%2F1/model.pth")
    fetch("hf://owner/repository/model.pth")
    asked = [(*args, kwargs["revision"], kwargs["local_files_only"], disabled) for args, kwargs, disabled in hub.calls]
    assert asked == [
        ("owner/repository", "folder/model.pth", "07c00e0", False, True),
        ("owner/repository", "model.pth", "refs/pr/1", False, quiet),
        ("owner/repository", "model.pth", None, False, quiet),
    ]


def test_hub_files_are_checked_and_recorded(hub):
    url = "hf://owner/repository/model.pth"
    fetch(url)
    assert [path.name for path in cached()] == ["model.pth.sha256"]
    hub.file.write_bytes(OTHER)
    message = complaint(url)
    assert message.startswith(f"{hub.file.resolve()}: sha256 {OTHER_SHA256}, but on first use {SHA256}")
    assert f"expected {SHA256}" in complaint(url, sha256=SHA256)


def test_hub_files_begin_as_weights(hub):
    hub.file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    message = complaint("hf://owner/repository/model.pth")
    assert message.startswith(f"{hub.file.resolve()}: begins with b'version https://git-lfs")
    assert cached() == []


@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), TimeoutError("no answer"), huggingface_hub.errors.OfflineModeIsEnabled("off")]
)
def test_hub_that_cannot_be_asked(hub, error):
    hub.error = error
    assert str(error) in unreachable("hf://owner/repository/model.pth")


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), huggingface_hub.errors.HFValidationError("Repo id must be short")]
)
def test_other_errors_of_the_hub(hub, monkeypatch, error, offline):
    monkeypatch.setenv("VISIONSSM_OFFLINE", offline)
    hub.error = error
    assert str(error) in complaint("hf://owner/repository/model.pth")


def test_hub_errors(hub, monkeypatch):
    url = "hf://owner/repository/model.pth"
    hub.error = huggingface_hub.errors.LocalEntryNotFoundError("404 Client Error.\n\nRepository Not Found for url: somewhere.")
    assert unreachable(url).startswith(f"{url}: 404 Client Error. Repository Not Found for url: somewhere; ")
    monkeypatch.setenv("VISIONSSM_OFFLINE", "1")
    assert unreachable(url) == f"{url}: not in huggingface_hub's cache, and VISIONSSM_OFFLINE is set"
    assert hub.calls[-1][1]["local_files_only"] is True


def test_threads_share_one_download(site):
    gate = threading.Event()
    page = Page(CONTENT, gate=gate)
    url = site.serve(page)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert page.arrived.wait(10)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert paths[0].read_bytes() == CONTENT
    assert len(site.requests) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, so that the import is paid once")
def test_processes_share_one_download(site):
    """The process that downloads is killed half-way; one of those that wait goes on from there."""
    url = site.serve(Page(CONTENT, cuts=[400_000]))
    code = f"""
import os, time
from visionssm.weights import cache
pids = []
for _ in range(3):
    pids.append(os.fork())
    if not pids[-1]:
        if len(pids) == 1:
            cache.time.sleep = lambda seconds: os.kill(os.getpid(), 9)  # after its first, broken request
        path = cache.fetch({url!r})
        os._exit(path.stat().st_size != {len(CONTENT)})
    while len(pids) == 1 and not os.path.exists(cache._Entry({url!r}).beside(".lock")):
        time.sleep(0.01)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "-9 0 0\n", run.stderr
    assert [(seen.range, seen.sent) for seen in site.requests] == [(None, 400_000), ("bytes=400000-", 648_576)]
    assert fetch(url).read_bytes() == CONTENT


def test_full_disk(site, monkeypatch):
    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer.os, "fsync", no_room)
    message = complaint(site.serve(Page(CONTENT)))
    assert "No space left on device; " in message
    assert "TORCH_HOME" in message
    assert cached("model.pth") == []
    assert len(site.requests) == 1


def test_cache_that_cannot_be_a_folder(site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    message = complaint(site.serve(Page(CONTENT)))
    assert "Not a directory; " in message
    assert "TORCH_HOME" in message
    assert site.requests == []


def test_files_of_a_read_only_cache_are_used(site, caplog):
    url = site.serve(Page(CONTENT))
    path = fetch(url)
    record = path.with_name("model.pth.sha256")
    record.unlink()
    record.mkdir()  # cannot be written, whoever runs the test
    assert fetch(url) == path
    assert f"{record}: the hash of the first use cannot be recorded" in caplog.text
