"""The command line: what each subcommand prints, and that whatever a user gets wrong is one line and an exit status."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import PretrainedCfg, list_models, save_for_hf

import visionssm
from visionssm.cli import INTERRUPTED, build_parser, main
from visionssm.commands import models
from visionssm.commands.images import open_image
from visionssm.commands.run_config import read_config
from visionssm.weights import checkpoints

NANO = {"depths": (1, 1, 1, 1), "embed_dim": (8, 16, 16, 16)}
CLASSES = ["cat", "dog", "$5 or $10", "猫"]
COMMANDS = ("list", "info", "classify", "explain", "erf", "env")


def run(capsys, *argv):
    """Exit status, lines of stdout, lines of stderr."""
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def refusal(capsys, *argv):
    """The one line on stderr of a command that fails."""
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert len(err) == 1
    assert err[0].startswith(f"visionssm {argv[0]}: ")
    return err[0]


def save_model(folder, classes=CLASSES, **kwargs):
    """A small model with distinct outputs, as timm's save_for_hf writes it."""
    torch.manual_seed(0)
    arguments = {**NANO, "num_classes": len(classes) if classes else 1000, **kwargs}
    model = timm.create_model("vmamba_nano", **arguments)
    torch.nn.init.normal_(model.head.fc.weight)
    config = {"label_names": classes} if classes else {}
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return model.eval()


def save_image(path, size=(40, 30), mode="RGB", seed=0):
    """An image of noise."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder by save_for_hf and its model."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, save_model(folder)


@pytest.fixture
def photo(tmp_path):
    return save_image(tmp_path / "photo.png")


# the parser


def test_help_names_every_command_and_gives_an_example_of_each(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command} ", text, re.MULTILINE)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        example = re.search(r"example:\n  visionssm (.*)", capsys.readouterr().out)[1]
        assert build_parser().parse_args(example.split()).command == command


def test_no_command_shows_the_help(capsys):
    status, out, err = run(capsys)
    assert (status, out) == (2, [])
    assert err[0].startswith("usage: visionssm")


@pytest.mark.parametrize(
    "argv",
    [["frobnicate"], ["info"], ["classify", "vim_nano"], ["classify", "a", "b", "--top", "0"], ["list", "--top", "1"]],
    ids=" ".join,
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: visionssm" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"visionssm {visionssm.__version__}\n"


def test_interrupt(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "model_page", interrupt)
    assert main(["info", "vim_nano"]) == INTERRUPTED


def test_as_a_module_into_a_closed_pipe():
    """`visionssm list | head`: the reader goes away; and what a process writes beside its answer is nothing."""
    command = [sys.executable, "-m", "visionssm", "list", "nano"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
    process.stderr.close()


# list and info


def test_list_by_pattern(capsys):
    status, out, err = run(capsys, "list", "vim_*_patch16_224")
    assert (status, err) == (0, [])
    rows = [re.split(r"  +", line) for line in out[1:4]]
    assert [row[0] for row in rows] == ["vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224"]
    assert [row[1] for row in rows] == ["7.15 M", "25.80 M", "97.60 M"]
    assert rows[0][2:] == ["224 x 224", "Vision Mamba, arXiv:2401.09417"]
    # each column of the header stands over its values
    assert out[0].index("paper") == out[1].index("Vision Mamba")


def test_list_by_part_of_a_name(capsys):
    _, out, _ = run(capsys, "list", "nano")
    listed = [line.split()[0] for line in out[1:] if "arXiv" in line]
    assert listed == sorted(list_models("*_nano", module=["local_vim", "local_vmamba", "vim", "vmamba"]))


def test_zoo_is_this_package_alone():
    names = models.zoo()
    assert {"vmamba_tiny_s1l8", "vim_tiny_patch16_224", "local_vim_tiny"} <= set(names)
    assert "resnet18" not in names
    assert len(names) == len(set(names))


def test_list_without_match(capsys):
    assert "did you mean vanilla_vmamba_tiny" in refusal(capsys, "list", "vanila_vmamba_tiny")


def test_list_pretrained(capsys):
    status, out, err = run(capsys, "list", "--pretrained")
    assert (status, err) == (0, [])
    assert len(out) == len(checkpoints(status=None)) + 3
    assert [line for line in out if line.startswith("vanilla_vmamba_base.in1k_dp05 ") and "top-1 83.2" in line]
    _, out, _ = run(capsys, "list", "--pretrained", "local_v*")
    assert any("(mislinked)" in line for line in out)
    assert "no checkpoint is called 'resnet50'" in refusal(capsys, "list", "--pretrained", "resnet50")


def test_info(capsys):
    status, out, err = run(capsys, "info", "vmamba_tiny_s1l8")
    assert (status, err) == (0, [])
    text = "\n".join(out)
    for fact in (
        "30,249,064",
        "3 x 224 x 224, other sizes too",
        "channels 96, 192, 384, 768 at strides 4, 8, 16, 32",
        "h, v, h_flip, v_flip (all 14 layers)",
        "VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166",
        "bicubic resize, crop 0.875",
    ):
        assert fact in text


def test_info_shows_the_paths_of_each_layer(capsys):
    _, out, _ = run(capsys, "info", "local_vim_small")
    first = next(i for i, line in enumerate(out) if line.startswith("scan paths"))
    assert out[first].endswith("  h, v_flip, w7, w7_flip (layer 0)")
    assert out[first + 3].strip() == "h, h_flip, v, v_flip (layers 3 to 5)"
    _, out, _ = run(capsys, "info", "vim_tiny_patch16_224")
    assert any(line.endswith("  h, h_flip (all 24 layers)") for line in out)


def test_info_refuses(capsys):
    assert "did you mean vmamba_tiny_s1l8" in refusal(capsys, "info", "vmaba_tiny_s1l8")
    assert "visionssm list shows all" in refusal(capsys, "info", "xyz")
    assert "timm's own" in refusal(capsys, "info", "resnet18")
    assert "no weights called 'vim_nano.in1k'" in refusal(capsys, "info", "vim_nano.in1k")


# classify


def expected_classes(model, path, names, top=5):
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        scores, indices = model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(0).topk(min(top, len(names)))
    return [f"  {score:6.1%}  {names[index]}" for score, index in zip(scores.tolist(), indices.tolist(), strict=True)]


def test_classify_a_folder_by_save_for_hf(saved, photo, capsys):
    folder, model = saved
    second = save_image(photo.with_name("second.jpg"), size=(90, 120), seed=1)
    status, out, err = run(capsys, "classify", folder, photo, second, "--device", "cpu")
    assert (status, err) == (0, [])
    assert out[0] == f"vmamba_nano from {folder}: 4 classes, 32 x 32 pixels, on cpu"
    assert out[2:7] == [str(photo), *expected_classes(model, photo, CLASSES)]
    assert out[8:] == [str(second), *expected_classes(model, second, CLASSES)]


def test_top(saved, photo, capsys):
    folder, model = saved
    _, out, _ = run(capsys, "classify", f"local-dir:{folder}", photo, "--top", "2", "--device", "cpu")
    assert out[3:] == expected_classes(model, photo, CLASSES, top=2)


def test_imagenet_names(tmp_path, photo, capsys):
    model = save_model(tmp_path / "model", classes=None)
    torch.nn.init.zeros_(model.head.fc.weight)
    model.head.fc.bias.data[1] = 50.0
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    _, out, _ = run(capsys, "classify", tmp_path / "model", photo)
    assert out[3].split(maxsplit=1) == ["100.0%", "goldfish, Carassius auratus"]


def test_classes_without_names(tmp_path, photo, capsys):
    save_model(tmp_path / "model", classes=None, num_classes=2)
    _, out, _ = run(capsys, "classify", tmp_path / "model", photo)
    assert {line.split(maxsplit=1)[1] for line in out[3:]} == {"class 0", "class 1"}


def test_grey_model(tmp_path, photo, capsys):
    save_model(tmp_path / "model", in_chans=1)
    status, out, _ = run(capsys, "classify", tmp_path / "model", photo)
    assert status == 0
    assert len(out) == 3 + len(CLASSES)
    save_model(tmp_path / "model", in_chans=4)
    assert "the model takes 4 channels" in refusal(capsys, "classify", tmp_path / "model", photo)


def test_bad_images_are_named_and_the_others_classified(saved, photo, tmp_path, capsys):
    text, empty, truncated, floats = (tmp_path / name for name in ("text.jpg", "empty.png", "truncated.png", "floats.tiff"))
    text.write_text("not an image")
    empty.touch()
    truncated.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    Image.fromarray(np.ones((8, 8), np.float32)).save(floats)
    missing = tmp_path / "missing.png"
    status, out, err = run(capsys, "classify", saved[0], text, empty, truncated, floats, missing, tmp_path, photo)
    assert status == 1
    assert [line for line in out if line.startswith(str(tmp_path))] == [str(photo)]
    reasons = ("not an image", "not an image", "cannot be read", "32-bit", "no such file", "a folder")
    assert len(err) == len(reasons)
    for line, path, reason in zip(err, (text, empty, truncated, floats, missing, tmp_path), reasons, strict=True):
        assert f"{path}: " in line
        assert reason in line


def test_images_are_opened_as_a_person_sees_them(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).quantize().save(path)  # a palette with a transparent colour
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)
    Image.new("L", (2, 2), 7).save(path)
    assert open_image(path).getpixel((0, 0)) == (7, 7, 7)
    Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)).save(path)
    assert open_image(path).getpixel((0, 0)) == (128, 128, 128)
    upright = Image.new("RGB", (2, 4))
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by a quarter
    upright.save(path, exif=exif)
    assert open_image(path).size == (4, 2)


def test_picture(saved, photo, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    status, lines, err = run(capsys, "classify", saved[0], photo, photo, tmp_path / "missing.png", "--out", out)
    assert status == 1  # of the missing image
    assert len(err) == 1
    assert lines[-1] == str(out)
    with Image.open(out) as picture:
        assert picture.size == (900, 440)


def test_picture_of_many_images(saved, photo, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from visionssm.commands import picture

    monkeypatch.setattr(picture, "MAX_IMAGES", 2)
    _, lines, _ = run(capsys, "classify", saved[0], photo, photo, photo, "--out", tmp_path / "picture.png")
    assert lines[-1] == f"{tmp_path / 'picture.png'} (the first 2 images)"


def test_names_that_the_terminal_cannot_show(saved, tmp_path, capsys):
    path = save_image(tmp_path / "photo.png").rename(tmp_path / "photo\udcff.png")
    status, out, err = run(capsys, "classify", saved[0], path)
    assert (status, err) == (0, [])
    assert out[2].endswith("photo\\udcff.png")


def test_picture_refuses(saved, photo, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for out, reason in (
        (tmp_path / "a.xyz", "cannot write .xyz, expected one of"),
        (tmp_path / "a", "a file without a suffix"),
        (tmp_path / "none" / "a.png", "no such folder"),
        (photo, "would be overwritten"),
    ):
        assert reason in refusal(capsys, "classify", saved[0], photo, "--out", out)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'visionssm[explain]'" in refusal(capsys, "classify", saved[0], photo, "--out", tmp_path / "a.png")


def test_classify_refuses_names(photo, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("timm.get_pretrained_cfg", lambda name: PretrainedCfg())
        assert "no weights are published in this version" in refusal(capsys, "classify", "vim_nano", photo)
    assert "timm's own" in refusal(capsys, "classify", "resnet18", photo)
    assert "neither a file or folder nor a model; did you mean vim_nano" in refusal(capsys, "classify", "vim_nana", photo)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(saved, photo, capsys):
    assert "torch sees no GPU" in refusal(capsys, "classify", saved[0], photo, "--device", "cuda")


def test_classify_refuses_folders(tmp_path, photo, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "holds neither a config.json" in refusal(capsys, "classify", folder, photo)
    config = folder / "config.json"
    for text in ("{", "[]", "{}"):
        config.write_text(text)
        assert "not the JSON" in refusal(capsys, "classify", folder, photo)
    config.write_text('{"architecture": "vmamba_nan"}')
    assert "unknown model 'vmamba_nan'; did you mean vmamba_nano" in refusal(capsys, "classify", folder, photo)
    save_model(folder)
    (folder / "model.safetensors").unlink()
    assert "No suitable checkpoints found" in refusal(capsys, "classify", folder, photo)
    (folder / "model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded as vmamba_nano" in refusal(capsys, "classify", folder, photo)


def test_classify_refuses_weights_of_another_variant(tmp_path, photo, capsys):
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depths"] = [1, 2, 1, 1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refusal(capsys, "classify", tmp_path, photo)
    assert re.search(r"missing layers\.1\.blocks\.1\.\S+, \S+, \S+, and \d+ more$", line)
    config["model_args"].update(depths=[1, 1, 1, 1], embed_dim=[16, 16, 16, 16])
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = "of other shapes patch_embed.conv1.weight [4, 3, 3, 3] for [8, 3, 3, 3], "
    assert shapes in refusal(capsys, "classify", tmp_path, photo)
    config["model_args"].update(embed_dim=NANO["embed_dim"], num_classes=5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "states 4 classes, and 5 in model_args" in refusal(capsys, "classify", tmp_path, photo)
    config["model_args"].update(num_classes=4, colour="red")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "colour" in refusal(capsys, "classify", tmp_path, photo)


def test_classify_refuses_names_of_other_classes(tmp_path, photo, capsys):
    save_model(tmp_path, classes=CLASSES, num_classes=3)
    assert "label_names: 1 more names than the model's 3 classes" in refusal(capsys, "classify", tmp_path, photo)


# files of training runs; tests/engine/test_classify.py has one that is right


def test_classify_refuses_files(tmp_path, photo, capsys):
    path = tmp_path / "weights.pth"
    assert "neither a file or folder nor a model" in refusal(capsys, "classify", path, photo)
    assert "not a checkpoint" in refusal(capsys, "classify", photo, photo)
    path.write_bytes(b"broken")
    assert "not a checkpoint" in refusal(capsys, "classify", path, photo)
    torch.save([1, 2], path)
    assert "holds a list" in refusal(capsys, "classify", path, photo)
    meta = {"cfg": "model = dict(backbone=dict(model_name='vim_nano'))"}
    for content in (
        {"weight": torch.ones(2)},
        {"state_dict": {}, "meta": {"cfg": "x = ("}},
        {"state_dict": {}, "meta": None},
        {"state_dict": torch.ones(2), "meta": meta},
    ):
        torch.save(content, path)
        assert "does not say which model" in refusal(capsys, "classify", path, photo)
    torch.save({"state_dict": {}, "meta": {"cfg": "model = dict(backbone=dict(model_name='vim_nan'))"}}, path)
    assert "unknown model 'vim_nan'; did you mean vim_nano" in refusal(capsys, "classify", path, photo)
    detector = "model = dict(type='MaskRCNN', backbone=dict(type='visionssm.Backbone', model_name='vim_nano'))"
    torch.save({"state_dict": {}, "meta": {"cfg": detector}}, path)
    assert "is of OpenMMLab's MaskRCNN; expected a checkpoint of a classifier" in refusal(capsys, "classify", path, photo)
    torch.save({"state_dict": {}, "meta": meta}, path)
    assert "cannot be loaded as vim_nano: missing" in refusal(capsys, "classify", path, photo)


def test_nothing_in_a_config_is_executed():
    text = "import os\nmodel = dict(a=(1, 2), b=[dict(c='d')], e={'f-g': None})\nother = os.getcwd()\n"
    assert read_config(text, "model", "absent") == {"model": {"a": [1, 2], "b": [{"c": "d"}], "e": {"f-g": None}}}
    with pytest.raises(ValueError, match="malformed"):
        read_config(text, "other")


# env


def test_env(capsys):
    status, out, err = run(capsys, "env")
    assert (status, err) == (0, [])
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in out if "  " in line)
    assert facts["visionssm"] == visionssm.__version__
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert facts["threads"].startswith(f"{torch.get_num_threads()} in torch")
    assert facts["reference"] == "runs"
    assert facts["chunked"].startswith("runs")
    assert "backends for tensors on cpu" in out


def test_env_says_why_cv2_cannot_be_imported(capsys, monkeypatch, tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    _, out, _ = run(capsys, "env")
    (line,) = (line for line in out if line.startswith("cv2 "))
    assert "libGL is missing (Debian: apt-get install libgl1)" in line
