"""From a published file's exact layout, over the table and timm, to logits equal to the published ones."""

import functools
import http.server
import threading
import warnings
from pathlib import Path

import pytest
import timm
import torch

import visionssm
from parity import check_logits, images, load_golden, published_weights
from visionssm.errors import UserError
from visionssm.weights import DownloadError, UnreachableError, checkpoints, download, find, load_weights, loading, read_checkpoint

pytest.importorskip("mmengine")
pytest.importorskip("yacs")

import layouts

CASES = {
    "vmamba_tiny_s1l8": layouts.vmamba,
    "vanilla_vmamba_tiny": functools.partial(layouts.vmamba, golden="vanilla_vmamba_tiny_published_keys"),
    "vim_tiny_patch16_224": layouts.vim,
    "vim_tiny_patch16_stride8_224": layouts.vim,
    "local_vim_tiny": layouts.local_mamba,
    "local_vim_tiny_midclstok": layouts.local_mamba,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function from a model's name to a file of its published layout, written once."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def make(model: str) -> Path:
        write = CASES[model]
        path = folder / f"{model}.pth"
        return write(path) if isinstance(write, functools.partial) else write(path, model)

    return make


@pytest.fixture
def published(files, monkeypatch):
    """Every address of a model in CASES serves its file."""
    sources = {row.url: row.model for row in checkpoints(task="classification") if row.model in CASES}
    asked = []

    def fetch(url, **known):
        asked.append((url, known))
        return files(sources[url])

    monkeypatch.setattr(loading, "fetch", fetch)
    return asked


def golden_of(model: str) -> tuple[str, dict]:
    golden = "vanilla_vmamba_tiny_published_keys" if model == "vanilla_vmamba_tiny" else model
    return golden, next(case for case in load_golden(golden)["cases"] if case["image"][1:] == [224, 224])


@pytest.mark.parametrize("model", CASES)
def test_pretrained_equals_the_published_logits(model, published):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = timm.create_model(model, pretrained=True).eval()
    golden, case = golden_of(model)
    with torch.inference_mode():
        check_logits(golden, case, net(images(case)))
    assert "state_dict" not in net.pretrained_cfg
    assert published[0][0] == find(model).url


@pytest.mark.parametrize("model", ["vmamba_tiny_s1l8", "vim_tiny_patch16_224", "local_vim_tiny"])
def test_timm_adapts_published_weights(model, published):
    whole = timm.create_model(model, pretrained=True)
    few = timm.create_model(model, pretrained=True, num_classes=10)
    assert few.get_classifier().weight.shape[0] == 10
    stem = f"{whole.pretrained_cfg['first_conv']}.weight"
    assert torch.equal(few.state_dict()[stem], whole.state_dict()[stem])
    grey = timm.create_model(model, pretrained=True, in_chans=1)
    assert torch.allclose(grey.state_dict()[stem], whole.state_dict()[stem].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(grey.get_classifier().weight, whole.get_classifier().weight)
    features = timm.create_model(model, pretrained=True, features_only=True)
    assert torch.equal(features.state_dict()[f"model.{stem}"], whole.state_dict()[stem])
    for net in (few, grey, features, features.model):
        assert "state_dict" not in net.pretrained_cfg
        assert net.pretrained_cfg["tag"] == "in1k"


def test_one_layout_in_another_model_is_refused_in_one_line(files):
    file = files("vmamba_tiny_s1l8")
    for other in ("vmamba_tiny_s2l5", "vmamba_nano", "vanilla_vmamba_tiny", "vim_tiny_patch16_224", "local_vim_tiny"):
        with pytest.raises(UserError, match=r"of another model than this|lacks|has no cls_token") as caught:
            timm.create_model(other, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("adapted", [{"num_classes": 10}, {"features_only": True}, {"in_chans": 1}, {}], ids=str)
def test_never_a_partial_load(adapted, tmp_path):
    whole = published_weights("vim_tiny_patch16_224")
    damaged = {
        "no stem": {k: v for k, v in whole.items() if not k.startswith("patch_embed.")},
        "half a stem": {k: v for k, v in whole.items() if k != "patch_embed.proj.bias"},
        "another stem": whole | {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8)},
        "no layer": {k: v for k, v in whole.items() if not k.startswith("layers.7.norm.")},
        "left over": whole | {"layers.0.extra": torch.zeros(1)},
        "a scalar": whole | {"pos_embed": torch.zeros(())},
        "another length": whole | {"layers.3.mixer.D_b": torch.zeros(5)},
    }
    for name, weights in damaged.items():
        torch.save({"model": weights}, tmp_path / "damaged.pth")
        with pytest.raises(UserError, match="of another model than this VisionMamba") as caught:
            timm.create_model(
                "vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "damaged.pth")}, **adapted
            )
        assert "\n" not in str(caught.value), name


def test_a_classifier_is_needed_where_one_is_asked_for(tmp_path):
    whole = published_weights("vim_tiny_patch16_224")
    torch.save({k: v for k, v in whole.items() if not k.startswith("head.")}, tmp_path / "headless.pth")
    overlay = {"file": str(tmp_path / "headless.pth")}
    with pytest.raises(UserError, match=r"missing head\.weight, head\.bias"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay)
    assert timm.create_model("vim_tiny_patch16_224", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)


def test_an_average_is_taken_where_the_table_says_so(tmp_path, monkeypatch):
    row = find("vim_base_patch16_224")
    zeros, ones = ({"cls_token": torch.full((1, 1, 768), value)} for value in (0.0, 1.0))
    file = tmp_path / row.url.rpartition("/")[2]
    torch.save({"model": zeros, "model_ema": ones}, file)
    monkeypatch.setattr(loading, "fetch", lambda url, **known: file)
    assert load_weights("vim_base_patch16_224")["cls_token"].mean() == 1
    assert load_weights("vim_base_patch16_224", entry="model")["cls_token"].mean() == 0
    cfg = timm.models.resolve_pretrained_cfg("vim_base_patch16_224", None, {"file": str(file)})
    assert loading.load_source(cfg, "vim_base_patch16_224").weights["cls_token"].mean() == 1


def test_a_local_file_goes_the_same_way(files):
    file = files("vim_tiny_patch16_224")
    weights = read_checkpoint(file)
    with pytest.warns(UserWarning, match="holds model and model_ema; model is taken"):  # the name says nothing
        net = timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    assert torch.equal(net.cls_token, weights["model"]["cls_token"])
    visionssm.load_checkpoint(net, file, entry="model_ema")
    assert torch.equal(net.cls_token, weights["model_ema"]["cls_token"])


def test_a_training_state_with_a_doubly_prefixed_average(tmp_path):
    file = layouts.local_mamba_training(tmp_path / "last.pth.tar", "local_vim_tiny")
    net = timm.create_model("local_vim_tiny")
    visionssm.load_checkpoint(net, file, entry="ema_model")
    assert torch.equal(net.head.bias, read_checkpoint(file)["model"]["head.bias"] + 1)


def test_the_table_chooses_the_entry_and_can_be_overruled(published):
    weights = load_weights("vim_tiny_patch16_224")
    average = load_weights("vim_tiny_patch16_224.in1k", entry="model_ema")
    assert torch.allclose(average["norm_f.weight"], weights["norm_f.weight"] + 1)
    assert published[0] == (find("vim_tiny_patch16_224").url, {"sha256": None, "progress": True, "cache_dir": None})
    with pytest.raises(UserError, match="has no weights under 'ema'; it has model, model_ema"):
        load_weights("vim_tiny_patch16_224", entry="ema")


def test_an_unexpected_moving_average_is_announced(tmp_path):
    file = layouts.vmamba(tmp_path / "both.pth", "vmamba_tiny_s1l8", average=True)
    model = timm.create_model("vmamba_tiny_s1l8")
    with pytest.warns(UserWarning, match="holds model and model_ema; model is taken"):
        visionssm.load_checkpoint(model, file)
    first = model.state_dict()["norm.weight"].clone()
    visionssm.load_checkpoint(model, file, entry="model_ema")
    assert torch.allclose(model.state_dict()["norm.weight"], first + 1)


def test_four_dimensional_linears_and_prefixes(files):
    content = read_checkpoint(files("vmamba_tiny_s1l8"))["model"]
    linears = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    conv = {f"module.{k}": v[:, :, None, None] if k.endswith(linears) else v for k, v in content.items()}
    one, other = timm.create_model("vmamba_tiny_s1l8"), timm.create_model("vmamba_tiny_s1l8")
    visionssm.load_checkpoint(one, {"model": content})
    visionssm.load_checkpoint(other, {"state_dict": conv})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_detectors_backbone(tmp_path):
    file = layouts.dense(tmp_path / "detector.pth", "vmamba_tiny_s1l8", (96, 192, 384, 768))
    model = timm.create_model("vmamba_tiny_s1l8", num_classes=0)
    visionssm.load_checkpoint(model, file)
    assert torch.equal(model.norm.weight, torch.full((768,), 4.0))
    first = read_checkpoint(file)["state_dict"]["backbone.patch_embed.0.weight"]
    assert torch.equal(model.patch_embed.conv1.weight, first)


def test_weights_that_are_not_published():
    for name, why in (("local_vim_small", "mislinked"), ("local_vmamba_tiny", "unreleased")):
        with pytest.raises(UserError, match=f"{name}.in1k is {why}: "):
            timm.create_model(name, pretrained=True)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vmamba_nano"):
        timm.create_model("vmamba_nano", pretrained=True, pretrained_cfg={"input_size": (3, 32, 32)})
    with pytest.raises(UserError, match="vim_tiny_rope is unsupported"):
        download("vim_tiny_rope")


def test_over_a_real_connection(files, tmp_path, monkeypatch):
    """The whole path: name, table, mirror, download with its bar, cache, safe reading, conversion, timm."""
    row = find("vmamba_tiny_s1l8")
    target = tmp_path / "site" / row.url.split("/", 3)[3]
    target.parent.mkdir(parents=True)
    target.symlink_to(files("vmamba_tiny_s1l8"))
    quoted = tmp_path / "site" / row.url.split("/", 3)[3].replace("%23", "#")
    quoted.parent.mkdir(parents=True, exist_ok=True)
    quoted.symlink_to(files("vmamba_tiny_s1l8"))
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("VISIONSSM_MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    try:
        net = timm.create_model("vmamba_tiny_s1l8", pretrained=True).eval()
        count = len(requests)
        timm.create_model("vmamba_tiny_s1l8.in1k", pretrained=True)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert count
    assert len(requests) == count, "the second time it comes from the cache"
    golden, case = golden_of("vmamba_tiny_s1l8")
    with torch.inference_mode():
        check_logits(golden, case, net(images(case)))


def test_older_addresses_stand_in_for_an_unreachable_one_alone(files, monkeypatch):
    row = find("vmamba_tiny_s1l8")
    errors = {row.url: UnreachableError("no such host")}

    def fetch(url, **known):
        if url in errors:
            raise errors[url]
        return files("vmamba_tiny_s1l8")

    monkeypatch.setattr(loading, "fetch", fetch)
    assert download("vmamba_tiny_s1l8") == files("vmamba_tiny_s1l8")
    errors[row.url] = DownloadError("sha256 differs")
    with pytest.raises(DownloadError, match="sha256 differs"):
        download("vmamba_tiny_s1l8")
    errors |= dict.fromkeys((row.url, *row.other_urls), UnreachableError("no such host"))
    with pytest.raises(UnreachableError):
        download("vmamba_tiny_s1l8")


def test_list_pretrained():
    listed = timm.list_pretrained(["vmamba*", "vanilla_vmamba*", "vim_*", "local_v*"])
    assert set(listed) == {row.name for row in checkpoints(task="classification")}
    assert "vmamba_tiny_s1l8.in1k" in timm.list_pretrained("vmamba*")
