"""mmengine's Runner with checkpoints that are never half written, never half loaded, and a quiet terminal."""

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import CheckpointLoader
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.utils.data import DataLoader

from visionssm.errors import UserError, first_line, shortened
from visionssm.weights import read_checkpoint

from .dense import annotation_files

_WRAPPER = "MMDistributedDataParallel"
_NO_IMAGE = (
    "a detector's filter_cfg drops images without boxes of metainfo.classes and images smaller than min_size; "
    "a segmentor's data set takes the files in data_prefix.img_path that end in img_suffix"
)


@CheckpointLoader.register_scheme(prefixes=r".*\.safetensors$")
def load_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What `visionssm convert` writes, for mmengine; on the CPU, wherever it goes from there."""
    return {"state_dict": read_checkpoint(filename), "meta": {}}


class Runner(MMEngineRunner):
    """The Runner that every entry point uses; arguments are mmengine's."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The log file takes every line, the terminal only warnings and errors that concern the user."""
        return quiet(super().build_logger(*args, **kwargs))

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Between processes gradients are exchanged where they lie; what the config says of its wrapper goes first.

        On CPUs, where torch refuses synchronised batch norms, plain ones take their place.
        """
        if self.distributed and not torch.cuda.is_available() and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            self.logger.warning("SyncBN needs GPUs: on CPUs every process normalises by the statistics of its own images")
            model = revert_sync_batchnorm(model)
        own = model_wrapper_cfg or {}
        if self.distributed and not is_model_wrapper(model) and own.get("type", _WRAPPER) == _WRAPPER:
            model_wrapper_cfg = {
                "type": _WRAPPER,
                "broadcast_buffers": False,
                "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
                "gradient_as_bucket_view": True,
                **({} if torch.cuda.is_available() else {"device_ids": None}),
                **own,
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def train(self) -> nn.Module:
        """Train, without warnings of what is meant to be so.

        A schedule in iterations goes on while gradients accumulate; a compiled gradient of one channel names other strides than its
        place between processes, for the same numbers in the same order.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            warnings.filterwarnings("ignore", message=r"Detected call of `scheduler.step\(\)` before `optimizer.step\(\)`")
            return super().train()

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        """Also of an iterable data set, which shards itself by what it learns of the loader here; pins memory for a GPU alone.

        Raises:
            UserError: no image, or an annotation file that is none.
        """
        if isinstance(dataloader, dict) and dataloader.get("pin_memory") and not torch.cuda.is_available():
            dataloader = {**dataloader, "pin_memory": False}
        try:
            loader = MMEngineRunner.build_dataloader(dataloader, *args, **kwargs)
        except (ValueError, KeyError, AssertionError) as error:
            # how mmengine's data sets fail when nothing is left to store
            if "need at least one array to concatenate" in str(error):
                raise UserError(f"dataset: no image is left; {_NO_IMAGE}") from error
            files = annotation_files(dataloader) if isinstance(dataloader, dict) else []
            if not files or isinstance(error, UserError):
                raise
            raise UserError(
                f"dataset.ann_file: {shortened(files)} cannot be read as COCO's format: {type(error).__name__}: {first_line(error)}"
            ) from error
        if hasattr(loader.dataset, "set_loader"):
            loader.dataset.set_loader(loader.batch_size, loader.num_workers)
        elif loader.drop_last and not isinstance(loader.sampler, InfiniteSampler) and len(loader) == 0:
            what = f"got {loader.batch_size}, with drop_last, but an epoch has {len(loader.sampler)} images for this process"
            raise UserError(f"train_dataloader.batch_size: {what}")
        return loader

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate by the size of the batch that an update sees over `base_batch_size`.

        mmengine's own rule leaves accumulated batches out. Ends of a schedule that are given in absolute terms are not scaled.
        """
        if not auto_scale_lr or not auto_scale_lr.get("enable", False):
            return
        loader = self._train_dataloader
        batch_size = loader.batch_size if isinstance(loader, DataLoader) else loader["batch_size"]
        total = batch_size * self.world_size * optim_wrapper._accumulative_counts
        ratio = total / auto_scale_lr["base_batch_size"]
        self.logger.info(f"learning rate x {ratio}: {total} images an update, {auto_scale_lr['base_batch_size']} in the config")
        for group in optim_wrapper.optimizer.param_groups:
            group["lr"] *= ratio

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        with written_whole(Path(out_dir) / filename) as partial:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)

    def load_checkpoint(self, filename: str, map_location: str | Callable = "cpu", strict: bool = True, **kwargs: Any) -> dict:
        """Load a checkpoint, `.pth` or `.safetensors`, that fits the model key by key; code in a pickle is never run.

        Raises:
            UserError: no such file, a file that is no checkpoint, or a checkpoint of another model.
        """
        with explained_loading(filename):
            return super().load_checkpoint(filename, map_location, strict, **kwargs)


def quiet(logger: MMLogger) -> MMLogger:
    """The log file takes every line, the terminal only warnings and errors that concern the user.

    One that does not is of accumulated gradients that a resumed run has lost: an epoch leaves none.
    """
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(max(handler.level, logging.WARNING))
            handler.addFilter(lambda record: not re.search("deprecated|^Resumed iteration number", record.getMessage()))
    return logger


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write to; what is there when all went well is moved to `path`."""
    partial = Path(f"{path}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def explained_loading(filename: str) -> Iterator[None]:
    """Around the loading of a checkpoint: no code in it is run, and what is wrong with it is a UserError.

    Raises:
        UserError: no such file, a file that is no checkpoint, or a checkpoint of another model.
    """
    if not Path(filename).is_file():
        raise UserError(f"checkpoint: no such file: {filename}")
    try:
        with _weights_only():
            yield
    except (RuntimeError, UnpicklingError, EOFError) as error:
        headline, *lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if not any(sign in headline for sign in ("do not match", "Error(s) in loading")):
            raise UserError(f"checkpoint: {filename} cannot be read: {headline}") from error
        # all names of a kind are in one line, all shapes that differ in one line each
        reasons = shortened([shortened(line.split(", ")) for line in lines], separator="; ")
        raise UserError(f"checkpoint: {filename} is not of this model: {reasons}") from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Mmengine falls back to unpickling anything; torch's own switch keeps it from that."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
