"""Time whole models: `python tools/benchmark_models.py --device cpu|cuda [--models NAME ...] [--peer NAME] [--batch-sizes 1 8]`.

Every model takes turns with the peer on the same images, so that both see the same machine; medians, and the ratio to the peer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch starts threads: unbound, two of them may share a core

import timm
import torch
from benchmark_ops import interleaved_times, quantiles
from machine import environment

import visionssm  # noqa: F401  registers the models


def inference_call(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """One forward without autograd."""
    model.eval()

    @torch.inference_mode()
    def call() -> None:
        model(images)

    return call


def training_call(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """One forward and backward; no optimizer step."""
    model.train()

    def call() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    return call


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["vmamba_tiny_s1l8"], help="timm model names")
    parser.add_argument("--peer", default="swin_tiny_patch4_window7_224", help="the model to compare with")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--train", action="store_true", help="forward and backward in place of inference")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each batch size, at least 5 calls of each model")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmark_models: --device cuda, but torch sees no CUDA device")
    torch.set_num_threads(arguments.threads)
    print(*environment(arguments.device).values(), "training" if arguments.train else "inference", f"{arguments.size} px", sep=", ")
    names = [arguments.peer, *(name for name in arguments.models if name != arguments.peer)]
    models = {name: timm.create_model(name).to(arguments.device) for name in names}
    prepare = training_call if arguments.train else inference_call
    for batch in arguments.batch_sizes:
        images = torch.randn(batch, 3, arguments.size, arguments.size, device=arguments.device)
        calls = {name: prepare(model, images) for name, model in models.items()}
        times = interleaved_times(calls, arguments.seconds, least=5, device=arguments.device)
        peer = quantiles(times[arguments.peer])[1]
        for name in names:
            p20, p50, p80 = quantiles(times[name])
            print(
                f"batch {batch:3d}  {name:32s} {p50:9.1f} ms (p20 {p20:.1f}, p80 {p80:.1f})"
                f"  {1e3 * batch / p50:8.1f} images/s  {p50 / peer:5.2f} x the time of {arguments.peer}"
            )


if __name__ == "__main__":
    main()
