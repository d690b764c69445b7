"""The machine that a number comes from."""

import datetime
import platform

import torch

try:
    import triton
except ImportError:
    triton = None


def environment(device: str) -> dict[str, str]:
    """The columns that say where a row comes from."""
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()} x {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
        "date": datetime.date.today().isoformat(),
    }
