"""A picture of test images with what the model says they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from visionssm.registry import HOOKS


@HOOKS.register_module()
class ContactSheetHook(Hook):
    """Writes `predictions.png` into the work directory after a test.

    Args:
        rows: rows of images.
        columns: columns of images, spread evenly over the test set.
    """

    def __init__(self, rows: int = 4, columns: int = 8) -> None:
        self.rows = rows
        self.columns = columns
        self.cells: list[tuple[np.ndarray, int, int, float]] = []

    @staticmethod
    def path(runner: Runner) -> Path:
        """Where the picture lies."""
        return Path(runner.work_dir) / "predictions.png"

    def before_test_epoch(self, runner: Runner) -> None:
        """Choose the images."""
        loader = runner.test_dataloader
        size = len(loader.sampler) if hasattr(loader.sampler, "__len__") else len(loader.dataset)
        self.wanted = set(np.linspace(0, size - 1, min(size, self.rows * self.columns)).round().astype(int).tolist())
        self.seen = 0
        self.cells = []

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep the chosen images of this batch with their predictions."""
        for offset, output in enumerate(outputs):
            if self.seen + offset in self.wanted:
                score, prediction = output["scores"].max(0)
                image = data_batch["images"][offset].permute(1, 2, 0).cpu().numpy()
                self.cells.append((image, data_batch["labels"][offset].item(), prediction.item(), score.item()))
        self.seen += len(outputs)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Draw the sheet: right predictions in green, wrong ones in red with the truth."""
        if not is_main_process():
            return
        from matplotlib.figure import Figure  # a second to import

        classes = runner.test_dataloader.dataset.metainfo["classes"]
        figure = Figure(figsize=(1.6 * self.columns, 1.9 * self.rows), layout="constrained")
        for axes in (grid := figure.subplots(self.rows, self.columns, squeeze=False)).flat:
            axes.axis("off")
        for axes, (image, label, prediction, score) in zip(grid.flat, self.cells, strict=False):
            axes.imshow(image)
            right = label == prediction
            caption = f"{classes[prediction]}  {score:.0%}"
            if not right:
                caption += f"\nis {classes[label]}" if label >= 0 else "\nunreadable"
            axes.set_title(caption, fontsize=9, color="tab:green" if right else "tab:red")
        figure.savefig(self.path(runner), dpi=100)
