"""Time and peak memory of rollouts against a forward pass: `python tools/benchmark_explain.py [--device cpu|cuda] [--out FILE]`.

The rollouts are of all layers, after the recording: one of alpha with row bounds, one of the whole mixers without; their times do
not hold the forward pass. All take turns in one process. Peak memory is above what was held before the call, that of the rollouts
with the recorded forward pass (CUDA: allocated; CPU: resident set, in a process of its own for each). The rows replace those of the
same device, model and size in the file. `--document` fills the sections of docs/explain.md from what was measured.
"""

import argparse
import csv
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from document_sections import replace_sections
from machine import environment

import visionssm  # noqa: F401  registers the models
from visionssm import explain

ROOT = Path(__file__).parents[1]
CASES = (
    ("vmamba_tiny_s1l8", 224),
    ("vmamba_tiny_s1l8", 1024),
    ("vim_tiny_patch16_224", 224),
    ("vim_tiny_patch16_224", 1248),
    ("local_vim_tiny", 224),
    ("local_vmamba_tiny", 224),
)
ROLLOUTS = {"ssm": {}, "mixer": {"include": "mixer", "normalize": False}}  # arguments of `rollout`
FIELDS = (
    "device", "model", "size", "tokens", "include", "forward_ms", "rollout_ms", "time_ratio", "forward_mib", "rollout_mib",
    "memory_ratio",
)  # fmt: skip
GOAL = 3.0  # times a forward
MIB = 1 << 20


class Case:
    """A model and an image.

    Args:
        name: of the model.
        size: side of the image in pixels.
        device: "cpu" or "cuda".
    """

    def __init__(self, name: str, size: int, device: str) -> None:
        torch.manual_seed(0)
        self.model, self.device = timm.create_model(name).eval().to(device), device
        self.images = torch.randn(1, 3, size, size, device=device)
        self.tokens = 0

    @torch.no_grad()
    def forward(self) -> float:
        """A forward pass; its seconds."""
        start = self.clock()
        self.model(self.images)
        return self.clock() - start

    def rollout(self, include: str) -> float:
        """A recorded forward pass and a rollout; the seconds of the rollout."""
        with explain.record(self.model) as tape, torch.no_grad():
            self.model(self.images)
        start = self.clock()
        explain.rollout(tape, **ROLLOUTS[include])
        self.tokens = tape.layout(0).tokens
        return self.clock() - start

    def clock(self) -> float:
        """Seconds, after all that the device was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def calls(self) -> dict[str, Callable[[], float]]:
        """What is measured."""
        return {"forward": self.forward, **{include: functools.partial(self.rollout, include) for include in ROLLOUTS}}

    def times(self, seconds: float) -> dict[str, list[float]]:
        """Seconds of each call, in turns, at least three of each after one to warm up."""
        calls = self.calls()
        times, start = [[call() for call in calls.values()]], time.perf_counter()
        while len(times) < 4 or time.perf_counter() - start < seconds:
            times.append([call() for call in calls.values()])
        return dict(zip(calls, map(list, zip(*times[1:], strict=True)), strict=True))

    def memory(self, what: str) -> float:
        """MiB at the peak of one call above what was held before; on a CPU right in a fresh process only."""
        before = self._peak(reset=True)
        self.calls()[what]()
        return (self._peak() - before) / MIB

    def _peak(self, reset: bool = False) -> int:
        if self.device == "cpu":
            return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])  # of no parent
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()


def measure(name: str, size: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for every rollout."""
    case = Case(name, size, arguments.device)
    times = case.times(arguments.seconds)
    peak = {what: memory_in_process(name, size, what, arguments) if case.device == "cpu" else case.memory(what) for what in times}
    machine = environment(arguments.device)
    rows = []
    for include in ROLLOUTS:
        values = {
            "forward_ms": 1e3 * statistics.median(times["forward"]),
            "rollout_ms": 1e3 * statistics.median(times[include]),
            "time_ratio": statistics.median(b / a for a, b in zip(times["forward"], times[include], strict=True)),
            "forward_mib": peak["forward"],
            "rollout_mib": peak[include],
            "memory_ratio": peak[include] / peak["forward"],
        }
        device = f"{machine['device']}, torch {machine['torch']}"
        source = {"device": device, "model": name, "size": size, "tokens": case.tokens}
        rows.append({**source, "include": include, **{field: round(value, 2) for field, value in values.items()}})
        print("  ".join(f"{field} {rows[-1][field]}" for field in FIELDS[1:]), flush=True)
    return rows


def memory_in_process(name: str, size: int, what: str, arguments: argparse.Namespace) -> float:
    """The peak of one call in a process of its own."""
    command = [sys.executable, __file__, "--device", arguments.device, "--threads", str(arguments.threads)]
    done = subprocess.run([*command, "--worker", name, str(size), what], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """The rows into a CSV file, in place of those of the same device, model and size."""

    def key(row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row[field]) for field in ("device", "model", "size"))

    measured = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read(path) if key(row) not in measured] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sections(folder: Path = ROOT / "benchmarks") -> dict[str, list[str]]:
    """What docs/explain.md shows of the files in `folder`: lines of Markdown by the name of the section."""
    return {f"cost-{device}": table(read(folder / f"explain_cost_{device}.csv")) for device in ("cpu", "cuda")}


def table(rows: list[dict[str, str]]) -> list[str]:
    """The rows as Markdown; what is not measured has no table."""
    if not rows:
        return []
    lines = [
        "Measured on " + "; ".join(dict.fromkeys(row["device"] for row in rows)) + ".",
        "",
        "| model | pixels | tokens | include | forward, ms | rollout, ms | times a forward | peak MiB: forward | with rollout |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row[field] for field in ("model", "size", "tokens", "include")]
        cells += [_rounded(row[field]) for field in ("forward_ms", "rollout_ms")]
        cells += [f"{float(row['time_ratio']):.2f}", *(_rounded(row[field]) for field in ("forward_mib", "rollout_mib"))]
        lines.append(f"| {' | '.join(cells)} |")
    slow = [f"{row['model']} at {row['size']}, {row['include']}" for row in rows if float(row["time_ratio"]) > GOAL]
    return [*lines, "", f"The goal is missed by: {'; '.join(slow)}." if slow else "The goal holds in every row."]


def _rounded(number: str) -> str:
    """Three digits or all before the point."""
    value = float(number)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each case")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="these cases only")
    parser.add_argument("--largest", type=int, metavar="PIXELS", help="cases up to this side only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/explain_cost_DEVICE.csv")
    parser.add_argument("--document", action="store_true", help="fill the sections of docs/explain.md")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.document:
        replace_sections(ROOT / "docs" / "explain.md", sections())
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_explain: --device cuda, but torch sees no CUDA device")
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        name, size, what = arguments.worker
        print(json.dumps(Case(name, int(size), arguments.device).memory(what)))
        return
    for name, size in CASES:
        if (arguments.models and name not in arguments.models) or (arguments.largest and size > arguments.largest):
            continue
        rows = measure(name, size, arguments)
        write(arguments.out or ROOT / "benchmarks" / f"explain_cost_{arguments.device}.csv", rows)


if __name__ == "__main__":
    main()
