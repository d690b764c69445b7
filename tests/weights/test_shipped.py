"""Our own weights: the command that puts them into the package, and what is there."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visionssm.weights import checkpoints, download, load_weights

ROOT = Path(__file__).parents[2]
SHIPPED = [row for row in checkpoints() if row.shipped_file]
RUN = {
    "config": "vim-nano_cifar10",
    "seed": 0,
    "model": "vim_nano",
    "status": "finished",
    "epochs": 7,
    "accuracy": 91.5,
    "accuracy_float16": 91.25,
    "parameters": 1_092_490,
    "images_per_s": 1000,
    "peak_memory_mib": 100,
    "processes_on_gpu": 3,
    "device": "a GPU",
    "torch": "2.11.0",
    "timm": "1.0.31",
    "date": "2026-01-01",
}
USE = """
import timm, torch, visionssm
from safetensors.torch import load_file
from visionssm.weights import find
model = timm.create_model("vim_nano", pretrained=True)
weights = load_file(find("vim_nano").shipped_file)
assert all(torch.equal(value, weights[name].to(value.dtype)) for name, value in model.state_dict().items())
assert model.num_classes == 10 and model.pretrained_cfg["label_names"][2] == "bird"
assert next(model.parameters()).dtype == torch.float32
assert timm.create_model("vim_nano", pretrained=True, num_classes=3).num_classes == 3
assert timm.create_model("vim_nano", pretrained=True, features_only=True)
print(visionssm.__file__)
"""


@pytest.fixture
def copied(tmp_path):
    """A copy of the repository's files that the command reads or writes, and how to run Python on it without a network."""
    copy = tmp_path / "copy"
    for folder in ("visionssm", "ops", "configs", "tools", "benchmarks", "model_cards", "docs"):
        unwanted = shutil.ignore_patterns("__pycache__", "ops" if folder == "visionssm" else "", "configs")
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    for name in ("ops", "configs"):
        (copy / "visionssm" / name).symlink_to(copy / name)
    environ = {**os.environ, "PYTHONPATH": str(copy), "VISIONSSM_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)

    return copy, run


@pytest.fixture
def trained(tmp_path):
    """What tools/benchmark_cifar10.py writes."""
    folder = tmp_path / "trained"
    folder.mkdir()
    weights = timm.create_model("vim_nano", num_classes=10).state_dict()
    save_file({name: value.half() for name, value in weights.items()}, folder / "vim_nano.cifar10.safetensors")
    with (folder / "cifar10_h100.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, RUN)
        writer.writeheader()
        writer.writerow(RUN)
        writer.writerow({**RUN, "model": "deit_tiny_patch16_224", "config": "deit-nano_cifar10"})
    return folder


def test_a_card_says_how_its_own_model_was_trained():
    with (ROOT / "benchmarks" / "cifar10_h200.csv").open(newline="") as file:
        runs = {run["config"]: run for run in csv.DictReader(file)}
    for row in SHIPPED:
        run = runs[Path(row.config).stem]
        card = (ROOT / "model_cards" / f"{row.name}.md").read_text()
        assert f", {run['processes_on_gpu']} of these trainings on each GPU, " in card
        assert f", {run['date']}. One recipe for all, but" in card
        assert f"\n| **{run['config']}** | {float(run['accuracy']):.2f} |" in card


def test_weights_enter_the_package(copied, trained):
    copy, run = copied
    shipping = run(str(copy / "tools" / "ship_weights.py"), str(trained))
    assert shipping.returncode == 0, shipping.stderr
    using = run("-c", USE)
    assert using.returncode == 0, using.stderr
    assert using.stdout.startswith(str(copy))
    card = (copy / "model_cards" / "vim_nano.cifar10.md").read_text()
    assert "value: 91.25" in card
    assert "| **vim-nano_cifar10** | 91.50 | 1,092,490 | 7 | 1000 | 100 |" in card
    assert "| deit-nano_cifar10 |" in card
    assert "pickle" not in card
    again = run(str(copy / "tools" / "ship_weights.py"), str(trained))
    assert ", 0 of them changed" in again.stdout
    listed = run("-m", "visionssm", "list", "vim_nano", "--pretrained")
    assert listed.returncode == 0, listed.stderr
    assert "top-1 91.25" in listed.stdout


def test_of_several_runs_the_last_is_shipped(copied, trained):
    copy, run = copied
    later = shutil.copytree(trained, trained.parent / "later")
    table = later / "cifar10_h100.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[1].replace("91.25", "92.5")]) + "\n")
    shipping = run(str(copy / "tools" / "ship_weights.py"), str(trained), str(later))
    assert shipping.returncode == 0, shipping.stderr
    assert "value: 92.5" in (copy / "model_cards" / "vim_nano.cifar10.md").read_text()
    assert [line.split(",")[0] for line in (copy / "benchmarks" / "cifar10_h100.csv").read_text().splitlines()[1:]] == [
        "vim-nano_cifar10",
        "deit-nano_cifar10",
    ]


def test_the_images_of_a_recipe_are_those_of_its_weights(copied, trained):
    """Weights of a recipe that enlarges them have a tag of their own, and timm's config of it says so."""
    copy, run = copied
    name = "vmamba-nano-64px-muon-189e_cifar10"
    weights = timm.create_model("vmamba_nano", num_classes=10).state_dict()
    save_file(weights, trained / "vmamba_nano.cifar10_64px.safetensors")
    with (trained / "cifar10_h100.csv").open("a", newline="") as file:
        csv.DictWriter(file, RUN).writerow({**RUN, "model": "vmamba_nano", "config": name})
    shipping = run(str(copy / "tools" / "ship_weights.py"), str(trained))
    assert shipping.returncode == 0, shipping.stderr
    code = "import timm, visionssm; cfg = timm.get_pretrained_cfg({!r}); print(cfg.input_size, cfg.pool_size, cfg.interpolation)"
    assert run("-c", code.format("vmamba_nano.cifar10_64px")).stdout == "(3, 64, 64) (4, 4) bilinear\n"
    assert run("-c", code.format("vmamba_nano")).stdout == "(3, 32, 32) (2, 2) bilinear\n"
    assert run("-c", code.format("vim_nano.cifar10")).stdout == "(3, 32, 32) None bilinear\n"
    model = timm.create_model("vmamba_nano").eval()
    assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape[1:3] == (4, 4)


def test_an_unfinished_run_is_not_shipped(copied, trained):
    copy, run = copied
    table = trained / "cifar10_h100.csv"
    table.write_text(table.read_text().replace("finished", "exit status -9"))
    shipping = run(str(copy / "tools" / "ship_weights.py"), str(trained))
    assert shipping.returncode == 1
    assert "vim_nano has the status 'exit status -9'" in shipping.stderr


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.name)
def test_shipped_weights_need_no_network(row, monkeypatch):
    monkeypatch.setenv("VISIONSSM_OFFLINE", "1")
    assert download(row.name) == row.shipped_file
    model = timm.create_model(row.name, pretrained=True)
    assert model.num_classes == len(row.classes) == 10
    weights = load_weights(row.name)
    assert all(torch.equal(value, weights[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert weights.keys() == load_file(row.shipped_file).keys()


@pytest.mark.slow
@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.name)
def test_shipped_weights_are_as_good_as_reported(row):
    """On the first 50 test images of each class; the bound is three standard errors of 500 draws."""
    if "VISIONSSM_DATA" not in os.environ or not (root := Path(os.environ["VISIONSSM_DATA"], "cifar10", "test")).is_dir():
        pytest.skip("VISIONSSM_DATA holds no cifar10/test")
    model = timm.create_model(row.name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right = 0
    for label, name in enumerate(row.classes):
        files = sorted((root / name).iterdir())[:50]
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.inference_mode():
            right += (model(images).argmax(1) == label).sum().item()
    share = row.reported["top1"] / 100
    assert right / 500 > share - 3 * (share * (1 - share) / 500) ** 0.5
