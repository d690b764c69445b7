"""Time the training loop of a config: `python tools/benchmark_training.py CONFIG [--workers 4 8 16] [--cfg-options KEY=VALUE ...]`.

Three rates in images/s, all in one run: the bare training step (forward, loss, backward, clipping, optimizer) on one batch that
stays on the device; the whole loop (hooks, logs, average, mixing, loader) on synthetic images; and the config's loader alone, for
each number of workers, where its data lies in `data_root`. The loop is to reach the bare step within 5 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from visionssm.engine import OptimWrapperConstructor, Runner
from visionssm.engine.config import load_config
from visionssm.engine.launch import parsed_options
from visionssm.errors import UserError
from visionssm.registry import DATASETS, HOOKS


@DATASETS.register_module()
class SyntheticImages(Dataset):
    """Random images that cost nothing to load."""

    split = "train"

    def __init__(self, length: int, num_classes: int, input_size: int) -> None:
        self.length = length
        self.metainfo = {"classes": tuple(map(str, range(num_classes)))}
        self.images = torch.randint(0, 256, (64, 3, input_size, input_size), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index % 64], "label": index % len(self.metainfo["classes"]), "unreadable": ()}


@HOOKS.register_module()
class StopWatch(Hook):
    """Seconds from the end of step `begin` to the end of the last one."""

    priority = "LOWEST"

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the clock."""
        if batch_idx in (self.begin - 1, runner.max_iters - 1):
            now = clock()
            runner.seconds, runner.began = now - getattr(runner, "began", now), now


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_rate(cfg: Config, steps: int, begin: int, compiled: bool) -> float:
    """Images/s of the training step alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS.build(cfg.model).to(device).train()
    if compiled:
        model.backbone.compile()
    wrapper_cfg = cfg.optim_wrapper.copy()
    wrapper_cfg.pop("constructor", None)
    wrapper = OptimWrapperConstructor(wrapper_cfg, wrapper_cfg.pop("paramwise_cfg", None))(model)
    batch = cfg.train_dataloader.batch_size
    images = torch.randn(batch, 3, cfg.input_size, cfg.input_size, device=device)
    labels = torch.randint(0, model.num_classes, (batch,), device=device)
    for step in range(steps):
        if step == begin:
            started = clock()
        with wrapper.optim_context(model):
            loss = cross_entropy(model.backbone(images).float(), labels)
        wrapper.update_params(loss)
    return batch * (steps - begin) / (clock() - started)


def loop_rate(cfg: Config, steps: int, begin: int, compiled: bool, folder: str) -> float:
    """Images/s of the whole loop."""
    batch, classes = cfg.train_dataloader.batch_size, cfg.model.backbone.num_classes
    data = {"type": "visionssm.SyntheticImages", "length": batch * steps, "num_classes": classes, "input_size": cfg.input_size}
    cfg = Config(
        {
            **{key: value for key, value in cfg.to_dict().items() if not key.startswith(("val_", "test_"))},
            "train_dataloader": {**cfg.train_dataloader, "dataset": data, "sampler": {"type": "DefaultSampler", "shuffle": True}},
            "train_cfg": {"by_epoch": True, "max_epochs": 1},
            "param_scheduler": None,
            "work_dir": folder,
            "default_hooks": {**cfg.default_hooks, "checkpoint": None},
            "custom_hooks": [hook for hook in cfg.custom_hooks if hook["type"] in ("visionssm.EMAHook", "visionssm.DataCheckHook")]
            + [{"type": "visionssm.StopWatch", "begin": begin}],
        }
    )
    runner = Runner.from_cfg(cfg)
    if compiled:
        runner.model.backbone.compile()
    runner.train()
    return batch * (steps - begin) / runner.seconds


def loader_rate(cfg: Config, workers: int, seconds: float) -> float:
    """Images/s of the loader without a model, after its first batches."""
    loader = Runner.build_dataloader({**cfg.train_dataloader, "num_workers": workers}, seed=0)
    images, started = 0, 0.0
    for number, batch in enumerate(loader):
        if number == max(4, workers):  # the workers have started
            started = time.perf_counter()
        elif started:
            images += len(batch["labels"])
            if time.perf_counter() - started > seconds:
                break
    if not images:
        raise UserError(f"data_root: {workers} workers leave no batch to measure in {len(loader)}; more images, or smaller batches")
    return images / (time.perf_counter() - started)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--steps", type=int, default=100, help="training steps; the first fifth is not counted")
    parser.add_argument("--compile", action="store_true", help="run the backbone through torch.compile")
    parser.add_argument("--workers", nargs="*", type=int, default=[], help="numbers of workers to time the loader with")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each number of workers")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    cfg = load_config(arguments.config, parsed_options(arguments.cfg_options))
    begin = max(1, arguments.steps // 5)
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_rate(cfg, arguments.steps, begin, arguments.compile)
        loop = loop_rate(cfg, arguments.steps, begin, arguments.compile, folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    batch = cfg.train_dataloader.batch_size
    print(f"{device}, torch {torch.__version__}, {cfg.model.backbone.model_name}, {cfg.input_size} px, batch {batch}")
    print(f"bare step     {bare:9.1f} images/s")
    print(f"training loop {loop:9.1f} images/s, {loop / bare:.3f} of the bare step")
    for workers in arguments.workers:
        print(f"loader alone  {loader_rate(cfg, workers, arguments.seconds):9.1f} images/s with {workers} workers", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmark_training: {error}")
