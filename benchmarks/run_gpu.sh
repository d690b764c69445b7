#!/usr/bin/env bash
# Everything that needs a GPU, from the repository root: the tests, the timed rows, one memory check. Results go to $OUT (default: benchmarks).
set -u -o pipefail
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
out=${OUT:-benchmarks}
for name in ops configs; do [ -e visionssm/$name ] || ln -s ../$name visionssm/$name; done
# pytest-benchmark warns when tests run side by side, and warnings are errors.
python3 -m pytest -q -n 12 -p no:benchmark tests/ops/test_csrc_kernels.py tests/ops/test_triton_kernels.py tests/ops/test_triton_gpu.py 2>&1 | tee "$out/gpu_tests.log" | tail -15
python3 tools/benchmark_ops.py --device cuda --out "$out/ops_cuda_$(date +%F).csv" 2>&1 | tee "$out/gpu_benchmark.log" | tail -70
