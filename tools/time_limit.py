"""Training for a given time, whatever the number of updates that fit: for a machine that is there for minutes."""

import math
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from visionssm import config_path
from visionssm.registry import HOOKS

CONFIG = """
_base_ = {base!r}
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=10**9, val_interval=10**9)
param_scheduler = None
train_dataloader = dict(sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True))
default_hooks = dict(checkpoint=None)
custom_hooks = [dict(type="visionssm.TimeLimit", seconds={seconds})]
"""


@HOOKS.register_module()
class TimeLimit(Hook):
    """A learning rate that follows the clock: linear over the first updates, then a cosine to 0 at the end, where training stops.

    So the time of an update need not be known. The loop is one of iterations; a checkpoint is written at its end.

    Args:
        seconds: time from the first update on.
        warmup: updates in which the learning rate rises.
    """

    priority = "HIGHEST"  # before the hook that logs the learning rate

    def __init__(self, seconds: float, warmup: int = 100) -> None:
        self.seconds, self.warmup = seconds, warmup
        self.begin: float | None = None
        self.rates: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Remember the optimizer's own learning rates."""
        self.rates = [group["lr"] for group in runner.optim_wrapper.param_groups]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the learning rates. The clock starts here, with the first batch at hand."""
        if self.begin is None:
            self.begin = time.monotonic()
        share = min(1.0, (time.monotonic() - self.begin) / self.seconds)
        factor = min(1.0, (runner.iter + 1) / self.warmup) * (1 + math.cos(math.pi * share)) / 2
        for group, rate in zip(runner.optim_wrapper.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop when the time is over."""
        runner.train_loop.stop_training = time.monotonic() - self.begin >= self.seconds

    def after_train(self, runner: Runner) -> None:
        """Write the checkpoint."""
        runner.save_checkpoint(runner.work_dir, f"iter_{runner.iter}.pth", save_optimizer=False, save_param_scheduler=False)


def timed_config(name: str, seconds: float, folder: Path) -> str:
    """A config in `folder` that trains like the one called `name`, but for `seconds`. Returns its path."""
    path = folder / "timed.py"
    path.write_text(CONFIG.format(base=str(config_path(name)), seconds=seconds))
    return str(path)
