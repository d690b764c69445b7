"""Time the operators: `python tools/benchmark_ops.py --device cuda|cpu [--rows cross mamba] [--out benchmarks/NAME.csv]`.

One CSV per run: every row has the device, torch, triton and the date, and p20, p50 and p80 of the time. Peers are timed in the same
run, interleaved row by row. A run first checks the operator against the reference in float64 and refuses to report if that fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

try:
    import triton
except ImportError:
    triton = None


@dataclass
class Row:
    """One measured time. Times are milliseconds, memory MiB, bandwidth GB/s of the bytes that must move."""

    case: str
    shape: str
    dtype: str
    direction: str
    provider: str
    p20: float
    p50: float
    p80: float
    wall_p50: float
    peak_mib: float
    saved_mib: float
    gb_per_s: float
    device: str
    torch: str
    triton: str
    date: str


@dataclass
class Case:
    """Something to time: `forward` runs the operator, `backward` its gradient on what `forward` returned."""

    case: str
    shape: str
    dtype: torch.dtype
    provider: str
    forward: Callable[[], torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    bytes_forward: int = 0


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def wall_times(run: Callable[[], object], seconds: float = 1.0, least: int = 5, device: str = "cpu") -> list[float]:
    """Wall time of single calls in milliseconds, after a warm-up."""
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    run()
    sync()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        sync()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def environment(device: str) -> dict[str, str]:
    """The columns that say where a row comes from."""
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor()} x {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "date": datetime.date.today().isoformat(),
    }


def write_csv(rows: list[Row], path: Path) -> None:
    """All rows of a run, one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def print_table(rows: list[Row]) -> None:
    """The medians, one line each."""
    for row in rows:
        print(f"{row.case:24s} {row.shape:24s} {row.dtype:9s} {row.direction:8s} {row.provider:18s} {row.p50:9.4f} ms")


def cpu_rows(which: list[str]) -> Iterator[Row]:
    """Rows of a CPU run."""
    raise SystemExit("no CPU rows yet")


def cuda_rows(which: list[str]) -> Iterator[Row]:
    """Rows of a GPU run."""
    raise SystemExit("no CUDA rows yet")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="*", default=["cross", "mamba"], help="which tables (default: all)")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/ops_DEVICE_DATE.csv)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_ops: --device cuda, but torch sees no CUDA device")
    rows = list((cuda_rows if arguments.device == "cuda" else cpu_rows)(arguments.rows))
    print_table(rows)
    out = arguments.out or Path("benchmarks") / f"ops_{arguments.device}_{datetime.date.today().isoformat()}.csv"
    write_csv(rows, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
