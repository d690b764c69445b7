#!/usr/bin/env bash
# What visionssm.explain needs a GPU for, from the repository root: cost, then the evaluation beside the tests. Results go to $OUT.
#   VISIONSSM_DATA=FOLDER OUT=FOLDER bash benchmarks/run_gpu_explain.sh [MODEL...]
# FOLDER holds cifar10.tar.xz and coco_tiny.zip; MODEL is a name with weights or a checkpoint. DEVICE=cpu COUNT=20 LARGEST=224 rehearses.
set -u -o pipefail
export PYTHONUNBUFFERED=1 PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD"
out=${OUT:-benchmarks} data=${VISIONSSM_DATA:?a folder with cifar10.tar.xz and coco_tiny.zip} device=${DEVICE:-cuda}
[ $# -gt 0 ] || set -- vmamba_nano.cifar10 vim_nano.cifar10
for name in ops configs; do [ -e visionssm/$name ] || ln -s ../$name visionssm/$name; done
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT

python3 - "$data" "$unpacked" <<'UNPACK' || exit 1
import sys, tarfile, zipfile
data, unpacked = sys.argv[1:]
with tarfile.open(f"{data}/cifar10.tar.xz") as archive:
    archive.extractall(unpacked, members=[m for m in archive if m.name.startswith("cifar10/test/")], filter="data")
zipfile.ZipFile(f"{data}/coco_tiny.zip").extractall(unpacked)
UNPACK

python3 tools/benchmark_explain.py --device "$device" --seconds 3 --largest "${LARGEST:-1248}" --out "$out/explain_cost_$device.csv" \
  2>&1 | tee "$out/explain_cost.log"
python3 -m pytest -q -p no:benchmark -m gpu tests/explain > "$out/explain_gpu_tests.log" 2>&1 &
tests=$!
python3 tools/evaluate_explain.py "$@" --device "$device" --count "${COUNT:-2000}" --out "$out" \
  --images "$unpacked/cifar10/test" --masks "$unpacked/coco_tiny" 2>&1 | tee "$out/explain_evaluation.log"
wait $tests
echo "tests: exit status $?"
tail -15 "$out/explain_gpu_tests.log"
