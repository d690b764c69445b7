"""A picture of how training went."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from visionssm.registry import HOOKS


@HOOKS.register_module()
class LearningCurveHook(Hook):
    """Draws loss, validation accuracy and learning rate over the epochs into `learning_curve.png` in the work directory.

    It reads the JSON logs of all runs in that folder, so that a resumed training is drawn from its beginning.
    """

    priority = "VERY_LOW"  # after the logger has written the last values

    @staticmethod
    def path(runner: Runner) -> Path:
        """Where the picture lies."""
        return Path(runner.work_dir) / "learning_curve.png"

    def after_train(self, runner: Runner) -> None:
        """Draw."""
        if not is_main_process():
            return
        from matplotlib.figure import Figure  # a second to import

        training, validation = read_logs(Path(runner.work_dir))
        epoch_length = len(runner.train_dataloader)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        epochs = [row["iter"] / epoch_length for row in training]
        marker = "." if len(epochs) < 30 else None
        loss.plot(epochs, [row["loss"] for row in training], color="tab:blue", marker=marker)
        loss.set_ylabel("training loss", color="tab:blue")
        rate.plot(epochs, [row["lr"] for row in training], color="tab:gray", marker=marker)
        rate.set_ylabel("learning rate")
        rate.set_xlabel("epoch")
        names = sorted({name for row in validation for name in row if name.startswith("accuracy/")})
        if names:
            accuracy = loss.twinx()
            for name, color in zip(names, ("tab:orange", "tab:red", "tab:purple"), strict=False):
                points = [(row["step"], row[name]) for row in validation if name in row]
                accuracy.plot(*zip(*points, strict=True), color=color, marker=".", label=name.split("/")[-1].replace("top", "top-"))
            accuracy.set_ylabel("validation accuracy, %")
            accuracy.legend(loc="center right")
        figure.savefig(self.path(runner), dpi=100)


def read_logs(work_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation rows of all runs' JSON logs, in order; an earlier run's end where a later one begins."""
    training: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        rows = list(_rows(file))
        own = [row for row in rows if "loss" in row]
        if not own:  # a test
            continue
        scores: dict[int, dict[str, Any]] = {}  # by epoch: the average's and the trained weights' are logged apart
        for row in rows:
            if "loss" not in row and any(name.startswith("accuracy/") for name in row):
                scores.setdefault(row["step"], {}).update(row)
        training = [row for row in training if row["iter"] < own[0]["iter"]] + own
        validation = [row for row in validation if row["step"] < own[0]["epoch"]] + [scores[step] for step in sorted(scores)]
    return training, validation


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """A log's lines; a run that was killed may leave half a one."""
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)
