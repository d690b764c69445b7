"""Training on a GPU: mixed precision."""

import json

import pytest
import torch

from visionssm.engine.config import load_config
from visionssm.engine.runner import Runner

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
