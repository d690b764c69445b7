"""Time the plans of the CUDA C++ forward scan over mamba's layout: `python tools/tune_sequence.py [--out benchmarks/NAME.csv]`.

`selective_scan` with z, D, delta_bias and softplus, 16 states, bfloat16, no gradient: a thread a channel, and eight or sixteen that
share one, in blocks of several sizes. Every plan's result is compared with that of today's first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from benchmark_ops import graph_times, mamba_case
from tune_scan import differ, write_rows

from visionssm.ops.kernels import cuda, sequence

SHAPES = [(batch, 384, 6085) for batch in (1, 2, 4, 5, 8, 16, 32, 64)]  # batch, dim, length
SHAPES += [(batch, 384, 197) for batch in (1, 8, 32, 128)]
BLOCKS = {"sequence_spread": (8, 16, 24, 32), "sequence_tiles": (8, 16, 24)}
COLUMNS = ("shape", "plan", "difference", "ms", "today")
TODAY = sequence.forward_plan


def plans(batch: int, channels: int, length: int) -> Iterator[sequence.Plan]:
    """A thread a channel, then lanes that share one."""
    sizes = (batch, 1, channels, length, torch.cuda.get_device_properties(0).multi_processor_count)
    yield sequence.thread_plan("sequence_forward", 16, *sizes)
    for plan in (sequence.spread_plan(*sizes), sequence.tiles_plan(*sizes, cuda.SHARED)[0]):
        for block in BLOCKS[plan.kernel]:
            yield replace(plan, channels=block)


@torch.no_grad()
def rows(shape: tuple[int, int, int]) -> Iterator[dict[str, object]]:
    """Median time of every plan for a shape."""
    batch, channels, length = shape
    call = mamba_case(batch, channels, length, 16, torch.bfloat16).providers["csrc"]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    today = TODAY(16, batch, 1, channels, length, processors)
    sequence.forward_plan = TODAY
    expected = call()
    for plan in plans(*shape):
        sequence.forward_plan = lambda *sizes, plan=plan: plan
        difference, time = differ((call(),), (expected,)), statistics.median(graph_times(call))
        row = {"shape": "x".join(map(str, shape)), "plan": f"{plan.kernel} {plan.channels} channels {plan.tiles_per_split} tiles"}
        yield row | {"difference": f"{difference:.1e}", "ms": f"{time:.4f}", "today": "*" if plan == today else ""}
    sequence.forward_plan = TODAY


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tune_sequence.csv"))
    arguments = parser.parse_args()
    write_rows(arguments.out, COLUMNS, (row for shape in SHAPES for row in rows(shape)))


if __name__ == "__main__":
    main()
