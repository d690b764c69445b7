"""The variants of the CUDA C++ kernels, as test_csrc_kernels.py has it for the one in use."""

import pytest
import torch
from test_csrc_kernels import BF16, DEVICE, F16, check, kernels, pytestmark  # noqa: F401

from visionssm.ops import CROSS

FORWARD = {
    "one": {"channels": 96},
    "one ahead": {"channels": 96, "ahead": True, "degree": 5, "short": True},
    "one, a warp": {"channels": 32, "ahead": True, "degree": 5},
    "two": {"channels": 64, "each": 2, "degree": 5, "short": True},
    "two ahead": {"channels": 128, "each": 2, "ahead": True},
    "three ahead": {"channels": 96, "each": 3, "ahead": True},
}
CASES = [
    ((5, 7), CROSS, {"dtype": BF16, "rank": 6, "channels": 96, "batch": 3}),
    ((3, 5), CROSS, {"dtype": BF16, "rank": 3}),
    ((17, 1), ("v", "h"), {"dtype": F16, "D": False, "dt_bias": False, "batch": 1, "rank": 48}),
    ((5, 4), CROSS, {"dtype": BF16, "batch": 3, "rank": 10, "channels": 136}),
    ((4, 5), ("w7", "v"), {"dtype": BF16, "batch": 1, "rank": 24}),
    ((1, 1), ("v", "h_flip"), {"dtype": BF16, "batch": 1, "rank": 2}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(kernels, monkeypatch, name, case):  # noqa: F811
    from visionssm.ops.kernels import cuda

    default = cuda.variant

    def variant(kernel, scan):
        return cuda.Variant("v2", **FORWARD[name]) if kernel == "scan_forward" else default(kernel, scan)

    monkeypatch.setattr(cuda, "variant", variant)
    for merge in (True, False):
        check(*case, merge)
    assert any(kernel == "v2/scan_forward" for kernel in kernels)
