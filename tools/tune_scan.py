"""Time the variants of the CUDA C++ scan kernels: `python tools/tune_scan.py [--stages 1 2 3 4] [--out benchmarks/NAME.csv]`.

The whole core (x projection, scan, merge) at VMamba-T's stages in bfloat16: forward for a variant of the forward, forward and
backward for one of the backward beside today's forward. Every variant's result and gradients are compared with today's first.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from benchmark_ops import SS2D_STAGES, CudaCase, graph_times, ss2d_case

from visionssm.ops.kernels import cuda

TODAY = cuda.variant
Options = dict[str, int | bool]
COLUMNS = ("stage", "kernel", "variant", "difference", "ms")

# By stage.
FORWARD: dict[int, list[Options]] = {
    1: [
        {"channels": 96, "resident": 12},
        {"channels": 32, "resident": 16},
        {"channels": 64, "resident": 12, "each": 2},
    ],
    2: [
        {"channels": 96, "resident": 15},
        {"channels": 96, "resident": 24},
        {"channels": 64, "resident": 24},
        {"channels": 64, "resident": 12, "each": 2},
        {"channels": 192, "resident": 12, "each": 2},
    ],
    3: [
        {"channels": 128, "resident": 16},
        {"channels": 96, "resident": 24},
        {"channels": 128, "resident": 24},
        {"channels": 64, "resident": 12, "each": 2},
        {"channels": 128, "resident": 12, "each": 2},
        {"channels": 192, "resident": 12, "each": 2},
    ],
    4: [
        {"channels": 96, "resident": 15},
        {"channels": 128, "resident": 16},
        {"channels": 64, "resident": 16},
        {"channels": 64, "resident": 8, "each": 2},
        {"channels": 128, "resident": 8, "each": 2},
        {"channels": 192, "resident": 9, "each": 2},
    ],
}
BACKWARD: dict[int, list[Options]] = {
    1: [
        {"channels": 96, "resident": 12},
        {"channels": 96, "resident": 15},
        {"channels": 96, "resident": 12, "apart": True},
    ],
    2: [
        {"channels": 96, "resident": 12},
        {"channels": 192, "resident": 12, "apart": True},
        {"channels": 64, "resident": 12},
    ],
    3: [
        {"channels": 128, "resident": 12},
        {"channels": 128, "resident": 16},
        {"channels": 192, "resident": 12, "apart": True},
        {"channels": 64, "resident": 12},
    ],
    4: [
        {"channels": 96, "resident": 9},
        {"channels": 64, "resident": 8},
        {"channels": 128, "resident": 8},
    ],
}


def serve(kernel: str, options: Options | None) -> None:
    """Let a variant serve a kernel from now on, today's the other; None for today's both."""
    chosen = options and cuda.Variant(**options)
    cuda.variant = lambda name, scan: chosen if chosen and name == kernel else TODAY(name, scan)


def calls(case: CudaCase) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """What is timed for a kernel: y alone, or y and every gradient."""
    core = case.providers["csrc"]

    @torch.no_grad()
    def forward() -> tuple[torch.Tensor, ...]:
        return (core(),)

    def both() -> tuple[torch.Tensor, ...]:
        y = core()
        return (y.detach(), *torch.autograd.grad(y, case.leaves, torch.ones_like(y)))

    return {"scan_forward": forward, "scan_backward": both}


def differ(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of a result over the largest of its values."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.float() - e.float()).abs().max() / e.float().abs().max()).item() for a, e in pairs)


def rows(stage: int, case: CudaCase, times: Callable[[Callable[[], object]], list[float]]) -> Iterator[dict[str, object]]:
    """Median times of today's kernels and of every variant at a stage; one that fails says why in place of a time."""
    for (kernel, call), table in zip(calls(case).items(), (FORWARD, BACKWARD), strict=True):
        serve(kernel, None)
        expected = call()
        for options in (None, *table[stage]):
            serve(kernel, options)
            row = {"stage": stage, "kernel": kernel, "variant": " ".join(f"{k}={v}" for k, v in (options or {}).items()) or "today"}
            try:
                row |= {"difference": f"{differ(call(), expected):.1e}", "ms": f"{statistics.median(times(call)):.4f}"}
            except (RuntimeError, RuntimeWarning) as error:
                row |= {"difference": "", "ms": str(error).splitlines()[0][:120]}
            yield row
    serve("", None)


def write_rows(out: Path, columns: Sequence[str], rows: Iterable[dict[str, object]]) -> None:
    """Each row as soon as it is measured, to the file and the terminal."""
    if not torch.cuda.is_available():  # before the file of an earlier run is emptied
        sys.exit(f"{Path(sys.argv[0]).stem}: torch sees no CUDA device")
    warnings.simplefilter("error", RuntimeWarning)  # or Triton would be timed in place of a kernel that does not compile
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            print(*row.values(), flush=True)
            writer.writerow(row)
            file.flush()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, choices=FORWARD, default=list(FORWARD))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tune_scan.csv"))
    arguments = parser.parse_args()
    cases = ((stage, ss2d_case(arguments.batch, *SS2D_STAGES[stage - 1], torch.bfloat16)) for stage in arguments.stages)
    write_rows(arguments.out, COLUMNS, (row for stage, case in cases for row in rows(stage, case, graph_times)))


if __name__ == "__main__":
    main()
