#!/usr/bin/env bash
# Training on GPUs, from the repository root: tests, then rates of the loop on one GPU and on all. DATA holds train/<class>/<image>.
# Results go to $OUT (default: benchmarks).
set -u -o pipefail
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
data=${1:?usage: benchmarks/run_training_gpu.sh DATA}
out=${OUT:-benchmarks}
for name in ops configs; do [ -e visionssm/$name ] || ln -s ../$name visionssm/$name; done
python3 -m pytest -q tests/engine/test_gpu.py 2>&1 | tee "$out/training_gpu_tests.log" | tail -15
gpus=$(nvidia-smi --list-gpus | wc -l)
cores=$(($(nproc) / gpus))
timed=(tools/benchmark_training.py vmamba-tiny-s1l8_8xb128-300e_in1k --compile --real --out "$out/training_cuda.csv")
options=(--cfg-options data_root="$data" train_dataloader.num_workers=$cores)
CUDA_VISIBLE_DEVICES=0 python3 "${timed[@]}" --steps 150 --workers 4 8 $cores --seconds 10 "${options[@]}"
[ "$gpus" -gt 1 ] && OMP_NUM_THREADS=1 python3 -m torch.distributed.run --nproc-per-node "$gpus" "${timed[@]}" --steps 150 "${options[@]}"
