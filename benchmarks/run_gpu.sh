#!/usr/bin/env bash
# Everything of the operator that needs a GPU, from the repository root: tests, timed rows, counters, a memory check. Results go to $OUT
# (default: benchmarks). Needs pytest-xdist for tests side by side; counters and memory check need ncu and compute-sanitizer.
set -u -o pipefail
# bound threads, which benchmark_ops.py asks for, would put all tests on one core
export PYTHONUNBUFFERED=1 OMP_PROC_BIND=false PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD:$PWD/tools"
out=${OUT:-benchmarks}
for name in ops configs; do [ -e visionssm/$name ] || ln -s ../$name visionssm/$name; done
# benchmark_ops.py runs the other kernels' tests. pytest-benchmark warns when tests run side by side, and warnings are errors.
python3 -m pytest -q -n 12 -p no:benchmark tests/ops/test_csrc_variants.py tests/ops/test_triton_gpu.py 2>&1 | tee "$out/gpu_tests.log" | tail -15
python3 tools/benchmark_ops.py --device cuda --out "$out/ops_cuda_$(date +%F).csv" 2>&1 | tee "$out/gpu_benchmark.log" | tail -70
if command -v ncu > /dev/null; then
    counters=gpu__time_duration.sum,sm__inst_executed.avg.per_cycle_active,sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active
    counters+=,sm__warps_active.avg.per_cycle_active,dram__throughput.avg.pct_of_peak_sustained_elapsed
    counters+=,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed,sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
    ncu --kernel-name "regex:scan|sequence" --metrics $counters --section WarpStateStats python3 - <<'ONCE' 2>&1 | tee "$out/gpu_counters.log" | tail -120
import benchmark_ops as b
import torch

for case in (b.ss2d_case(128, *b.SS2D_STAGES[0], torch.bfloat16), b.mamba_case(*b.MAMBA_SHAPES[0], torch.bfloat16),
             b.mamba_case(*b.MAMBA_SHAPES[2], torch.bfloat16)):
    y = case.providers["csrc"]()
    torch.autograd.grad(y, case.leaves, torch.ones_like(y))
ONCE
fi
if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --tool memcheck --target-processes all python3 -m pytest -q -p no:benchmark \
        tests/ops/test_csrc_kernels.py tests/ops/test_csrc_sequence.py 2>&1 | tee "$out/gpu_memcheck.log" | tail -5
fi
