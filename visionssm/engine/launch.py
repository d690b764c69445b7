"""From a command line to a result: what `tools/train.py`, `tools/test.py` and the package's own commands share."""

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from rich.console import Console

from visionssm.errors import UserError

from .config import fill_num_classes, load_config
from .contact_sheet import ContactSheetHook
from .hooks import ExportHook, UnreadableImagesHook
from .progress import ProgressHook
from .runner import Runner

INTERRUPTED = 130  # the shell's exit status for Ctrl-C

_console = Console(soft_wrap=True, highlight=False)


def main_train(argv: Sequence[str] | None = None) -> int:
    """Train from a config, test on its test data, say where everything lies. Returns the exit status."""
    parser = ArgumentParser(description="Train a model from a config.")
    _add_common_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the work directory")
    parser.add_argument("--amp", action="store_true", help="train in mixed precision (needs a GPU)")
    return _run(train, parser, argv)


def main_test(argv: Sequence[str] | None = None) -> int:
    """Test a checkpoint of a training run. Returns the exit status."""
    parser = ArgumentParser(description="Test a checkpoint on the test data of its config.")
    _add_common_arguments(parser)
    parser.add_argument("checkpoint", help="a .pth file that training wrote")
    return _run(test, parser, argv)


def train(args: Namespace) -> None:
    """What `main_train` does, with parsed arguments.

    Raises:
        UserError: wrong input.
        KeyboardInterrupt: Ctrl-C, after saying how to resume.
    """
    cfg = _prepare(args)
    if args.amp:
        _use_amp(cfg)
    if args.resume:
        cfg.load_from = newest_checkpoint(cfg.work_dir)
        cfg.resume = cfg.load_from is not None
        _console.print(f"resuming from {cfg.load_from}" if cfg.resume else f"no checkpoint in {cfg.work_dir} yet: starting anew")
    with _runner(cfg) as runner:
        try:
            runner.train()
        except KeyboardInterrupt:
            _say_how_to_resume(runner)
            raise
        report(runner, checkpoint=newest_checkpoint(cfg.work_dir))


def test(args: Namespace) -> None:
    """What `main_test` does, with parsed arguments.

    Raises:
        UserError: wrong input.
    """
    cfg = _prepare(args)
    cfg.load_from = args.checkpoint
    with _runner(cfg) as runner:
        report(runner, checkpoint=args.checkpoint)


def report(runner: Runner, checkpoint: str | None) -> None:
    """Run the test and print its result and where everything lies."""
    metrics = runner.test()
    if not is_main_process():
        return
    for name, value in metrics.items():
        _console.print(f"{name.rsplit('/', 1)[-1].replace('top', 'top-')}: {value:.1f} %")
    unreadable = sum(len(hook.paths) for hook in runner.hooks if isinstance(hook, UnreadableImagesHook))
    if unreadable:
        _console.print(f"{unreadable} images could not be read and were skipped: {UnreadableImagesHook.path(runner)}")
    places = {"checkpoint": checkpoint, "log": Path(runner.log_dir) / f"{runner.timestamp}.log"}
    for name, hook in (("for timm", ExportHook), ("pictures", ContactSheetHook)):
        if any(isinstance(used, hook) for used in runner.hooks) and hook.path(runner).exists():
            places[name] = hook.path(runner)
    for name, place in places.items():
        _console.print(f"{name:10}  {_short(place)}")


def newest_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint that training wrote last in this folder. Every such file is whole: a Runner moves it there at its end."""
    files = [*Path(work_dir).glob("epoch_*.pth"), *Path(work_dir).glob("iter_*.pth")]
    return str(max(files, key=lambda path: path.stat().st_mtime_ns)) if files else None


def _add_common_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", help="a config file, or the name of one that the package ships")
    parser.add_argument("--work-dir", help="folder for checkpoints and logs; default: work_dirs/<config name>")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="changes to the config, e.g. train_cfg.max_epochs=5",
    )


def _run(command: Callable[[Namespace], None], parser: ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run, and turn what the user can correct into one line."""
    try:
        command(parser.parse_args(argv))
    except UserError as error:
        message = str(error).rpartition(f"{UserError.__name__}: ")[2]  # a loader's worker puts its traceback before it
        sys.stderr.write(f"{parser.prog}: error: {message.strip()}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _prepare(args: Namespace) -> Config:
    cfg = load_config(args.config, args.cfg_options)
    fill_num_classes(cfg)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / _run_name(cfg, args.cfg_options))
    _check_writable(Path(cfg.work_dir))
    return cfg


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--work-dir: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--work-dir: cannot write to {folder}")


def _run_name(cfg: Config, overrides: dict) -> str:
    """The config's name; another model by override gets a folder of its own."""
    other = overrides.get("model.backbone.model_name")
    stem = Path(cfg.filename).stem
    return f"{stem}_{other}" if other else stem


def _use_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        raise UserError("--amp: needs a GPU, and torch sees none")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


@contextmanager
def _runner(cfg: Config) -> Iterator[Runner]:
    """A Runner whose live display is closed whatever happens."""
    runner = Runner.from_cfg(cfg)
    try:
        yield runner
    finally:
        for hook in runner.hooks:
            if isinstance(hook, ProgressHook):
                hook.close()


def _say_how_to_resume(runner: Runner) -> None:
    for hook in runner.hooks:
        if isinstance(hook, ProgressHook):
            hook.close()
    checkpoint = newest_checkpoint(runner.work_dir)
    python = ["python"] if sys.argv[0].endswith(".py") else []
    command = shlex.join([*python, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
    state = f"last checkpoint {_short(checkpoint)}; go on with: {command}" if checkpoint else "no checkpoint had been written yet"
    _console.print(f"interrupted in epoch {runner.epoch + 1} of {runner.max_epochs}: {state}")


def _short(path: str | Path) -> str:
    """Relative to the current folder where it lies in it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
