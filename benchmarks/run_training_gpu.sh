#!/usr/bin/env bash
# Training on GPUs, from the repository root: tests, then rates of the loop on one GPU and on all, and of the loader, whose workers or
# whose GPU decode. DATA holds train/<class>/<image>; further arguments are KEY=VALUE changes to the config, STEPS is the number of steps.
# Results go to $OUT (default: benchmarks). The exit status is not 0 where anything failed.
set -u -o pipefail
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
data=${1:?usage: benchmarks/run_training_gpu.sh DATA [KEY=VALUE ...]}
shift
out=${OUT:-benchmarks}
for name in ops configs; do [ -e visionssm/$name ] || ln -s ../$name visionssm/$name; done
failed=0
python3 -m pytest -q tests/engine/test_gpu.py tests/engine/test_device_decode.py 2>&1 | tee "$out/training_gpu_tests.log" | tail -15 || failed=1
gpus=$(nvidia-smi --list-gpus | wc -l)
cores=$(($(env -u OMP_NUM_THREADS nproc) / gpus))  # nproc obeys that variable
timed=(tools/benchmark_training.py vmamba-tiny-s1l8_8xb128-300e_in1k --compile-mode reduce-overhead --real --device-decode --steps "${STEPS:-150}"
    --out "$out/training_cuda.csv")
options=(--cfg-options data_root="$data" train_dataloader.num_workers=$cores "$@")
CUDA_VISIBLE_DEVICES=0 python3 "${timed[@]}" --workers 4 8 $cores --seconds 10 "${options[@]}" || failed=1
if [ "$gpus" -gt 1 ]; then
    OMP_NUM_THREADS=1 python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" "${timed[@]}" "${options[@]}" || failed=1
fi
exit $failed
