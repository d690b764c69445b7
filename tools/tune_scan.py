"""Time the variants of the CUDA C++ scan kernels: `python tools/tune_scan.py [--cases ss2d-1 ... mamba-4] [--out FILE]`.

In bfloat16: the whole core (x projection, scan, merge) at VMamba-T's stages, and `selective_scan` at benchmark_ops.py's shapes.
Forward for a variant of the forward; forward and backward for one of the backward, beside today's forward. Every variant's result
and gradients are compared with today's first.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmark_ops import MAMBA_SHAPES, SS2D_STAGES, CudaCase, graph_times, mamba_case, ss2d_case

from visionssm.ops.kernels import cuda, sequence
from visionssm.ops.kernels.common import STEPS

Options = dict[str, int | bool]
COLUMNS = ("case", "kernel", "variant", "difference", "ms")
TODAY = {"variant": cuda.variant, "forward": sequence.plan_forward, "backward": sequence.plan_backward}

# By case. For `ss2d` fields of cuda.Variant, for `mamba` those of sequence.Plan, with `splits` of the sequence.
FORWARD: dict[str, list[Options]] = {
    "ss2d-1": [
        {"channels": 96, "resident": 12},
        {"channels": 32, "resident": 16},
        {"channels": 64, "resident": 12, "each": 2},
    ],
    "ss2d-2": [
        {"channels": 96, "resident": 15},
        {"channels": 96, "resident": 24},
        {"channels": 64, "resident": 24},
        {"channels": 64, "resident": 12, "each": 2},
        {"channels": 192, "resident": 12, "each": 2},
    ],
    "ss2d-3": [
        {"channels": 128, "resident": 16},
        {"channels": 96, "resident": 24},
        {"channels": 128, "resident": 24},
        {"channels": 64, "resident": 12, "each": 2},
        {"channels": 128, "resident": 12, "each": 2},
        {"channels": 192, "resident": 12, "each": 2},
    ],
    "ss2d-4": [
        {"channels": 96, "resident": 15},
        {"channels": 128, "resident": 16},
        {"channels": 64, "resident": 16},
        {"channels": 64, "resident": 8, "each": 2},
        {"channels": 128, "resident": 8, "each": 2},
        {"channels": 192, "resident": 9, "each": 2},
    ],
    "mamba-1": [
        {"channels": 128, "stage": 16, "together": 2},
        {"channels": 128, "stage": 16, "together": 4},
        {"channels": 64, "stage": 16, "together": 2},
        {"channels": 32, "parts": 4, "stage": 32, "together": 2},
    ],
    "mamba-2": [
        {"channels": 128, "stage": 16, "together": 2},
        {"channels": 128, "stage": 16, "together": 4},
        {"channels": 64, "stage": 16, "together": 2},
    ],
    "mamba-3": [
        {"channels": 24, "parts": 16, "stage": 32},
        {"channels": 24, "parts": 8, "stage": 32},
        {"channels": 24, "parts": 8, "stage": 32, "together": 2},
        {"channels": 12, "parts": 8, "stage": 32, "together": 2},
        {"channels": 8, "parts": 8, "stage": 32, "together": 2},
        {"channels": 16, "parts": 8, "stage": 32, "together": 2},
        {"channels": 32, "parts": 8, "stage": 32, "together": 2},
        {"channels": 24, "parts": 4, "stage": 32, "together": 2},
        {"channels": 24, "parts": 4, "stage": 32, "together": 4},
        {"channels": 16, "parts": 4, "stage": 32, "together": 2},
        {"channels": 16, "parts": 4, "stage": 32, "together": 4},
        {"channels": 8, "parts": 4, "stage": 32, "together": 4},
        {"channels": 8, "parts": 4, "stage": 32, "together": 2},
        {"channels": 32, "parts": 4, "stage": 32, "together": 2, "splits": 4},
        {"channels": 128, "stage": 16, "together": 2, "splits": 16},
        {"channels": 128, "stage": 16, "splits": 16},
        {"channels": 32, "stage": 16, "together": 2, "splits": 16},
        {"channels": 128, "stage": 16, "together": 2, "splits": 8},
    ],
    "mamba-4": [
        {"channels": 128, "stage": 16, "together": 2, "splits": 64},
        {"channels": 128, "stage": 16, "together": 2, "splits": 128},
        {"channels": 8, "parts": 8, "stage": 32, "together": 2, "splits": 8},
        {"channels": 24, "parts": 8, "stage": 32, "together": 2, "splits": 8},
    ],
}
BACKWARD: dict[str, list[Options]] = {
    "ss2d-1": [
        {"channels": 96, "resident": 12},
        {"channels": 96, "resident": 15},
        {"channels": 96, "resident": 12, "apart": True},
    ],
    "ss2d-2": [
        {"channels": 96, "resident": 12},
        {"channels": 192, "resident": 12, "apart": True},
        {"channels": 64, "resident": 12},
    ],
    "ss2d-3": [
        {"channels": 128, "resident": 12},
        {"channels": 128, "resident": 16},
        {"channels": 192, "resident": 12, "apart": True},
        {"channels": 64, "resident": 12},
    ],
    "ss2d-4": [
        {"channels": 96, "resident": 9},
        {"channels": 64, "resident": 8},
        {"channels": 128, "resident": 8},
    ],
    "mamba-1": [{"channels": 64, "stage": 16}],
    "mamba-2": [{"channels": 64, "stage": 16}],
    "mamba-3": [
        {"channels": 128, "stage": 16, "splits": 8},
        {"channels": 128, "stage": 16, "splits": 12},
        {"channels": 128, "stage": 16, "splits": 16},
        {"channels": 128, "stage": 16, "splits": 24},
        {"channels": 128, "stage": 16, "splits": 32},
        {"channels": 64, "stage": 16, "splits": 16},
        {"channels": 32, "stage": 16, "splits": 16},
        {"channels": 64, "stage": 16, "splits": 24},
    ],
    "mamba-4": [{"channels": 64, "stage": 16, "splits": 64}],
}


def make(case: str) -> CudaCase:
    """The inputs of a case."""
    table, row = case.split("-")
    sizes = (SS2D_STAGES if table == "ss2d" else MAMBA_SHAPES)[int(row) - 1]
    return ss2d_case(128, *sizes, torch.bfloat16) if table == "ss2d" else mamba_case(*sizes, torch.bfloat16)


def plan(options: Options, length: int) -> sequence.Plan:
    """The plan that `options` stand for: whole stages in every split."""
    fields = {"parts": 1, **options}
    splits, stage = fields.pop("splits", 1), fields["stage"] // STEPS
    stages = -(-length // fields["stage"])
    return sequence.Plan(**fields, tiles_per_split=-(-stages // splits) * stage)


def serve(direction: str, options: Options | None) -> None:
    """Let a variant serve the forward or the backward from now on, today's all else; None for today's all."""
    cuda.variant, sequence.plan_forward, sequence.plan_backward = TODAY.values()
    if options is None:
        return
    if "resident" in options:
        chosen = cuda.Variant(**options)
        cuda.variant = lambda name, scan: chosen if name == f"scan_{direction}" else TODAY["variant"](name, scan)
    else:
        setattr(sequence, f"plan_{direction}", lambda *sizes: plan(options, sizes[3]))


def calls(case: CudaCase) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """What is timed in a direction: y alone, or y and every gradient."""
    core = case.providers["csrc"]

    @torch.no_grad()
    def forward() -> tuple[torch.Tensor, ...]:
        return (core(),)

    def both() -> tuple[torch.Tensor, ...]:
        y = core()
        return (y.detach(), *torch.autograd.grad(y, case.leaves, torch.ones_like(y)))

    return {"forward": forward, "backward": both}


def differ(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of a result over the largest of its values."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.float() - e.float()).abs().max() / e.float().abs().max()).item() for a, e in pairs)


def rows(name: str, case: CudaCase, times: Callable[[Callable[[], object]], list[float]]) -> Iterator[dict[str, object]]:
    """Median times of today's kernels and of every variant in a case; one that fails says why in place of a time."""
    for (direction, call), table in zip(calls(case).items(), (FORWARD, BACKWARD), strict=True):
        serve(direction, None)
        expected = call()
        for options in (None, *table[name]):
            serve(direction, options)
            words = " ".join(f"{key}={value}" for key, value in (options or {}).items())
            row = {"case": name, "kernel": direction, "variant": words or "today"}
            try:
                row |= {"difference": f"{differ(call(), expected):.1e}", "ms": f"{statistics.median(times(call)):.4f}"}
            except (RuntimeError, RuntimeWarning, TypeError) as error:
                row |= {"difference": "", "ms": str(error).splitlines()[0][:120]}
            print(*row.values(), flush=True)
            yield row
    serve("", None)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=FORWARD, default=list(FORWARD), metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tune_scan.csv"))
    arguments = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # or Triton would be timed in place of a kernel that does not compile
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in arguments.cases:
            for row in rows(name, make(name), graph_times):
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
