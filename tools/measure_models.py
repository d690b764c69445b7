"""Measure every model of the zoo on a CPU: parameters, FLOPs, time of one image, error against the published architecture.

    python tools/measure_models.py [--models 'vim_*'] [--out benchmarks/models_cpu.json]

The model cards and the README's table take their measured numbers from the file this writes. A run over some models replaces
only their rows.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch starts threads: unbound, two of them may share a core

import timm
import torch
from benchmark_ops import quantiles, wall_times
from machine import environment

import visionssm  # noqa: F401  registers the models
from visionssm.commands.models import parameters, zoo
from visionssm.flops import count_flops

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "models_cpu.json"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", metavar="PATTERN", help="only models whose names match")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each model, at least 5 images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = fnmatch.filter(zoo(), args.models)
    if not names:
        sys.exit(f"--models: no model of ours matches {args.models!r}")
    result = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    machine = environment("cpu")
    date = machine.pop("date")  # a row's own: a run may measure some of the models
    result["environment"] = machine
    errors = parity_errors()
    for name in names:
        row = counts(name) | {
            "ms_per_image_fp32": round(milliseconds(name, args.seconds), 1),
            "parity": errors.get(name),
            "date": date,
        }
        result["models"][name] = row
        print(name, row, flush=True)
    result["models"] = {name: result["models"][name] for name in zoo() if name in result["models"]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(args.out)


def counts(name: str) -> dict[str, Any]:
    """Parameters and FLOPs for one image of the model's size."""
    model = timm.create_model(name, device="meta", num_classes=1000)
    count = count_flops(model, model.pretrained_cfg["input_size"])
    return {
        "image": model.pretrained_cfg["input_size"][-1],
        "parameters": parameters(model),
        "gmacs_published_rule": round(count.macs / 1e9, 3),
        "gflops": round(count.flops / 1e9, 3),
        "gflops_of_scans": round(count.scan_flops / 1e9, 3),
    }


@torch.inference_mode()
def milliseconds(name: str, seconds: float) -> float:
    """Median time of one image of the model's size, float32."""
    model = timm.create_model(name).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    return quantiles(wall_times(lambda: model(images), seconds, least=5))[1]


def parity_errors() -> dict[str, dict[str, Any]]:
    """By model what the parity tests found: the largest error of any logit over all cases, relative to the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "parity.json")
        command = [sys.executable, "-m", "pytest", "-q", "tests/models", "-k", "parity", f"--parity-json={report}"]
        tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if tests.returncode:
            sys.exit(f"the parity tests failed:\n{tests.stdout[-2000:]}")
        return json.loads(report.read_text())


if __name__ == "__main__":
    main()
