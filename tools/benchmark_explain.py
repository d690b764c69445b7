"""Time and peak memory of a rollout against a forward pass: `python tools/benchmark_explain.py [--device cpu|cuda] [--csv FILE]`.

The rollout is of all layers, with row bounds, after the recording; its time does not hold the forward pass. Both take turns in one
process. Peak memory is that of a process of its own for each, above what it held before (CPU: resident set, CUDA: allocated).
`--table FILE` prints what `--csv` wrote as the table of docs/explain.md.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import visionssm  # noqa: F401  registers the models
from visionssm import explain

CASES = (
    ("vmamba_tiny_s1l8", 224),
    ("vmamba_tiny_s1l8", 1024),
    ("vim_tiny_patch16_224", 224),
    ("vim_tiny_patch16_224", 1248),
)
FIELDS = (
    "device", "threads", "model", "size", "tokens", "forward_ms", "rollout_ms", "time_ratio", "forward_mib", "rollout_mib",
    "memory_ratio",
)  # fmt: skip
MIB = 1 << 20


def calls(name: str, size: int, device: str) -> tuple[Callable[[], object], Callable[[], object], Callable[[], int]]:
    """A forward pass, a recorded forward pass with its rollout's time in seconds, and the tokens of the first layer."""
    torch.manual_seed(0)
    model, images = timm.create_model(name).eval().to(device), torch.randn(1, 3, size, size, device=device)
    tokens = [0]

    @torch.no_grad()
    def forward() -> float:
        start = clock(device)
        model(images)
        return clock(device) - start

    def rollout() -> float:
        with explain.record(model) as tape, torch.no_grad():
            model(images)
        start = clock(device)
        explain.rollout(tape)
        tokens[0] = tape.layout(0).tokens
        return clock(device) - start

    return forward, rollout, lambda: tokens[0]


def clock(device: str) -> float:
    """Seconds, after all that the device was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_times(name: str, size: int, device: str, seconds: float) -> dict[str, float]:
    """Median seconds of both, in turns, at least three of each after one to warm up."""
    forward, rollout, tokens = calls(name, size, device)
    times, start = [(forward(), rollout())], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - start < seconds:
        times.append((forward(), rollout()))
    one, other = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median(b / a for a, b in times[1:])
    return {"tokens": tokens(), "forward_ms": 1e3 * one, "rollout_ms": 1e3 * other, "time_ratio": ratio}


def measure_memory(name: str, size: int, device: str, what: str) -> dict[str, float]:
    """MiB at the peak of one call, above what was held before; the recorded forward pass is part of the rollout's."""
    forward, rollout, _ = calls(name, size, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    {"forward": forward, "rollout": rollout}[what]()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {f"{what}_mib": (after - before) / MIB}


def in_process(arguments: argparse.Namespace, name: str, size: int, what: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--seconds", str(arguments.seconds), "--worker", name, str(size), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(path: Path) -> list[str]:
    """The CSV as lines of Markdown."""
    lines = ["| model | pixels | tokens | forward, ms | rollout, ms | times a forward | peak memory, MiB: forward | and rollout |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    with path.open() as file:
        for row in csv.DictReader(file):
            cells = [row["model"], row["size"], row["tokens"], *(f"{float(row[f]):.0f}" for f in ("forward_ms", "rollout_ms"))]
            cells += [f"{float(row['time_ratio']):.2f}", *(f"{float(row[f]):.0f}" for f in ("forward_mib", "rollout_mib"))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each case")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print such a file as Markdown")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(*table(arguments.table), sep="\n")
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_explain: --device cuda, but torch sees no CUDA device")
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        name, size, what = arguments.worker[0], int(arguments.worker[1]), arguments.worker[2]
        if what == "times":
            print(json.dumps(measure_times(name, size, arguments.device, arguments.seconds)))
        else:
            print(json.dumps(measure_memory(name, size, arguments.device, what)))
        return
    rows = []
    for name, size in CASES:
        row = {"device": arguments.device, "threads": arguments.threads, "model": name, "size": size}
        for what in ("times", "forward", "rollout"):
            row.update(in_process(arguments, name, size, what))
        row["memory_ratio"] = row["rollout_mib"] / row["forward_mib"]
        rows.append({field: round(row[field], 2) if isinstance(row[field], float) else row[field] for field in FIELDS})
        print("  ".join(f"{field} {rows[-1][field]}" for field in FIELDS[2:]), flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
