"""What a training run shows on the terminal: one bar, or one line per epoch where the output is no terminal."""

import resource
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from visionssm.registry import HOOKS

from .metrics import in_percent


@HOOKS.register_module()
class ProgressHook(Hook):
    """Progress with loss, accuracy, learning rate, images/s, memory, time left; mmengine's own lines go to the log file alone.

    Args:
        window: number of iterations over which loss and accuracy are averaged.
        refresh: seconds between two updates of the bar. It shows values that have been logged already and waits for no device.
    """

    priority = "VERY_LOW"

    def __init__(self, window: int = 20, refresh: float = 0.5) -> None:
        self.window = window
        self.refresh = refresh
        self.console = Console()
        self.bar: Progress | None = None
        self.metrics: dict[str, float] = {}
        self.begin, self.first_iter, self.shown = time.monotonic(), 0, 0.0

    def before_train(self, runner: Runner) -> None:
        """Start the bar at the iteration from which training goes on."""
        self.begin, self.first_iter = time.monotonic(), runner.iter
        self.open("training", total=runner.max_iters, completed=runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        """Move the bar."""
        if self.bar and time.monotonic() - self.shown > self.refresh:
            self.shown = time.monotonic()
            status = self.status(runner, runner.iter + 1, self.metrics)
            self.show(position(runner), runner.iter + 1, status)

    def after_train_epoch(self, runner: Runner) -> None:
        """Without a terminal: one line per epoch."""
        self.print_line(f"{position(runner)}  {self.status(runner, runner.iter, {})}")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Show the newest validation result in the bar; without a terminal: a line."""
        self.metrics = in_percent(metrics or {})
        epoch = position(runner, done=True)
        self.show(epoch, runner.iter, self.status(runner, runner.iter, self.metrics))
        self.print_line(f"{epoch}  {'  '.join(_validation(self.metrics))}")

    def after_train(self, runner: Runner) -> None:
        """Close the bar."""
        self.close()

    def before_test(self, runner: Runner) -> None:
        """Start a bar for the test images."""
        self.open("test", total=len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move the bar."""
        self.show("test", batch_idx + 1, "")

    def after_test(self, runner: Runner) -> None:
        """Close the bar."""
        self.close()

    def status(self, runner: Runner, done: int, metrics: dict[str, float]) -> str:
        """Means of the last iterations, the newest validation result, the time left."""
        scalars = runner.message_hub.log_scalars
        parts = [
            f"{name} {scalars[f'train/{name}'].mean(self.window):{form}}"
            for name, form in (("loss", ".3f"), ("accuracy", ".1f"))
            if f"train/{name}" in scalars
        ]
        if "train/time" in scalars:
            images = runner.train_dataloader.batch_size * runner.world_size
            parts += [
                f"lr {scalars['train/lr'].current():.2e}",
                f"{images / scalars['train/time'].mean(self.window):.0f} images/s",
                f"{_memory() / 1e9:.1f} GB",
            ]
        elapsed = time.monotonic() - self.begin
        left = elapsed / max(done - self.first_iter, 1) * (runner.max_iters - done)
        return "  ".join([*parts, *_validation(metrics), f"left {timedelta(seconds=round(left))}"])

    def open(self, description: str, total: int, completed: int = 0) -> None:
        """Show a bar, where there is a terminal."""
        if is_main_process() and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), console=self.console
            )
            self.bar.add_task(description, total=total, completed=completed, status="")
            self.bar.start()

    def show(self, description: str, completed: int, status: str) -> None:
        """Update the bar, if there is one."""
        if self.bar:
            self.bar.update(TaskID(0), description=description, completed=completed, status=status)

    def print_line(self, line: str) -> None:
        """Print a line, where there is no terminal for a bar."""
        if is_main_process() and not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the live display; the terminal's cursor comes back."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def position(runner: Runner, of: str = "/", done: bool = False) -> str:
    """How far training is: the epoch that runs, or is done, or where a schedule has no epochs the iteration."""
    unit, number, total = "epoch", runner.epoch, runner.max_epochs
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        unit, number, total = "iteration", runner.iter, runner.max_iters
    return f"{unit} {min(number + (not done), total)}{of}{total}"


def _validation(metrics: dict[str, float]) -> list[str]:
    return [f"val {name} {value:.1f}" for name, value in metrics.items()]


def _memory() -> int:
    """Bytes that this process has needed at most, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
