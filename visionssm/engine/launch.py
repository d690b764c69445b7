"""From a command line to a result: what `tools/train.py`, `tools/test.py` and the package's own commands share."""

import itertools
import shlex
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.registry.build_functions import build_from_cfg
from rich.console import Console

from visionssm.commands.training import add_test_arguments, add_train_arguments, compile_mode
from visionssm.errors import UserError, first_line

from .config import CLASSIFIERS, fill_num_classes, load_config
from .contact_sheet import ContactSheetHook
from .dense import check_channels, check_files, check_precision
from .distributed import compile_backbone, leave, process_group, unwrapped
from .hooks import ExportHook, UnreadableImagesHook
from .learning_curve import LearningCurveHook
from .metrics import in_percent
from .progress import ProgressHook, position
from .published import is_of_a_backbone, load_published
from .runner import Runner
from .sharded import FlexibleRunner
from .work_dir import check_kept, check_space, check_writable

INTERRUPTED = 130  # the shell's exit status for Ctrl-C

_LOWER = (
    "out of memory on the device: lower train_dataloader.batch_size and raise optim_wrapper.accumulative_counts by "
    "the same factor, which trains alike; or lower input_size, or add --amp ({})"
)

_console = Console(soft_wrap=True, highlight=False)
_runs = itertools.count(1)  # of this process


def main_train(argv: Sequence[str] | None = None) -> int:
    """Train from a config, test on its test data, say where everything lies. Returns the exit status.

    One of several processes does not return, it ends: `distributed.leave`.
    """
    parser = ArgumentParser(description="Train a model from a config.")
    add_train_arguments(parser)
    return leave(_run(train, parser, argv))


def main_test(argv: Sequence[str] | None = None) -> int:
    """Test a checkpoint, a training's or a published one. Returns the exit status, or ends, as `main_train` does."""
    parser = ArgumentParser(description="Test a checkpoint, a training's or a published one, on the test data of a config.")
    add_test_arguments(parser)
    return leave(_run(test, parser, argv))


def train(args: Namespace) -> dict[str, float]:
    """What `main_train` does, with parsed arguments. Returns the test's metrics, in percent.

    Raises:
        UserError: wrong input.
        KeyboardInterrupt: Ctrl-C, after saying how to resume.
    """
    with _explained(), process_group() as distributed:
        cfg = _prepare(args, distributed)
        check_files(cfg)
        if args.amp:
            _use_amp(cfg)
        if args.resume:
            cfg.load_from = newest_checkpoint(cfg.work_dir)
            cfg.resume = cfg.load_from is not None
            _say(f"resuming from {cfg.load_from}" if cfg.resume else f"no checkpoint in {cfg.work_dir} yet: starting anew")
            if cfg.resume:
                _without_initial_weights(cfg)
        with _runner(cfg) as runner:
            check_kept(runner)
            check_space(runner)
            if mode := compile_mode(args):
                compile_backbone(runner.model, mode)
            try:
                with _interruptions():
                    runner.train()
            except KeyboardInterrupt:
                _say_how_to_resume(runner)
                raise
            return report(runner, checkpoint=newest_checkpoint(cfg.work_dir))


def test(args: Namespace) -> dict[str, float]:
    """What `main_test` does, with parsed arguments. Returns the metrics, in percent.

    Raises:
        UserError: wrong input.
    """
    with _explained(), process_group() as distributed:
        cfg = _prepare(args, distributed)
        check_files(cfg, ["test_dataloader"])
        checkpoint, published = args.checkpoint, is_of_a_backbone(cfg, args.checkpoint)
        cfg.load_from = None if published else checkpoint
        _without_initial_weights(cfg)
        # the averaged weights are a checkpoint's weights, so nothing is left to average or to swap
        cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks", []) if hook["type"] not in ("EMAHook", "visionssm.EMAHook")]
        if args.tta:
            if cfg.model.get("type") not in CLASSIFIERS:
                raise UserError(f"--tta: expected a model of type {' or '.join(CLASSIFIERS)}, got {cfg.model.get('type')}")
            cfg.model.flip_test = True
        with _runner(cfg) as runner:
            if published:
                checkpoint, note = load_published(runner, cfg, checkpoint)
                if note:
                    _say(f"note: {note}")
            return report(runner, checkpoint=checkpoint)


def report(runner: Runner, checkpoint: str | None) -> dict[str, float]:
    """Run the test, print its result, in percent, and where everything lies; return the result."""
    metrics = in_percent(runner.test())
    for name, value in metrics.items():
        _say(f"{name.replace('top', 'top-')}: {value:.1f} %")
    unreadable = sum(hook.total(runner) for hook in runner.hooks if isinstance(hook, UnreadableImagesHook))
    if unreadable:
        _say(f"{unreadable} images could not be read and were skipped: {UnreadableImagesHook.path(runner)}")
    places = {"checkpoint": checkpoint} if checkpoint else {}
    places["log"] = Path(runner.log_dir) / f"{runner.timestamp}.log"
    for name, hook in (("for timm", ExportHook), ("pictures", ContactSheetHook), ("curve", LearningCurveHook)):
        if any(isinstance(used, hook) for used in runner.hooks) and hook.path(runner).exists():
            places[name] = hook.path(runner)
    for name, place in places.items():
        _say(f"{name:10}  {_short(place)}")
    return metrics


def newest_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint that training wrote last in this folder. Every such file is whole: a Runner moves it there at its end."""
    files = [*Path(work_dir).glob("epoch_*.pth"), *Path(work_dir).glob("iter_*.pth")]
    return str(max(files, key=lambda path: path.stat().st_mtime_ns)) if files else None


def _run(command: Callable[[Namespace], None], parser: ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run, and turn what the user can correct into one line."""
    try:
        command(parser.parse_args(argv))
    except UserError as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@contextmanager
def _interruptions() -> Iterator[None]:
    """An interruption as such: mmengine takes one that comes while it formats a config for an error of the config's."""
    try:
        yield
    except SyntaxError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _explained() -> Iterator[None]:
    """What the user can correct, as a UserError of one line.

    Raises:
        UserError: one from a loader's worker without its traceback; a missing file; arguments that a part of a config does not
            take; too little memory, with what to lower.
    """
    try:
        with _interruptions():
            yield
    except UserError as error:
        message = str(error).rpartition(f"{UserError.__name__}: ")[2]
        raise UserError(" ".join(message.split())) from error
    except FileNotFoundError as error:
        reason = str(error).rpartition(f"{FileNotFoundError.__name__}: ")[2]
        raise UserError(" ".join(reason.split())) from error
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(_LOWER.format(first_line(error))) from error
        part = _failed_part(error)
        if part is None:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"config: {part} cannot be built of what it is given: {reason}") from error


def _failed_part(error: Exception) -> str | None:
    """The class that a config names and that failed to be built, the innermost; None if something else failed."""
    names = [
        getattr(frame.f_locals.get("obj_cls"), "__name__", None)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code is build_from_cfg.__code__
    ]
    return names[-1] if names else None


def _prepare(args: Namespace, distributed: bool) -> Config:
    overrides = parsed_options(args.cfg_options)
    cfg = load_config(args.config, overrides)
    fill_num_classes(cfg)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / _run_name(cfg, overrides))
    check_writable(Path(cfg.work_dir))
    if distributed:
        cfg.launcher = "pytorch"
    return cfg


def parsed_options(options: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` strings as mmengine reads them."""
    for option in options:
        if "=" not in option:
            raise UserError(f"--cfg-options: got {option!r}, expected KEY=VALUE")
    namespace = Namespace()
    DictAction([], "parsed")(ArgumentParser(), namespace, list(options))
    return namespace.parsed


def _run_name(cfg: Config, overrides: dict) -> str:
    """The config's name; another model by override gets a folder of its own."""
    other = overrides.get("model.backbone.model_name")
    stem = Path(cfg.filename).stem
    return f"{stem}_{other}" if other else stem


def _use_amp(cfg: Config) -> None:
    """Mixed precision in what the config names, else in bfloat16; a wrapper of another kind has its own."""
    wrapper = cfg.optim_wrapper
    if wrapper.get("type", "OptimWrapper") in ("OptimWrapper", "visionssm.OptimWrapper"):
        wrapper.type = "visionssm.OptimWrapper"
        wrapper.dtype = wrapper.get("dtype") or "bfloat16"


def _without_initial_weights(cfg: Config) -> None:
    """The checkpoint has all weights: those that training began with are not looked for, nor fetched."""
    if "pretrained" in cfg.model.get("backbone", {}):
        cfg.model.backbone.pretrained = False


def _runner_class(cfg: Config) -> type[Runner] | type[FlexibleRunner]:
    classes = {"Runner": Runner, "FlexibleRunner": FlexibleRunner}
    name = cfg.get("runner_type", "Runner")
    if name not in classes:
        raise UserError(f"runner_type: got {name!r}, expected {' or '.join(classes)}")
    return classes[name]


@contextmanager
def _runner(cfg: Config) -> Iterator[Runner]:
    """A Runner with a log of its own, whose live display is closed whatever happens."""
    if (number := next(_runs)) > 1:  # mmengine tells runs of a process apart by the config and the second at which they start
        cfg.experiment_name = f"{cfg.get('experiment_name') or Path(cfg.filename).stem}-{number}"
    runner = _runner_class(cfg).from_cfg(cfg)
    try:
        check_channels(unwrapped(runner.model))
        check_precision(unwrapped(runner.model), cfg.get("optim_wrapper") or {})
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
    _say(f"interrupted in {position(runner, ' of ')}: {state}")


def _say(line: str) -> None:
    if is_main_process():
        _console.print(line)


def _short(path: str | Path) -> str:
    """Relative to the current folder where it lies in it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
