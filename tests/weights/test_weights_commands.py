"""`visionssm download`, `convert` and `verify` on files of the published layouts."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import visionssm
from visionssm.cli import main
from visionssm.weights import loading, read_checkpoint

pytest.importorskip("mmengine")
pytest.importorskip("yacs")

import layouts

MODEL = "vim_tiny_patch16_224"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return layouts.vim(tmp_path_factory.mktemp("published") / "vim_t_midclstok_76p1acc.pth", MODEL)


def run(capsys, *argv):
    status = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def refusal(capsys, *argv) -> str:
    status, _, err = run(capsys, *argv)
    assert (status, len(err)) == (1, 1)
    return err[0]


def test_download(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "fetch", lambda url, **known: file)
    assert run(capsys, "download", f"{MODEL}.in1k") == (0, [str(file)], [])
    status, out, _ = run(capsys, "download", MODEL, "--to", tmp_path)
    assert (status, out) == (0, [str(tmp_path / f"{MODEL}.in1k.pth")])
    assert (tmp_path / f"{MODEL}.in1k.pth").read_bytes() == file.read_bytes()
    status, out, _ = run(capsys, "download", MODEL, "--to", tmp_path, "--format", "safetensors")
    assert (status, out) == (0, [str(tmp_path / f"{MODEL}.in1k.safetensors")])
    own = load_file(out[0])
    model = timm.create_model(MODEL, pretrained=True)
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert f"{tmp_path / 'none'}: no such folder" in refusal(capsys, "download", MODEL, "--to", tmp_path / "none")
    assert "is called 'vim_tiny_patch16_22'; did you mean" in refusal(capsys, "download", "vim_tiny_patch16_22")
    assert "local_vmamba_tiny.in1k is unreleased: Never released" in refusal(capsys, "download", "local_vmamba_tiny")


def test_convert(file, tmp_path, capsys):
    out = tmp_path / "vim.safetensors"
    status, lines, err = run(capsys, "convert", file, "--model", MODEL, "--entry", "model_ema", "-o", out)
    assert (status, err) == (0, [])
    assert lines == [f"{out}: {len(load_file(out))} tensors, {out.stat().st_size / 1e6:.1f} MB"]
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["architecture"] == MODEL
        assert opened.metadata()["source"] == file.name
    average = read_checkpoint(file)["model_ema"]
    assert torch.equal(load_file(out)["cls_token"], average["cls_token"])
    again = tmp_path / "again.safetensors"  # our own names pass unchanged
    assert run(capsys, "convert", out, "--model", MODEL, "-o", again)[0] == 0
    one, other = load_file(out), load_file(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "vim.safetensors"]


def test_convert_a_detector(tmp_path, capsys):
    file = layouts.dense(tmp_path / "detector.pth", "vmamba_tiny_s1l8", (96, 192, 384, 768))
    out = tmp_path / "detector.safetensors"
    status, lines, _ = run(capsys, "convert", file, "--model", "vmamba_tiny_s1l8", "-o", out)
    assert status == 0
    assert "with the detector's or segmentor's other parts" in lines[0]
    theirs, own = read_checkpoint(file)["state_dict"], load_file(out)
    for name in ("neck.lateral_convs.0.conv.weight", "roi_head.bbox_head.fc_cls.bias", "backbone.outnorm0.weight"):
        assert torch.equal(own[name], theirs[name])
    assert torch.equal(own["backbone.patch_embed.conv1.weight"], theirs["backbone.patch_embed.0.weight"])
    assert len(own) == len(theirs)
    one, other = (timm.create_model("vmamba_tiny_s1l8", num_classes=0) for _ in range(2))
    visionssm.load_checkpoint(one, file)
    visionssm.load_checkpoint(other, out)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    status, lines, _ = run(capsys, "verify", out, "--model", "vmamba_tiny_s1l8")
    assert status == 0
    assert "8 of output norms, 1 of neck, 1 of roi_head" in lines[-1]


def test_convert_refuses(file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    for arguments, reason in (
        ((file, "--model", "vim_tiny_patch16_22", "-o", out), "unknown model 'vim_tiny_patch16_22'; did you mean"),
        ((file, "--model", "vim_small_patch16_224", "-o", out), "of another model than this VisionMamba: of other shapes"),
        ((file, "--model", "vmamba_tiny_s1l8", "-o", out), "of another model than this VMamba: missing"),
        ((file, "--model", MODEL, "-o", tmp_path / "out.pth"), "expected a name that ends in .safetensors"),
        ((file, "--model", MODEL, "-o", tmp_path / "none" / "out.safetensors"), "no such folder"),
        ((file, "--model", MODEL, "--entry", "ema", "-o", out), "has no weights under 'ema'; it has model, model_ema"),
        ((tmp_path / "none.pth", "--model", MODEL, "-o", out), "none.pth: no such file"),
        ((tmp_path, "--model", MODEL, "-o", out), "a folder, expected a checkpoint file"),
    ):
        assert reason in refusal(capsys, "convert", *arguments)
        assert not list(tmp_path.iterdir())


def test_a_model_of_ours_with_other_classes(tmp_path, capsys):
    torch.save(timm.create_model("vmamba_nano", num_classes=10).state_dict(), tmp_path / "ours.pth")
    status, lines, _ = run(capsys, "verify", tmp_path / "ours.pth", "--model", "vmamba_nano")
    assert (status, len(lines)) == (0, 9)
    assert "the likeliest of 10 classes" in lines[3]
    visionssm.load_checkpoint(timm.create_model("vmamba_nano", num_classes=0), tmp_path / "ours.pth")


def test_another_grid_is_told(file, tmp_path, capsys):
    status, lines, _ = run(capsys, "convert", file, "--model", "vim_tiny_patch16_stride8_224", "-o", tmp_path / "out.safetensors")
    assert status == 0
    assert lines[0].endswith("its 197 positions were resized to 730: is it of this model?")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(tmp_path, capsys):
    file = layouts.vim(tmp_path / "renamed.pth", MODEL)
    status, _, err = run(capsys, "verify", file, "--model", MODEL)
    assert (status, err) == (0, [f"visionssm verify: {file}: holds model and model_ema; model is taken"])


def test_verify(file, tmp_path, capsys):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    status, lines, err = run(capsys, "verify", file, "--model", MODEL, "--entry", "model", "--image", tmp_path / "red.png")
    assert (status, err) == (0, [])
    assert lines[0].startswith(f"{file}: {file.stat().st_size:,} bytes, sha256 ")
    assert lines[1] == "415 tensors of float32; the file holds model, optimizer, lr_scheduler, scaler, epoch, model_ema, args"
    assert "7,148,008 parameters, none missing" in lines[2]
    assert lines[3] == f"{tmp_path / 'red.png'}, the likeliest of 1000 classes:"
    assert len(lines) == 9
    broken = read_checkpoint(file)["model"]
    torch.save({**broken, "norm_f.weight": broken["norm_f.weight"] * float("nan")}, tmp_path / "nan.pth")
    assert "the model's output is not finite" in refusal(capsys, "verify", tmp_path / "nan.pth", "--model", MODEL)
