"""A run's folder: can it be written, will the checkpoints fit, and does one always lie there?"""

import shutil
import tempfile
from pathlib import Path

from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.runner import Runner

from visionssm.errors import UserError

from .distributed import unwrapped


def check_writable(folder: Path) -> None:
    """Make the folder, and write a file into it: permissions alone do not say whether that works.

    Raises:
        UserError: neither can be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"--work-dir: cannot write to {folder}: {error.strerror or error}") from error


def check_kept(runner: Runner) -> None:
    """See that there is always a whole checkpoint: mmengine removes the oldest before it writes the next.

    Raises:
        UserError: only one is kept.
    """
    if any(hook.max_keep_ckpts == 1 for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        raise UserError(
            "default_hooks.checkpoint.max_keep_ckpts: got 1, expected at least 2, or -1 for all: the oldest is removed before the "
            "next is written"
        )


def check_space(runner: Runner) -> None:
    """Compare what the checkpoints will need with what is free.

    A checkpoint holds the weights, AdamW's two moments and, with a moving average, the averaged weights; while the next one is
    written, one more than `max_keep_ckpts` lie there.

    Raises:
        UserError: too little space.
    """
    keeping = [hook.max_keep_ckpts for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    if not keeping:
        return
    averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    weights = sum(p.numel() * p.element_size() for p in unwrapped(runner.model).parameters())
    count = keeping[0] + 1 if keeping[0] > 0 else 2
    need = count * weights * (4 if averaged else 3)
    present = sum(file.stat().st_size for file in Path(runner.work_dir).glob("epoch_*.pth"))
    free = shutil.disk_usage(runner.work_dir).free + present
    if free < need:
        raise UserError(f"--work-dir: {runner.work_dir} has {free / 1e6:.0f} MB left, {count} checkpoints need {need / 1e6:.0f} MB")
