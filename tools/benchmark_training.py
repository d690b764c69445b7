"""Time the training loop of a config: `python tools/benchmark_training.py CONFIG [--real] [--workers 4 8 16] [--out FILE]`.

Rates in images/s, all in one run: the bare training step (forward, loss, backward, clipping, optimizer) on one batch that stays
on the device; the whole loop (hooks, logs, average, mixing, loader) on synthetic images, and with `--real` on the config's own, as
often as needed; and the config's loader alone, for each number of workers. The loop is to reach the bare step within 5 %.

With `--device-decode` also what a data set's `decode="device"` gives: the loader alone, including the device's decoding and
resizing, and with `--real` the loop. Crop and mirror image are then all that is done to an image, so that the loader whose workers
decode is timed with these alone as well.

Started by torchrun, it times the loops alone, over all processes. With the same `--out` as the run of one process before, each rate
is compared with that of one process. `--document` fills the section of docs/training.md from that file, or
benchmarks/training_cuda.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from document_sections import replace_sections
from machine import environment
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset

from visionssm.commands.training import add_compile_arguments, compile_mode
from visionssm.engine import OptimWrapperConstructor, Runner
from visionssm.engine.config import load_config
from visionssm.engine.device_decode import decode_batch
from visionssm.engine.distributed import compile_backbone, leave, process_group
from visionssm.engine.launch import parsed_options
from visionssm.errors import UserError
from visionssm.registry import DATASETS, HOOKS

ROOT = Path(__file__).parents[1]


@DATASETS.register_module()
class SyntheticImages(Dataset):
    """Random images that cost nothing to load."""

    split = "train"

    def __init__(self, length: int, num_classes: int, input_size: int) -> None:
        self.length = length
        self.metainfo = {"classes": tuple(map(str, range(num_classes)))}
        self.images = torch.randint(0, 256, (64, 3, input_size, input_size), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index % 64], "label": index % len(self.metainfo["classes"]), "unreadable": ()}


@DATASETS.register_module()
class Repeated(Dataset):
    """Another data set over and over, up to a length."""

    def __init__(self, dataset: dict[str, Any], length: int) -> None:
        self.inner = DATASETS.build(dataset)
        self.metainfo, self.split, self.length = self.inner.metainfo, self.inner.split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.inner[index % len(self.inner)]


@HOOKS.register_module()
class StopWatch(Hook):
    """Seconds from the end of step `begin` to the end of the last one."""

    priority = "LOWEST"

    def __init__(self, begin: int) -> None:
        self.begin = begin

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the clock."""
        if batch_idx in (self.begin - 1, runner.max_iters - 1):
            now = clock()
            runner.seconds, runner.began = now - getattr(runner, "began", now), now


def clock() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_rate(cfg: Config, steps: int, begin: int, mode: str | None) -> float:
    """Images/s of the training step alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS.build(cfg.model).to(device).train()
    if mode:
        compile_backbone(model, mode)
    wrapper_cfg = cfg.optim_wrapper.copy()
    wrapper_cfg.pop("constructor", None)
    wrapper = OptimWrapperConstructor(wrapper_cfg, wrapper_cfg.pop("paramwise_cfg", None))(model)
    batch = cfg.train_dataloader.batch_size
    images = torch.randn(batch, 3, cfg.input_size, cfg.input_size, device=device)
    labels = torch.randint(0, model.num_classes, (batch,), device=device)
    for step in range(steps):
        if step == begin:
            started = clock()
        with wrapper.optim_context(model):
            loss = cross_entropy(model.backbone(images).float(), labels)
        wrapper.update_params(loss)
    return batch * (steps - begin) / (clock() - started)


def loop_rate(cfg: Config, data: dict[str, Any], steps: int, begin: int, mode: str | None) -> float:
    """Images/s of the whole loop, over all processes."""
    batch = cfg.train_dataloader.batch_size * get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config(
            {
                **{key: value for key, value in cfg.to_dict().items() if not key.startswith(("val_", "test_"))},
                "train_dataloader": {
                    **cfg.train_dataloader,
                    "dataset": {**data, "length": batch * steps},
                    "sampler": {"type": "DefaultSampler", "shuffle": True},
                },
                "train_cfg": {"by_epoch": True, "max_epochs": 1},
                "param_scheduler": None,
                "work_dir": folder,
                "default_hooks": {**cfg.default_hooks, "checkpoint": None},
                "custom_hooks": [
                    *(hook for hook in cfg.custom_hooks if hook["type"] in ("visionssm.EMAHook", "visionssm.DataCheckHook")),
                    {"type": "visionssm.StopWatch", "begin": begin},
                ],
            }
        )
        runner = Runner.from_cfg(cfg)
        if mode:
            compile_backbone(runner.model, mode)
        runner.train()
    return batch * (steps - begin) / runner.seconds


def crops_of(dataset: dict[str, Any], decode: str) -> dict[str, Any]:
    """The data set without what the device does not do."""
    return {
        **dataset,
        "decode": decode,
        "transform": {**(dataset.get("transform") or {}), "auto_augment": None, "color_jitter": None},
    }


def loader_rate(cfg: Config, dataset: dict[str, Any], workers: int, seconds: float) -> float:
    """Images/s of the loader without a model, after its first batches; what it leaves to the device is done there."""
    settings = {**cfg.train_dataloader, "num_workers": workers, "dataset": dataset}
    if not issubclass(DATASETS.get(dataset["type"]), IterableDataset):  # a small data set would end while the workers start
        settings["dataset"] = {"type": "visionssm.Repeated", "dataset": dataset, "length": 10_000 * cfg.train_dataloader.batch_size}
    loader = Runner.build_dataloader(settings, seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, started = 0, 0.0
    for number, batch in enumerate(loader):
        if "encoded" in batch:
            decode_batch(batch, device)
        if number == max(4, workers):  # the workers have started
            started = clock()
        elif started:
            images += len(batch["labels"])
            if time.perf_counter() - started > seconds:
                break
    if not images:
        raise UserError(f"data_root: {workers} workers leave no batch to measure in {len(loader)}; more images, or smaller batches")
    return images / (clock() - started)


def record(rows: list[dict[str, Any]], out: Path) -> None:
    """Add to the table in `out`; with more than one process, say how each rate compares with that of one process there."""
    earlier = list(csv.DictReader(out.open(newline=""))) if out.exists() else []
    for row in rows:
        same = ("what", "config", "batch", "compiled", "device")
        alone = [old for old in earlier if old["processes"] == "1" and all(old[key] == str(row[key]) for key in same)]
        if row["processes"] > 1 and alone:
            row["scaling"] = round(row["images_per_s"] / row["processes"] / float(alone[-1]["images_per_s"]), 3)
            print(f"{row['what']}: {row['scaling']} of {row['processes']} times the rate of one process")
    columns = [*rows[0], *(["scaling"] if "scaling" not in rows[0] else [])]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*earlier, *rows])


def table(rows: list[dict[str, str]]) -> list[str]:
    """The rates of a file as lines of Markdown; a loop's share is that of the bare step before it, compiled alike."""
    lines = [
        "| what | torch.compile | processes | images/s | of the bare step | of as many times one process |",
        "|---|---|---:|---:|---:|---:|",
    ]
    bare: dict[str, float] = {}
    for row in rows:
        mode, rate = row["compiled"], float(row["images_per_s"])
        if row["what"] == "bare step":
            bare[mode] = rate
        alone = row["what"].startswith("loop") and row["processes"] == "1" and mode in bare
        of_bare = f"{rate / bare[mode]:.3f}" if alone else ""
        compiled = "" if row["what"].startswith("loader") else mode
        lines.append(f"| {row['what']} | {compiled} | {row['processes']} | {rate:,.0f} | {of_bare} | {row['scaling'] or ''} |")
    measured = dict.fromkeys(
        f"`{row['config']}`, {row['batch']} images a process; {row['device']}, torch {row['torch']}, {row['date']}" for row in rows
    )
    return [*lines, "", f"Measured with {'; '.join(measured)}: benchmarks/training_cuda.csv."]


def rates(cfg: Config, arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """What was timed, and images/s."""
    loader = cfg.train_dataloader
    # until its queue has been full once, a loader allocates pinned memory, which holds up the device
    begin = max(1, arguments.steps // 5, loader.num_workers * loader.get("prefetch_factor", 2) + 4 if loader.num_workers else 0)
    if begin >= arguments.steps:
        raise UserError(f"--steps: got {arguments.steps}, expected more than {begin}, which are for warming up")
    timed = (arguments.steps, begin, compile_mode(arguments))
    if get_world_size() == 1:
        yield "bare step", bare_rate(cfg, *timed)
    classes = cfg.model.backbone.num_classes
    synthetic = {"type": "visionssm.SyntheticImages", "num_classes": classes, "input_size": cfg.input_size}
    yield "loop, synthetic images", loop_rate(cfg, synthetic, *timed)
    own = cfg.train_dataloader.dataset
    kinds = {"": own}
    if arguments.device_decode:
        kinds |= {", crops alone": crops_of(own, "worker"), ", device decode": crops_of(own, "device")}
    if arguments.real:
        for kind in [kind for kind in kinds if "alone" not in kind]:
            yield f"loop, real images{kind}", loop_rate(cfg, {"type": "visionssm.Repeated", "dataset": kinds[kind]}, *timed)
    if get_world_size() == 1:
        for workers in arguments.workers:
            for kind, dataset in kinds.items():
                yield f"loader alone{kind}, {workers} workers", loader_rate(cfg, dataset, workers, arguments.seconds)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", nargs="?")
    parser.add_argument(
        "--steps", type=int, default=100, help="training steps; the first fifth is not counted, nor what fills the loader's queue"
    )
    add_compile_arguments(parser)
    parser.add_argument("--real", action="store_true", help="also time the loop on the config's own images")
    parser.add_argument("--device-decode", action="store_true", help="also time decoding on the device")
    parser.add_argument("--workers", nargs="*", type=int, default=[], help="numbers of workers to time the loader with")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each number of workers")
    parser.add_argument("--out", type=Path, help="a CSV file to add the rates to")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--document", action="store_true", help="time nothing; fill the section of docs/training.md from the CSV file"
    )
    arguments = parser.parse_args()
    if arguments.document:
        with (arguments.out or ROOT / "benchmarks" / "training_cuda.csv").open(newline="") as file:
            replace_sections(ROOT / "docs" / "training.md", {"throughput": table(list(csv.DictReader(file)))})
        return
    if arguments.config is None:
        parser.error("expected CONFIG, or --document")
    cfg = load_config(arguments.config, parsed_options(arguments.cfg_options))
    with process_group() as distributed:
        if distributed:
            cfg.launcher = "pytorch"
        facts = {"processes": get_world_size(), "config": Path(cfg.filename).stem, "batch": cfg.train_dataloader.batch_size}
        machine = environment("cuda" if torch.cuda.is_available() else "cpu")
        rows = []
        try:
            for what, rate in rates(cfg, arguments):
                rows.append(
                    {"what": what, "images_per_s": round(rate, 1), **facts, "compiled": compile_mode(arguments) or "no", **machine}
                )
                share = (
                    f", {rate / rows[0]['images_per_s']:.3f} of the bare step"
                    if what.startswith("loop") and not distributed
                    else ""
                )
                if is_main_process():
                    print(f"{what:40} {rate:9.1f} images/s{share}, {facts['processes']} x {facts['batch']}", flush=True)
        finally:  # what follows a rate may fail for want of memory or data
            if arguments.out and rows and is_main_process():
                record(rows, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmark_training: {error}")
    sys.exit(leave(0))
