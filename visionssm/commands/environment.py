"""`visionssm env`: what is installed, what the machine has, which operator backends run here."""

import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from visionssm.errors import first_line
from visionssm.ops.backends import backend_report, choose_backend

_MISSING = "not installed"
_PACKAGES = ("visionssm", "torch", "torchvision", "timm", "numpy", "triton", "matplotlib", "tensorboard")
# one import name, several distributions of it
_OPENMMLAB = {
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}


def report() -> Iterator[str]:
    """Lines of name and finding; what is imported to find out is cv2 alone."""
    facts = {"Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    facts |= {name: _version(name) for name in _PACKAGES}
    facts |= {name: _version_of_any(distributions) for name, distributions in _OPENMMLAB.items()}
    facts["cv2"] = _cv2()
    facts["GPU"] = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["threads"] = f"{torch.get_num_threads()} in torch, {cores} cores to run on"
    width = max(map(len, facts))
    yield from (f"{name:{width}}  {fact}" for name, fact in facts.items())
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield ""
        yield f"backends for tensors on {device}"
        yield from _backends(torch.empty(1, device=device), width)


def _backends(x: torch.Tensor, width: int) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says itself that a GPU takes a slow backend
        default = choose_backend(x)
    for name, reason in backend_report(x).items():
        yield f"{name:{width}}  {'runs' if reason is None else f'cannot run: {reason}'}{', the default' if name == default else ''}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return _MISSING


def _version_of_any(names: Sequence[str]) -> str:
    """The version and name of the one distribution that is installed; two of them overwrite each other's files."""
    found = {name: _version(name) for name in names if _version(name) != _MISSING}
    if len(found) > 1:
        return f"{' and '.join(found)} share one import folder: pip uninstall all, then pip install one"
    return next((f"{number} ({name})" for name, number in found.items()), _MISSING)


def _cv2() -> str:
    try:
        import cv2
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cv2":
            return _MISSING
        if "libGL" in str(error):
            return "cannot be imported: libGL is missing (Debian: apt-get install libgl1), or take opencv-python-headless"
        return f"cannot be imported: {first_line(error)}"
    return cv2.__version__


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"none that torch sees ({built})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
