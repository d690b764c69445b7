"""Weights spread over two processes on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from visionssm import config_path
from visionssm.engine import FlexibleRunner
from visionssm.engine.config import load_config
from visionssm.engine.launch import main_test, main_train
from visionssm.engine.sharded import blocks
from visionssm.errors import UserError

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"
SHARDED = """
_base_ = {base!r}
runner_type = "FlexibleRunner"
strategy = dict(type="visionssm.ShardedStrategy")
model = dict(backbone=dict(model_name="vim_nano", depth=2))
augmentation = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))
train_cfg = dict(max_epochs={epochs}, val_interval=1)
train_dataloader = dict(batch_size=8, num_batch_per_epoch=3, dataset=dict(transform=augmentation))
val_dataloader = dict(batch_size=60)
test_dataloader = dict(batch_size=60)
optim_wrapper = dict(clip_grad=dict(max_norm=0.5))
param_scheduler = None
auto_scale_lr = dict(enable=True, base_batch_size=16)
"""


def config(folder, epochs):
    path = folder / f"sharded{epochs}.py"
    path.write_text(SHARDED.format(base=str(config_path("vmamba-nano_digits")), epochs=epochs))
    return str(path)


def two(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TRAIN)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, *arguments], env=environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def loaded(work, epoch):
    return torch.load(work / f"epoch_{epoch}.pth", weights_only=False)  # the file was written by this test


def test_sharded_training_is_that_of_one_process(tmp_path, capsys):
    """Same images an update: whole weights, exported ones too, and a resumed run agree with one process within 1e-4 of the
    largest value of a tensor; AdamW divides by small numbers, so more than for SGD.
    """
    work, alone = tmp_path / "work", tmp_path / "alone"
    two(config(tmp_path, 1), "--work-dir", str(work))
    out = two(config(tmp_path, 2), "--work-dir", str(work), "--resume")
    plain = ["runner_type=Runner", "strategy=None", "train_dataloader.batch_size=16"]
    assert main_train([config(tmp_path, 2), "--work-dir", str(alone), "--cfg-options", *plain]) == 0
    capsys.readouterr()
    for epoch in (1, 2):
        sharded, expected = loaded(work, epoch), loaded(alone, epoch)
        assert sharded["state_dict"].keys() == expected["state_dict"].keys()
        for name, value in expected["state_dict"].items():
            bound = 1e-4 * max(1.0, value.abs().max().item())
            torch.testing.assert_close(sharded["state_dict"][name], value, rtol=0, atol=bound)
        assert sharded["meta"]["iter"] == expected["meta"]["iter"]
    exported = timm.create_model(f"local-dir:{work / 'timm'}", pretrained=True, depth=2).state_dict()
    assert all(torch.equal(value, sharded["state_dict"][f"backbone.{name}"]) for name, value in exported.items())
    assert (
        main_test([config(tmp_path, 2), str(work / "epoch_2.pth"), "--work-dir", str(tmp_path / "test"), "--cfg-options", *plain])
        == 0
    )
    top1 = re.compile(r"^top-1: .*$", re.MULTILINE)
    assert top1.findall(out) == top1.findall(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "count"), [("vim_nano", 6), ("vmamba_nano", 9), ("local_vmamba_nano", 9), ("deit_tiny_patch16_224", 12)]
)
def test_blocks_are_found(name, count):
    assert len(blocks(timm.create_model(name, device="meta"))) == count


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("runner_type=FlexibleRunner", "ShardedStrategy spreads a model over processes; start them with torchrun"),
        ("runner_type=Flexible", "runner_type: got 'Flexible', expected Runner or FlexibleRunner"),
    ],
)
def test_wrong_settings(option, message, tmp_path, capsys):
    assert main_train([config(tmp_path, 1), "--work-dir", str(tmp_path / "work"), "--cfg-options", option]) == 1
    assert message in capsys.readouterr().err


def test_a_moving_average_is_refused(tmp_path):
    cfg = load_config(config(tmp_path, 1))
    cfg.strategy = {"type": "SingleDeviceStrategy"}
    cfg.custom_hooks = [{"type": "visionssm.EMAHook"}]
    cfg.work_dir = str(tmp_path / "work")
    with pytest.raises(UserError, match="custom_hooks: EMAHook needs whole weights"):
        FlexibleRunner.from_cfg(cfg)
