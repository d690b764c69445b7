"""Files of exactly the layouts that the three projects publish, with real yacs, argparse, optimizer and mmengine objects."""

import argparse
from pathlib import Path

import torch
from mmengine.logging import MessageHub
from yacs.config import CfgNode

from parity import published_weights


def vmamba(path: Path, golden: str, average: bool = False, **others) -> Path:
    """A training state with a yacs config; most published ones hold the moving average as `model`."""
    weights = published_weights(golden)
    config = CfgNode({"MODEL": {"TYPE": "vssm", "VSSM": {"DEPTHS": [2, 2, 8, 2]}}, "AMP_ENABLE": True})
    config.freeze()
    content = {"model": weights, **_training_state(weights), "max_accuracy": 82.6, "config": config}
    if average:
        content |= {"model_ema": {name: value + 1 for name, value in weights.items()}, "max_accuray_ema": 82.7}
    return _save(path, content | others)


def vim(path: Path, golden: str) -> Path:
    """A DeiT-style training state with argparse arguments and a moving average."""
    weights = published_weights(golden)
    args = argparse.Namespace(model=golden, lr=5e-4, output_dir=Path("output"), opt_betas=None)
    average = {name: value + 1 for name, value in weights.items()}
    content = {"model": weights, **_training_state(weights), "model_ema": average, "scaler": "none", "args": args}
    return _save(path, content)


def local_mamba(path: Path, golden: str) -> Path:
    """A file that the authors' conversion tool wrote: the weights alone."""
    return _save(path, {"state_dict": published_weights(golden)})


def local_mamba_training(path: Path, golden: str) -> Path:
    """A training state, whose moving average has a prefix twice."""
    weights = published_weights(golden)
    average = {f"module.module.{name}": value if "rope" in name else value + 1 for name, value in weights.items()}
    return _save(path, {"epoch": 3, "model": weights, "ema_model": average, **_training_state(weights), "dyrep": None})


def dense(path: Path, golden: str, widths: tuple[int, ...]) -> Path:
    """A detector's or segmentor's file by mmengine: the backbone without its classifier, output norms, a head."""
    backbone = {
        name: value for name, value in published_weights(golden).items() if not name.startswith(("classifier.", "head.", "norm."))
    }
    norms = {f"outnorm{i}.{what}": torch.full((c,), 1.0 + i) for i, c in enumerate(widths) for what in ("weight", "bias")}
    weights = {f"backbone.{name}": value for name, value in (backbone | norms).items()}
    weights |= {
        "neck.lateral_convs.0.conv.weight": torch.ones(8, widths[0], 1, 1),
        "roi_head.bbox_head.fc_cls.bias": torch.zeros(81),
    }
    hub = MessageHub("published")
    hub.update_scalar("train/loss", 0.5)
    meta = {"epoch": 12, "cfg": "model = dict(type='MaskRCNN')", "dataset_meta": {"CLASSES": ("person",)}, "seed": 1}
    return _save(path, {"meta": meta, "state_dict": weights, "message_hub": hub.state_dict(), **_training_state(weights)})


def _training_state(weights: dict[str, torch.Tensor]) -> dict:
    """Optimizer (with a few moments, to keep the file small), schedule and epoch, as real objects write them."""
    parameters = [torch.nn.Parameter(value.clone()) for value in list(weights.values())[-3:]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    optimizer.step()
    schedule.step()
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "scaler": {"scale": 65536.0}, "epoch": 264}


def _save(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path
