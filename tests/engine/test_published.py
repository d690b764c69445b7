"""Published weights, tested by a recipe."""

import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from visionssm import config_path
from visionssm.cli import main
from visionssm.weights import find, load_weights

ROW = find("vim_nano.cifar10")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image of noise a class, and 30 more in the folder of the class that the published model takes them for."""
    root = tmp_path_factory.mktemp("noise")
    model = timm.create_model(ROW.name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rng = np.random.default_rng(0)
    right = 0
    for index in range(40):
        level = rng.integers(0, 206, 3)
        image = Image.fromarray((level + rng.integers(0, 50, (32, 32, 3))).astype(np.uint8))
        with torch.inference_mode():
            predicted = model(transform(image)[None]).argmax().item()
        label = index if index < 10 else predicted
        right += label == predicted
        for split in ("train", "test"):
            folder = root / split / ROW.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")
    return root, 100 * right / 40


@pytest.fixture
def tested(images, tmp_path):
    options = ["test_dataloader.batch_size=8", "test_dataloader.dataset.workers=0"]

    def run(config, checkpoint, *more, root=images[0]):
        options_here = [f"data_root={root}", *options, *more]
        return main(["test", config, str(checkpoint), "--work-dir", str(tmp_path / "work"), "--cfg-options", *options_here])

    return run


def test_a_models_name_is_its_first_weights(images, tested, capsys):
    assert tested("vim-nano_cifar10", "vim_nano") == 0
    out = capsys.readouterr().out
    assert f"top-1: {images[1]:.1f} %" in out
    assert f"checkpoint  {ROW.name}\n" in out
    assert "note: " not in out


def test_images_of_another_size_are_noted(tested, capsys):
    assert tested("vmamba-nano_cifar10", "vmamba_nano.cifar10_64px") == 0
    assert "note: vmamba_nano.cifar10_64px is for images of 64 px, the config has 32\n" in capsys.readouterr().out


def test_classes_in_another_order(images, tested, tmp_path, capsys):
    """Ten classes as well, but the labels would mean others."""
    shutil.copytree(images[0], tmp_path / "renamed")
    for split in ("train", "test"):
        (tmp_path / "renamed" / split / "airplane").rename(tmp_path / "renamed" / split / "zeppelin")
    assert tested("vim-nano_cifar10", ROW.name, root=tmp_path / "renamed") == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "data_root: its classes are automobile, bird, cat" in message
    assert f"{ROW.name} was trained for airplane, automobile" in message


def test_a_runner_that_may_shard_weights(tested, tmp_path, capsys):
    config = tmp_path / "sharded.py"
    config.write_text(f"_base_ = {str(config_path('vim-nano_cifar10'))!r}\nrunner_type = 'FlexibleRunner'\ncustom_hooks = []\n")
    assert tested(str(config), ROW.name) == 1
    assert "expected 'Runner' to test published weights" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["name", "shipped", "published", "trained"])
def test_the_accuracy_is_that_of_the_timm_model(kind, images, tested, tmp_path, capsys):
    """By name, from a file under whichever prefix, or from a training's checkpoint."""
    weights = load_weights(ROW.name)
    files = {"name": ROW.name, "shipped": ROW.shipped_file, "published": tmp_path / "a.pth", "trained": tmp_path / "b.pth"}
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "a.pth")
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in weights.items()}}, tmp_path / "b.pth")
    assert images[1] > 75
    assert tested("vim-nano_cifar10", files[kind]) == 0
    assert f"top-1: {images[1]:.1f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("vim_nano.cifar1", r"no published checkpoint is called 'vim_nano\.cifar1'.*vim_nano\.cifar10"),
        ("vmamba_nano.cifar10", r"of another model than this VisionMamba: missing cls_token"),
        ("missing.pth", r"checkpoint: no such file: missing\.pth"),
        ("epoch_80.ckpt", r"checkpoint: no such file: epoch_80\.ckpt"),
        ("folder/vim_nano.cifar10", r"checkpoint: no such file: folder/vim_nano\.cifar10"),
    ],
)
def test_wrong_weights(checkpoint, message, tested, capsys):
    assert tested("vim-nano_cifar10", checkpoint) == 1
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_file_of_something_else(tested, tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    assert tested("vim-nano_cifar10", tmp_path / "other.safetensors") == 1
    assert "other.safetensors" in capsys.readouterr().err
    assert tested("vim-nano_cifar10", tmp_path / "broken.pth") == 1
    assert "broken.pth cannot be read" in " ".join(capsys.readouterr().err.split())
