"""Training on GPUs: mixed precision, sharded weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from visionssm import config_path
from visionssm.engine.config import load_config
from visionssm.engine.runner import Runner
from visionssm.registry import HOOKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["vim_nano", "vmamba_nano", "local_vmamba_nano", "local_vim_nano"])
def test_mixed_precision_trains_the_nanos(name, dtype, tmp_path):
    """Two epochs of real digits: every loss is finite, the weights stay so, and the model has learnt something."""
    options = {"model.backbone.model_name": name, "optim_wrapper.dtype": dtype, "train_cfg.max_epochs": 2}
    cfg = load_config("vmamba-nano_digits", options)
    cfg.work_dir = str(tmp_path / "work")
    cfg.default_hooks.logger.interval = 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    (log,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    losses = torch.tensor([row["loss"] for row in map(json.loads, log.read_text().splitlines()) if "loss" in row])
    assert len(losses) == 90
    assert losses.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in runner.model.parameters())
    assert losses[-10:].mean() < losses[:10].mean() - 0.3


@HOOKS.register_module()
class RefusesToWait(Hook):
    """From the fourth iteration to the last but one, whatever waits for the device before the next batch is read raises."""

    priority = "LOWEST"

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.cuda.set_sync_debug_mode("error" if 2 < batch_idx < runner.max_iters - 1 else "default")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_iteration_waits_for_the_device(dtype, tmp_path):
    """But for those in which the logger writes, here the last one alone."""
    options = {"optim_wrapper.dtype": dtype, "train_cfg.max_epochs": 1, "train_cfg.val_interval": 2}
    cfg = load_config("vmamba-nano_digits", options)
    cfg.work_dir = str(tmp_path / "work")
    cfg.train_dataloader.update(drop_last=True, pin_memory=True)
    cfg.model.random_erasing = {"probability": 0.25, "mode": "pixel"}
    cfg.model.mixup = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    cfg.custom_hooks = [{"type": "visionssm.EMAHook"}, {"type": "visionssm.RefusesToWait"}]
    cfg.default_hooks.logger.interval = 1000
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner.iter == 44


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_weights_train_on_two_gpus(tmp_path):
    config = tmp_path / "sharded.py"
    config.write_text(
        f"_base_ = {str(config_path('vmamba-nano_digits'))!r}\n"
        "runner_type = 'FlexibleRunner'\n"
        "strategy = dict(type='visionssm.ShardedStrategy')\n"
        "optim_wrapper = dict(dtype='bfloat16')\n"
        "train_cfg = dict(max_epochs=2, val_interval=1)\n"
    )
    tool = Path(__file__).parents[2] / "tools" / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tool), str(config)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--work-dir", str(tmp_path / "work")], env=environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "top-1: " in run.stdout
    content = torch.load(tmp_path / "work" / "epoch_2.pth", weights_only=False)  # the file was written by this test
    assert all(value.isfinite().all() for value in content["state_dict"].values())
