"""Small hooks: randomness, logged values, moving average, unreadable images, data that fits, weights for timm."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.hooks import Hook, LoggerHook
from mmengine.hooks import RuntimeInfoHook as MMEngineRuntimeInfoHook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner
from mmengine.runner.amp import autocast
from timm.models import save_for_hf

from visionssm.errors import UserError
from visionssm.registry import HOOKS, MODELS

from .dense import check_classes
from .distributed import unwrapped
from .optim import OptimWrapper


@HOOKS.register_module()
class RandomnessHook(Hook):
    """Seeds every generator from (seed, rank, epoch) before each epoch, and tells iterable data sets and the optimizer's wrapper.

    A checkpoint holds no generator's state, and no gradients; with this, the epochs after a resume draw the same augmentations,
    mixtures, drop paths and worker seeds, and update as often, as they would have without the interruption.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed `random`, numpy and torch; begin to count batches."""
        words = np.random.SeedSequence((runner.seed, runner.rank, runner.epoch)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])  # noqa: NPY002  timm's and torchvision's transforms use the legacy generator
        torch.manual_seed(int(words[2]))
        if isinstance(runner.train_dataloader.dataset, torch.utils.data.IterableDataset):
            runner.train_dataloader.dataset.set_epoch(runner.epoch)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and isinstance(runner.optim_wrapper, OptimWrapper):
            runner.optim_wrapper.begin_epoch(len(runner.train_dataloader))


@HOOKS.register_module()
class RuntimeInfoHook(MMEngineRuntimeInfoHook):
    """mmengine's, but it reads the losses of several iterations at once, when the logger writes: reading one waits for a GPU."""

    def __init__(self) -> None:
        self.interval = 1
        self.pending: list[dict[str, torch.Tensor]] = []

    def before_train(self, runner: Runner) -> None:
        """Find out how often the logger writes."""
        super().before_train(runner)
        self.interval = min((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), default=1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Keep this iteration's values, and log what has gathered.

        Raises:
            UserError: a loss that is not finite.
        """
        values = {name: value.detach() for name, value in (outputs or {}).items()}
        norm = getattr(runner.optim_wrapper, "grad_norm", None)
        self.pending.append(values if norm is None else {**values, "grad_norm": norm.detach()})
        at_once = all(value.device.type == "cpu" for value in values.values())
        if at_once or self.every_n_inner_iters(batch_idx, self.interval) or self.end_of_epoch(runner.train_dataloader, batch_idx):
            self.flush(runner)

    def flush(self, runner: Runner) -> None:
        """Read what is pending in one transfer."""
        for name in self.pending[-1]:
            column = torch.stack([values[name] for values in self.pending if name in values])
            for offset, value in enumerate(column.tolist()):
                if name == "loss" and not math.isfinite(value):
                    iteration = runner.iter + 2 - len(column) + offset
                    raise UserError(
                        f"the loss is {value} in iteration {iteration}: lower optim_wrapper.optimizer.lr, or train in full "
                        "precision (optim_wrapper.dtype=None) or in bfloat16; the last checkpoint is of an epoch before it"
                    )
                runner.message_hub.update_scalar(f"train/{name}", value)
        self.pending = []


@MODELS.register_module()
class WeightAverage(ExponentialMovingAverage):
    """mmengine's, in a few kernels for all weights together instead of one for each."""

    def update_parameters(self, model: torch.nn.Module) -> None:
        """Move the average towards the model's weights, at the first call onto them; copy its buffers."""
        sources, averages = list(model.parameters()), list(self.module.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, sources, self.momentum if self.steps else 1.0)
            for average, source in zip(self.module.buffers(), model.buffers(), strict=True):
                average.copy_(source)
        self.steps += 1


@HOOKS.register_module()
class EMAHook(MMEngineEMAHook):
    """Moving average of the weights: it is what gets evaluated, exported and stored as a checkpoint's `state_dict`.

    The trained weights lie in the checkpoint's `ema_state_dict`, for resuming. While gradients accumulate nothing is averaged, so
    that `decay` counts updates, not batches.

    Args:
        decay: share of the old average that an update keeps.
        validate_both: validate the trained weights too, before the average; their figures are logged as `<figure>_trained`.
    """

    def __init__(self, decay: float = 0.9999, validate_both: bool = False) -> None:
        self.validate_both = validate_both
        super().__init__(ema_type="visionssm.WeightAverage", momentum=1 - decay)

    def before_run(self, runner: Runner) -> None:
        """Begin an average, unless this runner has one: a test that follows a training is a run of its own to mmengine."""
        if not hasattr(self, "ema_model"):
            super().before_run(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        """Validate what has been trained, if that is wanted, and put the average in its place."""
        if self.validate_both:
            loop = runner.val_loop
            runner.model.eval()
            with torch.no_grad(), autocast(enabled=loop.fp16):
                for batch in loop.dataloader:
                    loop.evaluator.process(data_samples=runner.model.val_step(batch), data_batch=batch)
            metrics = loop.evaluator.evaluate(len(loop.dataloader.dataset))
            runner.visualizer.add_scalars({f"{name}_trained": value for name, value in metrics.items()}, step=runner.epoch)
        super().before_val_epoch(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Average, if the optimizer has made a step."""
        if runner.optim_wrapper.should_update():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Counts the images that could not be read, and lists them in `unreadable.txt` in the work directory."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any] | None = None, outputs: Any = None
    ) -> None:
        """Note this batch's unreadable images."""
        self.note(runner, data_batch)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any] | None = None, outputs: Any = None
    ) -> None:
        """Note this batch's unreadable images."""
        self.note(runner, data_batch)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Mapping[str, Any] | None = None, outputs: Any = None
    ) -> None:
        """Note this batch's unreadable images."""
        self.note(runner, data_batch)

    def note(self, runner: Runner, data_batch: Mapping[str, Any]) -> None:
        """Log and list the images that are new here."""
        new = sorted(set(data_batch["unreadable"]) - self.paths)
        if new:
            self.paths.update(new)
            with self.path(runner).open("a", encoding="utf-8") as file:
                file.writelines(f"{path}\n" for path in new)
            for path in new:
                runner.logger.info(f"skipped an image that cannot be read: {path}")

    def total(self, runner: Runner) -> int:
        """How many all processes have met; the list gets each once. All processes have to call this."""
        together = sorted(set().union(*all_gather_object(self.paths)))
        if together and is_main_process():
            self.path(runner).write_text("".join(f"{path}\n" for path in together), encoding="utf-8")
        return len(together)

    @staticmethod
    def path(runner: Runner) -> Path:
        """Where the list lies."""
        return Path(runner.log_dir) / "unreadable.txt"


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Refuses data that does not fit the model, before the first batch: classes, odd batches, other epochs than before a resume."""

    def __init__(self) -> None:
        self.learnt: tuple[str, ...] | None = None  # classes that the weights stand for, in their order

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Remember the classes of a training that goes on, or is tested; one that starts from other weights learns its own."""
        classes = (checkpoint.get("meta") or {}).get("dataset_meta", {}).get("classes")
        if classes is not None and (runner._resume or not isinstance(runner._train_loop, BaseLoop)):
            self.learnt = tuple(classes)

    def before_train(self, runner: Runner) -> None:
        """Check the training data, and the validation data against it."""
        dataset = runner.train_dataloader.dataset
        self.check_classes(runner, dataset)
        self.learnt = tuple(dataset.metainfo["classes"])
        if runner.val_loop is not None:
            self.check_classes(runner, runner.val_loop.dataloader.dataset)
        self.check_batches(runner)
        self.check_progress(runner)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self.check_classes(runner, runner.test_dataloader.dataset)

    def check_classes(self, runner: Runner, dataset: torch.utils.data.Dataset) -> None:
        """Compare the data's classes with the model's: their number, and as far as is known their names and order.

        Raises:
            UserError: they differ.
        """
        model, classes = unwrapped(runner.model), tuple(dataset.metainfo["classes"])
        if len(classes) != model.num_classes:
            found = f"the {dataset.split} data has {len(classes)} classes"
            raise UserError(f"model.backbone.num_classes: got {model.num_classes}, {found}")
        pairs = zip(self.learnt or classes, classes, strict=True)
        for label, (learnt, found) in enumerate(pairs):
            if found != learnt:
                raise UserError(
                    f"dataset.class_map: label {label} is {found!r} in the {dataset.split} data and {learnt!r} in training; "
                    "expected the same classes in the same order"
                )

    @staticmethod
    def check_batches(runner: Runner) -> None:
        """Check that mixup finds pairs, and that an epoch's randomness depends on its number alone.

        Raises:
            UserError: mixup with odd batches; workers that live longer than an epoch.
        """
        loader = runner.train_dataloader
        if loader.persistent_workers:
            raise UserError("train_dataloader.persistent_workers: expected False, as a resumed run could not repeat their state")
        if getattr(unwrapped(runner.model).data_preprocessor, "mixup", None) is None:
            return
        if loader.batch_size % 2:
            raise UserError(f"train_dataloader.batch_size: got {loader.batch_size}, expected an even number, as mixup pairs images")
        last = 0 if loader.drop_last or not hasattr(loader.sampler, "__len__") else len(loader.sampler) % loader.batch_size
        if last % 2:
            raise UserError(f"train_dataloader.drop_last: expected True with mixup, as the last batch has an odd {last} images")

    @staticmethod
    def check_progress(runner: Runner) -> None:
        """Check that an epoch has as many batches as before a resume: the schedule in the checkpoint counts them.

        Raises:
            UserError: it has not.
        """
        expected = runner.epoch * len(runner.train_dataloader)
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and runner.param_schedulers and runner.iter != expected:
            raise UserError(
                f"--resume: the checkpoint has {runner.iter} batches behind it in {runner.epoch} epochs, this train_dataloader "
                f"would have {expected}, and the schedule counts them: take the same data, and a batch_size that, times the "
                "number of processes, is what it was"
            )


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Compares the number of the data's classes with that of a detector's or a segmentor's heads, before the first batch."""

    def before_train(self, runner: Runner) -> None:
        """Check the training data."""
        check_classes(unwrapped(runner.model), runner.train_dataloader.dataset.metainfo)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        check_classes(unwrapped(runner.model), runner.test_dataloader.dataset.metainfo)


@HOOKS.register_module()
class ExportHook(Hook):
    """Writes the trained backbone to `timm/` in the work directory, for `timm.create_model("local-dir:...", pretrained=True)`.

    The folder holds `model.safetensors` and a `config.json` with the class names and the test preprocessing.
    """

    @staticmethod
    def path(runner: Runner) -> Path:
        """Where the folder lies."""
        return Path(runner.work_dir) / "timm"

    def after_train(self, runner: Runner) -> None:
        """Write the folder."""
        backbone = self.trained(runner).backbone
        if hasattr(runner, "strategy"):  # the weights may be spread over the processes
            whole = runner.strategy.model_state_dict()
            backbone = MODELS.build(runner.cfg.model).backbone
        if not is_main_process():
            return
        if hasattr(runner, "strategy"):
            backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in whole.items()})
        dataset = runner.train_dataloader.dataset if runner.val_loop is None else runner.val_loop.dataloader.dataset
        save_for_hf(
            backbone,
            self.path(runner),
            model_config={"label_names": list(dataset.metainfo["classes"])},
            data_config=dataset.data_config,
            safe_serialization=True,
        )

    @staticmethod
    def trained(runner: Runner) -> torch.nn.Module:
        """The averaged model, where there is one."""
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, MMEngineEMAHook)]
        return averages[0] if averages else unwrapped(runner.model)
