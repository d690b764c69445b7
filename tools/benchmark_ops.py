"""Time the operators: `python tools/benchmark_ops.py --device cuda|cpu [--rows cross mamba] [--out benchmarks/NAME.csv]`.

One CSV per run: every row has the device, torch, triton and the date, and p20, p50 and p80 of the time. Peers are timed in the same
run, on a CPU in turns, on a GPU one after the other. A run first compares the operator with the reference in float64, on a GPU by
the kernels' tests, and if that fails it reports nothing and leaves an older file as it is.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch starts threads: unbound, two of them may share a core

import torch
from machine import environment

from visionssm.ops import BIDIRECTIONAL, CROSS, cross_selective_scan_packed, selective_scan
from visionssm.ops.testing import (
    Inputs,
    cross_selective_scan_inputs,
    outputs_and_gradients,
    pack,
    selective_scan_inputs,
    to_float64,
)

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as mamba_scan  # a peer, timed where it is installed
except ImportError:
    mamba_scan = None


@dataclass
class Row:
    """One measured time. Times are milliseconds, memory MiB, bandwidth GB/s of the bytes that must move."""

    case: str
    shape: str
    dtype: str
    direction: str
    """forward (without gradients), training (a forward that keeps what a backward needs), both (that and the backward), or copy."""
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


def print_ratios(rows: list[Row], peer: str) -> None:
    """How many times faster than `peer` each other provider is, by medians."""
    medians = {(row.case, row.shape, row.dtype, row.direction, row.provider): row.p50 for row in rows}
    for (*what, provider), p50 in medians.items():
        other = medians.get((*what, peer))
        if provider != peer and other is not None:
            print(f"{' '.join(what)}: {provider} is {other / p50:.1f} times as fast as {peer}")


def report(rows: Iterable[Row], path: Path) -> list[Row]:
    """Print every row as it comes and add it to one file: a run that is cut short has reported what it measured."""
    rows = iter(rows)
    rows = itertools.chain([next(rows)], rows)  # what is checked first may end the run: an older file is still there then
    path.parent.mkdir(parents=True, exist_ok=True)
    done = []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            print(
                f"{row.case:8s} {row.shape:20s} {row.dtype:9s} {row.direction:8s} {row.provider:10s} {row.p50:9.4f} ms", flush=True
            )
            writer.writerow(asdict(row))
            file.flush()
            done.append(row)
    return done


CPU_SHAPES = {  # case: ((H, W), channels, states, rank, paths)
    "cross": [((side, side), c, 1, c // 16, CROSS) for side, c in ((56, 96), (28, 192), (14, 384), (7, 768))],
    "mamba": [((1, 197), 384, 16, 24, BIDIRECTIONAL)],
}


def cpu_rows(which: list[str]) -> Iterator[Row]:
    """Rows of a CPU run: `chunked` and the reference loop, forward alone and with every gradient, in turns."""
    where = environment("cpu")
    for case, batch in itertools.product(which, (1, 8)):
        for sizes in CPU_SHAPES[case]:
            size, channels, state, rank, paths = sizes
            inputs = cross_selective_scan_inputs(batch, *sizes[:3], paths, rank, step_range=(1e-3, 1e-1), dtype=torch.float32)
            inputs = pack(inputs)
            if batch == 1:
                check_against_float64(inputs, paths)
            shape = "x".join(map(str, (batch, *size, channels, state, len(paths))))
            for direction, prepare in (("forward", forward_call), ("both", training_call)):
                calls = {backend: prepare(inputs, paths=paths, backend=backend) for backend in ("chunked", "reference")}
                for backend, times in interleaved_times(calls).items():
                    p20, p50, p80 = quantiles(times)
                    unmeasured = dict.fromkeys(("peak_mib", "saved_mib", "gb_per_s"), math.nan)
                    yield Row(case, shape, "float32", direction, backend, p20, p50, p80, wall_p50=p50, **unmeasured, **where)


def forward_call(inputs: Inputs, **options: object) -> Callable[[], object]:
    """The operator without autograd."""

    @torch.inference_mode()
    def call() -> None:
        cross_selective_scan_packed(**inputs, **options)

    return call


def training_call(inputs: Inputs, **options: object) -> Callable[[], object]:
    """The operator and the gradient of every input."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}

    def call() -> None:
        y = cross_selective_scan_packed(**leaves, **options)
        torch.autograd.grad(y, tuple(leaves.values()), torch.ones_like(y))

    return call


def interleaved_times(
    calls: dict[str, Callable[[], object]], seconds: float = 3.0, least: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Wall times in milliseconds, the calls taking turns so that all see the same machine; a fast one takes several in a turn."""
    first = {name: wall_times(call, seconds=0.0, least=1, device=device)[0] for name, call in calls.items()}
    turns = {name: min(10, max(1, int(max(first.values()) / 4 / ms))) for name, ms in first.items()}
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or any(len(t) < least for t in times.values()):
        for name, call in calls.items():
            for _ in range(turns[name]):
                start = time.perf_counter()
                call()
                sync()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def check_against_float64(inputs: Inputs, paths: tuple[str, ...], tolerance: float = 1e-5) -> None:
    """Exit unless the default backend's result and gradients are within `tolerance` of the float64 reference's."""
    expected = outputs_and_gradients(cross_selective_scan_packed, to_float64(inputs), paths=paths, backend="reference")
    actual = outputs_and_gradients(cross_selective_scan_packed, inputs, paths=paths)
    for name, value in expected.items():
        error = ((actual[name].double() - value).abs().max() / value.abs().max()).item()
        if not error <= tolerance:
            sys.exit(
                f"benchmark_ops: {name} is off by {error:.1e} (relative) from the float64 reference; no time is worth reporting"
            )


SS2D_STAGES = ((96, 56, 6), (192, 28, 12), (384, 14, 24), (768, 7, 48))  # channels, side, rank of VMamba-T at 224 px
MAMBA_SHAPES = ((128, 384, 197, 16), (128, 768, 197, 16), (8, 384, 6085, 16), (1, 384, 6085, 16))  # batch, dim, length, state


@dataclass
class CudaCase:
    """One shape on the GPU: a function per provider, the tensors to differentiate, and the bytes a forward must move."""

    case: str
    shape: str
    dtype: torch.dtype
    providers: dict[str, Callable[[], torch.Tensor]]
    leaves: list[torch.Tensor]
    moved: int


def ss2d_case(batch: int, channels: int, side: int, rank: int, dtype: torch.dtype, device: str = "cuda") -> CudaCase:
    """The core of SS2D: x_proj, dt_proj, scan along four paths, merge."""
    inputs = cross_selective_scan_inputs(1, (1, 1), channels, 1, CROSS, rank, step_range=(1e-3, 1e-1), dtype=dtype, device=device)
    parameters = {name: inputs[name].requires_grad_() for name in ("A", "D", "dt_weight", "dt_bias")}
    x = torch.randn(batch, side, side, channels, device=device).to(dtype).requires_grad_()
    x_proj = (torch.randn(4 * (rank + 2), channels, device=device) / channels**0.5).to(dtype).requires_grad_()

    def run(backend: str, csrc: int = 0) -> Callable[[], torch.Tensor]:
        def core() -> torch.Tensor:
            os.environ["VISIONSSM_CSRC"] = str(csrc)  # read at every call, and still so when its backward runs
            x_dbl = torch.nn.functional.linear(x, x_proj).unflatten(-1, (4, rank + 2))
            return cross_selective_scan_packed(x, x_dbl, **parameters, paths=CROSS, backend=backend)

        return core

    # Plain PyTorch: project, gather every path, one step of the scan after the other, put back and add.
    providers = {"triton": run("triton")} | ({"pytorch": run("reference")} if side <= 14 else {})
    if batch > 1:  # the paths of one map are split, which Triton does
        providers = {"csrc": run("triton", csrc=1)} | providers
    shape = f"{batch}x{side}x{side}x{channels}"
    moved = 2 * x.nbytes + batch * side * side * 4 * (rank + 2) * x.element_size()
    return CudaCase("ss2d", shape, dtype, providers, [x, x_proj, *parameters.values()], moved)


def mamba_case(batch: int, dim: int, length: int, state: int, dtype: torch.dtype) -> CudaCase:
    """`selective_scan` with z, D, delta_bias and softplus, in mamba's layout."""
    inputs = selective_scan_inputs(batch, dim, length, state, 1, step_range=(1e-3, 1e-1), dtype=dtype, device="cuda")
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}

    def run(csrc: int) -> Callable[[], torch.Tensor]:
        def scan() -> torch.Tensor:
            os.environ["VISIONSSM_CSRC"] = str(csrc)  # read at every call, and still so when its backward runs
            return selective_scan(**leaves, delta_softplus=True, backend="triton")

        return scan

    providers = {"csrc": run(1), "triton": run(0)}
    if mamba_scan is not None:
        providers["mamba_ssm"] = lambda: mamba_scan(**leaves, delta_softplus=True)
    if length <= 256:
        providers["pytorch"] = lambda: selective_scan(**leaves, delta_softplus=True, backend="reference")
    moved = 4 * inputs["u"].nbytes + 2 * inputs["B"].nbytes
    return CudaCase("mamba", f"{batch}x{dim}x{length}x{state}", dtype, providers, list(leaves.values()), moved)


def graph_times(call: Callable[[], object], repeats: int = 20) -> list[float]:
    """GPU time of `call` replayed from a CUDA graph, in milliseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return event_times(graph.replay, repeats)


def event_times(call: Callable[[], object], repeats: int) -> list[float]:
    """GPU time between events around `call`, in milliseconds."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def memory_of(call: Callable[[], object], forward: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Peak memory of `call`, and what a forward keeps for the backward beside its output, both in MiB over the inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    y = forward()
    saved = torch.cuda.memory_allocated() - before - y.nbytes
    del y
    return peak / 2**20, saved / 2**20


def cuda_rows(which: list[str]) -> Iterator[Row]:
    """Rows of a GPU run: see `Row.direction`; GPU time from CUDA graphs, eager wall time beside it."""
    names = ("csrc_kernels", "csrc_sequence", "triton_kernels")
    tests = [str(Path(__file__).parents[1] / "tests" / "ops" / f"test_{name}.py") for name in names]
    # Side by side where pytest-xdist is; pytest-benchmark, which would warn of that, stays out.
    parallel = ["-n", "12", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *parallel, *tests], check=False).returncode:
        sys.exit("benchmark_ops: the tests of the kernels are red; no time is worth reporting")
    where = environment("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        cases = [lambda s=s, dtype=dtype: ss2d_case(128, *s, dtype) for s in SS2D_STAGES] if "cross" in which else []
        cases += [lambda dtype=dtype: ss2d_case(1, 96, 312, 6, dtype)] if "cross" in which else []  # 1248 px
        cases += [lambda s=s, dtype=dtype: mamba_case(*s, dtype) for s in MAMBA_SHAPES] if "mamba" in which else []
        for make in cases:
            yield from case_rows(make(), where)


def case_rows(case: CudaCase, where: dict[str, str]) -> Iterator[Row]:
    """All rows of one shape, and the copy of its largest input: what the memory allows."""
    dtype = str(case.dtype).removeprefix("torch.")
    largest = max(case.leaves, key=lambda t: t.nbytes).detach()
    p20, p50, p80 = quantiles(graph_times(largest.clone))
    speed = 2 * largest.nbytes / p50 / 1e6
    yield Row(case.case, case.shape, dtype, "copy", "clone", p20, p50, p80, math.nan, math.nan, math.nan, speed, **where)
    for provider, forward in case.providers.items():

        def inference(forward: Callable[[], torch.Tensor] = forward) -> torch.Tensor:
            with torch.no_grad():
                return forward()

        gradient = torch.ones_like(inference())  # comes from what follows the operator

        def both(forward: Callable[[], torch.Tensor] = forward, gradient: torch.Tensor = gradient) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), case.leaves, gradient)

        for direction, call in (("forward", inference), ("training", forward), ("both", both)):
            call()
            times = event_times(call, 3) if provider == "pytorch" else graph_times(call)
            wall = quantiles(wall_times(call, seconds=0.1, least=3, device="cuda"))[1]
            peak, saved = memory_of(call, forward)
            p20, p50, p80 = quantiles(times)
            moved = case.moved / p50 / 1e6 if direction == "forward" else math.nan
            yield Row(case.case, case.shape, dtype, direction, provider, p20, p50, p80, wall, peak, saved, moved, **where)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rows", nargs="+", choices=("cross", "mamba"), default=("cross", "mamba"), help="which tables (default: all)"
    )
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/ops_DEVICE_DATE.csv)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_ops: --device cuda, but torch sees no CUDA device")
    out = arguments.out or Path("benchmarks") / f"ops_{arguments.device}_{datetime.date.today().isoformat()}.csv"
    rows = report((cuda_rows if arguments.device == "cuda" else cpu_rows)(arguments.rows), out)
    print_ratios(rows, peer="reference" if arguments.device == "cpu" else "pytorch")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
