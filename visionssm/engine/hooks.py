"""Small hooks: randomness, unreadable images, the class count, weights for timm."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from timm.models import save_for_hf

from visionssm.errors import UserError
from visionssm.registry import HOOKS


@HOOKS.register_module()
class RandomnessHook(Hook):
    """Seeds every generator from (seed, rank, epoch) before each epoch.

    A checkpoint holds no generator's state; with this, the epochs after a resume draw the same augmentations, drop paths
    and worker seeds as they would have drawn without the interruption.
    """

    priority = "VERY_HIGH"

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed `random`, numpy and torch."""
        words = np.random.SeedSequence((runner.seed, runner.rank, runner.epoch)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])  # noqa: NPY002  timm's and torchvision's transforms use the legacy generator
        torch.manual_seed(int(words[2]))


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

    @staticmethod
    def path(runner: Runner) -> Path:
        """Where the list lies."""
        return Path(runner.log_dir) / "unreadable.txt"


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Refuses data whose number of classes is not the model's."""

    def before_train(self, runner: Runner) -> None:
        """Check the training data."""
        self.check(runner, runner.train_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self.check(runner, runner.test_dataloader.dataset)

    @staticmethod
    def check(runner: Runner, dataset: torch.utils.data.Dataset) -> None:
        """Compare the two counts.

        Raises:
            UserError: they differ.
        """
        model = _unwrapped(runner.model)
        found = len(dataset.metainfo["classes"])
        if found != model.num_classes:
            raise UserError(f"model.backbone.num_classes: got {model.num_classes}, the {dataset.split} data has {found} classes")


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
        if not is_main_process():
            return
        dataset = runner.train_dataloader.dataset if runner.val_loop is None else runner.val_loop.dataloader.dataset
        save_for_hf(
            _unwrapped(runner.model).backbone,
            self.path(runner),
            model_config={"label_names": list(dataset.metainfo["classes"])},
            data_config=dataset.data_config,
            safe_serialization=True,
        )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if is_model_wrapper(model) else model
