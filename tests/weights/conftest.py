"""A cache and a web server for the tests of downloads."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from web_site import CONTENT, Site

from visionssm.weights import cache


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache, no proxies, mirrors or offline mode, and no waiting between attempts."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "VISIONSSM_MIRROR", "VISIONSSM_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(cache, "_BACKOFF_S", 0)


@pytest.fixture(scope="module")
def one_site():
    with Site() as site:
        yield site


@pytest.fixture
def site(one_site):
    one_site.pages.clear()
    one_site.requests.clear()
    return one_site


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub's function, which gives a file of its cache or raises; and the calls it got."""

    class Hub:
        file = tmp_path / "hub" / "snapshots" / "model.pth"
        error = None
        calls = ()

        def download(self, *args, **kwargs):
            self.calls = (*self.calls, (args, kwargs, are_progress_bars_disabled()))
            if self.error is not None:
                raise self.error
            return str(self.file)

    hub = Hub()
    blob = tmp_path / "hub" / "blobs" / "0123"
    for folder in (blob.parent, hub.file.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    hub.file.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub
