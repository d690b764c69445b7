"""Train the nanos and peers of their size on CIFAR-10, all at once: `python tools/benchmark_cifar10.py DATA_ROOT`.

Every model gets the same recipe (configs/_base_/cifar10.py) in a process of its own; the processes share the machine's GPUs. The
table says per run: test accuracy of the averaged weights of the last epoch, once more with the weights rounded to float16,
images/s of the training loop beside the other processes on its GPU, peak memory of the process on the GPU, parameters. The nanos'
weights are written beside the table, in float16 where that changes nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from machine import environment
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors.torch import save_file
from ship_weights import tag_of
from torch import nn
from torch.utils.data import DataLoader

from visionssm import load_checkpoint
from visionssm.commands.training import COMPILE_MODES
from visionssm.engine import Runner
from visionssm.engine.config import load_config
from visionssm.engine.launch import newest_checkpoint, parsed_options

# in this order over the GPUs: two of them get about the same to do
CONFIGS = ("vmamba-nano", "local-vmamba-nano", "local-vim-nano", "vim-nano", "deit-nano", "convnext-nano")
LONGER = ("vmamba-nano-64px-muon-189e",)
UNCHANGED = 0.02  # percentage points, two of 10,000 test images
TIMED_EPOCHS = 6  # one more than the warm-up
TIMING = 200  # seconds in which a model has to be compiled and timed
OVERHEAD = 60  # seconds of a training beside its epochs, with compiled code in the cache


class Job:
    """One training in a process of its own."""

    def __init__(self, config: str, seed: int, gpu: int, folder: Path, threads: int, options: list[str], mode: str) -> None:
        self.config, self.seed, self.gpu = f"{config}_cifar10", seed, gpu
        self.options = [*options, f"randomness.seed={seed}"]
        self.work_dir = folder / f"{self.config}_{seed}"
        if self.work_dir.exists():
            raise SystemExit(f"--work-dir: {self.work_dir} exists; expected a new folder, so that no older run is measured")
        self.work_dir.mkdir(parents=True)
        self.log = self.work_dir / "output.txt"
        command = [sys.executable, "-m", "visionssm", "train", self.config, "--work-dir", str(self.work_dir)]
        command += [] if mode == "none" else ["--compile-mode", mode]
        command += ["--cfg-options", *self.options]
        shares = {"OMP_NUM_THREADS": min(threads, 4), "TORCHINDUCTOR_COMPILE_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu}
        environ = os.environ | {name: str(value) for name, value in shares.items()}
        self.began = time.monotonic()
        self.seconds: float | None = None
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)

    def ended(self) -> bool:
        """Whether the process has; notes when."""
        if self.seconds is None and self.process.poll() is not None:
            self.seconds = time.monotonic() - self.began
        return self.seconds is not None

    def stop(self) -> None:
        """End the process and its workers, if it still runs."""
        if not self.ended():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def logged(self, key: str) -> list[float]:
        """A value's course over the training iterations, without the first epoch, which compiles."""
        lines = [json.loads(line) for file in self.work_dir.glob("*/vis_data/scalars.json") for line in file.open()]
        return [line[key] for line in lines if key in line and line.get("epoch", 0) > 1]

    def config_with_options(self) -> Config:
        """What the process trains by."""
        return load_config(self.config, parsed_options(self.options))

    def rate(self) -> int:
        """Images/s of the training loop."""
        return round(self.config_with_options().train_dataloader.batch_size / statistics.median(self.logged("time")))


def wait(jobs: list[Job], seconds: float) -> None:
    """Until all have ended, or the time is over; then stop the rest."""
    end = time.monotonic() + seconds
    running = jobs
    while running and time.monotonic() < end:
        time.sleep(0.2)
        running = [job for job in running if not job.ended()]
    for job in jobs:
        job.stop()


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Percent of the test images, in float32."""
    model.eval()
    right = 0
    for data in loader:
        batch = model.data_preprocessor(data)
        right += (model(batch["images"]).argmax(1) == batch["labels"]).sum().item()
    return 100 * right / len(loader.dataset)


def fitting_epochs(jobs: list[Job], images: int, seconds: float) -> int:
    """How many epochs the slowest of these runs can do in the time that is left."""
    for job in jobs:
        if job.process.returncode or not job.logged("time"):
            raise SystemExit(f"{job.config} did not get through {TIMED_EPOCHS} epochs:\n{job.log.read_text()[-3000:]}")
    rates = {job.config: job.rate() for job in jobs}
    epochs = int(0.95 * (seconds - OVERHEAD) * min(rates.values()) / images)
    print(f"{rates} images/s; {epochs} epochs fit into {seconds:.0f} s", flush=True)
    return max(epochs, TIMED_EPOCHS)


def result(job: Job, sharing: int, loader: DataLoader, weights: Path | None) -> dict[str, Any]:
    """A row of the table; writes the weights, if a folder is given for them."""
    cfg = job.config_with_options()
    row = {
        "config": job.config,
        "model": cfg.model.backbone.model_name,
        "seed": job.seed,
        "epochs": cfg.train_cfg.max_epochs,
        "status": "finished" if job.process.returncode == 0 else f"exit status {job.process.returncode}",
        "seconds": None if job.seconds is None else round(job.seconds),
        "processes_on_gpu": sharing,
    }
    if job.logged("time"):
        row["images_per_s"] = job.rate()
    if memory := job.logged("memory"):
        row["peak_memory_mib"] = round(max(memory))
    checkpoint = newest_checkpoint(job.work_dir)
    if checkpoint is None:
        return row
    model = MODELS.build(cfg.model)
    load_checkpoint(model.backbone, checkpoint, entry="state_dict")  # the average
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    row["weights"] = Path(checkpoint).stem
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["accuracy"] = accuracy(model, loader)
    full = {name: value.cpu().contiguous() for name, value in model.backbone.state_dict().items()}
    half = {name: value.half() if value.is_floating_point() else value for name, value in full.items()}
    model.backbone.load_state_dict(half)
    row["accuracy_float16"] = accuracy(model, loader)
    if weights:
        same = abs(row["accuracy_float16"] - row["accuracy"]) <= UNCHANGED
        save_file(half if same else full, weights / f"{row['model']}.{tag_of(cfg.input_size)}.safetensors")
    return row


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=Path, help="folder with {train,test}/<class>/<image>")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=(*CONFIGS, *LONGER), metavar="NAME")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="one run of each model for each; the first one's weights are kept"
    )
    parser.add_argument("--seconds", type=float, default=500, help="what still trains after so long is stopped")
    parser.add_argument("--fit", action="store_true", help="time a few epochs first, then train as many as fit into --seconds")
    parser.add_argument(
        "--compile-mode", default="reduce-overhead", choices=("none", *COMPILE_MODES), help="how torch.compile compiles the models"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder for the table, the weights and the log")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="for every run, e.g. train_cfg.max_epochs=100"
    )
    return parser.parse_args()


def train(arguments: argparse.Namespace, folder: Path, options: list[str], seconds: float) -> list[Job]:
    """All runs at once, until they have ended or the time is over."""
    gpus = max(1, torch.cuda.device_count())
    todo = [(config, seed) for seed in arguments.seeds for config in arguments.configs]
    threads = max(1, (os.cpu_count() or 1) // len(todo))
    options = [f"data_root={arguments.data_root.resolve()}", *arguments.cfg_options, *options]
    jobs = [
        Job(config, seed, number % gpus, folder, threads, options, arguments.compile_mode)
        for number, (config, seed) in enumerate(todo)
    ]
    try:
        wait(jobs, seconds)
    finally:
        for job in jobs:
            job.stop()
    return jobs


def write(jobs: list[Job], out: Path) -> None:
    """The table, the weights, the processes' output."""
    out.mkdir(parents=True, exist_ok=True)
    machine = {"timm": timm.__version__} | environment("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for job in jobs:
        loader = Runner.build_dataloader(job.config_with_options().test_dataloader)
        sharing = sum(other.gpu == job.gpu for other in jobs)
        keep = job.seed == jobs[0].seed and "_nano" in job.config_with_options().model.backbone.model_name
        rows.append(result(job, sharing, loader, out if keep else None) | machine)
        print(rows[-1], flush=True)
    name = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    with (out / f"cifar10_{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with (out / f"cifar10_{name}.log").open("w") as file:
        file.writelines(f"== {job.config} seed {job.seed}\n{job.log.read_text()}\n" for job in jobs)


def main() -> int:
    """Train, measure, write. The exit status says whether every run finished."""
    began = time.monotonic()
    arguments = parse()
    options = []
    if arguments.fit:
        timed = train(arguments, arguments.work_dir / "timed", [f"train_cfg.max_epochs={TIMED_EPOCHS}"], TIMING)
        images = sum(1 for _ in arguments.data_root.glob("train/*/*"))
        left = arguments.seconds - (time.monotonic() - began)
        options = [f"train_cfg.max_epochs={fitting_epochs(timed, images, left)}"]
    jobs = train(arguments, arguments.work_dir, options, arguments.seconds - (time.monotonic() - began))
    write(jobs, arguments.out)
    return int(any(job.process.returncode for job in jobs))


if __name__ == "__main__":
    sys.exit(main())
