"""`visionssm explain` and `visionssm erf`: pictures, and one line for whatever a user gets wrong."""

import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from visionssm.cli import main
from visionssm.commands.explain import METHODS

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder by timm's save_for_hf for every family."""
    folders = {}
    for name, arguments in (
        ("vim_nano", {"depth": 3}),
        ("vmamba_nano", {"depths": (1, 1), "embed_dim": (8, 16)}),
        ("local_vmamba_nano", {"depths": (1,), "embed_dim": (8,), "paths": (("h", "w2", "v_flip"),)}),
    ):
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        config = {"label_names": ["cat", "dog"]}
        save_for_hf(
            timm.create_model(name, num_classes=2, **arguments), folders[name], model_config=config, safe_serialization=True
        )
    return folders


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(capsys, *argv):
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def refusal(capsys, *argv):
    status, _, err = run(capsys, *argv)
    assert (status, len(err)) == (1, 1)
    assert err[0].startswith(f"visionssm {argv[0]}: ")
    return err[0]


@pytest.mark.parametrize("method", METHODS)
def test_explain_draws(method, saved, photo, tmp_path, capsys):
    pytest.importorskip("captum")
    out = tmp_path / "out.png"
    for folder in saved.values():
        out.unlink(missing_ok=True)
        status, lines, err = run(capsys, "explain", folder, photo, photo, "-o", out, "--method", method, "--class", 1, "--layer", 0)
        assert (status, err) == (0, [])
        assert len(lines) == 4
        assert "photo.png: dog, " in lines[1]
        assert lines[-1] == str(out)
        with Image.open(out) as picture:
            assert len(picture.convert("L").getcolors()) > 50


def test_options_change_the_picture(saved, photo, tmp_path, capsys):
    pictures = []
    for i, options in enumerate(
        ([], ["--signed"], ["--method", "attribution"], ["--method", "raw"], ["--layer", 1], ["--method", "raw", "--layer", 1])
    ):
        out = tmp_path / f"{i}.png"
        assert run(capsys, "explain", saved["vim_nano"], photo, "-o", out, *options)[0] == 0
        pictures.append(out.read_bytes())
    assert len(set(pictures)) == len(pictures)


def test_negative_layers_count_from_the_last(saved, photo, tmp_path, capsys):
    pictures = []
    for layer in (-1, 2):
        out = tmp_path / f"{layer}.png"
        assert run(capsys, "explain", saved["vim_nano"], photo, "-o", out, "--layer", layer)[0] == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_the_other_images_are_explained(saved, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    status, lines, err = run(capsys, "explain", saved["vim_nano"], tmp_path / "none.png", photo, "-o", out)
    assert status == 1
    assert err == [f"visionssm explain: {tmp_path / 'none.png'}: no such file"]
    assert "photo.png: " in lines[1]
    assert out.is_file()


def test_explain_refuses(saved, photo, tmp_path, capsys, monkeypatch):
    folder, out = saved["vim_nano"], tmp_path / "out.png"
    for options, message in (
        (["--method", "rolout"], "--method: got 'rolout', expected one of rollout, attribution, raw, .*; did you mean rollout"),
        (["--class", 2], "--class: 2 is out of range; the model has 2 classes, 0 to 1"),
        (["--layer", 3], r"layer: got 3, expected 0 to 2 \(or -3 to -1\)"),
        (["--layer", -4], "layer: got -4, expected 0 to 2"),
    ):
        line = refusal(capsys, "explain", folder, photo, "-o", out, *options)
        assert re.search(message, line)
        assert not out.exists()
    assert "cannot write .xyz" in refusal(capsys, "explain", folder, photo, "-o", tmp_path / "a.xyz")
    assert "would be overwritten" in refusal(capsys, "explain", folder, photo, "-o", photo)
    assert "did you mean vim_nano" in refusal(capsys, "explain", "vim_nana", photo, "-o", out)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refusal(capsys, "explain", folder, photo, "-o", out, "--method", "gradient")
    assert "gradient needs captum: pip install 'visionssm[explain]'" in line


def test_erf(saved, photo, tmp_path, capsys):
    out = tmp_path / "erf.png"
    status, lines, err = run(capsys, "erf", "vmamba_nano", "-o", out, "--size", 32, "--untrained")
    assert (status, err) == (0, [])
    assert lines[0] == "vmamba_nano from fresh weights: 32 x 32 pixels, 8 images of noise"
    shares = [float(line.split("within ")[1].split("%")[0]) for line in lines[1:4]]
    assert 0 < shares[0] < shares[1] < shares[2] <= 100
    with Image.open(out) as picture:
        assert len(picture.convert("L").getcolors()) > 50
    status, lines, _ = run(capsys, "erf", saved["vim_nano"], photo, photo, "-o", out)
    assert status == 0
    assert lines[0].endswith("32 x 32 pixels, 2 images")


def test_erf_refuses(saved, tmp_path, capsys):
    assert "--untrained: expected a model's name" in refusal(
        capsys, "erf", saved["vim_nano"], "--untrained", "-o", tmp_path / "a.png"
    )
    assert "cannot write" in refusal(capsys, "erf", "vim_nano", "-o", tmp_path / "a.xyz")
    assert "no such file" in refusal(capsys, "erf", "vim_nano", tmp_path / "none.png", "--untrained", "-o", tmp_path / "a.png")
    line = refusal(capsys, "erf", "vim_nano", "--size", 3, "--untrained", "-o", tmp_path / "a.png")
    assert line.endswith("--size 3: image: 3 x 3 pixels is smaller than one 4 x 4 patch")
    assert "timm's own" in refusal(capsys, "erf", "resnet18", "--untrained", "-o", tmp_path / "a.png")
