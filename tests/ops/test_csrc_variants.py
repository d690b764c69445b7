"""The variants of the CUDA C++ kernels, as test_csrc_kernels.py has it for the one in use."""

import pytest
from test_csrc_kernels import BF16, F16, check, kernels, pytestmark  # noqa: F401

from visionssm.ops import CROSS

FORWARD = {
    "one": {"channels": 96},
    "one, a warp": {"channels": 32, "resident": 2},
    "two": {"channels": 64, "each": 2},
    "two, two warps": {"channels": 128, "each": 2},
}
BACKWARD = {
    "three warps": {"channels": 96},
    "two warps apart": {"channels": 64, "apart": True},
    "four warps apart": {"channels": 128, "apart": True},
    "a warp": {"channels": 32, "resident": 2},
}
CASES = [
    ((5, 7), CROSS, {"dtype": BF16, "rank": 6, "channels": 96, "batch": 3}),
    ((3, 5), CROSS, {"dtype": BF16, "rank": 3}),
    ((17, 1), ("v", "h"), {"dtype": F16, "D": False, "dt_bias": False, "batch": 1, "rank": 48}),
    ((5, 4), CROSS, {"dtype": BF16, "batch": 3, "rank": 10, "channels": 136}),
    ((4, 5), ("w7", "v"), {"dtype": BF16, "batch": 1, "rank": 24}),
    ((1, 1), ("v", "h_flip"), {"dtype": BF16, "batch": 1, "rank": 2}),
]


def serve(monkeypatch, kernel, options):
    """Let a variant serve a kernel."""
    from visionssm.ops.kernels import cuda

    default = cuda.variant
    monkeypatch.setattr(
        cuda, "variant", lambda k, scan: cuda.Variant(**{"resident": 12, **options}) if k == kernel else default(k, scan)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward(kernels, monkeypatch, name, case):  # noqa: F811
    serve(monkeypatch, "scan_forward", FORWARD[name])
    for merge in (True, False):
        check(*case, merge)
    assert kernels.count("scan_forward") == 2


@pytest.mark.parametrize("case", [*CASES, ((3, 5), CROSS, {"dtype": F16, "rank": 3})], ids=str)
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(kernels, monkeypatch, name, case):  # noqa: F811
    serve(monkeypatch, "scan_backward", BACKWARD[name])
    for merge in (True, False):
        check(*case, merge)
    assert kernels.count("scan_backward") == 2
